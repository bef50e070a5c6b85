"""The command `python -m pose.data.tokenizer OUT DOCUMENTS ...`: a tokenizer as the tiny model's, trained on texts."""

import argparse
import logging
from pathlib import Path

from pose.app import command
from pose.errors import ConfigError, require_int

log = logging.getLogger("pose.app.tokenizer")


def main():
    """Trains on the documents that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m pose.data.tokenizer", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=command.path, help="folder to save to")
    parser.add_argument(
        "documents", nargs="+", type=command.path, help="files or folders, as data.documents takes them"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, the 256 bytes included (default: 4096)")
    parser.add_argument("--window", type=int, default=256, help="tokens, model_max_length (default: 256)")
    arguments = parser.parse_args()
    with command.running():
        require_int("--vocab-size", arguments.vocab_size, at_least=257)
        require_int("--window", arguments.window, at_least=1)
        if Path(arguments.out).is_file():
            raise ConfigError(f"OUT={arguments.out} is a file: give the folder to save to first, then the documents")
        from pose.data.documents import Keys, read_documents
        from pose.data.tokenizer import train_tokenizer

        keys = Keys.of_paths("documents")
        texts = (document.text for document in read_documents(arguments.documents, keys=keys))
        tokenizer = train_tokenizer(texts, arguments.vocab_size, arguments.window)
        tokenizer.save_pretrained(arguments.out)
        log.info(f"{arguments.out}  ({len(tokenizer):,} tokens)")


if __name__ == "__main__":
    main()
