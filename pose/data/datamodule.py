"""The LightningDataModule: PoSE-chunked batches, `input_ids`, `labels`, `position_ids` [B, L]."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset

from pose.data.cache import TokenCache
from pose.data.examples import Curriculum, PoseDataset, collate
from pose.data.synthetic import TASKS
from pose.errors import ConfigError
from pose.positions import PositionSampler

SENTENCE_END = re.compile(r"""([.!?]["'”’»)\]]*|\n)\s*$""")


class PoseDataModule(L.LightningDataModule):
    """From documents files to batches.

    Args:
        documents: .jsonl or .jsonl.gz files; a file named twice counts twice.
        tokenizer: a transformers tokenizer.
        sampler: which tokens an example shows and which position ids they get.
        num_examples: examples in the whole run, over all processes.
        micro_batch: examples in a batch of one process.
        seed: of everything that is drawn.
        cache_dir: the folder of all token caches.
        text_field: the key of the text in each line.
        window_len: tokens of a document that one example is drawn from; None takes documents whole.
        add_bos: whether a document begins with the tokenizer's BOS; None does as the tokenizer does.
        synthetic: share of examples by name of a task in `pose.data.synthetic.TASKS`.
        curriculum: (share of the run, length in tokens) of phases of shorter sequences before the rest.
        num_workers: processes that read; 0 reads in the training process.

    Raises:
        ConfigError: shares that do not add up, an unknown task, or a BOS the tokenizer does not have.
        DataError: a documents file is broken, or no document is long enough.
    """

    def __init__(
        self,
        documents: Sequence[str | Path],
        tokenizer,
        sampler: PositionSampler,
        *,
        num_examples: int,
        micro_batch: int,
        seed: int,
        cache_dir: str | Path,
        text_field: str = "text",
        window_len: int | None = None,
        add_bos: bool | None = None,
        synthetic: Mapping[str, float] | None = None,
        curriculum: Sequence[tuple[float, int]] = (),
        num_workers: int = 0,
    ):
        super().__init__()
        self.files, self.tokenizer, self.sampler = list(documents), tokenizer, sampler
        self.num_examples, self.micro_batch, self.seed = num_examples, micro_batch, seed
        self.cache_dir, self.text_field, self.window_len = cache_dir, text_field, window_len
        self.bos_id = bos_id(tokenizer, add_bos)
        self.synthetic, self.num_workers = dict(synthetic or {}), num_workers
        self.curriculum = [tuple(phase) if isinstance(phase, Sequence) else (phase,) for phase in curriculum]
        self.dataset: Dataset | None = None
        self._check()

    def _check(self):
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
            if not begin < end < 1 or length < 1 or example_len % length:
                raise ConfigError(
                    f"data.curriculum has the phase {list(phase)}: give [end, length], the end a share of the run "
                    f"above {begin:g} and below 1, the length a divisor of {example_len}"
                )
            begin = end
        num_bos = 0 if self.bos_id is None else 1
        if self.window_len is not None and self.window_len + num_bos < self.sampler.min_document_len:
            raise ConfigError(
                f"data.window_len={self.window_len} is too short: {self.sampler.name} draws from documents of at least "
                f"{self.sampler.min_document_len - num_bos} tokens"
            )

    def prepare_data(self):
        for file in dict.fromkeys(self.files):
            TokenCache.build(file, self.tokenizer, self.cache_dir, self.text_field)

    def setup(self, stage: str | None = None):
        if self.dataset is not None:
            return
        caches = [TokenCache.build(file, self.tokenizer, self.cache_dir, self.text_field) for file in self.files]
        documents = list(chain.from_iterable(_Document.all(cache) for cache in caches))
        tasks = {TASKS[name](self.tokenizer, documents): share for name, share in self.synthetic.items()}
        for task in tasks:  # what does not fit is an error now, not in the middle of the run
            for length in (self.sampler.example_len, *(length for _, length in self.curriculum)):
                task.sample(np.random.default_rng(0), length)

        ends = sentence_ends(self.tokenizer) if self.sampler.uses_breaks else None

        def dataset(sampler, window_len):
            return PoseDataset(
                documents, sampler, num_examples=self.num_examples, seed=self.seed,
                window_len=window_len, bos_id=self.bos_id, synthetic=tasks, sentence_end=ends,
            )  # fmt: skip

        self.dataset = dataset(self.sampler, self.window_len)
        if self.curriculum:
            batches = self.num_examples / self.micro_batch  # a batch is of one phase: its rows have one length
            phases = [
                (round(end * batches) * self.micro_batch, dataset(self.sampler.resized(n, n), n))
                for end, n in self.curriculum
            ]
            self.dataset = Curriculum([*phases, (self.num_examples, self.dataset)])

    def train_dataloader(self) -> DataLoader:
        # In order: example i of the run is item i. Under DDP Lightning's DistributedSampler deals
        # the items out in turn, so a global batch holds the same examples for any number of processes.
        return DataLoader(
            self.dataset, self.micro_batch, shuffle=False, num_workers=self.num_workers,
            collate_fn=collate, persistent_workers=self.num_workers > 0,
        )  # fmt: skip


class _Document(Sequence):
    """A document of a cache, by reference: picklable for workers, and no file is touched to list it."""

    def __init__(self, cache: TokenCache, index: int):
        self.cache, self.index = cache, index

    @classmethod
    def all(cls, cache: TokenCache):
        """Those of a cache that are not empty."""
        return (cls(cache, i) for i in range(len(cache)) if cache.lengths[i])

    def __len__(self):
        return int(self.cache.lengths[self.index])

    def __getitem__(self, key):
        return self.cache[self.index][key]


def bos_id(tokenizer, add_bos: bool | None) -> int | None:
    """The token to put before a document, or None.

    Args:
        tokenizer: a transformers tokenizer.
        add_bos: True, False, or None to do as the tokenizer itself does.

    Raises:
        ConfigError: add_bos is True and the tokenizer has no BOS token.
    """
    if add_bos is None:
        default = tokenizer("a")["input_ids"]
        add_bos = tokenizer.bos_token_id is not None and default[:1] == [tokenizer.bos_token_id]
    if add_bos and tokenizer.bos_token_id is None:
        raise ConfigError("add_bos=true, but this tokenizer has no BOS token: set it to false")
    return tokenizer.bos_token_id if add_bos else None


def sentence_ends(tokenizer) -> np.ndarray:
    """Which tokens end a sentence: those whose text ends in . ! or ? (closing quotes may follow), or in a line break.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        bool [vocabulary].
    """
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return np.array([SENTENCE_END.search(text) is not None for text in texts])
