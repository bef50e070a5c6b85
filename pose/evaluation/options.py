"""What is measured: the group `eval`."""

from dataclasses import dataclass, field
from typing import Any

from pose.errors import ConfigError

TASKS = ("perplexity", "passkey", "needle")
BOOK = "assets/corpora/books.heldout.jsonl.gz"


@dataclass
class EvalOptions:
    """What is measured: the group `eval`. Lengths are in tokens."""

    tasks: list[str] = field(default_factory=list)  # perplexity, passkey, needle, ruler/TASK, harness/TASK
    prefix: str | None = None  # ruler or harness: put before names in tasks that have no / in them
    lengths: list[int] | None = None  # null: the window, doubled up to the target
    seed: int = 0  # of prompts, and of which documents are drawn
    batch_tokens: int | None = None  # tokens in one forward pass, at least one window; null: 1024 on a CPU, else 4096
    add_bos: bool = False  # windows and prompts begin with BOS
    before: bool = True  # train.py measures the untuned and the scaled model too
    # perplexity
    documents: Any = None  # file, folder, glob, or dataset {path, name, split, ...}, or a list of them: docs/DATA.md
    text_field: str = "text"  # the key of the text, for documents that do not name their own
    min_tokens: int | None = None  # tokens; shorter documents are left out; null: the longest of lengths
    max_documents: int | None = None  # so many of those that are long enough; null: all
    draw_documents: bool = False  # max_documents are drawn by the seed; false: the first ones, and no more is read
    windows: int = 8  # windows per document and length
    tail: int | None = 128  # last tokens of a window that tail_ppl scores; null: no tail_ppl
    bin: int = 256  # tokens in a bin of perplexity by position
    stride: int | None = None  # tokens; sliding-window perplexity too, when given
    sliding_tokens: int | None = None  # tokens of each document the window slides over; null: all
    # passkey, needle, ruler
    trials: int = 20  # prompts per length (needle: per length and depth)
    depths: list[float] | None = (
        None  # places in [0, 1]: of the passkey in turn (null: random), of needles (null: 0 to 1)
    )
    generate: bool = False  # passkey by greedy decoding in place of teacher forcing
    haystack: Any = BOOK  # the text that needles lie in: file, folder or glob
    # harness
    num_fewshot: int | None = None  # examples before a question; null: the paper's for its six tasks, others their own
    limit: int | None = None  # questions of each task; null: all
    include_path: str | None = None  # folder with task YAMLs of your own

    def __post_init__(self):
        if self.prefix not in (None, "ruler", "harness"):
            raise ConfigError(f"eval.prefix={self.prefix!r} is unknown: choose ruler or harness")
        if self.prefix is not None:
            self.tasks = [task if "/" in task or task in TASKS else f"{self.prefix}/{task}" for task in self.tasks]
        for task in self.tasks:
            if task not in TASKS and not task.startswith(("ruler/", "harness/")):
                raise ConfigError(
                    f"eval.tasks has {task!r}: choose from {', '.join(TASKS)}, ruler/TASK and harness/TASK (with "
                    "eval=ruler or eval=harness TASK alone)"
                )
        for name in (
            "windows", "tail", "bin", "trials", "batch_tokens", "stride", "sliding_tokens", "min_tokens",
            "max_documents", "limit",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"eval.{name}={value} is not accepted: give an integer of at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"eval.num_fewshot={self.num_fewshot} is not accepted: give an integer of at least 0")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 2):
            raise ConfigError(f"eval.lengths={list(self.lengths)} is not accepted: give lengths of at least 2 tokens")
        if self.depths is not None and (not self.depths or min(self.depths) < 0 or max(self.depths) > 1):
            raise ConfigError(f"eval.depths={list(self.depths)} is not accepted: give places from 0 to 1")
        if self.seed < 0:
            raise ConfigError(f"eval.seed={self.seed} is not accepted: give an integer of at least 0")
