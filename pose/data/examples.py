"""Training examples: a pure function of (seed, epoch, index).

B examples in a batch, L tokens in an example.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from pose.errors import DataError
from pose.positions import PositionSampler, skip_before_question

IGNORE = -100  # the label of tokens that carry no loss, as in transformers


class PoseDataset(Dataset):
    """Examples of documents, laid out by a position sampler, drawn anew in every epoch.

    In an epoch each document is met once, or, with `window_len`, once for every window_len tokens
    it has. Item i is example (epoch, index) = divmod(i, epoch_len): nothing depends on the number
    of workers or processes, and starting at any i costs nothing.

    Args:
        documents: token arrays, one a document (`TokenCache`, or several joined in a list).
        sampler: which tokens an example shows and which position ids they get.
        num_examples: length of the dataset: examples in the whole run.
        seed: of everything drawn here.
        window_len: the document x of the sampler is a random stretch of at most so many tokens of a
            longer document, BOS among them; None takes documents whole.
        bos_id: put before x when given.
        synthetic: retrieval tasks by the share of examples they take, each an object with
            ``sample(rng, length) -> (tokens, is_answer)`` and ``question_len`` (`pose.tasks.synthetic.TrainingTask`).
        sentence_end: bool [vocabulary], the tokens that end a sentence; for samplers that use breaks.
        skip_before_question: whether what the positions of a retrieval example skip stands before its first question
            (`pose.positions.skip_before_question`), in place of where it was drawn.

    Raises:
        DataError: no document is long enough for the sampler.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        sampler: PositionSampler,
        *,
        num_examples: int,
        seed: int,
        window_len: int | None = None,
        bos_id: int | None = None,
        synthetic: Mapping[Any, float] | None = None,
        sentence_end: np.ndarray | None = None,
        skip_before_question: bool = True,
    ):
        self.documents, self.sampler = documents, sampler
        self.num_examples, self.seed, self.window_len, self.bos_id = num_examples, seed, window_len, bos_id
        self.synthetic, self.sentence_end = dict(synthetic or {}), sentence_end
        self.skip_before_question = skip_before_question
        self.num_bos = 0 if bos_id is None else 1
        lengths = np.array([len(document) for document in documents])
        self.usable = np.flatnonzero(lengths + self.num_bos >= sampler.min_document_len)
        if len(self.usable) == 0:
            raise DataError(
                f"none of the {len(lengths)} documents is long enough: the longest has {lengths.max(initial=0)} "
                f"tokens, and {type(sampler).__name__} with pose.train_len={sampler.train_len} and "
                f"pose.target_len={sampler.target_len} needs {sampler.min_document_len}"
            )
        visits = np.ones_like(self.usable) if window_len is None else lengths[self.usable] // window_len
        self.visits = np.repeat(self.usable, np.maximum(visits, 1))
        self._epoch_order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def epoch_len(self) -> int:
        """Examples in an epoch."""
        return len(self.visits)

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not 0 <= i < self.num_examples:
            raise IndexError(i)
        return self.example(*divmod(i, self.epoch_len))

    def example(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        """One example: input_ids, labels (IGNORE where no loss is taken), position_ids; int64 [L].

        Of a sampler that weighs tokens, token_weights too: fp32 [L].
        """
        rng = np.random.default_rng((self.seed, epoch, index))
        if (task := self._task(rng)) is not None:
            return self._synthetic_example(rng, task)
        document = self.documents[self._epoch_order(epoch)[index]]
        longest = len(document) if self.window_len is None else self.window_len - self.num_bos
        if len(document) > longest:
            start = int(rng.integers(len(document) - longest, endpoint=True))
            document = document[start : start + longest]
        layout = self.sampler.sample(rng, len(document) + self.num_bos, self._breaks(document))
        if self.bos_id is None:
            tokens = document[layout.content_ids].astype(np.int64)
        else:
            tokens = document[np.maximum(layout.content_ids - 1, 0)].astype(np.int64)
            tokens[layout.content_ids == 0] = self.bos_id
        return self._item(tokens, tokens, layout.position_ids, layout.weights)

    def num_rows(self, i: int) -> int:
        """Rows of a batch that item i becomes."""
        return 1

    def describe(self, i: int, row: int = 0) -> str:
        """Where item i comes from, for messages."""
        epoch, index = divmod(i, self.epoch_len)
        if self._task(np.random.default_rng((self.seed, epoch, index))) is not None:
            return f"example (epoch {epoch}, index {index}), a retrieval task"
        document = self._epoch_order(epoch)[index]
        name = getattr(self.documents[document], "id", f"number {document}")
        return f"example (epoch {epoch}, index {index}), document {name}"

    def _task(self, rng: np.random.Generator):
        """The retrieval task that an example is of, drawn first; None for text."""
        if self.synthetic:
            draw, share = rng.random(), 0.0
            for task, fraction in self.synthetic.items():
                share += fraction
                if draw < share:
                    return task
        return None

    def _breaks(self, document: np.ndarray) -> np.ndarray | None:
        """The indices in x (BOS included) at which a new sentence begins, for a sampler that looks at them."""
        if self.sentence_end is None or not self.sampler.uses_breaks:
            return None
        return np.flatnonzero(self.sentence_end[document[:-1]]) + 1 + self.num_bos

    def _synthetic_example(self, rng, task):
        tokens, is_answer = task.sample(rng, self.sampler.example_len - self.num_bos)
        if self.bos_id is not None:
            tokens, is_answer = np.append(self.bos_id, tokens), np.append(False, is_answer)
        layout = self.sampler.sample(rng, self.sampler.min_document_len)  # its positions alone
        positions = self.sampler.positions_of_answers(layout.position_ids, is_answer, task.question_len)
        if self.skip_before_question:
            positions = skip_before_question(positions, is_answer, task.question_len)
        return self._item(tokens, np.where(is_answer, tokens, IGNORE), positions)

    def _item(self, tokens, labels, position_ids, weights=None) -> dict[str, torch.Tensor]:
        arrays = {"input_ids": tokens, "labels": labels, "position_ids": position_ids}
        if self.sampler.weighs_tokens:  # every example has them then, or they could not be joined
            arrays["token_weights"] = np.ones(len(tokens), np.float32) if weights is None else weights
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.visits)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_epoch_order"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._epoch_order = lru_cache(maxsize=2)(self._shuffled)


class Curriculum(Dataset):
    """A run in phases: of short sequences (the same tokens a step, cut into more, shorter rows), of nearer targets.

    Args:
        phases: (first item that no longer belongs to it, its dataset), in order of item. An item
            of a phase is as many of its examples in a row as fill the last phase's length.
    """

    def __init__(self, phases: Sequence[tuple[int, PoseDataset]]):
        self.phases = list(phases)

    def __len__(self) -> int:
        return self.phases[-1][0]

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Tensors [rows, length] with rows * length the same for every item."""
        dataset, rows = self._phase(i), self.num_rows(i)
        examples = [dataset.example(*divmod(i * rows + row, dataset.epoch_len)) for row in range(rows)]
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def num_rows(self, i: int) -> int:
        """Rows of a batch that item i becomes."""
        return self.phases[-1][1].sampler.example_len // self._phase(i).sampler.example_len

    def describe(self, i: int, row: int = 0) -> str:
        """Where a row of item i comes from, for messages."""
        return self._phase(i).describe(i * self.num_rows(i) + row)

    def _phase(self, i: int) -> PoseDataset:
        return next(dataset for end, dataset in self.phases if i < end)


class Targets(NamedTuple):
    """Which tokens of a batch are scored. Worked out on the CPU, as a batch is made: no shape depends on the device.

    Attributes:
        at: int64 [n], of the states that predict them, in the batch's B * L.
        weights: fp32 [n], of each in the loss; those of a row with a target add up to 1 / B.
    """

    at: torch.Tensor
    weights: torch.Tensor

    def in_batch(self, name: str = "scored") -> dict[str, torch.Tensor]:
        """As a batch carries them. The weights are int32 there, bit for bit: DeepSpeed would round floats to bf16."""
        return {f"{name}_at": self.at, f"{name}_weights": self.weights.view(torch.int32)}

    @classmethod
    def of_batch(cls, batch: Mapping[str, torch.Tensor], name: str = "scored") -> "Targets | None":
        """Those that a batch carries under a name, on its device; None where it carries none."""
        if f"{name}_at" not in batch:
            return None
        return cls(batch[f"{name}_at"], batch[f"{name}_weights"].view(torch.float32))


def scored_tokens(labels: torch.Tensor, token_weights: torch.Tensor | None = None) -> Targets:
    """The targets of a batch.

    Args:
        labels: int64 [B, L], not shifted, IGNORE where no loss is taken.
        token_weights: fp32 [B, L], how much each label counts beside the others of its row: at least 0, and not 0 for
            all that are scored; None weighs them alike.
    """
    is_scored = labels[:, 1:] != IGNORE
    row, column = is_scored.nonzero(as_tuple=True)
    if token_weights is None:
        divisors = is_scored.sum(1) * len(labels)
        weights = divisors.float().reciprocal()[row]
    else:
        relative = token_weights[:, 1:] * is_scored
        weights = relative[row, column] * (relative.double().sum(1) * len(labels)).float().reciprocal()[row]
    return Targets(row * labels.shape[1] + column, weights)


def skipped_tokens(position_ids: torch.Tensor) -> Targets:
    """The tokens of a batch from the first skip of their rows on: their places, and what weighs each in its row's mean.

    Args:
        position_ids: int64 [B, L].
    """
    is_moved = position_ids != torch.arange(position_ids.shape[1])
    row, column = is_moved.nonzero(as_tuple=True)
    weights = (is_moved.sum(1) * len(position_ids)).float().reciprocal()[row]
    return Targets(row * position_ids.shape[1] + column, weights)


def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Joins items to a batch [B, L]."""
    return {name: torch.cat([torch.atleast_2d(item[name]) for item in items]) for name in items[0]}


def collate_scored(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As `collate`, with its `Targets` (`Targets.of_batch`) in place of the items' token_weights."""
    batch = collate(items)
    return batch | scored_tokens(batch["labels"], batch.pop("token_weights", None)).in_batch()


def collate_views(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As `collate_scored`, with its `skipped_tokens` under the name skipped."""
    batch = collate_scored(items)
    return batch | skipped_tokens(batch["position_ids"]).in_batch("skipped")
