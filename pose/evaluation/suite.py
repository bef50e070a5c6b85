"""The tasks that are run on a model, with everything they need made ready beforehand."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from pose.data.cache import TokenCache
from pose.data.datamodule import bos_id
from pose.data.documents import Keys
from pose.data.heldout import SetAside
from pose.data.tokenizer import check_vocabulary, token_bytes
from pose.errors import ConfigError, PoseError, TooShortError, WindowError
from pose.evaluation.harness import Harness
from pose.evaluation.memo import Kept, Outcomes, Took
from pose.evaluation.needle import Needle
from pose.evaluation.needle_gain import NeedleGain
from pose.evaluation.options import EvalOptions, needs_haystack, read_haystack
from pose.evaluation.passkey import Passkey
from pose.evaluation.perplexity import Perplexity
from pose.evaluation.ruler import Ruler
from pose.evaluation.scoring import Scorer, peak_memory_gib
from pose.evaluation.task import Estimate, Metric, Task, describe
from pose.tasks.passkey import PasskeyPrompts

log = logging.getLogger(__name__)


SHOWN_EVERY = 1.0  # seconds
NEEDLE_DEPTHS = [i / 10 for i in range(11)]


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
        window: the models' own, in tokens; None is the shortest of the lengths.

    Attributes:
        lengths: sorted, each once.
        documents, document_ids: that perplexity is measured on: tokens, int64 or less, and ids.
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
        window: int | None = None,
    ):
        assert options.lengths, "lengths are filled in by who knows the model"
        self.options, self.tokenizer = options, tokenizer
        self.lengths = sorted(set(options.lengths))
        self.max_length = self.lengths[-1] if max_length is None else max_length
        self.vocab_size = vocab_size
        self.window = self.lengths[0] if window is None else window
        self.bos_id = bos_id(tokenizer, options.add_bos, "{group}.add_bos", vocab_size, group="eval")
        self.documents: list[np.ndarray] = []
        self.document_ids: list[str] = []
        self.took: list[Took] = []
        haystack = read_haystack(options.haystack) if needs_haystack(options.tasks) else ""
        if haystack and vocab_size is not None:
            check_vocabulary(tokenizer, haystack, vocab_size, "the haystack")
        names = dict.fromkeys(options.tasks)
        tasks = {name: self._retrieval(name, haystack) for name in names if name != "perplexity"}
        if "perplexity" in names:  # the last to be made, since it reads the documents, which takes long
            tasks["perplexity"] = self._perplexity(documents, cache_dir)
        self.tasks: list[Task] = [tasks[name] for name in names]

    @property
    def seconds(self) -> float:
        """That the units of the last run took when they were measured."""
        return sum(took.seconds for took in self.took)

    def metrics(self) -> dict[str, Metric]:
        """What `run` will give, by name."""
        return {name: metric for task in self.tasks for name, metric in task.metrics().items()}

    def set_max_length(self, max_length: int):
        """Says for which window the next model is meant, in tokens, which standard benchmarks may fill."""
        self.max_length = max_length
        for task in self.tasks:
            if isinstance(task, Harness):
                task.max_length = max_length

    def prepare(self):
        """Loads what measuring needs beside a model, such as the questions of a benchmark, whose errors it raises."""
        for task in self.tasks:
            task.prepare()

    def run(
        self,
        model: PreTrainedModel | None = None,
        progress: bool = True,
        *,
        load: Callable[[], PreTrainedModel] | None = None,
        outcomes: Outcomes | None = None,
        under: Any = None,
        skip_too_long: bool = False,
    ) -> dict[str, Estimate]:
        """Measures one model; the metrics by name, such as ppl@2048 and passkey@2048.

        Args:
            model: to measure; None where `load` gives it.
            progress: whether to show a bar.
            load: makes the model when the first unit has to be measured.
            outcomes: keep the outcome of each unit as soon as it is there, and have those of earlier evaluations.
            under: what tells the model from every other one (`pose.evaluation.memo.identity`), with `outcomes`.
            skip_too_long: whether a benchmark that does not fit into the model's window is left out, with a warning.

        Raises:
            WindowError: a benchmark does not fit into the model's window.
        """
        scorer = None if model is None else Scorer(model, self.options.batch_tokens)
        units = {task: task.units() for task in self.tasks}
        kept: dict[Task, dict[str, Kept]] = {}
        for task in self.tasks:
            kept[task] = {} if outcomes is None else outcomes.find(under, task, units[task])
            if kept[task]:
                log.info(f"{task.name}: {len(kept[task])} of {len(units[task])} results reused from the cache")
            if len(kept[task]) < len(units[task]):
                task.prepare()
        self.took = []
        estimates: dict[str, Estimate] = {}
        for task in self.tasks:
            missing = [unit for unit in units[task] if unit not in kept[task]]
            bar = tqdm(missing, task.name, unit="unit", leave=False, disable=not (progress and missing))
            for unit in bar:
                if scorer is None:
                    assert load is not None, "a model, or what makes it"
                    scorer = Scorer(load(), self.options.batch_tokens)
                begin = time.perf_counter()
                try:
                    with _counting_tokens(bar, scorer.model):
                        outcome = task.measure(scorer, unit)
                except WindowError as error:
                    if not skip_too_long:
                        raise
                    log.warning(f"{task.name} is left out for this model: {error}")
                    break
                took = Took(time.perf_counter() - begin, peak_memory_gib(scorer.device))
                kept[task][unit] = Kept(outcome, took)
                if outcomes is not None:
                    outcomes.keep(under, task, units[task][unit], kept[task][unit])
            if len(kept[task]) < len(units[task]):
                continue
            self.took += [kept[task][unit].took for unit in units[task]]
            estimates |= task.summarise({unit: kept[task][unit].outcome for unit in units[task]})
        return estimates

    def keep_documents(self, ids: Collection[str]):
        """Leaves out all documents of perplexity but these."""
        pairs = zip(self.document_ids, self.documents, strict=True)
        kept = [(name, tokens) for name, tokens in pairs if name in ids]
        self.document_ids, self.documents = [name for name, _ in kept], [tokens for _, tokens in kept]
        for task in self.tasks:
            if isinstance(task, Perplexity):
                task.keep(ids)

    def _perplexity(self, documents, cache_dir) -> Perplexity:
        o = self.options
        if o.stride is not None and o.stride >= self.lengths[0]:
            raise ConfigError(
                f"{{group}}.stride={o.stride} leaves tokens unscored at a window of {self.lengths[0]}: give at most "
                f"{self.lengths[0] - 1}",
                group="eval",
            )
        if o.sliding_tokens is not None and o.sliding_tokens < self.lengths[-1]:
            raise ConfigError(
                f"{{group}}.sliding_tokens={o.sliding_tokens} is less than one window: give at least "
                f"{self.lengths[-1]}",
                group="eval",
            )
        if documents is None:
            raise ConfigError(
                "{group}.documents is not set, and perplexity needs a file (.jsonl, .txt, .parquet), a folder or a "
                "dataset",
                group="eval",
            )
        self.documents, self.document_ids = self._choose(documents, cache_dir)
        return Perplexity(
            self.documents, self.document_ids, self.lengths,
            windows=o.windows, tail=o.tail, bin=o.bin, stride=o.stride, sliding_tokens=o.sliding_tokens,
            bos_id=self.bos_id, token_bytes=token_bytes(self.tokenizer),
        )  # fmt: skip

    def _choose(self, documents, cache_dir) -> tuple[list[np.ndarray], list[str]]:
        """Tokens and ids of the documents that are measured: those that are long enough, or some of them."""
        o, longest = self.options, self.lengths[-1]
        enough = max(longest, o.min_tokens or 0)
        key = "{group}.lengths" if enough == longest else "{group}.min_tokens"
        keys = Keys("{group}.documents", "{group}.text_field", key, max_document_chars=None)
        stop_early = o.max_documents is not None and not o.draw_documents
        if isinstance(documents, SetAside):
            cache, chosen = documents.open(self.tokenizer)
        else:
            try:
                cache = TokenCache.build(
                    documents, self.tokenizer, cache_dir, o.text_field,
                    min_tokens=enough if stop_early else 1, max_documents=o.max_documents if stop_early else None,
                    keys=keys,
                )  # fmt: skip
            except PoseError as error:
                error.under("eval")
                raise
            chosen = list(range(len(cache)))
        usable = [i for i in chosen if cache.lengths[i] >= enough]
        if not usable:
            name = documents if isinstance(documents, str | Path) else cache.info["documents"]
            raise TooShortError(
                f"none of the {len(chosen)} documents of {name} has {enough} tokens ({key}): the longest has "
                f"{cache.lengths[chosen].max()}",
                group="eval",
            )
        if o.max_documents is not None and o.max_documents < len(usable):
            if o.draw_documents:
                usable = np.random.default_rng(o.seed).choice(usable, o.max_documents, replace=False).tolist()
            usable = sorted(usable[: o.max_documents])
        if self.vocab_size is not None:
            cache.check_vocabulary(self.tokenizer, self.vocab_size, usable)
        if len(usable) < len(chosen):
            log.info(f"Perplexity on {len(usable)} of {len(chosen)} documents of at least {enough} tokens")
        texts = [cache[i] for i in usable]
        if more := len(texts) - len({(len(text), text[:longest].tobytes()) for text in texts}):
            log.warning(
                f"{more} of the {len(texts)} documents that perplexity is measured on begin as another does, and are "
                "as long: each counts, and the intervals are narrower than they should be. Is a file named twice?"
            )
        return texts, [cache.ids[i] for i in usable]

    def _retrieval(self, name: str, haystack: str) -> Task:
        o = self.options
        if name == "passkey":
            prompts = PasskeyPrompts(self.tokenizer, self.bos_id)
            return Passkey(prompts, self.lengths, trials=o.trials, seed=o.seed, depths=o.depths, generate=o.generate)
        if name == "needle":
            depths = NEEDLE_DEPTHS if o.depths is None else o.depths
            return Needle(
                self.tokenizer, haystack, self.lengths, depths=depths, trials=o.trials, seed=o.seed, bos_id=self.bos_id
            )
        if name == "needle_gain":
            depths = far_depths(o.trials) if o.depths is None else o.depths
            return NeedleGain(
                self.tokenizer, haystack, self.lengths,
                window=self.window, depths=depths, trials=o.trials, seed=o.seed, bos_id=self.bos_id,
            )  # fmt: skip
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


@contextlib.contextmanager
def _counting_tokens(bar: tqdm, model: PreTrainedModel) -> Iterator[None]:
    """Shows how many tokens have gone through a model beside a bar, of which one unit may take minutes.

    On a terminal alone: each time would be a line of a log.
    """
    if bar.disable or not bar.fp.isatty():
        yield
        return
    num, shown = 0, time.monotonic()

    def count(module, args, output):
        nonlocal num, shown
        num += args[0].numel() if args else 0
        if time.monotonic() > shown + SHOWN_EVERY:
            bar.set_postfix_str(f"{num:,} tokens")
            shown = time.monotonic()

    hook = model.get_input_embeddings().register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


def values(estimates: Mapping[str, Estimate]) -> dict[str, float]:
    """The metrics alone."""
    return {name: estimate.value for name, estimate in estimates.items()}


def out_of_reach(results: Mapping[str, Estimate | float], window: int) -> str | None:
    """A remark on tasks that a model cannot do at all: 0 at every length inside its own window.

    Such a task says nothing of how far the model reaches, and its zeros look like a failure of the extension.

    Args:
        results: metrics by name, of one model.
        window: the model's own, in tokens.

    Returns:
        A line for the reader; None where there is no such task.
    """
    inside: dict[str, list[float]] = {}
    for name, found in results.items():
        family, _, length = name.partition("@")
        if length.isdecimal() and int(length) <= window and describe(name).is_share:
            inside.setdefault(family, []).append(found.value if isinstance(found, Estimate) else found)
    zero = [family for family, scores in inside.items() if not any(scores)]
    if not zero:
        return None
    return (
        f"{', '.join(zero)}: 0 at every length inside the model's own window of {window:,} tokens. A task that the "
        "model cannot do there says nothing about the extension: a 0 beyond the window is not a failure"
    )


def far_depths(trials: int) -> list[float]:
    """Five places from 0 to 0.5, or fewer for fewer trials: of N tokens the distances that N / 2 tokens lack."""
    return np.linspace(0, 0.5, min(trials, 5)).tolist()


def default_lengths(window: int, target_len: int) -> Sequence[int]:
    """The window, doubled until the target, and the target."""
    lengths = []
    while window < target_len:
        lengths.append(window)
        window *= 2
    return [*lengths, target_len]
