"""The tensors of a checkpoint matched with a model's: each is used, or named in an error.

transformers drops what a config has no place for and draws what is missing at random; a config that ties an untied head
gives another model under every strategy. Here each of these is an error, the same for whatever reads the weights.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from pose.errors import CheckpointError
from pose.modeling import compat
from pose.modeling.lora import adapters

log = logging.getLogger(__name__)

Weights = Iterator[tuple[str, torch.Tensor]]
SHOWN = 5  # names in a message

# What old checkpoints hold beside their weights: numbers that follow from the config, and causal masks.
_TABLES = re.compile(r"(^|\.)(rotary\w*\.(inv_freq|cos_cached|sin_cached)|position_ids)$")
_MASKS = re.compile(r"\.(attn|attention|self_attn)\.(bias|masked_bias)$")


def places(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Where the tensors of a checkpoint go: parameters and persistent buffers by name, without adapters."""
    own = {id(part) for adapter in adapters(model).values() for part in (adapter.down, adapter.up)}
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in own
    }


def find(named: dict[str, torch.Tensor], name: str, prefix: str) -> str | None:
    """The name that a name in a checkpoint means, with or without the prefix of the base model; or None."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in named), None)


def matched(model: PreTrainedModel, weights: Weights, merging: bool = False) -> Weights:
    """The weights of a checkpoint by the names that the model has for them, as from_pretrained renames them.

    Args:
        model: that `compat.note_conversions` has seen, under any strategy.
        weights: by their names in the checkpoint; looked at one after the other.
        merging: whether tensors are merged or split by whoever reads them; they are not yielded.

    Yields:
        Each tensor that has a place, with that place's name.

    Raises:
        CheckpointError: one of two tensors for one tied weight differs from the other, or without `merging` a tensor
            is to be merged. And at the end: tensors that have no place, of another shape, or twice there; places for
            which there is none. Names them.
    """
    named = places(model)
    owners = Counter(map(id, named.values()))
    missing: dict[int, str] = {}
    for name, tensor in named.items():
        missing.setdefault(id(tensor), name)
    tied: dict[int, tuple[str, torch.Tensor]] = {}
    merged: dict[str, _Merged] = {}
    unexpected: list[str] = []
    left_out: list[str] = []
    shapes: list[tuple[str, Sequence[int], Sequence[int]]] = []
    twice: list[str] = []
    for name, tensor in weights:
        renamed, converter = compat.renamed(model, name)
        target = find(named, renamed, model.base_model_prefix)
        if target is None:  # a name of the model, which the renaming was not meant for
            target, converter = find(named, name, model.base_model_prefix), None
        if target is None:
            if not is_no_weight(name, tensor):
                (left_out if compat.is_left_out(model, renamed) else unexpected).append(name)
            continue
        if converter is not None and not merging:
            raise CheckpointError(
                f"{name} is merged with other weights, or split, when a {model.config.model_type} model is loaded, so "
                "this checkpoint cannot be sharded over several processes: take strategy=ddp or finetune=lora with "
                "strategy=auto"
            )
        if converter is not None:
            first, *others = converter.target_patterns
            for made in (target, *(target.replace(first, other) for other in others)):
                missing.pop(id(named.get(made)), None)
            wanted = merged.setdefault(target, _Merged(len(converter.source_patterns))).add(name, tensor.shape)
            if tensor.shape != wanted:
                shapes.append((name, tensor.shape, wanted))
            continue
        place = named[target]
        if owners[id(place)] > 1:
            first, other = tied.setdefault(id(place), (name, tensor))
            if first != name and not torch.equal(other.float(), tensor.float()):
                raise CheckpointError(
                    f"{first} and {name} differ, and the config says that they are one (tie_word_embeddings: true): "
                    "set it to false in config.json, or remove the one that is not the model's"
                )
        elif id(place) not in missing:
            twice.append(name)
            continue
        missing.pop(id(place), None)
        wanted = compat.full_shape(place)
        if tensor.shape != wanted:
            shapes.append((name, tensor.shape, wanted))
            continue
        yield target, tensor
    if left_out:
        log.warning(
            f"Weights that transformers' {model.config.model_type} has no use for are not read: {listed(left_out)}"
        )
    parts = [part for target, made in merged.items() for part in made.missing(target)]
    refuse([*missing.values(), *parts], unexpected, shapes, twice)


def merges(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether tensors of a checkpoint are merged with others, or split, when they are read: experts, above all.

    Args:
        model: that `compat.note_conversions` has seen.
        names: in the checkpoint.
    """
    named = places(model)
    renamed = (compat.renamed(model, name) for name in names)
    return any(made and find(named, name, model.base_model_prefix) is not None for name, made in renamed)


class _Merged:
    """Tensors that make one weight: kinds of them, such as the gates and the inputs of all experts, as many of each.

    Args:
        num_kinds: that there should be.
    """

    def __init__(self, num_kinds: int):
        self.num_kinds, self.kinds = num_kinds, dict[str, list[torch.Size]]()

    def add(self, name: str, shape: torch.Size) -> torch.Size:
        """The shape that a tensor should have: that of the first of its kind, whose name differs in its last number."""
        of_kind = self.kinds.setdefault(re.sub(r"\.\d+\.(?!.*\.\d+\.)", ".#.", name), [])
        of_kind.append(shape)
        return of_kind[0]

    def missing(self, target: str) -> list[str]:
        most = max(map(len, self.kinds.values()))
        few = [f"{kind} (there are {len(of)} of {most})" for kind, of in self.kinds.items() if len(of) < most]
        return few + [f"a part of {target}"] * (len(self.kinds) < self.num_kinds)


def refuse(
    missing: Collection[str],
    unexpected: Collection[str],
    shapes: Collection[tuple[str, Sequence[int], Sequence[int]]],
    twice: Collection[str] = (),
):
    """Raises CheckpointError if there are any.

    Args:
        missing: names of weights that the model has and the checkpoint lacks.
        unexpected: names of tensors that the model has no place for.
        shapes: names of tensors, with the shape of each and the one that the model has.
        twice: names of tensors whose place is taken by another.
    """
    other = [f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in shapes]
    problems = [
        f"{words}: {listed(names)}"
        for words, names in (
            ("it lacks weights of its own config", missing),
            ("it holds weights that its config has no place for", unexpected),
            ("it holds weights of other shapes than its config says", other),
            ("it holds several tensors for one weight", twice),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}. Correct config.json, or take the weights that belong to it")


def is_no_weight(name: str, tensor: torch.Tensor) -> bool:
    """Whether an unused tensor is one that old checkpoints hold, and that a model can do without."""
    return bool(_TABLES.search(name)) or (bool(_MASKS.search(name)) and tensor.ndim in (0, 4))


@torch.no_grad()
def not_finite(model: PreTrainedModel) -> list[str]:
    """Names of weights with NaN or infinities in the part that this process holds."""

    def is_finite(part: torch.Tensor) -> bool:
        if part.is_meta or part.numel() == 0 or not part.is_floating_point() or part.itemsize == 1:  # 1: quantised
            return True
        return all(bound.isfinite() for bound in part.aminmax())  # which NaN goes through

    return [name for name, tensor in places(model).items() if not is_finite(compat.local_part(tensor))]


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
