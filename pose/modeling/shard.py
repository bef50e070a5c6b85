"""Models in parts: no process ever holds all the weights of one.

A model is built without weights. Each weight is read when its turn comes, given to the processes in
parts (FSDP2, ZeRO-3), and forgotten. What is not a weight, the inverse frequencies above all, is
computed in full and in fp32 by every process.

W processes of rank r; a weight of n elements.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from pose.errors import CheckpointError
from pose.modeling import compat
from pose.modeling.compat import full_shape
from pose.modeling.held import frozen_dtype, hold, is_exact
from pose.modeling.layers import decoder_layers
from pose.modeling.lora import initial_adapters
from pose.modeling.weights import Weights, listed, matched, places


class Layout(Protocol):
    """How the weights of a model are sharded over the processes.

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

    Attributes:
        frozen: the dtype of slices that do not train, as of `pose.modeling.held.Held`; without 4 bits.
    """

    def __init__(self, mesh, device: torch.device, compute_dtype: torch.dtype | None):
        self.mesh, self.device, self.compute_dtype = mesh, device, compute_dtype
        self.frozen = "float32"
        self._matrices: set[int] = set()
        self.policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)

    def wrap(self, model: PreTrainedModel):
        hold_them = partial(hold, model, widens=self.compute_dtype is None)
        if self.frozen != "float32":
            hold_them()
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=self.mesh, mp_policy=self.policy)
        # Embeddings, last norm and head in one group, so that tied ones can be: it is gathered by a call of the model,
        # and `with_root` makes one of whatever else uses these weights.
        fully_shard(model, mesh=self.mesh, mp_policy=self.policy)
        if self.frozen != "float32":
            self._matrices = hold_them()  # of the parameters as they are now
        model.call = _call  # type: ignore[assignment]  # of a module, which could be anything
        register_fsdp_forward_method(model, "call")

    def place(self, parameter: nn.Parameter, whole: torch.Tensor) -> nn.Parameter:
        # Every process reads the weight itself, so that nothing is sent. The slice is cut before it is cast.
        part = distribute_tensor(whole, self.mesh, cast(DTensor, parameter).placements, src_data_rank=None)
        is_narrow = id(parameter) in self._matrices and not parameter.requires_grad
        dtype = frozen_dtype(self.frozen, whole.dtype) if is_narrow else parameter.dtype
        return nn.Parameter(part.to(dtype), parameter.requires_grad)


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


def fill(model: PreTrainedModel, weights: Weights, layout: Layout):
    """Gives every parameter of a model on the meta device its value, each process its part.

    Args:
        model: as `layout.wrap` left it; adapters (`pose.modeling.lora`) get their initial values.
        weights: of the model, whole, by its names for them (`matched`); read one after the other, by every process
            in the same order.
        layout: how they are sharded. What does not train, and is held in fewer bits than it was given in, is noted:
            `model.rounded` has its names.

    Raises:
        CheckpointError: a parameter got no value; or as `weights` do.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    named = dict(model.named_parameters(remove_duplicate=False))
    meta = places(model)
    waiting = {id(parameter) for parameter in named.values()}
    rounded: set[int] = set()

    def place(parameter: nn.Parameter, tensor: torch.Tensor):
        placed = layout.place(parameter, tensor)
        if not (parameter.requires_grad or is_exact(placed, tensor.dtype)):
            rounded.add(id(parameter))
        for module, name in owners[id(parameter)]:
            setattr(module, name, placed)
        waiting.discard(id(parameter))

    for name, tensor in weights:
        target = meta[name]
        if not isinstance(target, nn.Parameter):  # a buffer
            target.copy_(tensor)
        elif id(target) in waiting:  # else a tied head
            place(target, tensor)
    for name, tensor in initial_adapters(model):
        place(named[name], tensor)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(layout.device))
    # What an export takes from the checkpoint
    model.rounded = {name for name, place in meta.items() if id(place) in rounded}  # type: ignore[assignment]
    if waiting:
        raise CheckpointError(f"no value for {listed(name for name, p in named.items() if id(p) in waiting)}")


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
                    compat.initialise(model, module)
                for kind, parameter in module.named_parameters(recurse=False):
                    yield f"{name}.{kind}" if name else kind, parameter.data

    return drawn()


def with_root(model: PreTrainedModel, function: Callable, *args) -> Any:
    """function(*args), which may use any part of the model by itself: under FSDP2 embeddings, norm and head are whole.

    What it returns is what a backward pass may begin at.
    """
    if not isinstance(model, FSDPModule):
        return function(*args)
    # Without arguments, which would be cast to the compute dtype
    result = model.call(lambda: function(*args))  # type: ignore[operator]
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

    named = places(model)
    for name, tensor in matched(model, weights):
        parameter = named[name]
        if not parameter.requires_grad:
            continue
        if not compat.is_partitioned(parameter):
            safe_set_full_fp32_param(parameter, tensor.flatten())
            continue
        size = compat.local_part(parameter).numel()
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
        return cast(DTensor, parameter.detach()).full_tensor()
    in_zero3 = compat.is_partitioned(parameter)
    if parameter.requires_grad and (in_zero3 or compat.has_master(parameter)):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().view(full_shape(parameter))
    if in_zero3:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def _call(function: Callable):
    return function()
