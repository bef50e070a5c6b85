"""Checks of what the rest of the package assumes of a model's layers.

Training with skips, the guards, and the comparison of an export need every layer to be causal attention whose queries
and keys are rotated by one RoPE. A layer without RoPE does not see a skip, ALiBi has no frequencies to scale, and a
layer with a state of its own (linear attention, state space models) reads a jump of the positions as if there were
none. Long windows and shared beginnings need a cache of keys and values that gives what one pass gives, and can be cut.
"""

import sys
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PretrainedConfig, PreTrainedModel

from pose.errors import ConfigError, first_line
from pose.modeling import compat
from pose.modeling.attention import unsupported_term
from pose.modeling.rotary import depends_on_length, head_dim_of, rotary_dim_of, rotate_by_example_length

KINDS = ("full_attention", "sliding_attention")  # of layers, in a config's layer_types
PROBE = "pose_probe"  # what transformers knows the noting attention by
UNMOVED = "such layers do not see the positions, so that a skip is none for them"
ITS_OWN = "its attention cannot be replaced by pose's, and may take a skip for the border of two documents"
_passed: set[tuple[type, str]] = set()
_hands_on: dict[tuple[type, str, str], bool] = {}


def check_layers(config: PretrainedConfig):
    """Refuses a model whose layers are not all causal attention with RoPE, before any weights are there.

    The model is built without memory and run once on four tokens. Its attention only notes what it is given: which
    layers call it, and whether their queries and keys have been rotated (they would pass a gradient to the cosines).

    Args:
        config: of the model.

    Raises:
        ConfigError: names the class, and what about its layers is not supported.
    """
    key = (type(config), config.to_json_string(use_diff=False))
    if key in _passed:
        return
    cls = compat.causal_lm_class(config)
    if cls is None:
        raise ConfigError(
            f"a {config.model_type} model is not supported: it is no causal language model of transformers"
        )
    reason = _reason_of_class(cls, config)
    if reason is None:
        try:
            reason = _reason_of_layers(config)
        except ConfigError as error:
            raise ConfigError(f"{cls.__name__} is not supported: {error}") from None
        except Exception as error:  # a model's code may raise anything for a config's values
            if isinstance(error, KeyError) and error.args == (PROBE,):  # looked up in a list of the class's own
                raise ConfigError(f"{cls.__name__} is not supported: {ITS_OWN}") from error
            needs_values = isinstance(error, NotImplementedError) or "meta tensor" in str(error)
            why = (
                "cannot be run without weights, which the look at its layers needs" if needs_values
                else "cannot be built from its config, and run without weights to look at its layers"
            )  # fmt: skip
            raise ConfigError(f"{cls.__name__} {why}: {type(error).__name__}: {first_line(error)}") from error
    if reason is not None:
        raise ConfigError(f"{cls.__name__} is not supported: {reason}")
    _passed.add(key)


def hands_on(config: PretrainedConfig, keyword: str) -> bool:
    """Whether each layer of a model hands a keyword, which the base model is called with, to its attention.

    Args:
        config: of a model that `check_layers` has passed.
        keyword: a name that transformers does not know.
    """
    key = (type(config), config.to_json_string(use_diff=False), keyword)
    if key not in _hands_on:
        try:
            calls, num_layers = _attention_calls(config, **{keyword: None})
        except TypeError:  # it takes no such keyword
            calls, num_layers = [], 1
        with_it = {i for i, call in calls if keyword in call.keywords}
        _hands_on[key] = len(with_it) == num_layers and all(keyword in call.keywords for _, call in calls)
    return _hands_on[key]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a model's layers.

    Raises:
        ConfigError: the base model has none.
    """
    lists = [module for module in model.base_model.children() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{type(model.base_model).__name__} has no list of layers")
    return max(lists, key=len)


def cache_is_exact(config: PretrainedConfig) -> bool:
    """Whether a text that goes through the model in parts, with a cache of keys and values, gives what one pass gives.

    Where frequencies depend on the length of the text, cached keys keep those of a shorter one.
    """
    return not depends_on_length(config)


def cache_can_be_cut(config: PretrainedConfig) -> bool:
    """Whether the cache is exact, and can be cropped and repeated; a sliding window drops old tokens."""
    return cache_is_exact(config) and not any(DynamicCache(config=config).is_sliding)


def cache_width(config: PretrainedConfig) -> int:
    """Numbers that a cache holds of a token: its keys and values in all layers."""
    if latent := getattr(config, "kv_lora_rank", None):  # DeepSeek's MLA: transformers keeps what both are made of
        return config.num_hidden_layers * (latent + config.qk_rope_head_dim)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim_of(config)


def _reason_of_class(cls: type[PreTrainedModel], config: PretrainedConfig) -> str | None:
    """Why a class is not supported, as far as it can be told without building it."""
    if _has_alibi(config):
        return "it has ALiBi in place of RoPE, so there are no frequencies to scale"
    if compat.keeps_state(cls):
        return f"it has layers with a state of their own (linear attention, state space or recurrent): {UNMOVED}"
    kinds = sorted(set(getattr(config, "layer_types", None) or ()).difference(KINDS))
    if kinds:
        return f"layer_types in its config has {', '.join(kinds)}, and only {' and '.join(KINDS)} are"
    return None


def _reason_of_layers(config: PretrainedConfig) -> str | None:
    """Why a model is not supported, by what its layers do."""
    calls, num_layers = _attention_calls(config)
    if num_layers is None:
        return "it keeps no model apart from its output layer"
    without = sorted(set(range(num_layers)) - {i for i, _ in calls})
    if len(without) == num_layers:
        return ITS_OWN
    if without:
        return f"{_named(without)} no attention: {UNMOVED}"
    still = sorted({i for i, call in calls if not call.rotated})
    if len(still) == num_layers:
        return "it has no RoPE, so there are no frequencies to scale"
    if still:
        return f"{_named(still)} no RoPE: {UNMOVED}"
    unseen = sorted({i for i, call in calls if call.window is None and _slides(config, i)})
    if unseen:
        return (
            f"{_named(unseen)} a sliding window of {config.sliding_window} tokens that is applied by a mask alone, "
            "which pose's attention does not take: where it is at least your target, give a copy of the folder with "
            "sliding_window: null"
        )
    terms = sorted({call.term for _, call in calls if call.term is not None})
    if terms:
        return f"its attention uses {', '.join(terms)}"
    if any(call.masked for _, call in calls):
        return "it hands its attention a mask of its own"
    if not all(call.causal for _, call in calls):
        return "its attention is not causal"
    return None


def _check_dim(model: PreTrainedModel, config: PretrainedConfig):
    """Raises a ConfigError where a class rotates other dimensions of a head than its config says."""
    if "rope_theta" not in (getattr(config, "rope_parameters", None) or {}):
        return
    for module in compat.rotary_modules(model):
        if (dim := 2 * len(module.inv_freq)) != rotary_dim_of(config):
            raise ConfigError(
                f"its config says that {rotary_dim_of(config)} dimensions of a head are rotated "
                f"(partial_rotary_factor), and the class rotates {dim}"
            )


def _attention_calls(config: PretrainedConfig, **keywords) -> tuple[list[tuple[int, "_Call"]], int | None]:
    """What each layer of a model gives its attention, with the layer's index, and how many layers there are.

    The number is None, and nothing was run, where the model is not apart from its output layer.

    Args:
        config: of the model.
        keywords: that the base model is called with.
    """
    calls: list[tuple[int, _Call]] = []
    current = -1

    def note(module, query, key, value, attention_mask=None, **kwargs):
        rotated, causal = query.requires_grad and key.requires_grad, kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        term, window = unsupported_term(kwargs), kwargs.get("sliding_window")
        call = _Call(rotated, causal, attention_mask is not None, term, frozenset(kwargs), window)
        calls.append((current, call))
        num_batch, num_heads, num_query, _ = query.shape
        # Without a gradient, so that nothing of the rotation reaches the next layer
        return value.new_zeros(num_batch, num_query, num_heads, value.shape[-1]), None

    def enter(index):
        def hook(module, args):
            nonlocal current
            current = index

        return hook

    def mark(module, args, output):
        if isinstance(output, torch.Tensor):
            return output.detach().requires_grad_()
        return tuple(mark(module, args, part) for part in output)

    AttentionInterface.register(PROBE, note)
    model = compat.build_on_meta(config, PROBE).eval().requires_grad_(False)
    if model.base_model is model:
        return calls, None
    layers = decoder_layers(model)
    _check_dim(model, config)
    rotate_by_example_length(model)  # transformers' own looks at the values of the positions
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(index))
    for module in model.modules():
        if "rotary" in type(module).__name__.lower():
            module.register_forward_hook(mark)
    tokens = torch.arange(4, device="meta")[None]
    with torch.enable_grad():
        model.base_model(input_ids=tokens, position_ids=tokens, use_cache=False, **keywords)
    return calls, len(layers)


class _Call(NamedTuple):
    """What a layer's attention was given.

    Attributes:
        rotated: whether queries and keys were.
        causal: whether it is to be.
        masked: whether the model made a mask of its own.
        term: what it asks for that is not implemented.
        keywords: the names of what it is given beside.
        window: the sliding window that it is given, in tokens.
    """

    rotated: bool
    causal: bool
    masked: bool
    term: str | None
    keywords: frozenset[str]
    window: int | None


def _slides(config: PretrainedConfig, layer: int) -> bool:
    """Whether transformers' own mask lets a layer attend to the last tokens alone."""
    if getattr(config, "sliding_window", None) is None:
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return kinds[layer] == "sliding_attention"
    cls = compat.causal_lm_class(config)
    assert cls is not None
    return hasattr(sys.modules[cls.__module__], "create_sliding_window_causal_mask")


def _has_alibi(config: PretrainedConfig) -> bool:
    """Whether it is a model with ALiBi: Falcon and MPT say so in their configs, Bloom always has it."""
    attention = getattr(config, "attn_config", None)
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False) or getattr(attention, "alibi", False))


def _named(layers: list[int]) -> str:
    shown = ", ".join(map(str, layers[:5])) + ", ..." * (len(layers) > 5)
    return f"layer {shown} has" if len(layers) == 1 else f"layers {shown} have"
