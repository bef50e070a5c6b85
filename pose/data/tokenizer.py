"""The tiny model's tokenizer, trained: byte-level BPE, digits one by one. And the bytes that a token stands for.

python -m pose.data.tokenizer assets/tiny assets/corpora/*.train.jsonl.gz
"""

if __name__ == "__main__":  # before what takes seconds to import
    import runpy

    runpy.run_module("pose.app.tokenizer", run_name="__main__")
    raise SystemExit

import hashlib
import json
import re
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pose.errors import DataError

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
        rules |= {"truncation": None, "padding": None}  # set by calls, and without effect on the tokens here
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
        if token.special or token.content not in own  # others are ordinary text, as Gemma's runs of spaces
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


def check_vocabulary(tokenizer, text: str, vocab_size: int, where: str):
    """Whether a model has a row of its embedding for every token of a text.

    Args:
        tokenizer: a transformers tokenizer.
        text: the whole text.
        vocab_size: rows of the embedding.
        where: the text is from, for the error.

    Raises:
        DataError: it has not; names the token, its id, and the rows there are.
    """
    if max(tokenizer.get_vocab().values()) >= vocab_size:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if max(ids, default=0) >= vocab_size:
            raise beyond_vocabulary(tokenizer, max(ids), vocab_size, where)


def beyond_vocabulary(tokenizer, token_id: int, vocab_size: int, where: str, group: str | None = None) -> DataError:
    """The error for a token that a model has no embedding for.

    Args:
        tokenizer: that made it.
        token_id: its id.
        vocab_size: rows of the embedding.
        where: it was found, for the error; may have `{group}` in it.
        group: for `{group}`.
    """
    return DataError(
        f"{where} has the token {tokenizer.convert_ids_to_tokens(token_id)!r} of id {token_id}, and the model's "
        f"embedding has {vocab_size} rows, for ids 0 to {vocab_size - 1}: take the tokenizer that the model was "
        "trained with, or documents without this token",
        group,
    )


def _is_byte_level(tokenizer) -> bool:
    """Whether tokens are written in the 256 letters of GPT-2, one for each byte."""
    if not tokenizer.is_fast:
        return hasattr(tokenizer, "byte_decoder")
    return "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
