"""From a checkpoint, or a bare config, to a model whose RoPE is scaled before it is built."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from pose.errors import CheckpointError, ConfigError
from pose.modeling.attention import resolve_backend
from pose.rope import RopeGeometry, RopeScaling


def load_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """Reads a checkpoint's config.

    Args:
        path: a local Hugging Face folder, or a hub id.
        revision: of the hub repository.

    Raises:
        CheckpointError: nothing there, or not a model's config; names the path.
    """
    return _from_hub("config", AutoConfig, path, revision)


def load_tokenizer(path: str, revision: str | None = None):
    """Reads a checkpoint's tokenizer. Args and Raises as `load_config`."""
    return _from_hub("tokenizer", AutoTokenizer, path, revision)


def rope_geometry(config: PretrainedConfig) -> RopeGeometry:
    """What a model's config says of its rotary embedding: nothing here is a constant of ours.

    Raises:
        ConfigError: the model has no rotary embedding, or one for each kind of layer.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or "rope_theta" not in parameters:
        raise ConfigError(
            f"a {config.model_type} model has no single rotary embedding in its config (rope_parameters: "
            f"{parameters}): only models with one RoPE for all layers can be extended"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    window = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    rope_type = parameters.get("rope_type", "default")
    ours = getattr(config, "pose", None)  # what `scale_config` noted: linear and ntk leave no other trace of the window
    if isinstance(ours, dict):
        window = ours["window"]
        rope_type = ours["rope"] if rope_type == "default" else rope_type
    return RopeGeometry(float(parameters["rope_theta"]), dim, window, rope_type)


def scale_config(config: PretrainedConfig, scaling: RopeScaling, target_len: int) -> RopeScaling:
    """Writes a scaling and the new window into a config, before any model is built from it.

    Args:
        config: of the model to extend; changed in place.
        scaling: the method; its factor may be open.
        target_len: the new window, in tokens.

    Returns:
        The scaling with its factor filled in.

    Raises:
        ConfigError: the target is shorter than the model's window, or the checkpoint is scaled already.
    """
    geometry = rope_geometry(config)
    if target_len < geometry.window:
        raise ConfigError(
            f"pose.target_len={target_len} is below the model's own window of {geometry.window} tokens: "
            "give a target of at least the window"
        )
    sliding = getattr(config, "sliding_window", None)
    if (
        sliding is not None
        and sliding < target_len
        and "full_attention" not in (getattr(config, "layer_types", None) or ())
    ):
        raise ConfigError(
            f"this model attends to the last {sliding} tokens only (sliding_window in its config), so it cannot use "
            f"pose.target_len={target_len}: give a target of at most {sliding}, or a copy of the folder with "
            "sliding_window: null"
        )
    scaling = scaling.resolve(geometry, target_len)
    if scaling.name != "none":
        config.pose = {"rope": scaling.name, "window": geometry.window, "factor": scaling.factor}
        partial = {k: v for k, v in config.rope_parameters.items() if k == "partial_rotary_factor"}
        config.rope_parameters = partial | scaling.to_hf(geometry)
    config.max_position_embeddings = max(target_len, config.max_position_embeddings)
    return scaling


def build_model(
    config: PretrainedConfig,
    path: str | None,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> PreTrainedModel:
    """Builds a model from a (scaled) config and loads its weights.

    Args:
        config: says everything about the architecture, RoPE included.
        path: folder or hub id of the weights; None initialises them at random.
        attention: a backend of `pose.modeling.attention`.
        dtype: of the weights. Frequencies are fp32 whatever it is, and stay so.

    Raises:
        CheckpointError: the weights cannot be loaded, or do not fit the config.
    """
    backend = resolve_backend(attention)
    config = copy.deepcopy(config)  # the model owns its config: another built from the same must not change it
    if path is None:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=backend, dtype=dtype)
    else:
        model, info = _from_hub(
            "weights", AutoModelForCausalLM, path, revision,
            config=config, attn_implementation=backend, dtype=dtype, output_loading_info=True,
        )  # fmt: skip
        missing = sorted(set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]})
        if missing:
            raise CheckpointError(f"{path} lacks weights of its own config: {', '.join(missing[:5])}")
    keep_frequencies_fp32(model)
    model.base_model.register_forward_pre_hook(_refuse_padding, with_kwargs=True)
    return model


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a model's inverse frequencies."""
    return [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)]


def keep_frequencies_fp32(model: nn.Module):
    """Makes casts of the model pass its inverse frequencies by.

    `module.to(bfloat16)`, Lightning's bf16-true and DeepSpeed's engine all cast buffers; a bf16
    frequency is off by up to 20 rad at position 16,383. Moves between devices still work.
    """
    for module in rotary_modules(model):
        module._apply = _Fp32Apply(module)


def _refuse_padding(module, args, kwargs):
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is not None and not mask.all():
        raise ValueError(
            "an attention_mask with padding was given: pose's attention is purely causal and would ignore it. Batches "
            "here hold rows of one length; pad on the right and read no padded output, or export the model and load "
            "it with transformers' own attention"
        )


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


def _from_hub(what: str, auto_class, path: str, revision: str | None, **kwargs) -> Any:
    local = Path(path).expanduser()
    meant_local = local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1 or local.parent.is_dir()
    if not local.is_dir() and meant_local:
        raise CheckpointError(f"no folder at {path}: give a Hugging Face folder or a hub id (owner/name)")
    try:
        return auto_class.from_pretrained(str(local) if local.is_dir() else path, revision=revision, **kwargs)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the {what} of {path} cannot be loaded: {first_line}") from error
