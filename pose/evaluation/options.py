"""What is measured: the group `eval`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pose.data.documents import Keys, out_of_memory, read_documents
from pose.errors import ConfigError, DataError, PoseError, require_choice, require_int

TASKS = ("perplexity", "passkey", "needle", "needle_gain")
BOOK = "assets/corpora/books.heldout.jsonl.gz"
MAX_SEED = 2**32 - 1  # of numpy's generators, lm-eval's too


@dataclass
class EvalOptions:
    """What is measured: the group `eval`. Lengths are in tokens."""

    tasks: list[str] = field(default_factory=list)  # perplexity, passkey, needle, needle_gain, ruler/TASK, harness/TASK
    prefix: str | None = None  # ruler or harness: put before names in tasks that have no / in them
    lengths: list[int] | None = None  # null: the window, doubled up to the target
    seed: int = 0  # of prompts, and of which documents are drawn
    batch_tokens: int | None = None  # tokens in one forward pass, at least one window; null: 1024 on a CPU, else 4096
    add_bos: bool | None = None  # windows and prompts begin with BOS; null: as the tokenizer does
    before: bool = True  # train.py measures the untuned and the scaled model too
    # perplexity
    documents: Any = None  # file, folder, glob, or dataset {path, name, split, ...}, or a list of them: docs/DATA.md
    text_field: str = "text"  # the key of the text in documents that do not name their own
    min_tokens: int | None = None  # tokens; shorter documents are left out; null: the longest of lengths
    max_documents: int | None = None  # so many of those that are long enough; null: all
    draw_documents: bool = False  # max_documents are drawn by the seed; false: the first ones, and no more is read
    windows: int = 8  # windows per document and length
    tail: int | None = 128  # last tokens of a window that tail_ppl scores; null: no tail_ppl
    bin: int = 256  # tokens in a bin of perplexity by position
    stride: int | None = None  # tokens; sliding-window perplexity too, when given
    sliding_tokens: int | None = None  # tokens of each document the window slides over; null: all
    # passkey, needle, needle_gain, ruler
    trials: int = 20  # prompts per length (needle: per length and depth)
    # Places in [0, 1]: of needles (null: 0 to 1), in turn of needle_gain (0 to 0.5) and of the passkey (random)
    depths: list[float] | None = None
    generate: bool = False  # passkey by greedy decoding in place of teacher forcing
    haystack: Any = BOOK  # the text that needles lie in: file, folder or glob, {path, text_field}, or a list of them
    # harness
    num_fewshot: int | None = None  # examples before a question; null: the paper's for its six tasks, others their own
    limit: int | None = None  # questions of each task; null: all
    include_path: str | None = None  # folder with task YAMLs of your own
    trust_tasks: bool = False  # include_path runs code: the !function of its YAMLs, and its templates

    def __post_init__(self):
        if self.prefix is not None:
            require_choice("{group}.prefix", self.prefix, ("ruler", "harness"), group="eval")
            self.tasks = [task if "/" in task or task in TASKS else f"{self.prefix}/{task}" for task in self.tasks]
        for task in self.tasks:
            if task not in TASKS and not (task.startswith(("ruler/", "harness/")) and task.partition("/")[2]):
                raise _refused(
                    f"tasks has {task!r}: choose from {', '.join(TASKS)}, ruler/TASK and harness/TASK (with "
                    "eval=ruler or eval=harness TASK alone)"
                )
        for name in (
            "windows", "tail", "bin", "trials", "batch_tokens", "stride", "sliding_tokens", "min_tokens",
            "max_documents", "limit",
        ):  # fmt: skip
            optional = name not in ("windows", "bin", "trials")
            require_int(f"{{group}}.{name}", getattr(self, name), at_least=1, group="eval", optional=optional)
        require_int("{group}.num_fewshot", self.num_fewshot, at_least=0, group="eval", optional=True)
        require_int("{group}.seed", self.seed, at_least=0, at_most=MAX_SEED, group="eval")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 2):
            raise _refused(f"lengths={list(self.lengths)} is not accepted: give lengths of at least 2 tokens")
        if self.depths is not None and not (self.depths and all(0 <= depth <= 1 for depth in self.depths)):
            raise _refused(f"depths={list(self.depths)} is not accepted: give places from 0 to 1")
        if not self.text_field:
            raise _refused("text_field is empty: give the key of the text, such as text")
        if self.documents is not None:
            _check_source("documents", self.documents)
        if self.haystack is not None or needs_haystack(self.tasks):
            _check_source("haystack", self.haystack, fields={"path", "text_field"})
        if self.include_path is not None:
            if not self.include_path or not Path(self.include_path).expanduser().is_dir():
                raise _refused(f"include_path={self.include_path!r} is no folder: give one with task YAMLs")
            if not self.trust_tasks:
                raise _refused(
                    f"include_path={self.include_path} can run code: the functions that its YAMLs name (!function), "
                    "and its templates. Read them, and give {group}.trust_tasks=true to allow it"
                )


def needs_haystack(tasks: Iterable[str]) -> bool:
    """Whether any of these tasks hides needles in a text."""
    return any(task in ("needle", "needle_gain") or task.startswith("ruler/") for task in tasks)


def read_haystack(source: Any, group: str = "eval", name: str = "haystack") -> str:
    """The text of a haystack, documents separated by empty lines.

    Args:
        source: as `EvalOptions.haystack`, its paths found.
        group: of the config that it is of, for errors; "" for a command, which takes paths alone.
        name: of the key in it.

    Raises:
        ConfigError: a value that names no file.
        DataError: what is missing, of another kind, or broken; names file and line. Or memory runs out.
    """
    key = f"{{group}}.{name}"
    keys = Keys.of_paths(key, takes_field=bool(group))
    try:
        return "\n\n".join(document.text for document in read_documents(source, keys=keys))
    except PoseError as error:
        error.under(group)
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise DataError(f"memory ran out while {key} was read: give a shorter text", group=group) from error


def _refused(message: str) -> ConfigError:
    return ConfigError(f"{{group}}.{message}", group="eval")


def _check_source(key: str, value: Any, fields: set[str] | None = None):
    """Whether a value names at least one file, folder or dataset, and none by an empty text.

    Args:
        key: of the group.
        value: file, folder or glob, an object with a path, or a list of them.
        fields: what an object may have; None is left to who reads it.

    Raises:
        ConfigError: it does not.
    """
    if isinstance(value, list | tuple) and value:
        for one in value:
            _check_source(key, one, fields)
        return
    path = value.get("path") if isinstance(value, Mapping) else value
    is_object = isinstance(value, Mapping) and (fields is None or set(value) <= fields)
    if not (isinstance(path, str | Path) and str(path).strip() and (is_object or not isinstance(value, Mapping))):
        what = "a file, folder or glob" if fields else "a file, folder, glob or dataset"
        such = " (or '{path: FILE, text_field: KEY}')" if fields else ""
        raise _refused(f"{key}={value!r} is not accepted: give {what}{such}, or a list of them")
