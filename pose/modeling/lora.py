"""Low-rank adapters (LoRA, arXiv 2106.09685): peft's layers put into the model itself.

The model keeps its class, and with it everything that training, guards and loss ask of it. A linear
layer with weight W [out, in] computes with W + alpha / rank * B A, where A is [rank, in] and B
[out, rank] starts at zero; W is frozen.
"""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from pose.errors import ConfigError
from pose.modeling import compat
from pose.modeling.options import LoraOptions


class Adapter(NamedTuple):
    """What is added to one weight [out, in]: scale * up @ down.

    Attributes:
        down: A [rank, in].
        up: B [out, rank].
        scale: alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def target_names(model: PreTrainedModel, options: LoraOptions) -> list[str]:
    """The full names of the layers that get an adapter.

    Raises:
        ConfigError: peft is not installed, or target_modules has a name that the model lacks; lists those it has.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("finetune.lora needs the package peft, which is not installed: pip install peft")
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if options.target_modules is None:
        return linear
    for target in options.target_modules:
        if not any(_ends_with(name, target) for name in linear):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ConfigError(
                f"finetune.lora.target_modules has {target!r}, which is no linear layer of this model (a head gets no "
                f"adapter): choose from {', '.join(known)}"
            )
    return [name for name in linear if any(_ends_with(name, target) for target in options.target_modules)]


def add_lora(model: PreTrainedModel, options: LoraOptions):
    """Puts adapters into a model, in place, and freezes all other weights.

    With `train_embeddings_and_norms` the input embeddings and every normalisation train as well. A
    head that is tied to the embeddings is the same parameter and trains with them; an untied one
    stays frozen, as in LongLoRA.

    Args:
        model: built by `pose.modeling.load.build_model`; one on the meta device gets adapters there, whose values
            are `initial_adapters`.
        options: rank, targets and so on.

    Raises:
        ConfigError: as `target_names`.
    """
    targets = target_names(model, options)
    from peft import LoraConfig, inject_adapter_in_model

    numbers: dict[str, Any] = {"r": options.rank, "lora_alpha": options.alpha, "lora_dropout": options.dropout}
    # In a module without a config: of some classes with experts peft makes other targets than those it is given
    holder = nn.Module()
    holder.inner = model
    config = LoraConfig(target_modules=[f"inner.{name}" for name in targets], **numbers)
    inject_adapter_in_model(config, holder, low_cpu_mem_usage=next(model.parameters()).is_meta)
    if (num := len(adapters(model))) != len(targets):
        raise ConfigError(
            f"finetune.lora: peft gave {num} adapters to {len(targets)} layers of this "
            f"{model.config.model_type} model; choose others by finetune.lora.target_modules, or finetune=full"
        )
    if options.train_embeddings_and_norms:
        model.get_input_embeddings().requires_grad_(True)
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                module.requires_grad_(True)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by the name, in its state dict, of the weight that each changes; {} without any."""
    return {
        f"{name}.base_layer.weight": Adapter(module.lora_A[key].weight, module.lora_B[key].weight, module.scaling[key])
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
        for key in module.active_adapters
    }


def initial_adapters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What peft would give the adapters of a model, by name, drawn in its order from the same state; A twice."""
    for name, module in model.named_modules():
        if not (hasattr(module, "base_layer") and hasattr(module, "lora_A")):
            continue
        for key in module.active_adapters:
            rank, (num_out, num_in) = module.r[key], (module.out_features, module.in_features)
            down = nn.Linear(num_in, rank, bias=False).weight.detach()
            up = nn.Linear(rank, num_out, bias=False).weight.detach()
            yield f"{name}.lora_A.{key}.weight", nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            yield f"{name}.lora_B.{key}.weight", nn.init.zeros_(up)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all of them, in all processes together; tied ones count once."""
    sizes = [(parameter.requires_grad, math.prod(compat.full_shape(parameter))) for parameter in model.parameters()]
    return sum(size for trainable, size in sizes if trainable), sum(size for _, size in sizes)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
