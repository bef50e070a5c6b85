"""The command `python -m pose.evaluation.ruler`: RULER's prompts as JSON lines, without a model.

python -m pose.evaluation.ruler tokenizer=FOLDER task=TASK length=N num=K out=FILE.jsonl
    [seed=0] [depth=D] [haystack=FILE] [add_bos=false]

writes K prompts, one JSON object a line: prompt, answers, length, depths, task, index.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pose.app.console import log_to_terminal
from pose.app.runtime import quiet_libraries, readable_errors
from pose.data.datamodule import bos_id
from pose.errors import ConfigError, PoseError
from pose.evaluation.options import BOOK, read_haystack
from pose.files import atomic_file, locate
from pose.modeling.load import load_tokenizer
from pose.tasks.ruler import NEEDLES, TASKS, RulerPrompts


@dataclass
class Command:
    """What the command takes, key=value each."""

    tokenizer: str = MISSING  # folder or hub id
    task: str = MISSING  # one of RULER's, without its qa_1 and qa_2
    length: int = MISSING  # tokens of each prompt
    num: int = MISSING  # prompts
    out: str = MISSING  # file to write; its folder is made
    seed: int = 0  # of everything that is drawn
    depth: float | None = None  # of the needle that is asked for, in [0, 1]; null: drawn
    haystack: str = BOOK  # the text that needles lie in: file, folder or glob
    add_bos: bool = False  # a BOS, which the file does not have, is counted in the length

    def __post_init__(self):
        for name in ("tokenizer", "out", "haystack"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: give a path, or leave {name}= out where it has a default")
        for name, least in (("length", 1), ("num", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is not accepted: give an integer of at least {least}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ConfigError(f"depth={self.depth} is not accepted: give a place from 0 to 1")
        if self.depth is not None and self.task in TASKS and self.task not in NEEDLES:
            raise ConfigError(f"depth={self.depth} does not go with task={self.task}, which has no needles")


def parse(arguments: Sequence[str]) -> Command:
    """The arguments of the command.

    Raises:
        ConfigError: an unknown or missing key, or a value that is not accepted.
    """
    usage = __doc__.split("\n\n")[1]
    schema, known = OmegaConf.structured(Command), [field.name for field in fields(Command)]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"{argument!r} is not known: give key=value, as in\n{usage}")
        try:
            schema[name] = None if value == "null" else value
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{argument} is not accepted: {reason}") from error
    if missing := sorted(OmegaConf.missing_keys(schema)):
        raise ConfigError(f"{', '.join(missing)} must be given too, as in\n{usage}")
    command = OmegaConf.to_object(schema)
    assert isinstance(command, Command)
    return command


def write_prompts(command: Command, tokenizer, haystack: str):
    """Writes the prompts, in one step.

    Args:
        command: what is asked for.
        tokenizer: a transformers tokenizer.
        haystack: the text that needles lie in.

    Raises:
        ConfigError: an unknown task, a length that is too short, or a path that cannot be written.
    """
    depths = None if command.depth is None else [command.depth]
    try:
        prompts = RulerPrompts(command.task, tokenizer, haystack, depths=depths, num_added=int(command.add_bos))
    except PoseError as error:
        raise error.under("") from None
    prompts.check(command.seed, command.length, command.num)
    path = Path(command.out).expanduser()
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            for index in range(command.num):
                prompt = prompts.sample(command.seed, command.length, index)
                record = {
                    "prompt": prompt.text, "answers": prompt.answers, "length": command.length,
                    "depths": prompt.depths, "task": command.task, "index": index,
                }  # fmt: skip
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"out={path} cannot be written ({error}): give a file, such as prompts.jsonl") from error


def main():
    """Writes the prompts that the arguments ask for."""
    log_to_terminal()
    quiet_libraries()
    with readable_errors():
        command = parse(sys.argv[1:])
        tokenizer = load_tokenizer(locate(command.tokenizer))
        bos_id(tokenizer, command.add_bos)
        write_prompts(command, tokenizer, read_haystack(locate(command.haystack), group=""))
        print(f"{command.num} prompts of ruler/{command.task} with {command.length} tokens each in {command.out}")


if __name__ == "__main__":
    main()
