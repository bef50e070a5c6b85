"""What this package takes from transformers, peft, bitsandbytes, DeepSpeed and torch beyond what they document.

Each name stands here once, with what is relied on; tests/unit/modeling/test_compat.py holds it against the installed
versions.
"""

import copy
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file, cached_files

SELECTIVE = "torch._higher_order_ops.wrap"  # the logger of what traces recomputation
RECOMPILATIONS = "torch._dynamo.guards.__recompiles"  # the logger of its artifact "recompiles"
ROPE_TYPES = frozenset({"default", *ROPE_INIT_FUNCTIONS})  # that transformers can build


def find_file(path: str, name: str, **hub) -> str | None:
    """The local path of a file of a folder or hub id, which is downloaded if need be; None where there is none.

    Args:
        path: a local folder, or a hub id.
        name: of the file, inside.
        hub: revision, local_files_only and the like.
    """
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)


def find_files(path: str, names: list[str], **hub) -> list[str]:
    """The local paths of files of a hub id, which have to be there; args as `find_file`."""
    return cached_files(path, names, **hub) or []


def tokenizer_settings(path: str, **hub) -> dict[str, Any]:
    """What a tokenizer_config.json says; {} where there is none. Args as `find_file`."""
    return get_tokenizer_config(path, **hub)


def causal_lm_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that AutoModelForCausalLM builds from a config; None where it knows none."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def keeps_state(cls: type[PreTrainedModel]) -> bool:
    """Whether a model's layers keep a state that is no cache of keys and values."""
    return cls._is_stateful


def build_on_meta(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """A model without memory, buffers included, that can be run. No random number is drawn for it.

    Args:
        config: stays as it is.
        attention: a registered name.
    """
    # batched_mm looks at no values, where the default for experts does
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=attention, experts_implementation="batched_mm"
        )


def build_empty(config: PretrainedConfig, **options) -> PreTrainedModel:
    """A model whose parameters have no memory; its buffers are computed, on the CPU.

    Args:
        config, options: of from_config.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()  # what is moved to the meta device is no longer one
    return model


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which parameters transformers loads in fp32 whatever the checkpoint's dtype, by their names.

    Among them are the biases of routers, whose rounding to 16 bits would choose other experts.

    Args:
        model: of a class that says so.
        dtype: of the others. Some are kept under fp16 alone.
    """
    modules = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16:
        modules |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    pattern = re.compile("|".join(rf"((^|\.){module}($|\.))" for module in sorted(modules)))
    return lambda name: bool(modules) and pattern.search(name) is not None


def note_conversions(model: PreTrainedModel, from_checkpoint: bool):
    """Notes on a model how its names differ from those of its checkpoints: for `renamed`, and for save_pretrained.

    transformers would look it up when it saves, by the model's class, which FSDP2 replaces by another.

    Args:
        model: on the meta device, of its own class.
        from_checkpoint: whether it is to be filled from one: `keep_used_conversions` comes after that. A model of
            random weights is saved under the names that transformers gives to one.
    """
    conversions = get_model_conversion_mapping(model, add_legacy=from_checkpoint)
    _note(model, [c for c in conversions if from_checkpoint or not isinstance(c, PrefixChange)])


def keep_used_conversions(model: PreTrainedModel):
    """Drops renamings that the checkpoint did not use, as from_pretrained does: saving reverses the others alone."""
    _note(model, [conversion for conversion in _noted(model) if conversion.was_used()])


def _note(model: PreTrainedModel, conversions: list[WeightTransform]):
    model._weight_conversions = conversions  # type: ignore[assignment]  # of a module, which could be anything


def _noted(model: PreTrainedModel) -> list[WeightTransform]:
    return cast(list[WeightTransform], model._weight_conversions)


def renamed(model: PreTrainedModel, name: str) -> tuple[str, WeightConverter | None]:
    """What from_pretrained calls a tensor of a checkpoint.

    Args:
        model: that `note_conversions` has seen.
        name: in the checkpoint.

    Returns:
        The new name; and where weights are made of several tensors, or several of one, what makes them, with its
        `source_patterns` and `target_patterns`: the new name is of the first target.
    """
    renamings = [c for c in _noted(model) if isinstance(c, WeightRenaming)]
    converters = [c for c in _noted(model) if isinstance(c, WeightConverter)]
    new, pattern = rename_source_key(name, renamings, converters)
    return new, next((c for c in converters if pattern in c.source_patterns), None)


def as_in_checkpoint(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a model under the names, and in the form, that save_pretrained gives them.

    Args:
        model: that `note_conversions` has seen, or from_pretrained.
        weights: by the model's names.
    """
    return revert_weight_conversion(model, weights)


def is_left_out(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's class says that its checkpoints hold a tensor that it has no use for: further heads, say."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def initialise(model: PreTrainedModel, module: nn.Module):
    """Draws the weights of one module as the model's class does."""
    model._init_weights(module)


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has sharded a parameter; it is empty then, and a process's part lies beside it."""
    return hasattr(parameter, "ds_id")


def has_master(parameter: torch.Tensor) -> bool:
    """Whether a lower stage of DeepSpeed's ZeRO keeps an fp32 weight that the optimizer steps on in its place."""
    return hasattr(parameter, "_hp_mapping")


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, of which a process may hold a part, or which is packed."""
    if is_quantised(parameter):
        return parameter.quant_state.shape  # type: ignore[attr-defined]  # of bitsandbytes' Params4bit
    return getattr(parameter, "ds_shape", parameter.shape)


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether a weight is held in 4 bits by bitsandbytes."""
    return getattr(parameter, "quant_state", None) is not None


def bitsandbytes() -> Any:
    """The package, imported when it is needed."""
    return importlib.import_module("bitsandbytes")


def quantised(whole: torch.Tensor, device: torch.device) -> nn.Parameter:
    """A frozen weight in 4 bits: those that from_pretrained gives with NF4 and double quantisation.

    Args:
        whole: [O, I], of any dtype.
        device: of the result.
    """
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    parameter = bitsandbytes().nn.Params4bit(
        whole.float(),
        requires_grad=False,
        quant_type=how.bnb_4bit_quant_type,
        compress_statistics=how.bnb_4bit_use_double_quant,
        quant_storage=how.bnb_4bit_quant_storage,
    )
    return parameter.to(device)  # which quantises


def linear_4bit(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear for a weight that is `quantised`, in the dtype of the input; only the packed weight is kept for later.

    Not by bitsandbytes' own layer, which rounds biases for good, and packs a weight anew for the evaluation on some
    CPUs, after which no gradient goes through it.
    """
    return bitsandbytes().matmul_4bit(input, weight, bias=bias, quant_state=weight.quant_state)  # type: ignore[attr-defined]


def dequantised(weight: torch.Tensor) -> torch.Tensor:
    """What a `quantised` weight stands for, fp32 [O, I]."""
    return bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state).float()  # type: ignore[attr-defined]


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter, under any strategy."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def warn_of_recompilations(log: logging.Logger):
    """Has torch.compile say, as a warning, what was compiled again and why: it takes long, and may be needless."""
    torch._logging.set_logs(recompiles=True)
    logger = logging.getLogger(RECOMPILATIONS)
    logger.handlers[:], logger.propagate = [_Recompilation(log)], False
    # "Please make sure the checkpointed region does not contain in-place ops": layers have none
    logging.getLogger(SELECTIVE).addFilter(lambda record: "context_fn is passed" not in record.getMessage())


class _Recompilation(logging.Handler):
    def __init__(self, log: logging.Logger):
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord):
        text = " ".join(record.getMessage().split())
        function, _, cause = text.partition("triggered by the following guard failure(s):")
        reason = (cause or function).split(" - ")[1 if cause else 0]  # that of the version compiled last
        self.log.warning(f"Compiled again, which takes a while: {reason.split(' #')[0].strip()}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has a class for its own allocator on a GPU, and words alone for the rest."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("can't allocate memory", "out of memory")
    )


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention that a model computes with."""
    return model.config._attn_implementation


def is_of_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter of peft, by its name."""
    return "lora_" in name


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The layers of a model compute without the adapters that peft has put into them.

    Not by peft's own switch, which also changes what needs a gradient.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


class Rotary(nn.Module):
    """What transformers' rotary modules have in common; a name for them, not their class.

    Attributes:
        config: of the model.
        inv_freq: fp32 [d/2], a buffer.
        attention_scaling: multiplies cosines and sines.
        rope_type: one of transformers' RoPE types.
    """

    config: PretrainedConfig
    inv_freq: torch.Tensor
    attention_scaling: float
    rope_type: str


def rotary_modules(model: nn.Module) -> list[Rotary]:
    """The modules that hold a model's inverse frequencies."""
    found = (module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor))
    return cast(list[Rotary], list(found))


def rotation(module: Rotary) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """What a rotary module computes of itself, a hidden state [B, L, H] and position ids [B, L]: cosines and sines.

    transformers' decorators are left out, of which one changes the frequencies with the positions that it sees.
    """
    return inspect.unwrap(type(module).forward)


def frequencies(config: PretrainedConfig, rope_type: str, device, seq_len: int | torch.Tensor) -> torch.Tensor:
    """Inverse frequencies, fp32 [d/2], of one of transformers' RoPE types for a text of seq_len tokens.

    Lengths [B, 1] give [B, d/2], where a type's frequencies depend on them.
    """
    return ROPE_INIT_FUNCTIONS[rope_type](config, device, seq_len=seq_len)[0]
