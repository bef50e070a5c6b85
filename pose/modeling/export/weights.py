"""The weights of a trained model into safetensors files, of which one at a time is in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pose.errors import CheckpointError, TrainingError
from pose.modeling import compat
from pose.modeling.export.fold import Fold
from pose.modeling.held import becomes
from pose.modeling.lora import adapters
from pose.modeling.shard import full_shape, full_weight
from pose.modeling.weights import matched, places

SHARD_SIZE = "5GB"  # of a file: what is held in memory, and what most hubs and file systems like


class Weights:
    """What is saved of a model, and in which files: adapters merged, tied weights once, names of a checkpoint.

    Frozen weights that are held in fewer bits than their checkpoint has (QLoRA) are read from there once more.

    Args:
        model: as it trains, under any strategy.
        dtype: of the saved weights; whole numbers keep theirs, and what transformers holds in fp32 stays so.
        fold: what is multiplied into them before they are rounded; None: nothing.

    Attributes:
        files: names of the files with the tensors in each; those that `save_pretrained` would give for SHARD_SIZE.
        num_bytes, num_parameters: of all files together.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, fold: Fold | None = None):
        self.model, self.dtype, self.fold = model, dtype, fold
        self._in_fp32 = compat.kept_in_fp32(model, dtype)
        self._parameters = _saved_parameters(model)
        self._adapters = adapters(model)
        self._stored = Stored(model)
        shapes = {
            name: torch.empty(full_shape(tensor), dtype=self._dtype_of(name, tensor), device="meta")
            for name, tensor in self._parameters.items()
        }
        saved = {name: torch.empty_like(tensor) for name, tensor in self._as_in_checkpoint(shapes).items()}
        alone = {name: self._as_in_checkpoint({name: tensor}) for name, tensor in shapes.items()}
        order = {name: place for place, name in enumerate(saved)}
        # What has to be together to be given its form in a checkpoint: each weight alone, or, where a checkpoint merges
        # what the model has apart, all of them.
        if {n: t.shape for made in alone.values() for n, t in made.items()} == {n: t.shape for n, t in saved.items()}:
            self._groups = sorted(([name] for name in shapes), key=lambda group: order[next(iter(alone[group[0]]))])
        else:
            self._groups = [list(shapes)]
        self._split = split_torch_state_dict_into_shards(
            saved, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
        )
        self.files = self._split.filename_to_tensors
        self.num_bytes: int = self._split.metadata["total_size"]
        self.num_parameters = sum(tensor.numel() for tensor in saved.values())

    def write(self, folder: Path, is_writer: bool):
        """Writes the files. Every process must call this, since each may hold a part of the weights.

        Args:
            folder: that is there.
            is_writer: whether this process writes; the others only give their parts.

        Raises:
            TrainingError: a weight is not finite; every process raises it.
        """
        gathered = self._gathered(keep=is_writer)
        waiting: dict[str, dict[str, torch.Tensor]] = {file: {} for file in self.files}
        try:
            for weights in gathered:
                for name, tensor in weights.items():
                    file = self._split.tensor_to_filename[name]
                    waiting[file][name] = tensor.contiguous()
                    if len(waiting[file]) == len(self.files[file]):
                        save_file(waiting.pop(file), folder / file, {"format": "pt"})
            if is_writer and self._split.is_sharded:
                metadata = {"total_parameters": self.num_parameters, **self._split.metadata}
                index = {"metadata": metadata, "weight_map": self._split.tensor_to_filename}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        except (OSError, SafetensorError):
            waiting.clear()
            for _ in gathered:  # the other processes wait for this one's parts
                pass
            raise

    def _gathered(self, keep: bool) -> Iterator[dict[str, torch.Tensor]]:
        """The weights on the CPU, a group at a time, by their names in a checkpoint; {} where they are not kept."""
        for group in self._groups:
            whole = {}
            for name in group:
                tensor = self._whole(name)
                if keep:
                    whole[name] = tensor.to("cpu", self._dtype_of(name, tensor))
            yield self._as_in_checkpoint(whole) if keep else {}

    @torch.no_grad()
    def _whole(self, name: str) -> torch.Tensor:
        parameter, is_rounded = self._parameters[name], _plain(name) in self._stored.names
        full = full_weight(parameter)
        if is_rounded:
            held, full = full, self._stored(_plain(name))
            if not becomes(full, parameter if compat.is_quantised(parameter) else held):
                raise CheckpointError(
                    f"{_plain(name)} has other values in the checkpoint (model.path) than the model was trained with: "
                    "it was changed meanwhile. Bring the earlier one back, and go on with resume=auto"
                )
        if name in self._adapters:
            down, up, scale = self._adapters[name]
            added = scale * (full_weight(up).float() @ full_weight(down).float())
            full = full.to(added.device).float() + added
        if self.fold is not None:
            full = self.fold(_plain(name), full)
        if full.is_floating_point() and not full.isfinite().all():
            raise broken(f"{_plain(name)} has values that are not finite")
        return full

    def _dtype_of(self, name: str, tensor: torch.Tensor) -> torch.dtype:
        if not (tensor.is_floating_point() or compat.is_quantised(tensor)):
            return tensor.dtype
        return torch.float32 if self._in_fp32(_plain(name)) else self.dtype

    def _as_in_checkpoint(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return compat.as_in_checkpoint(self.model, {_plain(name): tensor for name, tensor in weights.items()})


class Stored:
    """The weights of a model's checkpoint that the model holds in fewer bits, each read when it is asked for.

    Args:
        model: as it trains.

    Attributes:
        names: of these weights, without those of adapters; none where there is no checkpoint.
    """

    def __init__(self, model: PreTrainedModel):
        source: Any = getattr(model, "source", None)
        self.names: set[str] = set() if source is None else getattr(model, "rounded", set())
        self._places = {name: id(place) for name, place in places(model).items()} if self.names else {}
        self._wanted = {self._places[name] for name in self.names}
        self._rest = matched(model, source()) if self.names else iter(())
        self._waiting: dict[int, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """The checkpoint's own tensor, once; tensors before it in the files wait to be asked for, mapped and not read.

        Raises:
            CheckpointError: the checkpoint is no longer the one that the model was loaded from.
        """
        wanted = self._places[name]
        while wanted not in self._waiting:
            found = next(self._rest, None)
            if found is None:
                raise CheckpointError(f"{name} is no longer in the checkpoint that the model was loaded from")
            if (place := self._places[found[0]]) in self._wanted:
                self._waiting[place] = found[1]
        return self._waiting.pop(wanted)


def broken(what: str) -> TrainingError:
    """The error for a model that training has made useless; every process raises the same."""
    error = TrainingError(
        f"the training has broken the model, and nothing is exported: {what}. Start anew with a lower finetune.lr, and "
        "with trainer.precision=bf16-mixed or 32-true where it has 16 bits",
        anew=True,
    )
    error.is_everywhere = True
    return error


def _saved_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers to save, by the model's names: none of an adapter, and one of those that are tied."""
    parts = {id(part) for adapter in adapters(model).values() for part in (adapter.down, adapter.up)}
    found = model.state_dict(keep_vars=True)
    kept: dict[int, str] = {}
    for name, tensor in sorted(found.items(), key=lambda item: _plain(item[0]) in model.all_tied_weights_keys):
        kept.setdefault(id(tensor), name)
    return {name: tensor for name, tensor in found.items() if kept[id(tensor)] == name and id(tensor) not in parts}


def _plain(name: str) -> str:
    """The name of a weight as it is without adapters."""
    return name.replace(".base_layer.", ".")
