"""What a training minimises: the config group `objective`.

An objective makes a batch of examples, and says what its loss is. One model may see the same tokens twice, at plain
positions and at the sampler's (`pose.modeling.views`).

Shapes: B examples, L tokens of each.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from transformers import PreTrainedModel

from pose.data.examples import Targets, collate_scored, collate_views
from pose.errors import ConfigError, require_number
from pose.modeling.loss import loss_and_example_losses, weighted_kl
from pose.modeling.views import hidden_states_of_views
from pose.positions import PositionSampler


class Losses(NamedTuple):
    """Of a batch, in nats per token.

    Attributes:
        loss: fp32 scalar, what is minimised.
        by_example: fp32 [B] without gradients, what each example adds to it, times B.
        parts: fp32 scalars without gradients by `Objective.parts`, before they are weighted.
    """

    loss: torch.Tensor
    by_example: torch.Tensor
    parts: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Objective(ABC):
    """What every objective has in common.

    Attributes:
        parts: names of what the loss is made of, that of the language model first; () where it is that alone. They are
            logged as train/loss_NAME.
    """

    parts: ClassVar[tuple[str, ...]] = ()

    def collate(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Joins examples to a batch of its own kind, on the CPU."""
        return collate_scored(items)

    def check(self, sampler: PositionSampler):  # noqa: B027  # most have nothing to ask for
        """Whether it can be trained on what a sampler draws.

        Raises:
            ConfigError: it cannot; names the key.
        """

    @abstractmethod
    def describe(self) -> str:
        """What it is, in a line of the model card."""

    @abstractmethod
    def losses(self, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> Losses:
        """The loss of a batch that `collate` made. Call it by `pose.modeling.shard.with_root`.

        Args:
            model: as it trains.
            batch: on the model's device.
        """


@dataclass(frozen=True)
class LanguageModel(Objective):
    """`objective=lm`: the cross-entropy of the next token at the sampler's positions, as in the paper."""

    def describe(self):
        return "cross-entropy of the next token"

    def losses(self, model, batch):
        return _language_model(model, batch, batch["position_ids"])


@dataclass(frozen=True)
class SelfDistill(Objective):
    """`objective=self_distill`: RoPE-perturbed self-distillation (arXiv 2604.14339).

    The same tokens at plain positions 0..L-1 (p) and at the sampler's (q). The loss is the language model's at plain
    positions, plus

        weight * mean over the tokens from the first skip on of KL(p || q),

    where no gradient goes through p. Tokens before the first skip have equal positions in both, and nothing to learn.
    Each example counts the same, as in the language model's loss; one without a skip adds no KL.

    Args:
        weight: lambda, of the KL. At 0 it is the language model's loss at plain positions, whatever the sampler.

    Raises:
        ConfigError: weight is not a number of at least 0.
    """

    parts = ("lm", "kl")

    weight: float = 1.0

    def __post_init__(self):
        require_number("objective.weight", self.weight, at_least=0)

    def collate(self, items):
        return collate_views(items)

    def check(self, sampler):
        _require_skips("self_distill", sampler)

    def describe(self):
        return (
            "self-distillation (arXiv 2604.14339): cross-entropy of the next token at plain positions, and "
            f"{self.weight:g} times the divergence of the predictions at the sampler's from those at plain ones"
        )

    def losses(self, model, batch):
        if self.weight == 0:
            plain = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
            loss, by_example, _ = _language_model(model, batch, plain.expand_as(batch["input_ids"]))
            return Losses(loss, by_example, (loss.detach(), torch.zeros_like(loss)))
        labels, skipped = batch["labels"], Targets.read(batch, "skipped")
        views = hidden_states_of_views(model, batch["input_ids"], batch["position_ids"], skipped.at)
        head = model.get_output_embeddings()
        lm, by_example = loss_and_example_losses(views.plain.view(*labels.shape, -1), head, labels, _scored(batch))
        kl, by_token = weighted_kl(views.skipped, views.plain[skipped.at], head, skipped.weights)
        by_example = by_example.index_add(
            0, skipped.at // labels.shape[1], self.weight * len(labels) * skipped.weights * by_token
        )
        return Losses(lm + self.weight * kl, by_example, (lm.detach(), kl.detach()))


def _language_model(model: PreTrainedModel, batch: dict[str, torch.Tensor], position_ids: torch.Tensor) -> Losses:
    body = model.base_model
    hidden = body(input_ids=batch["input_ids"], position_ids=position_ids, use_cache=False).last_hidden_state
    return Losses(*loss_and_example_losses(hidden, model.get_output_embeddings(), batch["labels"], _scored(batch)))


def _scored(batch: dict[str, torch.Tensor]) -> Targets | None:
    return Targets.read(batch, "scored") if "scored_at" in batch else None


def _require_skips(name: str, sampler: PositionSampler):
    if not sampler.skips:
        raise ConfigError(
            f"objective={name} compares plain positions with those of the sampler, and pose={sampler.name} draws plain "
            "ones alone: choose a sampler with skips, or objective=lm"
        )
