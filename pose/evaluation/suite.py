"""The tasks that are run on a model, with everything they need made ready beforehand."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from pose.data.cache import TokenCache
from pose.data.datamodule import bos_id
from pose.data.documents import read_documents
from pose.data.tokenizer import check_vocabulary, token_bytes
from pose.errors import ConfigError, DataError
from pose.evaluation.harness import Harness
from pose.evaluation.needle import Needle
from pose.evaluation.options import EvalOptions
from pose.evaluation.passkey import Passkey
from pose.evaluation.perplexity import Perplexity
from pose.evaluation.ruler import Ruler
from pose.evaluation.scoring import Scorer, peak_memory_gib
from pose.evaluation.task import Estimate, Task
from pose.files import Memo
from pose.tasks.passkey import PasskeyPrompts

log = logging.getLogger(__name__)


class Took(NamedTuple):
    """What one unit took: wall clock seconds, and the most memory that the process had held by then, in GiB."""

    seconds: float
    peak_memory_gib: float


class Suite:
    """The evaluation of one or more models that share a tokenizer.

    Args:
        options: what to measure; `lengths` filled in.
        tokenizer: of the models.
        documents: those of options.documents, found.
        cache_dir: the folder of all token caches.
        max_length: the window that the models are meant for, in tokens, which standard benchmarks may fill; None is the
            longest of the lengths.
        vocab_size: rows of the models' embedding, which every token must have one of; None does not look.

    Attributes:
        lengths: sorted, each once.
        document_ids: of the documents that perplexity is measured on.
        tasks: what is run, in order.
        took: what each unit took when it was measured, of the last run.

    Raises:
        ConfigError: a task, prompt or stride that does not fit the lengths.
        DataError: the documents are broken, or none has max(lengths) tokens, or a token is beyond vocab_size.
    """

    def __init__(
        self,
        options: EvalOptions,
        tokenizer,
        documents,
        cache_dir: str | Path,
        max_length: int | None = None,
        vocab_size: int | None = None,
    ):
        self.options, self.tokenizer = options, tokenizer
        self.lengths = sorted(set(options.lengths))
        self.max_length = self.lengths[-1] if max_length is None else max_length
        self.vocab_size, self.bos_id = vocab_size, bos_id(tokenizer, options.add_bos, vocab_size)
        self.document_ids: list[str] = []
        self.took: list[Took] = []
        haystack = None
        if any(task == "needle" or task.startswith("ruler/") for task in options.tasks):
            haystack = "\n\n".join(document.text for document in read_documents(options.haystack, options.text_field))
            if vocab_size is not None:
                check_vocabulary(tokenizer, haystack, vocab_size, "eval.haystack")
        self.tasks: list[Task] = []
        for name in dict.fromkeys(options.tasks):
            if name == "perplexity":
                self.tasks.append(self._perplexity(documents, cache_dir))
            else:
                self.tasks.append(self._retrieval(name, haystack))

    def run(
        self,
        model: PreTrainedModel | None = None,
        progress: bool = True,
        *,
        load: Callable[[], PreTrainedModel] | None = None,
        memo: Memo | None = None,
        under: Any = None,
        reuse: bool = True,
    ) -> dict[str, Estimate]:
        """Measures one model; the metrics by name, such as ppl@2048 and passkey@2048.

        Args:
            model: to measure; None where `load` gives it.
            progress: whether to show a bar.
            load: makes the model when the first unit has to be measured.
            memo: keeps the outcome of each unit as soon as it is there, and those of earlier evaluations.
            under: plain JSON that tells the model from every other one, with `memo`.
            reuse: whether outcomes in `memo` are taken over.
        """
        scorer = None if model is None else Scorer(model, self.options.batch_tokens)
        keys = {task: {unit: [under, task.name, it] for unit, it in task.units().items()} for task in self.tasks}
        kept: dict[Task, dict[str, Any]] = {task: {} for task in self.tasks}
        for task in self.tasks:
            if memo is not None and reuse:
                found = {unit: memo.get(key) for unit, key in keys[task].items()}
                kept[task] = {unit: outcome for unit, outcome in found.items() if outcome is not None}
                if kept[task]:
                    log.info(f"{task.name}: {len(kept[task])} of {len(keys[task])} are there from before")
            if len(kept[task]) < len(keys[task]):
                task.prepare()
        self.took = []
        estimates: dict[str, Estimate] = {}
        for task in self.tasks:
            missing = [unit for unit in keys[task] if unit not in kept[task]]
            for unit in tqdm(missing, task.name, unit="unit", leave=False, disable=not progress):
                if scorer is None:
                    scorer = Scorer(load(), self.options.batch_tokens)
                begin = time.perf_counter()
                outcome = task.measure(scorer, unit)
                took = Took(time.perf_counter() - begin, peak_memory_gib(scorer.device))
                kept[task][unit] = {"outcome": outcome, "took": took}
                if memo is not None:
                    memo.set(keys[task][unit], kept[task][unit])
            self.took += [Took(*kept[task][unit]["took"]) for unit in keys[task]]
            estimates |= task.summarise({unit: kept[task][unit]["outcome"] for unit in keys[task]})
        return estimates

    def keep_documents(self, ids: Collection[str]):
        """Leaves out all documents of perplexity but these."""
        self.document_ids = [name for name in self.document_ids if name in ids]
        for task in self.tasks:
            if isinstance(task, Perplexity):
                task.keep(ids)

    def _perplexity(self, documents, cache_dir) -> Perplexity:
        o = self.options
        if o.stride is not None and o.stride >= self.lengths[0]:
            raise ConfigError(
                f"eval.stride={o.stride} leaves tokens unscored at a window of {self.lengths[0]}: give at most "
                f"{self.lengths[0] - 1}"
            )
        if o.sliding_tokens is not None and o.sliding_tokens < self.lengths[-1]:
            raise ConfigError(
                f"eval.sliding_tokens={o.sliding_tokens} is less than one window: give at least {self.lengths[-1]}"
            )
        tokens, self.document_ids = self._choose(documents, cache_dir)
        return Perplexity(
            tokens, self.document_ids, self.lengths,
            windows=o.windows, tail=o.tail, bin=o.bin, stride=o.stride, sliding_tokens=o.sliding_tokens,
            bos_id=self.bos_id, token_bytes=token_bytes(self.tokenizer),
        )  # fmt: skip

    def _choose(self, documents, cache_dir) -> tuple[list[np.ndarray], list[str]]:
        """Tokens and ids of the documents that are measured: those that are long enough, or some of them."""
        o, longest = self.options, self.lengths[-1]
        enough = max(longest, o.min_tokens or 0)
        key = "eval.lengths" if enough == longest else "eval.min_tokens"
        stop_early = o.max_documents is not None and not o.draw_documents
        bounds = {"min_tokens": enough, "max_documents": o.max_documents} if stop_early else {}
        try:
            cache = TokenCache.build(documents, self.tokenizer, cache_dir, o.text_field, **bounds)
        except DataError as error:
            raise DataError(str(error).replace(f"data.min_tokens={enough}", f"{enough} ({key})")) from error
        usable = [i for i in range(len(cache)) if cache.lengths[i] >= enough]
        if not usable:
            name = documents if isinstance(documents, str | Path) else cache.info["documents"]
            raise DataError(
                f"none of the {len(cache)} documents of {name} has {enough} tokens ({key}): the longest has "
                f"{cache.lengths.max()}"
            )
        if o.max_documents is not None and o.max_documents < len(usable):
            rng = np.random.default_rng(o.seed)
            usable = sorted(rng.choice(usable, o.max_documents, replace=False).tolist())
        if self.vocab_size is not None:
            cache.check_vocabulary(self.tokenizer, self.vocab_size, usable)
        if len(usable) < len(cache):
            log.info(f"Perplexity on {len(usable)} of {len(cache)} documents of at least {enough} tokens")
        return [cache[i] for i in usable], [cache.ids[i] for i in usable]

    def _retrieval(self, name: str, haystack: str | None) -> Task:
        o = self.options
        if name == "passkey":
            prompts = PasskeyPrompts(self.tokenizer, self.bos_id)
            return Passkey(prompts, self.lengths, trials=o.trials, seed=o.seed, depths=o.depths, generate=o.generate)
        if name == "needle":
            depths = [i / 10 for i in range(11)] if o.depths is None else o.depths
            return Needle(
                self.tokenizer, haystack, self.lengths, depths=depths, trials=o.trials, seed=o.seed, bos_id=self.bos_id
            )
        kind, task = name.split("/", 1)
        if kind == "ruler":
            return Ruler(
                task, self.tokenizer, haystack, self.lengths,
                trials=o.trials, seed=o.seed, depths=o.depths, bos_id=self.bos_id,
            )  # fmt: skip
        return Harness(
            task, self.tokenizer,
            num_fewshot=o.num_fewshot, limit=o.limit, include_path=o.include_path, seed=o.seed,
            max_length=self.max_length,
        )  # fmt: skip


def values(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """The metrics alone."""
    return {name: estimate.value for name, estimate in estimates.items()}


def default_lengths(window: int, target_len: int) -> Sequence[int]:
    """The window, doubled until the target, and the target."""
    lengths = []
    while window < target_len:
        lengths.append(window)
        window *= 2
    return [*lengths, target_len]
