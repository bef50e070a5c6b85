"""Trains the tiny model's tokenizer: byte-level BPE, digits one by one.

python -m pose.data.tokenizer assets/tiny assets/corpora/*.train.jsonl.gz
"""

import argparse
from collections.abc import Iterable

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
