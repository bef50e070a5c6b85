"""The command `python -m pose.evaluation.ruler TOKENIZER OUT ...`: RULER's prompts as JSON lines, without a model."""

import argparse
import json
import logging
from pathlib import Path

from pose.app import command
from pose.errors import ConfigError, PoseError, require_int
from pose.evaluation.options import BOOK, read_haystack
from pose.files import atomic_file, locate
from pose.tasks.ruler import NEEDLES, TASKS, RulerPrompts

log = logging.getLogger("pose.app.ruler")


def write_prompts(
    out: str | Path,
    tokenizer,
    haystack: str,
    *,
    task: str,
    length: int,
    num: int,
    seed: int = 0,
    depth: float | None = None,
    add_bos: bool = False,
):
    """Writes the prompts, in one step: a JSON object a line, with prompt, answers, length, depths, task, index.

    Args:
        out: file to write; its folder is made.
        tokenizer: a transformers tokenizer.
        haystack: the text that needles lie in.
        task: one of RULER's, without its qa_1 and qa_2.
        length: tokens of each prompt.
        num: prompts.
        seed: of everything that is drawn.
        depth: of the needle that is asked for, in [0, 1]; None draws it.
        add_bos: whether a BOS, which the file does not have, is counted in the length.

    Raises:
        ConfigError: a value that is not accepted, a length that is too short, or a path that cannot be written.
    """
    for name, value, least in (("length", length, 1), ("num", num, 1), ("seed", seed, 0)):
        require_int(f"--{name}", value, at_least=least)
    if depth is not None and not 0 <= depth <= 1:
        raise ConfigError(f"--depth={depth} is not accepted: give a place from 0 to 1")
    if depth is not None and task not in NEEDLES:
        raise ConfigError(f"--depth={depth} does not go with --task={task}, which has no needles")
    depths = None if depth is None else [depth]
    try:
        prompts = RulerPrompts(task, tokenizer, haystack, depths=depths, num_added=int(add_bos))
    except PoseError as error:
        raise error.under("") from None
    prompts.check(seed, length, num)
    path = Path(out).expanduser()
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            for index in range(num):
                prompt = prompts.sample(seed, length, index)
                record = {
                    "prompt": prompt.text, "answers": prompt.answers, "length": length, "depths": prompt.depths,
                    "task": task, "index": index,
                }  # fmt: skip
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}): give a file, such as prompts.jsonl") from error


def main():
    """Writes the prompts that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m pose.evaluation.ruler", description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=command.path, help="folder or hub id")
    parser.add_argument("out", type=command.path, help="file to write, such as prompts.jsonl; its folder is made")
    parser.add_argument("--task", required=True, choices=TASKS, help="one of RULER's", metavar="TASK")
    parser.add_argument("--length", required=True, type=int, help="tokens of each prompt")
    parser.add_argument("--num", required=True, type=int, help="prompts")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument("--depth", type=float, help="of the needle that is asked for, from 0 to 1 (default: drawn)")
    parser.add_argument("--haystack", type=command.path, default=BOOK, help=f"file, folder or glob (default: {BOOK})")
    parser.add_argument("--add-bos", action="store_true", help="a BOS, which the file does not have, is counted too")
    arguments = vars(parser.parse_args())
    with command.running():
        from pose.data.datamodule import bos_id
        from pose.modeling.load import load_tokenizer

        tokenizer = load_tokenizer(locate(arguments.pop("tokenizer")))
        bos_id(tokenizer, arguments["add_bos"], "--add-bos")
        write_prompts(
            tokenizer=tokenizer, haystack=read_haystack(locate(arguments.pop("haystack")), group=""), **arguments
        )
        log.info(
            f"{arguments['num']} prompts of ruler/{arguments['task']} with {arguments['length']} tokens each in "
            f"{arguments['out']}"
        )


if __name__ == "__main__":
    main()
