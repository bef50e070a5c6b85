"""The tiny model's tokenizer, trained: byte-level BPE, digits one by one. And how many bytes a token of any stands for.

python -m pose.data.tokenizer assets/tiny assets/corpora/*.train.jsonl.gz
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pose.data.documents import read_documents

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, window: int) -> PreTrainedTokenizerFast:
    """Trains on texts.

    Args:
        texts: whole documents.
        vocab_size: tokens, the 256 bytes and one special token included.
        window: tokens; becomes model_max_length.

    Returns:
        A tokenizer whose bos, eos and pad are one token that it never adds by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=window,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_digest(tokenizer) -> str:
    """SHA-256 of what decides a tokenizer's tokens."""
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"truncation": None, "padding": None}  # which calls set, and do not matter here
    else:
        rules = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(rules).encode()).hexdigest()


def token_bytes(tokenizer) -> np.ndarray:
    """How many UTF-8 bytes of text each token stands for.

    The tokens of a text then sum to its bytes, for tokenizers that lose nothing: byte-level BPE, and sentencepiece,
    where the space that some models put before a text counts too. Added and special tokens count as they are written.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        int64 [largest id + 1]; 0 for ids that no token has.
    """
    vocab = tokenizer.get_vocab()
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False) if tokenizer.is_fast else {}
    added = {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content not in own  # else it is made of text too, as Gemma's runs of spaces
    }
    sizes = np.zeros(max(vocab.values()) + 1, np.int64)
    byte_level = _is_byte_level(tokenizer)
    for token, i in vocab.items():
        if i in added:
            sizes[i] = len(added[i].encode())
        elif byte_level:
            sizes[i] = len(token)  # a letter for each byte
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            sizes[i] = 1
        else:
            sizes[i] = len(token.replace("▁", " ").encode())
    return sizes


def _is_byte_level(tokenizer) -> bool:
    """Whether tokens are written in the 256 letters of GPT-2, one for each byte."""
    if not tokenizer.is_fast:
        return hasattr(tokenizer, "byte_decoder")
    return "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="folder to save to")
    parser.add_argument("documents", nargs="+", help=".jsonl or .jsonl.gz files")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    args = parser.parse_args()
    texts = (document.text for path in args.documents for document in read_documents(path))
    train_tokenizer(texts, args.vocab_size, args.window).save_pretrained(args.out)


if __name__ == "__main__":
    main()
