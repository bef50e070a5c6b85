"""The modules of a model that compute its rotation, and what keeps them right.

Two of transformers' RoPE types have frequencies that depend on the length of the text: `dynamic`,
and `longrope` with unequal factors. transformers takes the length from the largest position of the
whole batch, and `dynamic` remembers the longest it has seen. Here **the length of an example is
the one it simulates, max(position_ids) + 1 of its row**: it does not depend on its neighbours in
the batch, nor on what came before, and is what transformers gives one fresh text of that length.

A token that is decoded with a cache has the frequencies of the text up to it, while the keys in
the cache keep those of their time, as in transformers: only a pass over the whole text is exact.

Shapes: B batch (or 1, for positions shared by all rows), L tokens, d rotary dimensions of a head.
"""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import PretrainedConfig

from pose.errors import ConfigError
from pose.modeling import compat
from pose.modeling.compat import Rotary, rotary_modules
from pose.rope import Frequencies


def depends_on_length(config: PretrainedConfig) -> bool:
    """Whether the frequencies change with the length of the text, so that one pass cannot serve several lengths."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return is_dynamic(config) or (
        parameters.get("rope_type") == "longrope"
        and list(parameters["short_factor"]) != list(parameters["long_factor"])
    )


def is_dynamic(config: PretrainedConfig) -> bool:
    """Whether a model's RoPE is `dynamic` by length; HunYuan's with `alpha` is NTK's, the same at every length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "dynamic":
        return False
    return not (config.model_type.startswith("hunyuan") and parameters.get("alpha"))


def head_dim_of(config: PretrainedConfig) -> int:
    """Dimensions of a head, which a config names or leaves to the hidden size."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_dim_of(config: PretrainedConfig) -> int:
    """Dimensions of a head that its config has rotated."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(head_dim_of(config) * (parameters.get("partial_rotary_factor") or 1.0))


def target_len_of(config: PretrainedConfig) -> int:
    """The window a model is meant for, in tokens.

    That is max_position_embeddings, save for `dynamic`, whose formula takes the model's own window from there: its
    target is noted beside it, and is factor times the window where another program wrote the config.
    """
    if not is_dynamic(config):
        return config.max_position_embeddings
    parameters = config.rope_parameters
    noted = (getattr(config, "pose", None) or {}).get("target_len")
    return noted or int(parameters["factor"] * config.max_position_embeddings)


def set_target_len(config: PretrainedConfig, target_len: int):
    """Sets the window that `target_len_of` returns."""
    if not is_dynamic(config):
        config.max_position_embeddings = target_len
        return
    window, factor = config.max_position_embeddings, config.rope_parameters["factor"]
    noted = getattr(config, "pose", None) or {"rope": "dynamic", "window": window, "factor": factor}
    config.pose = noted | {"target_len": target_len}


def rotate_by_example_length(model: nn.Module):
    """Makes the rotation of each example that of its own length, where the RoPE type looks at lengths.

    Frequencies come from transformers' own functions, and cos and sin from the module's own code, without the update
    before it that changes its buffers. A `longrope` whose two lists are equal is spared that update alone.
    """
    for module in rotary_modules(model):
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            module.forward = _StatelessForward(module)


def set_frequencies(model: nn.Module, frequencies: Frequencies):
    """Rotates with other frequencies from now on, the same at every length; of a model whose type is a static one."""
    for module in rotary_modules(model):
        module.inv_freq.copy_(frequencies.inv_freq)
        module.attention_scaling = frequencies.attention_factor


def frequencies_at(module: Rotary, seq_len: int) -> torch.Tensor:
    """The inverse frequencies, [d/2], with which a rotary module of this package rotates a text of seq_len tokens."""
    if isinstance(module.forward, _StatelessForward):
        return module.forward.inv_freq(torch.tensor([seq_len], device=module.inv_freq.device))[0]
    return module.inv_freq


class _StatelessForward:
    """forward of a rotary module whose type is `dynamic` or `longrope`."""

    def __init__(self, module: Rotary):
        self.module = module
        self.by_length = depends_on_length(module.config)
        self.rope_type = module.rope_type
        self.window = module.config.max_position_embeddings
        if self.rope_type == "longrope":
            self.window = module.config.rope_parameters["original_max_position_embeddings"]
            # In the module, to move with it
            module.register_buffer("long_inv_freq", self._beyond_window(self.window + 1), persistent=False)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, L, d] in the dtype of x, for position_ids [B, L]."""
        own_forward = compat.rotation(self.module)
        if not self.by_length:
            return own_forward(self.module, x, position_ids)
        rows = []
        for inv_freq, row in zip(self.inv_freq(position_ids.amax(-1) + 1), position_ids, strict=True):
            frequencies = SimpleNamespace(inv_freq=inv_freq, attention_scaling=self.module.attention_scaling)
            try:
                cos, sin = own_forward(frequencies, x, row[None])
            except (AttributeError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{type(self.module).__name__} works out its rotation in a way of its own, so {self.rope_type} "
                    "frequencies, which depend on the length of each example, are not supported with it"
                ) from error
            rows.append((cos, sin))
        cosines, sines = zip(*rows, strict=True)
        return torch.cat(cosines), torch.cat(sines)

    def inv_freq(self, lengths: torch.Tensor) -> torch.Tensor:
        """The frequencies, fp32 [B, d/2], of texts of the given lengths [B]."""
        lengths = lengths[:, None]
        long = self.rope_type == "longrope"
        beyond = self.module.get_buffer("long_inv_freq") if long else self._beyond_window(lengths)
        return torch.where(lengths > self.window, beyond, self.module.inv_freq)

    def _beyond_window(self, seq_len: int | torch.Tensor) -> torch.Tensor:
        return compat.frequencies(self.module.config, self.rope_type, self.module.inv_freq.device, seq_len)


def keep_frequencies_fp32(model: nn.Module):
    """Keeps the inverse frequencies in fp32 when the model is cast.

    `module.to(bfloat16)`, Lightning's bf16-true and DeepSpeed's engine all cast buffers; a bf16
    frequency is off by up to 20 rad at position 16,383. Moves between devices still work.
    """
    for module in rotary_modules(model):
        module._apply = _Fp32Apply(module)  # type: ignore[method-assign]


class _Fp32Apply:
    """nn.Module._apply for a rotary module: buffers follow the device and keep their dtype."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, fn, recurse=True):
        kept = {name: buffer for name, buffer in self.module.named_buffers(recurse=False) if buffer.is_floating_point()}
        type(self.module)._apply(self.module, fn, recurse)
        for name, buffer in kept.items():
            cast = getattr(self.module, name)
            if cast.dtype != buffer.dtype:
                setattr(self.module, name, buffer.to(cast.device))
        return self.module
