"""How a model's layers compute: compiled, with fewer activations kept, with a residual stream of few bits.

None of it changes what is computed beyond rounding.
"""

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from pose.errors import ConfigError
from pose.modeling import compat
from pose.modeling.layers import decoder_layers
from pose.modeling.options import RECOMPUTE

log = logging.getLogger(__name__)

ops = torch.ops.aten
MATRIX_PRODUCTS = (ops.mm.default, ops.addmm.default)
# Attention is kept: its backward pass needs its output, and it is the dearest to compute again.
ATTENTION = (
    ops._scaled_dot_product_flash_attention_for_cpu.default,
    ops._scaled_dot_product_flash_attention.default,
    ops._scaled_dot_product_efficient_attention.default,
    ops._scaled_dot_product_cudnn_attention.default,
)
CUDA = ("gpu", "cuda")  # what trainer.accelerator calls them
FLASH = ("flash_attn", "flash_attn_3")  # namespaces of the operators of FlashAttention's packages


def cpu_computes_bf16() -> bool:
    """Whether this CPU has instructions for matrix products in bf16; without them they are emulated."""
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in instructions)


def check_accelerator(accelerator: str):
    """Raises a ConfigError where trainer.accelerator asks for a GPU of NVIDIA's, and there is none."""
    if accelerator in CUDA and not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={accelerator} is not there: torch {torch.__version__} sees no GPU. Give auto or cpu, "
            "or install a torch with CUDA, and the driver that it needs"
        )


def warn_of_emulated_bf16(device: torch.device, settings: Mapping[str, Any], instead: str):
    """Warns of settings that ask for bf16 on a CPU that emulates it: some 70 times as long (docs/LOG.md).

    Args:
        device: that computes.
        settings: values by key.
        instead: the settings to take in their place.
    """
    asked = [f"{key}={value}" for key, value in settings.items() if str(value).startswith(("bf16", "bfloat16"))]
    if asked and device.type == "cpu" and not cpu_computes_bf16():
        log.warning(
            f"{' and '.join(asked)}: this CPU has no instructions for bf16 (AVX512_BF16, AMX); matrix products take "
            f"some 70 times as long as in fp32. Give {instead}"
        )


def compile_layers(model: PreTrainedModel):
    """Compiles what a decoder layer computes, once for all layers; whatever wraps a layer stays around it.

    The hooks of FSDP2, activation checkpointing and adapters see the layers they saw before, and names in the state
    dict stay. Another shape compiles it again, which is a warning with the cause.
    """
    compat.warn_of_recompilations(log)
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward)
    model.get_input_embeddings().register_forward_hook(_as_of_a_layer)


def _as_of_a_layer(module, args, output: torch.Tensor) -> torch.Tensor:
    """Frozen embeddings give what needs a gradient too, or the first layer would be compiled apart from the others."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


def recompute(model: PreTrainedModel, how: bool | str):
    """Which activations inside a model's layers are made again in the backward pass, and not kept.

    Args:
        model: in place.
        how: one of RECOMPUTE. False keeps all, True none. "selective" keeps the outputs of attention and of every
            second matrix product, as torchtitan does: what is made again costs little.

    Raises:
        ConfigError: the model's class cannot.
    """
    assert how in RECOMPUTE
    if not how:
        return
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"model.gradient_checkpointing={str(how).lower()} is not supported by {type(model).__name__}: take false"
        )
    options = {"context_fn": _selective} if how == "selective" else {}
    for layer in decoder_layers(model):
        layer.forward = _recomputed(layer, layer.forward, options)


def _recomputed(layer: nn.Module, forward: Callable, options: dict) -> Callable:
    """What a layer computes, under activation checkpointing.

    Not by transformers' own switch, which is inside of `forward`, and so of what is compiled, in some releases alone.
    Where it is outside (5.17) the backward pass runs the compiled layer, and FSDP2's hooks, a second time.
    """

    @wraps(forward)
    def again(*args, **kwargs):
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return again


def _selective():
    return create_selective_checkpoint_contexts(_Policy())


class _Policy:
    """A fresh one for each layer and pass: the same products are kept in both."""

    def __init__(self):
        self.seen = {False: 0, True: 0}

    def __call__(self, context, op, *args, **kwargs):
        if op in MATRIX_PRODUCTS:
            self.seen[context.is_recompute] += 1
            kept = self.seen[context.is_recompute] % 2 == 1
        else:
            kept = op in ATTENTION or getattr(op, "namespace", None) in FLASH
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def residuals_as_computed(model: PreTrainedModel):
    """Under bf16 autocast the stream between layers is bf16, as under FSDP2, and not fp32.

    Half the traffic, and half the memory of what is kept of it; norms still compute in fp32. So do the angles of RoPE;
    their cosines and sines are rounded to bf16 and rotate in it, as in a model that is served in bf16: an error of
    2^-9, at every distance. fp16 would overflow.
    """
    model.get_input_embeddings().register_forward_hook(_as_computed)


def _as_computed(module, args, output: torch.Tensor) -> torch.Tensor:
    device = output.device.type
    in_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    return output.bfloat16() if in_bf16 else output
