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
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pose.data.examples import Targets, collate_scored, collate_views
from pose.errors import ConfigError, require_int, require_number
from pose.modeling.layers import decoder_layers
from pose.modeling.loss import CHUNK_LEN_OF_VIEWS, loss_and_example_losses, weighted_nll_and_kl
from pose.modeling.teacher import Teacher, states_of_layers
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
        name: in the config group `objective`.
        num_views: under how many sets of position ids the model sees each example.
        trains_plain, trains_skipped: whether the loss has a part at plain positions whatever the sampler, and one at
            the sampler's.
        parts: names of what the loss is made of, that of the language model first; () where it is that alone. They are
            logged as train/loss_NAME.
        has_teacher: whether it keeps to the original model (`pose.modeling.teacher`).
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ()
    has_teacher: ClassVar[bool] = False

    @property
    def num_views(self) -> int:
        return 1

    @property
    def trains_plain(self) -> bool:
        return False

    @property
    def trains_skipped(self) -> bool:
        return True

    def collate(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Joins examples to a batch of its own kind, on the CPU."""
        return collate_scored(items)

    def check(self, sampler: PositionSampler, num_layers: int):  # noqa: B027  # most have nothing to ask for
        """Whether it can be trained on what a sampler draws, by a model of so many layers.

        Raises:
            ConfigError: it cannot; names the key.
        """

    def _require_skips(self, sampler: PositionSampler):
        if not sampler.changes_distances:
            raise ConfigError(
                f"objective={self.name} compares plain positions with a sampler's, and the sampler {sampler.name} "
                "puts all tokens as far apart as they stand: choose a sampler with skips, or objective=lm"
            )

    @abstractmethod
    def describe(self) -> str:
        """What it is, in a line of the model card."""

    @abstractmethod
    def losses(self, model: PreTrainedModel, batch: dict[str, torch.Tensor], teacher: Teacher | None = None) -> Losses:
        """The loss of a batch that `collate` made. Call it by `pose.modeling.shard.with_root`.

        Args:
            model: as it trains.
            batch: on the model's device.
            teacher: the original, where the objective has one.
        """


@dataclass(frozen=True)
class LanguageModel(Objective):
    """`objective=lm`: the cross-entropy of the next token at the sampler's positions, as in the paper."""

    name = "lm"

    def describe(self):
        return "cross-entropy of the next token"

    def losses(self, model, batch, teacher=None):
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

    name = "self_distill"
    parts = ("lm", "kl")

    weight: float = 1.0

    def __post_init__(self):
        require_number("objective.weight", self.weight, at_least=0)

    @property
    def num_views(self):
        return 1 if self.weight == 0 else 2

    @property
    def trains_plain(self):
        return True

    @property
    def trains_skipped(self):
        return self.weight > 0

    def collate(self, items):
        if self.weight == 0:
            return collate_scored(items)
        batch = collate_views(items)
        scored, skipped = batch["scored_at"], batch["skipped_at"]
        return batch | {"alone_at": scored[~torch.isin(scored, skipped)]}

    def check(self, sampler, num_layers):
        if self.weight != 0:
            self._require_skips(sampler)

    def describe(self):
        return (
            "self-distillation (arXiv 2604.14339): cross-entropy of the next token at plain positions, and "
            f"{self.weight:g} times the divergence of the predictions at the sampler's from those at plain ones"
        )

    def losses(self, model, batch, teacher=None):
        if self.weight == 0:
            plain = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
            loss, by_example, _ = _language_model(model, batch, plain.expand_as(batch["input_ids"]))
            return Losses(loss, by_example, (loss.detach(), torch.zeros_like(loss)))
        labels, skipped = batch["labels"], _tokens(batch, "skipped")
        views = hidden_states_of_views(model, batch["input_ids"], batch["position_ids"], skipped.at)
        scored = _tokens(batch, "scored")
        targets = labels.roll(-1, 1).clamp(min=0).flatten()
        loss, nll, kl = weighted_nll_and_kl(
            views.plain, views.skipped, model.get_output_embeddings(), targets, scored, skipped,
            batch["alone_at"], self.weight,
        )  # fmt: skip
        nll, kl = nll[scored.at] * scored.weights, kl * skipped.weights
        by_example = torch.zeros(len(labels), device=labels.device)
        by_example.index_add_(0, scored.at // labels.shape[1], nll * len(labels))
        by_example.index_add_(0, skipped.at // labels.shape[1], kl * self.weight * len(labels))
        return Losses(loss, by_example, (nll.sum(), kl.sum()))


@dataclass(frozen=True)
class LongShort(Objective):
    """`objective=long_short`: keep what short texts had, by the original model (LongReD, arXiv 2502.07365).

    The same tokens at plain positions and at the sampler's; the teacher is the original model, with its own
    frequencies, at plain positions. With cos the mean over tokens of the cosine similarity of hidden states, it is

        lm_weight * (the language model's at the sampler's positions)
        + short_weight * sum over layers of (1 - cos(plain, teacher))
        + skipped_weight * (1 - cos(sampler's, teacher)) of the last layer.

    LongReD draws the three from texts of different lengths; here they share the tokens of each example, so that two
    passes of the model and one of the teacher serve all of them.

    Args:
        lm_weight, short_weight, skipped_weight: of the three (the paper's 1, 5, 10).
        layers: whose states on short texts keep to the teacher's, of 1..n for a model of n layers; n is what the head
            sees. None takes the first, those at a quarter, a half and three quarters, and the last. (LongReD takes
            1, 9, 12, 14, 15 and 32 of LLaMA-3-8B's 32.)

    Raises:
        ConfigError: a weight is not a number of at least 0, or layers is no list of different layers.
    """

    name = "long_short"
    parts = ("lm", "short", "skipped")
    has_teacher = True

    lm_weight: float = 1.0
    short_weight: float = 5.0
    skipped_weight: float = 10.0
    layers: Sequence[int] | None = None

    @property
    def num_views(self):
        return 2

    @property
    def trains_plain(self):
        return self.short_weight > 0

    @property
    def trains_skipped(self):
        return self.lm_weight > 0 or self.skipped_weight > 0

    def __post_init__(self):
        for name in ("lm_weight", "short_weight", "skipped_weight"):
            require_number(f"objective.{name}", getattr(self, name), at_least=0)
        if not any((self.lm_weight, self.short_weight, self.skipped_weight)):
            raise ConfigError(
                "objective.lm_weight, objective.short_weight and objective.skipped_weight are all 0: give one above"
            )
        if self.layers is not None:
            if isinstance(self.layers, str) or not isinstance(self.layers, Sequence) or not self.layers:
                raise ConfigError(f"objective.layers={self.layers!r} is not accepted: give a list of layers, or null")
            for layer in self.layers:
                require_int("objective.layers", layer, at_least=1)
            if len(set(self.layers)) < len(self.layers):
                raise ConfigError(f"objective.layers={list(self.layers)} names a layer twice")

    def collate(self, items):
        return collate_views(items)

    def check(self, sampler, num_layers):
        self._require_skips(sampler)
        if max(self.layers or [1]) > num_layers:
            raise ConfigError(
                f"objective.layers={list(self.layers or [])}: this model has {num_layers} layers; give some of 1 to "
                f"{num_layers}"
            )

    def layers_of(self, num_layers: int) -> list[int]:
        """The chosen ones of a model of so many layers, ascending."""
        if self.layers is not None:
            return sorted(self.layers)
        return sorted({1, *(max(round(num_layers * share), 1) for share in (0.25, 0.5, 0.75)), num_layers})

    def describe(self):
        return (
            f"restoration distillation (LongReD, arXiv 2502.07365): {self.lm_weight:g} times the cross-entropy of the "
            f"next token, {self.short_weight:g} times the distance of hidden states to the original model's on short "
            f"texts, {self.skipped_weight:g} times that at the sampler's positions"
        )

    def losses(self, model, batch, teacher=None):
        assert teacher is not None
        labels, skipped = batch["labels"], _tokens(batch, "skipped")
        num, num_examples = labels.numel(), len(labels)
        last = len(decoder_layers(model))
        layers = self.layers_of(last)
        original = teacher.hidden_states(batch["input_ids"], [*layers, *([] if last in layers else [last])])
        wanted = [states.flatten(0, 1) for states in original]
        with states_of_layers(model, layers) as found:
            views = hidden_states_of_views(model, batch["input_ids"], batch["position_ids"], skipped.at)
        second = views.second(skipped.at)
        head, shape = model.get_output_embeddings(), (*labels.shape, -1)
        scored = Targets.of_batch(batch)
        lm, lm_by_example = loss_and_example_losses(second.view(shape), head, labels, scored, CHUNK_LEN_OF_VIEWS)
        plain = [states.flatten(0, 1)[:num] for states in found]
        short = torch.stack([_distances(a, b) for a, b in zip(plain, wanted, strict=False)]).sum(0)
        moved = _distances(second, wanted[-1])
        with torch.no_grad():
            kept = self.short_weight * short + self.skipped_weight * moved
            by_example = self.lm_weight * lm_by_example + kept.view(num_examples, -1).mean(1)
        parts = lm, short.mean(), moved.mean()
        loss = self.lm_weight * lm + self.short_weight * parts[1] + self.skipped_weight * parts[2]
        return Losses(loss, by_example, tuple(part.detach() for part in parts))


def _distances(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity, fp32 [n], of hidden states [n, H]."""

    def distances(states):
        return 1 - F.cosine_similarity(states.float(), wanted.float(), dim=-1)

    # Or autograd would keep both normalised, in fp32
    return checkpoint(distances, states, use_reentrant=False, preserve_rng_state=False)


def _language_model(model: PreTrainedModel, batch: dict[str, torch.Tensor], position_ids: torch.Tensor) -> Losses:
    body = model.base_model
    hidden = body(input_ids=batch["input_ids"], position_ids=position_ids, use_cache=False).last_hidden_state
    return Losses(
        *loss_and_example_losses(hidden, model.get_output_embeddings(), batch["labels"], Targets.of_batch(batch))
    )


def _tokens(batch: dict[str, torch.Tensor], name: str) -> Targets:
    found = Targets.of_batch(batch, name)
    assert found is not None, "a batch of `collate_views`"
    return found
