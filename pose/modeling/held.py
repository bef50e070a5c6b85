"""The dtype in which a weight is held, apart from the one in which its layer computes.

What does not train needs no more bits than its checkpoint has: a frozen matrix is held in bf16 where the checkpoint
stores bf16 (LoRA), or in 4 bits (QLoRA, arXiv 2305.14314). A layer widens its weight to the dtype it computes in when
it is called, and once more for the backward pass; no wide copy lives in between.

Shapes: n rows of inputs, I inputs, O outputs of a layer.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from pose.errors import CheckpointError
from pose.modeling import compat
from pose.modeling.attention import compute_dtype
from pose.modeling.options import NF4

NARROW = (torch.bfloat16, torch.float16)
BLOCK = 2**24  # elements of a weight that are wide at one time: 64 MiB in fp32


class HeldLinear(nn.Linear):
    """A linear layer whose weight may be of fewer bits than it computes in: those of its input, or of autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O], in the dtype that nn.Linear with an fp32 weight would give."""
        dtype, weight = compute_dtype(input), self.weight
        if compat.is_quantised(weight):
            bias = None if self.bias is None else self.bias.to(dtype)
            return compat.linear_4bit(input.to(dtype), weight, bias)
        if weight.dtype not in NARROW or weight.dtype == dtype:
            return super().forward(input)
        output = _Widened.apply(input.to(dtype), weight)
        return output if self.bias is None else output + self.bias.to(dtype)


class HeldEmbedding(nn.Embedding):
    """An embedding whose weight may be of 16 bits.

    Attributes:
        widens: whether what it gives is fp32 all the same, as that of a weight of 32 bits is.
    """

    widens = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., H]."""
        found = super().forward(input)
        return found.float() if self.widens else found


class _Widened(torch.autograd.Function):
    """x W^T with W of 16 bits and x of others: W is widened a block of rows at a time, and only W itself is kept."""

    @staticmethod
    def forward(ctx, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """input [..., I], weight [O, I]."""
        ctx.save_for_backward(input if weight.requires_grad else None, weight)
        rows = _rows_at_once(weight)
        if rows >= len(weight):
            return F.linear(input, weight.to(input.dtype))
        output = input.new_empty(*input.shape[:-1], len(weight))
        for start in range(0, len(weight), rows):
            output[..., start : start + rows] = F.linear(input, weight[start : start + rows].to(input.dtype))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of output [..., O]: those of input and weight, each in its own dtype."""
        (gradient,), (input, weight) = gradients, ctx.saved_tensors
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            rows = _rows_at_once(weight)
            of_input = gradient[..., :rows] @ weight[:rows].to(gradient.dtype)
            for start in range(rows, len(weight), rows):
                part = weight[start : start + rows].to(gradient.dtype)
                of_input += gradient[..., start : start + rows] @ part
        if ctx.needs_input_grad[1]:
            of_weight = (gradient.flatten(0, -2).T @ input.flatten(0, -2)).to(weight.dtype)
        return of_input, of_weight


class Held:
    """A layout (`pose.modeling.shard`) in which a process has all weights, each in as many bits as it needs.

    The matrices of plain linear layers and of embeddings are what this is about; whatever else a model has (norms,
    biases, experts, layers of a class of its own) is held in fp32.

    Args:
        device: of the weights.
        frozen: of matrices that do not train: auto keeps a checkpoint's own 16 bits and makes fp32 of anything else;
            float32; bfloat16; nf4 is 4 bits in linear layers but for the head, and auto elsewhere.
        trained: of matrices that train.
    """

    def __init__(self, device: torch.device, frozen: str = "auto", trained: torch.dtype = torch.float32):
        self.device, self.frozen, self.trained = device, frozen, trained
        self._matrices: set[int] = set()  # by id of the parameter, as `place` gets it
        self._quantised: set[int] = set()

    def wrap(self, model: PreTrainedModel):
        """Prepares a model whose parameters are on the meta device."""
        self._matrices = hold(model)
        if self.frozen == NF4:
            self._quantised = {id(module.weight) for module in _quantisable(model)}

    def place(self, parameter: nn.Parameter, whole: torch.Tensor) -> nn.Parameter:
        """The weight as it is held."""
        trains = parameter.requires_grad
        if id(parameter) in self._quantised and not trains:
            return compat.quantised(whole, self.device)
        dtype = torch.float32
        if id(parameter) in self._matrices:
            dtype = self.trained if trains else frozen_dtype(self.frozen, whole.dtype)
        placed = nn.Parameter(whole.to(self.device, dtype, copy=True), trains)
        if trains and dtype in NARROW:
            placed.grad_dtype = torch.float32  # in which the gradients of micro-batches add up
        return placed


def frozen_dtype(frozen: str, stored: torch.dtype) -> torch.dtype:
    """What a frozen matrix is held in, by the option and what its checkpoint stores."""
    if frozen == "float32":
        return torch.float32
    if frozen == "bfloat16":
        return torch.bfloat16
    return stored if stored in NARROW else torch.float32


def hold(model: nn.Module, widens: bool = True) -> set[int]:
    """Makes the plain linear layers and embeddings of a model ones whose weights may be of fewer bits.

    Args:
        model: whose layers change their class, and nothing else.
        widens: of the embeddings.

    Returns:
        The ids of these weights; of those that other layers share, none.
    """
    ours: set[int] = set()
    others: set[int] = set()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = HeldLinear
        elif type(module) is nn.Embedding and module.max_norm is None:  # which would change the weights in place
            module.__class__ = HeldEmbedding
            cast(HeldEmbedding, module).widens = widens
        is_ours = isinstance(module, HeldLinear | HeldEmbedding)
        for name, parameter in module.named_parameters(recurse=False):
            (ours if is_ours and name == "weight" else others).add(id(parameter))
    return ours - others


def is_exact(held: torch.Tensor, stored: torch.dtype) -> bool:
    """Whether a weight is held without loss.

    Args:
        held: under any strategy.
        stored: the dtype of its checkpoint.
    """
    dtype = compat.local_part(held).dtype
    return not compat.is_quantised(held) and (dtype == stored or dtype.itemsize >= 4)


def held_weight(parameter: torch.Tensor) -> torch.Tensor:
    """The values that a layer computes with, in fp32; of a model that one process holds."""
    return compat.dequantised(parameter) if compat.is_quantised(parameter) else parameter.detach().float()


def becomes(stored: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether a weight of a checkpoint is held as these very values.

    Args:
        stored: as the checkpoint has it.
        held: whole, in the dtype that it is held in.
    """
    if compat.is_quantised(held):
        return torch.equal(compat.dequantised(compat.quantised(stored, held.device)), compat.dequantised(held))
    return torch.equal(stored.to(held.device, held.dtype), held)


def drop_quantised(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, int]:
    """Takes the weights in 4 bits out of a state dict: they follow from the model's checkpoint, and never change.

    Args:
        state: of the model; changed.
        model: that they are of.

    Returns:
        By their names what tells them from others: the sums of their bytes.
    """
    packed = dict(_quantised(model))
    for name in packed:
        state.pop(name, None)
    if not packed:
        return {}
    sums = torch.stack([weight.detach().sum(dtype=torch.int64) for weight in packed.values()]).tolist()
    return dict(zip(packed, sums, strict=True))


def add_quantised(state: dict[str, torch.Tensor], model: nn.Module, sums: dict[str, int]):
    """Puts the weights of a model back that `drop_quantised` has taken out of its state dict.

    Args:
        state: of before; changed.
        model: that was loaded anew.
        sums: of before.

    Raises:
        CheckpointError: they are others now.
    """
    packed = dict(_quantised(model))
    if sums != drop_quantised({}, model):
        raise CheckpointError(
            "the weights under the adapters are others than before, in 4 bits: is model.path the same checkpoint, and "
            "the run on the same kind of device?"
        )
    state |= packed


def _quantised(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if compat.is_quantised(parameter))


def _quantisable(model: PreTrainedModel) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, HeldLinear) and module is not head]


def _rows_at_once(weight: torch.Tensor) -> int:
    return max(BLOCK // weight.shape[1], 1)
