"""The LightningDataModule: PoSE-chunked batches, `input_ids`, `labels`, `position_ids` [B, L].

With them comes which tokens are scored (`pose.data.examples.Targets`), so that nothing on a GPU waits to know.
"""

import atexit
import ctypes
import hashlib
import json
import logging
import multiprocessing
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from pose.data.cache import TokenCache
from pose.data.documents import MAX_DOCUMENT_CHARS, Keys
from pose.data.examples import Curriculum, PoseDataset, collate_scored
from pose.data.heldout import SetAside, document_digests, found_again, without
from pose.data.tokenizer import beyond_vocabulary
from pose.errors import ConfigError, DataError, require_int
from pose.positions import PositionSampler
from pose.tasks.synthetic import TASKS

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # of linux/prctl.h: the signal that a process gets when its parent ends
HANDLES, HANDLES_OF_A_WORKER = 128, 16  # open files: of the training process, and for each that reads (8 were seen)
SENTENCE_END = re.compile(r"""([.!?]["'”’»)\]]*|[。！？][”’」』）]*|\n)\s*$""")


class PoseDataModule(L.LightningDataModule):
    """From documents files to batches.

    Args:
        documents: files, folders, globs or datasets, one or a list, as `TokenCache.build` takes them.
        tokenizer: a transformers tokenizer.
        sampler: which tokens an example shows and which position ids they get; its target may grow over the run.
        num_examples: examples in the whole run, over all processes.
        micro_batch: examples in a batch of one process.
        global_batch: examples in an optimizer step, over all processes; None: micro_batch.
        seed: of everything that is drawn.
        cache_dir: the folder of all token caches.
        text_field: the key of the text, for documents that do not name their own.
        min_tokens: shorter documents are left out.
        max_documents: the first so many of the others; None takes all.
        on_broken: "error" or "skip", for lines and rows that cannot be read, or are too long.
        max_document_chars: the most characters that the text of a document may have.
        vocab_size: rows of the model's embedding, which every token must have one of; None does not look.
        heldout_share: share of whole documents set aside for evaluation (`set_aside`), in [0, 1); 0 keeps none.
        heldout_len: tokens that such a document has at least; None: the sampler's target.
        heldout_asked_by: the key of the config that asks for so many, for errors.
        leave_out: documents, as `documents`, that no example is drawn from: those with the same text are left out.
        window_len: tokens, BOS among them, that one example is drawn from; None takes documents whole.
        add_bos: whether a document begins with the tokenizer's BOS; None does as the tokenizer does.
        synthetic: share of examples by name of a task in `pose.tasks.synthetic.TASKS`.
        curriculum: (share of the run, length in tokens) of phases of shorter sequences before the rest.
        skip_before_question: as of `PoseDataset`.
        num_workers: processes that read; 0 reads in the training process.
        collate: joins examples to a batch.

    Attributes:
        dataset: the examples; None before `setup`.
        fingerprint: of all the text and its tokens.
        num_documents, num_tokens: that examples are drawn from: of those that are long enough.

    Raises:
        ConfigError: shares that do not add up, phases that cannot work, an unknown task, or a BOS the tokenizer lacks.
        DataError: documents are broken or missing, or none is long enough, or a token is beyond vocab_size.
    """

    def __init__(
        self,
        documents: str | Path | Mapping | Sequence,
        tokenizer,
        sampler: PositionSampler,
        *,
        num_examples: int,
        micro_batch: int,
        global_batch: int | None = None,
        seed: int,
        cache_dir: str | Path,
        text_field: str = "text",
        min_tokens: int = 1,
        max_documents: int | None = None,
        on_broken: str = "error",
        heldout_share: float = 0.0,
        heldout_len: int | None = None,
        heldout_asked_by: str = "eval.lengths",
        leave_out: str | Path | Mapping | Sequence | None = None,
        max_document_chars: int = MAX_DOCUMENT_CHARS,
        vocab_size: int | None = None,
        window_len: int | None = None,
        add_bos: bool | None = None,
        synthetic: Mapping[str, float] | None = None,
        curriculum: Sequence[tuple[float, int]] = (),
        skip_before_question: bool = True,
        num_workers: int = 0,
        collate: Callable[[Sequence[dict[str, torch.Tensor]]], dict[str, torch.Tensor]] = collate_scored,
    ):
        super().__init__()
        self.collate = collate
        self.documents, self.tokenizer, self.sampler = documents, tokenizer, sampler
        self.num_examples, self.micro_batch, self.seed = num_examples, micro_batch, seed
        self.global_batch = micro_batch if global_batch is None else global_batch
        self.cache_dir, self.text_field, self.window_len = cache_dir, text_field, window_len
        self.choice: dict[str, Any] = {
            "min_tokens": min_tokens, "max_documents": max_documents, "on_broken": on_broken,
            "max_document_chars": max_document_chars,
        }  # fmt: skip
        self.leave_out = leave_out
        self.set_aside = None
        if heldout_share:
            length = sampler.target_len if heldout_len is None else heldout_len
            self.set_aside = SetAside(
                documents, heldout_share, length, cache_dir, text_field, heldout_asked_by, self.choice
            )
        self.vocab_size, self.bos_id = vocab_size, bos_id(tokenizer, add_bos, "data.add_bos", vocab_size)
        self.synthetic, self.num_workers = dict(synthetic or {}), num_workers
        self.skip_before_question = skip_before_question
        self.curriculum: list[tuple] = [
            tuple(phase) if isinstance(phase, Sequence) else (phase,) for phase in curriculum
        ]
        self.dataset: PoseDataset | Curriculum | None = None
        self._check()

    def _check(self):
        require_int("data.num_workers", self.num_workers, at_least=0)
        reserve_file_handles(self.num_workers)
        for name, share in self.synthetic.items():
            if name not in TASKS:
                raise ConfigError(f"data.synthetic has no task {name!r}: choose from {', '.join(TASKS)}")
            if not 0 <= share <= 1:
                raise ConfigError(f"data.synthetic.{name}={share!r} is not accepted: give a share in [0, 1]")
        if sum(self.synthetic.values()) > 1 + 1e-9:
            raise ConfigError(f"data.synthetic={self.synthetic} adds up to more than 1")
        example_len, begin = self.sampler.example_len, 0.0
        for phase in self.curriculum:
            end, length = phase if len(phase) == 2 else (0, 0)
            is_phase = type(end) in (int, float) and type(length) is int
            if not is_phase or not begin < end < 1 or length < 1 or example_len % length:
                raise ConfigError(
                    f"data.curriculum has the phase {list(phase)}: give [end, length], the end a share of the run "
                    f"above {begin:g} and below 1, the length a divisor of {example_len}"
                )
            try:
                self.sampler.resized(length, length)
            except ConfigError as error:
                raise ConfigError(
                    f"data.curriculum has the phase {list(phase)}, and {self.sampler.name} does not take its length: "
                    f"{error}"
                ) from error
            begin = end
        for end, sampler in self.sampler.phases:
            if end <= begin:
                raise ConfigError(
                    f"pose.curriculum has the phase {[end, sampler.target_len]}, and data.curriculum goes on to "
                    f"{begin:g} of the run, with plain ids: give an end above it, or leave the phase out"
                )
        if self.window_len is not None and self.window_len < self.sampler.min_document_len:
            raise ConfigError(
                f"data.window_len={self.window_len} is too short: {self.sampler.name} draws from at least "
                f"{self.sampler.min_document_len} tokens, BOS among them"
            )

    def prepare_data(self):
        self._open()

    def setup(self, stage: str | None = None):
        if self.dataset is not None:
            return
        cache = self._open()
        self.fingerprint = cache.folder.name  # of all the text and its tokens
        if self.vocab_size is not None:
            cache.check_vocabulary(self.tokenizer, self.vocab_size)
        kept_back = [] if self.set_aside is None else self.set_aside.of(cache)
        if kept_back:
            self.fingerprint += f", without {len(kept_back)} for evaluation: " + _fingerprint(kept_back)
            held_out = f"Held out    {len(kept_back):,} of {len(cache):,} documents (data.heldout_share)"
            if copies := sorted({*found_again(cache, [cache[i] for i in kept_back])}.difference(kept_back)):
                self.fingerprint += f", and their {len(copies)} copies: " + _fingerprint(copies)
                held_out += f", and {len(copies):,} with the same text, which do not train either"
                kept_back = sorted([*kept_back, *copies])
            log.info(held_out)
            if len(kept_back) == len(cache):
                raise DataError(
                    "data.documents leave none to train on: all have the text of one that is set aside for perplexity "
                    "(data.heldout_share); give more, or others to measure on with data.heldout"
                )
        if left_out := self._left_out(cache):
            self.fingerprint += f", without {len(left_out)} of data.leave_out: " + _fingerprint(left_out)
        self._documents = documents = _Documents(cache, [*kept_back, *left_out])
        if not len(documents):
            raise DataError(
                "data.documents leave none to train on: all are set aside for perplexity (data.heldout_share) or left "
                "out (data.leave_out); give more, or others to measure on with data.heldout"
            )
        lengths = cache.lengths[documents.indices]
        tasks: dict[Any, float] = {
            TASKS[name](self.tokenizer, documents, self.vocab_size): share for name, share in self.synthetic.items()
        }
        for task in tasks:  # so that what does not fit is an error now, not in the middle of the run
            for length in (self.sampler.example_len, *(length for _, length in self.curriculum)):
                task.sample(np.random.default_rng(0), length - (self.bos_id is not None))

        ends = sentence_ends(self.tokenizer) if self.sampler.uses_breaks else None

        def dataset(sampler, window_len) -> PoseDataset:
            return PoseDataset(
                documents, sampler, num_examples=self.num_examples, seed=self.seed,
                window_len=window_len, bos_id=self.bos_id, synthetic=tasks, sentence_end=ends,
                skip_before_question=self.skip_before_question,
            )  # fmt: skip

        self.dataset = whole = dataset(self.sampler, self.window_len)
        self.num_documents, self.num_tokens = len(whole.usable), int(lengths[whole.usable].sum())
        self._say_what_is_used(cache.info["documents"], len(lengths), int(lengths.sum()))
        steps = self.num_examples / self.global_batch

        def items(share: float) -> int:
            """Of so much of the run; an optimizer step is of one phase, as its rows have one length."""
            return round(share * steps) * self.global_batch

        phases = [(items(end), dataset(self.sampler.resized(n, n), n)) for end, n in self.curriculum]
        targets = [(items(end), dataset(sampler, self.window_len)) for end, sampler in self.sampler.phases]
        usable = [one.usable for _, one in (*phases, *targets, (self.num_examples, whole))]
        self._trained = documents.indices if tasks else documents.indices[np.unique(np.concatenate(usable))]
        begin = phases[-1][0] if phases else 0  # of the first target
        self._say_what_has_no_step("data.curriculum", [0, *(end for end, _ in phases)])
        self._say_what_has_no_step("pose.curriculum", [begin, *(end for end, _ in targets)])
        if phases or targets:
            targets.append((self.num_examples, whole))
            self.dataset = Curriculum([*phases, *targets])
        if self.sampler.phases:
            begins = [begin, *(end for end, _ in targets[:-1])]
            until = [
                f"{one.sampler.target_len:,} tokens up to step {end // self.global_batch:,}"
                for begin, (end, one) in zip(begins, targets, strict=True)
                if end > begin
            ]
            log.info(f"Targets     {', '.join(until)}")

    def trains_on(self, documents: Sequence[np.ndarray]) -> list[str]:
        """The ids of the training documents that have the same tokens as one of others."""
        assert self.dataset is not None, "setup comes first"
        cache, trained = self._documents.cache, set(self._trained.tolist())
        return [cache.ids[i] for i in found_again(cache, documents) if i in trained]

    def trained_digests(self) -> np.ndarray:
        """Those of the training documents (`document_digests`)."""
        assert self.dataset is not None, "setup comes first"
        return document_digests(self._documents.cache[i] for i in self._trained.tolist())

    @property
    def has_phases(self) -> bool:
        """Whether the length of examples or their target changes in the run, at shares of its steps."""
        return bool(self.curriculum or self.sampler.phases)

    def _say_what_has_no_step(self, key: str, bounds: list[int]):
        """A warning where a phase of a curriculum, from one bound (an item) to the next, or the rest has no step."""
        steps = self.num_examples // self.global_batch
        if len(bounds) > 1 and bounds[-1] >= self.num_examples:
            log.warning(f"{key} leaves no step of trainer.max_steps={steps} to what comes after its last phase")
        if any(begin >= end for begin, end in pairwise(bounds)):
            log.warning(f"{key}: a phase has no step, since trainer.max_steps={steps} is too few for its share")

    def _say_what_is_used(self, name: str, num: int, tokens: int):
        """How many of the documents and tokens examples are drawn from: a warning where it is less than half."""
        if self.num_documents == num:
            return
        few = 2 * self.num_documents < num or 2 * self.num_tokens < tokens
        needed = self.sampler.min_document_len
        key = "train_len" if needed == self.sampler.train_len else "target_len"
        hint = ". Join short documents, or train on less" if few else ""
        log.log(
            logging.WARNING if few else logging.INFO,
            f"{name}: {self.num_documents:,} of {num:,} documents, {self.num_tokens:,} of {tokens:,} tokens, are used: "
            f"the others are shorter than the {needed:,} tokens that an example needs at "
            f"pose.{key}={getattr(self.sampler, key)}{hint}",
        )

    def _open(self) -> TokenCache:
        return TokenCache.build(self.documents, self.tokenizer, self.cache_dir, self.text_field, **self.choice)

    def _left_out(self, cache: TokenCache) -> list[int]:
        """Which documents have the text of one of `leave_out`."""
        if self.leave_out is None:
            return []
        keys = Keys("data.leave_out", min_tokens="data.leave_out")
        as_the_others = {name: self.choice[name] for name in ("on_broken", "max_document_chars")}
        others = TokenCache.build(
            self.leave_out, self.tokenizer, self.cache_dir, self.text_field, keys=keys, **as_the_others
        )
        left_out = found_again(cache, [others[i] for i in range(len(others))])
        log.info(f"Left out    {len(left_out):,} of {len(cache):,} documents: they are of data.leave_out")
        if len(left_out) == len(cache):
            raise DataError("data.leave_out leaves no document to train on: give others with data.documents")
        return left_out

    def train_dataloader(self) -> DataLoader:
        step, rank, world, pinned = 0, 0, 1, False
        if self.trainer is not None:  # a run that goes on begins its data at the step it has reached
            step, rank, world = self.trainer.global_step, self.trainer.global_rank, self.trainer.world_size
            # So that a GPU is given a batch without anybody waiting: Lightning moves tensors with non_blocking=True
            pinned = self.trainer.strategy.root_device.type == "cuda"
        assert self.dataset is not None, "setup comes first"
        self.order = InOrder(self.dataset, step * self.global_batch, rank, world)
        if self.num_workers:
            atexit.unregister(_end_readers)
            atexit.register(_end_readers)
        return DataLoader(
            self.dataset, self.micro_batch, sampler=self.order, num_workers=self.num_workers,
            collate_fn=self.collate, persistent_workers=self.num_workers > 0, worker_init_fn=_follow_the_trainer,
            pin_memory=pinned,
        )  # fmt: skip

    def describe(self, batch_idx: int, row: int) -> str:
        """Which example is in a row of a batch of this process's loader, for messages: epoch, index, document."""
        assert self.dataset is not None, "setup comes first"
        items = islice(self.order, batch_idx * self.micro_batch, (batch_idx + 1) * self.micro_batch)
        rows = [(item, i) for item in items for i in range(self.dataset.num_rows(item))]
        return self.dataset.describe(*rows[row])


def reserve_file_handles(num_workers: int):
    """Raises this process's limit of open files to what reading processes need: they would hang without.

    Raises:
        ConfigError: it cannot be raised so far.
    """
    if num_workers < 1:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = HANDLES + HANDLES_OF_A_WORKER * num_workers
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"data.num_workers={num_workers} needs {needed} open files, and the limit is {hard} (ulimit -Hn): raise "
            "it, or give fewer; 0 reads in the training process"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _follow_the_trainer(worker: int):
    """Ignores signals, which schedulers and terminals send to every process of a job: the trainer ends its readers.

    When it is killed the kernel ends them at once; by themselves they would notice seconds later.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.excepthook = _unless_the_trainer_left


def _unless_the_trainer_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None):
    """Prints an error of a reader's thread; that a trainer which stops drops its connections is none."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_readers():
    """Kills readers at the exit: multiprocessing would send SIGTERM, which they ignore, and wait."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class InOrder(DistributedSampler):
    """Deals the items of a dataset out in turn: process r of W has start + r, start + r + W, ...

    So a global batch has the same examples for any number of processes, and a run goes on where it stopped.
    """

    def __init__(self, dataset: PoseDataset | Curriculum, start: int, rank: int, world: int):
        super().__init__(dataset, world, rank, shuffle=False)
        self.start, self.num_items = start, len(dataset)

    def __iter__(self):
        return iter(range(self.start + self.rank, self.num_items, self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.start + self.rank, self.num_items, self.num_replicas))


class _Documents(Sequence):
    """The documents of a cache, but for some."""

    def __init__(self, cache: TokenCache, left_out: Sequence[int] = ()):
        self.cache, self.indices = cache, without(len(cache), left_out)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return _Document(self.cache, int(self.indices[index]))


class _Document(Sequence):
    """A document of a cache, by reference: picklable for workers, and no file is touched to list it."""

    def __init__(self, cache: TokenCache, index: int):
        self.cache, self.number = cache, index

    @property
    def id(self) -> str:
        return self.cache.ids[self.number]

    def __len__(self):
        return int(self.cache.lengths[self.number])

    def __getitem__(self, key):
        return self.cache[self.number][key]


def _fingerprint(indices: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(indices)).encode()).hexdigest()[:16]


def bos_id(
    tokenizer, add_bos: bool | None, key: str, vocab_size: int | None = None, group: str | None = None
) -> int | None:
    """The token to put before a document, or None.

    Args:
        tokenizer: a transformers tokenizer.
        add_bos: True, False, or None to do as the tokenizer itself does.
        key: that gives it, for errors; may begin with `{group}`.
        vocab_size: rows of the model's embedding, which the token must have one of; None does not look.
        group: for `{group}`.

    Raises:
        ConfigError: add_bos is True and the tokenizer has no BOS token.
        DataError: the token is beyond vocab_size.
    """
    if add_bos is None:
        default = tokenizer("a")["input_ids"]
        add_bos = tokenizer.bos_token_id is not None and default[:1] == [tokenizer.bos_token_id]
    if add_bos and tokenizer.bos_token_id is None:
        raise ConfigError(f"{key} is true, but this tokenizer has no BOS token: set it to false", group)
    if add_bos and vocab_size is not None and tokenizer.bos_token_id >= vocab_size:
        raise beyond_vocabulary(
            tokenizer, tokenizer.bos_token_id, vocab_size, f"the beginning of a text ({key})", group
        )
    return tokenizer.bos_token_id if add_bos else None


def sentence_ends(tokenizer) -> np.ndarray:
    """Which tokens end a sentence: those whose text ends in . ! or ? (closing quotes may follow), or in a line break.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        bool [vocabulary].
    """
    ids = sorted(tokenizer.get_vocab().values())  # which may have gaps
    ends = np.zeros(ids[-1] + 1, bool)
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    ends[ids] = [SENTENCE_END.search(text) is not None for text in texts]
    return ends
