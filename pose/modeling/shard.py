"""Models in parts: no process ever holds all the weights of one.

A model is built without weights. Each weight is read when its turn comes, given to the processes in
parts (FSDP2, ZeRO-3), and forgotten. What is not a weight, the inverse frequencies above all, is
computed in full and in fp32 by every process.

W processes of rank r; a weight of n elements.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

from pose.errors import CheckpointError
from pose.modeling.layers import decoder_layers
from pose.modeling.lora import initial_adapters

Weights = Iterator[tuple[str, torch.Tensor]]


class Layout(Protocol):
    """How the weights of a model are dealt out to the processes.

    Attributes:
        device: of the buffers.
    """

    device: torch.device

    def wrap(self, model: PreTrainedModel):
        """Prepares a model whose parameters are on the meta device."""

    def place(self, parameter: nn.Parameter, whole: torch.Tensor) -> nn.Parameter:
        """This process's part of a weight, as what takes the place of its meta parameter."""


class Whole:
    """Every process keeps all weights, on its device and in one dtype: the first stages of ZeRO.

    Args:
        device, dtype: of the weights.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def wrap(self, model: PreTrainedModel):
        pass

    def place(self, parameter: nn.Parameter, whole: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(whole.to(self.device, self.dtype, copy=True), parameter.requires_grad)


class FullyShard:
    """FSDP2: each process keeps a slice of every weight, in fp32, and gathers a decoder layer while it computes.

    With a compute dtype, weights are gathered in it, and gradients reduced in fp32: half the traffic and half the
    working set of autocast, which would gather fp32. The optimizer sees the fp32 slices alone.

    Args:
        mesh: one-dimensional, over all processes.
        device: of the slices.
        compute_dtype: in which layers compute; None is fp32.
    """

    def __init__(self, mesh, device: torch.device, compute_dtype: torch.dtype | None):
        self.mesh, self.device = mesh, device
        self.policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)

    def wrap(self, model: PreTrainedModel):
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=self.mesh, mp_policy=self.policy)
        # Embeddings, last norm and head in one group, so that tied ones can be: it is gathered by a call of the model,
        # and `with_root` makes one of whatever else uses these weights.
        fully_shard(model, mesh=self.mesh, mp_policy=self.policy)
        model.call = _call
        register_fsdp_forward_method(model, "call")

    def place(self, parameter: nn.Parameter, whole: torch.Tensor) -> nn.Parameter:
        chunks = whole.chunk(self.mesh.size())
        rank = self.mesh.get_local_rank()
        part = (chunks[rank] if rank < len(chunks) else whole[:0]).to(self.device, parameter.dtype, copy=True)
        part = DTensor.from_local(
            part, self.mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )  # fmt: skip
        return nn.Parameter(part, parameter.requires_grad)


class Zero3:
    """DeepSpeed's ZeRO stage 3: each process keeps n / W elements of every weight, in the dtype it computes in.

    Rank 0 reads and the others receive. The fp32 master weights are made by the engine, from these
    (`set_masters` makes them exact).

    Args:
        config: of DeepSpeed, with batch size and precision in it.
        device: on which weights are put together.
    """

    def __init__(self, config: dict[str, Any], device: torch.device):
        self.config, self.device = config, device
        enabled = [
            dtype
            for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
            if config.get(key, {}).get("enabled")
        ]
        self.dtype = enabled[0] if enabled else torch.float32

    def wrap(self, model: PreTrainedModel):
        pass

    def place(self, parameter: nn.Parameter, whole: torch.Tensor) -> nn.Parameter:
        import deepspeed

        if torch.distributed.get_rank() == 0:
            data = whole.to(self.device, self.dtype, copy=True)
        else:
            data = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
        placed = nn.Parameter(data, parameter.requires_grad)
        deepspeed.zero.Init(module=nn.ParameterList([placed]), config_dict_or_path=self.config)
        return placed


@contextlib.contextmanager
def parameters_on_meta():
    """Models built inside have parameters without memory; their buffers are computed, on the CPU."""
    register = nn.Module.register_parameter

    def register_on_meta(module, name, parameter):
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def fill(model: PreTrainedModel, weights: Weights, layout: Layout) -> list[str]:
    """Gives every parameter of a model on the meta device its value, each process its part.

    Args:
        model: as `layout.wrap` left it; adapters (`pose.modeling.lora`) get their initial values.
        weights: of the model, whole, by its names for them (`renamed`); read one after the other, by every process
            in the same order.
        layout: how they are dealt out.

    Returns:
        The names of parameters that got no value: missing among the weights, or there with another shape.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    meta = _by_checkpoint_name(model)
    waiting = {id(parameter) for parameter in meta.values()}

    def place(parameter: nn.Parameter, tensor: torch.Tensor):
        placed = layout.place(parameter, tensor)
        for module, name in owners[id(parameter)]:
            setattr(module, name, placed)
        waiting.discard(id(parameter))

    for name, tensor in weights:
        parameter = find(meta, name, model.base_model_prefix)
        if parameter is None or id(parameter) not in waiting:  # masks and frequencies of old checkpoints; a tied head
            continue
        if tensor.shape == parameter.shape:
            place(parameter, tensor)
    for name, tensor in initial_adapters(model):
        place(meta[name], tensor)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(layout.device))
    return [name for name, parameter in meta.items() if id(parameter) in waiting]


def note_conversions(model: PreTrainedModel, from_checkpoint: bool):
    """Notes on a model how its names differ from those of its checkpoints: for `renamed`, and for save_pretrained.

    transformers would look it up when it saves, by the model's class, which `Layout.wrap` may replace by another.

    Args:
        model: on the meta device, before `Layout.wrap`.
        from_checkpoint: whether it is to be filled from one: `keep_used_conversions` comes after that. A model of
            random weights is saved under the names that transformers gives to one.
    """
    conversions = get_model_conversion_mapping(model, add_legacy=from_checkpoint)
    model._weight_conversions = [c for c in conversions if from_checkpoint or not isinstance(c, PrefixChange)]


def keep_used_conversions(model: PreTrainedModel):
    """Forgets what the names of the checkpoint had no need of, as from_pretrained: the model is saved under them."""
    model._weight_conversions = [conversion for conversion in model._weight_conversions if conversion.was_used()]


def renamed(model: PreTrainedModel, weights: Weights) -> Weights:
    """The weights of a checkpoint by the names that the model has for them, as from_pretrained renames them.

    Args:
        model: that `note_conversions` has seen.
        weights: by their names in the checkpoint.

    Raises:
        CheckpointError: transformers makes a weight of the model out of several in the checkpoint, or the reverse; or
            the checkpoint has two different weights for one tied parameter, which from_pretrained would untie.
    """
    parameters = _by_checkpoint_name(model)
    owners = Counter(id(parameter) for parameter in parameters.values())
    renamings = [c for c in model._weight_conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in model._weight_conversions if isinstance(c, WeightConverter)]
    tied: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in weights:
        new_name, converter = rename_source_key(name, renamings, converters)
        parameter = find(parameters, new_name, model.base_model_prefix)
        if parameter is None:  # a name of the model, which the renaming was not meant for
            new_name, converter = name, None
            parameter = find(parameters, name, model.base_model_prefix)
        if converter is not None:
            raise CheckpointError(
                f"{name} is merged with other weights, or split, when a {model.config.model_type} model is loaded, so "
                "this checkpoint cannot be dealt out to several processes: take strategy=ddp or finetune=lora with "
                "strategy=auto"
            )
        if owners[id(parameter)] > 1:
            first, other = tied.setdefault(id(parameter), (name, tensor))
            if first != name and not torch.equal(other.float(), tensor.float()):
                raise CheckpointError(
                    f"{first} and {name} differ, and the config says that they are one (tie_word_embeddings: true): "
                    "set it to false in config.json, or remove the one that is not the model's"
                )
        yield new_name, tensor


def find(parameters: dict[str, Any], name: str, prefix: str):
    """The parameter that a name in a checkpoint means, with or without the prefix of the base model; or None."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in parameters:
            return parameters[candidate]
    return None


def random_weights(model: PreTrainedModel) -> Weights:
    """The initial weights of a model on the meta device, those that transformers would draw from the same state.

    transformers draws twice, when a layer is made and when all are there: first so for the base model, then for the
    head.
    """
    leaves = {
        name: copy.deepcopy(module)
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    base = [name for name in leaves if name.startswith(f"{model.base_model_prefix}.")]

    def drawn():
        for names in (base, [name for name in leaves if name not in base]):
            for name in names:
                if hasattr(leaves[name], "reset_parameters"):
                    copy.deepcopy(leaves[name]).to_empty(device="cpu").reset_parameters()
            for name in names:
                module = copy.deepcopy(leaves[name]).to_empty(device="cpu")
                with torch.no_grad():
                    model._init_weights(module)
                for kind, parameter in module.named_parameters(recurse=False):
                    yield f"{name}.{kind}" if name else kind, parameter.data

    return drawn()


def with_root(model: PreTrainedModel, function: Callable, *args) -> Any:
    """function(*args), which may use any part of the model by itself: under FSDP2 embeddings, norm and head are whole.

    What it returns is what a backward pass may begin at.
    """
    if not isinstance(model, FSDPModule):
        return function(*args)
    result = model.call(lambda: function(*args))  # without arguments, which would be cast to the compute dtype
    if not torch.is_grad_enabled():
        model.reshard()  # otherwise the backward pass does
    return result


def set_masters(model: PreTrainedModel, weights: Weights):
    """Sets DeepSpeed's fp32 master weights to those of the checkpoint: the engine made them from rounded ones.

    Args:
        model: inside the engine.
        weights: those that the model was filled from, by their names in the checkpoint.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    parameters = _by_checkpoint_name(model)
    for name, tensor in renamed(model, weights):
        parameter = find(parameters, name, model.base_model_prefix)
        if parameter is None or not parameter.requires_grad:
            continue
        if not hasattr(parameter, "ds_id"):
            safe_set_full_fp32_param(parameter, tensor.flatten())
            continue
        size = parameter.ds_tensor.numel()
        start = torch.distributed.get_rank() * size
        part = tensor.flatten()[start : start + size].float()
        safe_set_local_fp32_param(parameter, nn.functional.pad(part, (0, size - len(part))))


def full_weight(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter as it trains, whole; every process must ask for it.

    Args:
        parameter: of a model under any strategy.

    Returns:
        Of the full shape; the fp32 that the optimizer steps on, where the parameter itself is of fewer bits.
    """
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    in_zero3 = hasattr(parameter, "ds_id")
    if parameter.requires_grad and (in_zero3 or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().view(full_shape(parameter))
    if in_zero3:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, of which a process may hold a part."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _by_checkpoint_name(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _call(function: Callable):
    return function()
