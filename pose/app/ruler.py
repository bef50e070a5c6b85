"""The command `python -m pose.evaluation.ruler`: RULER's prompts as JSON lines, without a model."""

import sys

from pose.app.console import log_to_terminal
from pose.app.runtime import quiet_libraries, readable_errors
from pose.data.datamodule import bos_id
from pose.data.documents import read_documents
from pose.evaluation.ruler import parse, write_prompts
from pose.files import locate
from pose.modeling.load import load_tokenizer


def main():
    """Writes the prompts that the arguments, key=value each, ask for."""
    log_to_terminal()
    quiet_libraries()
    with readable_errors():
        given = parse(sys.argv[1:])
        tokenizer = load_tokenizer(locate(given.pop("tokenizer")))
        bos_id(tokenizer, given["add_bos"])
        haystack = "\n\n".join(document.text for document in read_documents(locate(given.pop("haystack"))))
        out = given.pop("out")
        write_prompts(out, tokenizer=tokenizer, haystack=haystack, **given)
        print(f"{given['num']} prompts of ruler/{given['task']} with {given['length']} tokens each in {out}")


if __name__ == "__main__":
    main()
