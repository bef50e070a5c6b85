"""The tasks that are run on a model, with everything they need made ready beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from pose.data.cache import TokenCache
from pose.data.datamodule import bos_id
from pose.data.passkey import PasskeyPrompts
from pose.errors import ConfigError, DataError
from pose.evaluation.passkey import passkey_accuracy, passkey_prompts
from pose.evaluation.perplexity import sliding_perplexity, truncated_perplexity
from pose.evaluation.scoring import Scorer

TASKS = ("perplexity", "passkey")


@dataclass
class EvalOptions:
    """What is measured: the group `eval`. Lengths are in tokens."""

    tasks: list[str] = field(default_factory=list)  # perplexity, passkey
    documents: Any = None  # for perplexity: file, folder, glob, or dataset {path, name, split, ...}: docs/DATA.md
    text_field: str = "text"  # the key of the text, for documents that do not name their own
    max_documents: int | None = None  # the first so many documents that are long enough
    lengths: list[int] | None = None  # null: the window, doubled up to the target
    windows: int = 8  # windows per document and length
    tail: int = 128  # last tokens of a window that tail_ppl scores
    bin: int = 256  # tokens in a bin of perplexity by position
    stride: int | None = None  # tokens; sliding-window perplexity too, when given
    sliding_tokens: int | None = None  # tokens of each document the window slides over; null: all
    add_bos: bool = False  # windows and prompts begin with BOS
    trials: int = 20  # passkey prompts per length
    depths: list[float] | None = None  # passkey places in [0, 1], taken in turn; null: random
    seed: int = 0  # of the passkey prompts
    batch_tokens: int = 4096  # tokens in one forward pass, at least one window
    before: bool = True  # train.py measures the untuned and the scaled model too

    def __post_init__(self):
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(f"eval.tasks has {task!r}: choose from {', '.join(TASKS)}")
        for name in ("windows", "tail", "bin", "trials", "batch_tokens", "stride", "sliding_tokens", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"eval.{name}={value} is not accepted: give an integer of at least 1")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 2):
            raise ConfigError(f"eval.lengths={list(self.lengths)} is not accepted: give lengths of at least 2 tokens")
        if self.depths is not None and (not self.depths or min(self.depths) < 0 or max(self.depths) > 1):
            raise ConfigError(f"eval.depths={list(self.depths)} is not accepted: give places from 0 to 1")
        if self.seed < 0:
            raise ConfigError(f"eval.seed={self.seed} is not accepted: give an integer of at least 0")
        if "perplexity" in self.tasks and self.documents is None:
            raise ConfigError(
                "eval.documents is not set, and perplexity needs a file (.jsonl, .txt, .parquet), a folder or a dataset"
            )


class Suite:
    """The evaluation of one or more models that share a tokenizer.

    Args:
        options: what to measure; `lengths` filled in.
        tokenizer: of the models.
        documents: those of options.documents, found.
        cache_dir: the folder of all token caches.

    Raises:
        ConfigError: a prompt or a stride that does not fit the lengths.
        DataError: the documents are broken, or none has max(lengths) tokens.
    """

    def __init__(self, options: EvalOptions, tokenizer, documents, cache_dir: str | Path):
        self.options = options
        self.lengths = sorted(set(options.lengths))
        self.bos_id = bos_id(tokenizer, options.add_bos)
        self.prompts = PasskeyPrompts(tokenizer, self.bos_id)
        self.documents: list[np.ndarray] = []
        self.document_ids: list[str] = []
        if "passkey" in options.tasks:
            for length in self.lengths:
                passkey_prompts(self.prompts, length, options.trials, options.seed, options.depths)
        if "perplexity" in options.tasks:
            if options.stride is not None and options.stride >= self.lengths[0]:
                raise ConfigError(
                    f"eval.stride={options.stride} leaves tokens unscored at a window of {self.lengths[0]}: give at "
                    f"most {self.lengths[0] - 1}"
                )
            if options.sliding_tokens is not None and options.sliding_tokens < self.lengths[-1]:
                raise ConfigError(
                    f"eval.sliding_tokens={options.sliding_tokens} is less than one window: give at least "
                    f"{self.lengths[-1]}"
                )
            self._open(documents, tokenizer, cache_dir)

    def _open(self, documents, tokenizer, cache_dir):
        cache = TokenCache.build(documents, tokenizer, cache_dir, self.options.text_field)
        longest = self.lengths[-1]
        usable = [i for i in range(len(cache)) if cache.lengths[i] >= longest][: self.options.max_documents]
        if not usable:
            name = documents if isinstance(documents, str | Path) else cache.info["documents"]
            raise DataError(
                f"none of the {len(cache)} documents of {name} has {longest} tokens, the longest of eval.lengths: "
                f"the longest has {cache.lengths.max()}"
            )
        if len(usable) < len(cache):
            print(
                f"Perplexity on {len(usable)} of {len(cache)} documents: those of at least {longest} tokens", flush=True
            )
        self.documents = [cache[i] for i in usable]
        self.document_ids = [cache.ids[i] for i in usable]

    def run(self, model: PreTrainedModel, progress: bool = True) -> dict[str, float]:
        """Measures one model; the metrics by name, such as ppl@2048 and passkey@2048."""
        o = self.options
        scorer = Scorer(model, o.batch_tokens)
        metrics: dict[str, float] = {}
        if "perplexity" in o.tasks:
            metrics |= truncated_perplexity(
                scorer, self.documents, self.lengths,
                windows=o.windows, tail=o.tail, bin=o.bin, bos_id=self.bos_id, progress=progress,
            )  # fmt: skip
            if o.stride is not None:
                metrics |= sliding_perplexity(
                    scorer, self.documents, self.lengths,
                    stride=o.stride, max_tokens=o.sliding_tokens, bos_id=self.bos_id, progress=progress,
                )  # fmt: skip
        if "passkey" in o.tasks:
            metrics |= passkey_accuracy(
                scorer, self.prompts, self.lengths, trials=o.trials, seed=o.seed, depths=o.depths, progress=progress
            )
        return metrics


def default_lengths(window: int, target_len: int) -> Sequence[int]:
    """The window, doubled until the target, and the target."""
    lengths = []
    while window < target_len:
        lengths.append(window)
        window *= 2
    return [*lengths, target_len]
