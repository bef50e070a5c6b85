"""Skip-wise batches for your own DataLoader or Trainer: documents in, `input_ids, labels, position_ids` out."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import get_worker_info

from pose.data.examples import collate
from pose.errors import ConfigError, DataError
from pose.positions import PositionSampler


class PoseCollator:
    """A collate function that shows a new layout of a document each time it meets it.

    Nothing is frozen into the data: the position ids of a document differ from epoch to epoch. In a
    process without workers the draws follow from `seed` alone. A DataLoader's worker draws from
    `seed` and its own worker seed, which torch makes anew for every worker and epoch, from
    `torch.manual_seed` or the DataLoader's generator; so a run repeats with the same seeds and the
    same number of workers. In distributed training each rank (the variable RANK, as torchrun sets
    it) draws for itself.

    Args:
        sampler: which tokens of a document an example shows, and their position ids.
        seed: of the layouts, at least 0.
        sentence_end: bool [vocabulary], the tokens that end a sentence, for samplers that split at
            sentences (`uses_breaks`); see `pose.data.datamodule.sentence_ends`.

    Raises:
        ConfigError: the sampler weighs tokens, or its target grows over the run: a collator could do neither.
    """

    def __init__(self, sampler: PositionSampler, seed: int = 0, sentence_end: np.ndarray | None = None):
        if sampler.weighs_tokens:
            raise ConfigError(
                f"{sampler.name} weighs the tokens of an example, which a trainer that takes its loss from labels "
                "cannot: give all the same weight (of EndAnchor, cue_weight=1)"
            )
        if sampler.curriculum is not None:
            raise ConfigError(
                "a collator does not know how far the run is: give a sampler without curriculum, and another one when "
                "a phase begins"
            )
        self.sampler, self.seed, self.sentence_end = sampler, seed, sentence_end
        self._source: tuple[int, ...] = ()

    def __call__(self, features: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """One batch.

        Args:
            features: each with the `input_ids` of a whole tokenised document, without padding: a
                list, array or tensor of at least `sampler.min_document_len` tokens. Its `labels`
                are kept when it has some of the same length (-100 where no loss is taken); without,
                every token is one.

        Returns:
            input_ids, labels, position_ids; int64 [B, sampler.example_len]. Labels are not shifted.

        Raises:
            DataError: a feature has no such input_ids or labels, or is too short; names its place in the batch.
        """
        rng = self._generator()
        return collate([self._example(rng, feature, f"item {i} of the batch") for i, feature in enumerate(features)])

    def _example(self, rng: np.random.Generator, feature: Mapping, where: str) -> dict[str, torch.Tensor]:
        if "input_ids" not in feature:
            raise DataError(f"{where} has no input_ids, only {sorted(feature)}")
        tokens = np.asarray(feature["input_ids"])
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(
                f"{where}: input_ids has shape {list(tokens.shape)} and type {tokens.dtype}, where the token ids of "
                "one document are expected"
            )
        if len(tokens) < self.sampler.min_document_len:
            raise DataError(
                f"{where} has {len(tokens)} tokens, and {self.sampler.name} with train_len={self.sampler.train_len} "
                f"and target_len={self.sampler.target_len} needs {self.sampler.min_document_len}: leave shorter "
                "documents out of the dataset, or join them"
            )
        labels = np.asarray(feature.get("labels", tokens))
        if labels.shape != tokens.shape:
            raise DataError(f"{where} has {len(tokens)} input_ids and labels of shape {list(labels.shape)}")
        breaks = None
        if self.sentence_end is not None and self.sampler.uses_breaks:
            breaks = np.flatnonzero(self.sentence_end[tokens]) + 1
        layout = self.sampler.sample(rng, len(tokens), breaks)
        example = {
            "input_ids": tokens[layout.content_ids],
            "labels": labels[layout.content_ids],
            "position_ids": layout.position_ids,
        }
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in example.items()}

    def _generator(self) -> np.random.Generator:
        worker = get_worker_info()
        source = (self.seed, int(os.environ.get("RANK", "0")), 0 if worker is None else worker.seed)
        if source != self._source:
            self._source, self._rng = source, np.random.default_rng(source)
        return self._rng
