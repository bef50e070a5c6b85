"""Checks of the JSON files of a checkpoint, which may come from anywhere, before any long work.

What transformers checks itself is left to it. Here are values that it accepts, and that hang, fill the memory, divide
by zero, or raise an error that does not name their file.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PretrainedConfig

from pose.errors import CheckpointError
from pose.files import load_json
from pose.modeling.checkpoints.hub import find_file

# Integers of a config.json, of at least 1, and the largest that is believed: far above any model there is.
LAYERS = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1_000)
HEADS = dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 1 << 16)
WIDTHS = dict.fromkeys(
    ("hidden_size", "intermediate_size", "head_dim", "n_embd", "n_inner", "d_model", "d_ff", "ffn_dim"), 1 << 20
)
SIZES = LAYERS | HEADS | WIDTHS | {"vocab_size": 1 << 24}
WINDOW = 1 << 28  # tokens
SIZES |= dict.fromkeys(("max_position_embeddings", "n_positions", "original_max_position_embeddings"), WINDOW)
# Numbers: (the least, whether that itself is accepted, the largest). A base of 1 turns all dimensions alike.
BASES = dict.fromkeys(("rope_theta", "rotary_emb_base"), (1.0, False, 1e30))
SHARES = dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (0.0, False, 1.0))
NUMBERS = BASES | SHARES
# In rope_scaling and rope_parameters alone: elsewhere these names mean other things.
ROPE_NUMBERS = NUMBERS | {"factor": (1.0, True, 1e30)}
ROPE_NUMBERS |= dict.fromkeys(("mscale", "mscale_all_dim", "short_mscale", "long_mscale"), (0.0, True, 1e30))
ROPE_NUMBERS |= dict.fromkeys(
    ("attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"), (0.0, False, 1e30)
)
ROPE_NUMBERS |= dict.fromkeys(("short_factor", "long_factor"), (0.0, False, 1e30))  # or lists of them
LISTS = ("short_factor", "long_factor", "intermediate_size", "num_key_value_heads")  # or one for each layer
ROPE = ("rope_scaling", "rope_parameters")
# What transformers' functions take from rope_parameters without a default, beside rope_theta.
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TEXT = "a string, or an object with a string under 'content',"


def check_config(path: str, **hub):
    """Checks the config.json and generation_config.json of a checkpoint.

    Args:
        path: a local folder, or a hub id.
        hub: revision and the like, for transformers' `cached_file`.

    Raises:
        CheckpointError: not JSON objects, or values that cannot be; names file, key, value and what is accepted.
    """
    if (file := find_file(path, "config.json", **hub)) is not None:
        raw = load_json(file, CheckpointError)
        if raw.get("transformers_weights") or raw.get("configuration_files"):
            raise CheckpointError(
                f"{file} names other files (transformers_weights, configuration_files), which are not read: take the "
                "key out, and name the file as usual"
            )
        check_values(raw, file)
    if (file := find_file(path, "generation_config.json", **hub)) is not None:
        raw = load_json(file, CheckpointError)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = raw.get(key)
            if not all(i is None or (is_integer(i) and i >= 0) for i in (ids if isinstance(ids, list) else [ids])):
                raise _refused(file, key, ids, "the id of a token, or a list of them,")


def check_values(raw: dict[str, Any], file: str):
    """Checks the values of a config.json.

    Args:
        raw: what it holds.
        file: its name, for the error.

    Raises:
        CheckpointError: a value that cannot be; names file, key, value and what is accepted.
    """
    _check_values(raw, file, "", NUMBERS)
    _check(raw, file, "sliding_window", is_integer, "a number of tokens")
    if "pose" in raw:
        _check_note(raw["pose"], file)


def check_groups(config: PretrainedConfig, name: str):
    """Checks that heads share keys and values in groups of one size.

    Raises:
        CheckpointError: they do not; names model and values.
    """
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if is_integer(heads) and is_integer(groups) and heads % groups:
        raise _refused(name, "num_key_value_heads", groups, f"a divisor of num_attention_heads={heads}")


def check_rope(config: PretrainedConfig, name: str):
    """Checks that a config's heads can be rotated, once transformers has worked out what a file leaves open.

    Args:
        config: of a model with one rotary embedding, or of another, which passes.
        name: of the model, for the error.

    Raises:
        CheckpointError: heads without an even number of dimensions to rotate; a base or a scaling that cannot be; names
            model, values and what is accepted.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or "rope_theta" not in parameters:
        return
    sizes = {key: getattr(config, key, None) for key in ("hidden_size", "num_attention_heads", "head_dim")}
    said = ", ".join(f"{key}={size}" for key, size in sizes.items())
    width, heads, head_dim = (size or 0 for size in sizes.values())
    if not all(is_integer(size) and size > 0 for size in (width, heads, head_dim or 1)):
        raise CheckpointError(f"{name} has {said}: integers of at least 1 are accepted")
    _check_values(dict(parameters), name, "rope_parameters.", ROPE_NUMBERS)
    for key in ("rope_theta", *NEEDED.get(parameters.get("rope_type"), ())):
        if parameters.get(key) is None:
            raise _refused(name, f"rope_parameters.{key}", None, "a value")
    share = parameters.get("partial_rotary_factor") or 1.0
    dim = int((head_dim or width // heads) * share)
    if dim < 2 or dim % 2:
        raise CheckpointError(
            f"{name} rotates {dim} dimensions of a head ({said}, partial_rotary_factor={share}): an even number of at "
            "least 2 is accepted"
        )
    for key in ("short_factor", "long_factor"):
        if isinstance(parameters.get(key), list) and len(parameters[key]) != dim // 2:
            raise CheckpointError(
                f"{name} has {len(parameters[key])} numbers under 'rope_parameters.{key}', where {dim // 2} are "
                "expected: one for every two rotary dimensions of a head"
            )


def check_tokenizer(path: str, **hub):
    """Checks the JSON files of a tokenizer: settings, special tokens, added tokens, and itself. Args as `check_config`.

    Raises:
        CheckpointError: not JSON objects, or of wrong types; names file, key, value and what is accepted.
    """
    if (file := find_file(path, "tokenizer_config.json", **hub)) is not None:
        settings = load_json(file, CheckpointError)
        _check_special(settings, file)
        _check(settings, file, "model_max_length", lambda value: is_number(value) and value >= 1, "a number above 0")
        _check(settings, file, "tokenizer_class", lambda value: isinstance(value, str), "a string")
        _check(settings, file, "chat_template", lambda value: isinstance(value, str | list | dict), "a template")
        _check(settings, file, "auto_map", lambda value: isinstance(value, list | dict), "an object")
        _check(settings, file, "added_tokens_decoder", lambda value: isinstance(value, dict), "an object")
        names = settings.get("fast_tokenizer_files") or []
        if not isinstance(names, list) or not all(isinstance(name, str) and "/" not in name for name in names):
            raise _refused(file, "fast_tokenizer_files", names, "a list of files in its folder")
        for index, token in (settings.get("added_tokens_decoder") or {}).items():
            if not index.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
                raise _refused(file, "added_tokens_decoder", {index: token}, "an id with the 'content' of its token")
    if (file := find_file(path, "tokenizer.json", **hub)) is not None:
        _check_merges(file)
    if (file := find_file(path, "special_tokens_map.json", **hub)) is not None:
        _check_special(load_json(file, CheckpointError), file)
    if (file := find_file(path, "added_tokens.json", **hub)) is not None:
        for token, index in load_json(file, CheckpointError).items():
            if not is_integer(index) or not 0 <= index <= SIZES["vocab_size"]:
                raise _refused(file, token, index, "the id of the token")


def _check_merges(file: str):
    """Checks that the second part of each merge of a tokenizer.json begins with its continuing_subword_prefix.

    tokenizers cuts off that many bytes without a check, and panics where this splits a character.
    """
    model = load_json(file, CheckpointError, {"model": dict})["model"]
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if prefix is None or prefix == "" or not isinstance(merges, list):
        return
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(prefix, str) and parts and str(parts[-1]).startswith(prefix)):
            raise _refused(file, "model.continuing_subword_prefix", prefix, f"what the merge {merge!r} continues with")


def _check_values(values: dict[str, Any], file: str, prefix: str, numbers: dict[str, tuple[float, bool, float]]):
    for key, value in values.items():
        name = prefix + key
        if value is None:
            continue
        if key in SIZES:
            for one in value if key in LISTS and isinstance(value, list) else [value]:
                if not is_integer(one) or not 1 <= one <= SIZES[key]:
                    raise _refused(file, name, value, f"an integer from 1 to {SIZES[key]:,}")
        elif key in numbers:
            low, included, high = numbers[key]
            for one in value if key in LISTS and isinstance(value, list) else [value]:
                if not is_number(one) or not (low < one <= high or (included and one == low)):
                    bound = f"of at least {low:g}" if included else f"above {low:g}"
                    raise _refused(file, name, value, f"a number {bound}, up to {high:g},")
        elif key in ROPE or prefix.startswith(ROPE):
            if key in ("rope_type", "type"):
                _check(values, file, key, lambda value: isinstance(value, str), "a string", prefix)
            elif isinstance(value, dict):
                _check_values(value, file, f"{name}.", ROPE_NUMBERS)
            elif key in ROPE:
                raise _refused(file, name, value, "an object")
        elif isinstance(value, dict):
            _check_values(value, file, f"{name}.", numbers)


def _check_note(note: Any, file: str):
    """Checks the note `pose` that `pose.modeling.load.scale_config` writes."""
    if not isinstance(note, dict):
        raise _refused(file, "pose", note, "an object")
    kinds: dict[str, Callable[[Any], bool]] = {
        "rope": lambda value: isinstance(value, str),
        "window": lambda value: is_integer(value) and 1 <= value <= WINDOW,
        "factor": lambda value: value is None or is_number(value),
    }
    for key, fits in kinds.items():
        if not fits(note.get(key)):
            raise _refused(file, f"pose.{key}", note.get(key), "what this package writes")
    _check(note, file, "target_len", kinds["window"], "a number of tokens", "pose.")
    for key in ("attention_factor", "folded"):
        _check(note, file, key, lambda value: is_number(value) and value > 0, "a number above 0", "pose.")
    _check(note, file, "without_attention_factor", lambda value: isinstance(value, dict), "an object", "pose.")


def _check_special(tokens: dict[str, Any], file: str):
    for key in SPECIAL:
        _check(tokens, file, key, _is_token, f"{TEXT} or null")
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = tokens.get(key)
        several = list(value.values()) if isinstance(value, dict) else value
        if value is not None and not (isinstance(several, list) and all(map(_is_token, several))):
            raise _refused(file, key, value, "a list of tokens")


def _check(values: dict[str, Any], file: str, key: str, fits: Callable[[Any], bool], accepted: str, prefix: str = ""):
    if values.get(key) is not None and not fits(values[key]):
        raise _refused(file, prefix + key, values[key], accepted)


def _refused(file: str | Path, key: str, value: Any, accepted: str) -> CheckpointError:
    return CheckpointError(f"{file} has {f'{value!r}'[:60]} under {key!r}, where {accepted} is expected")


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number: a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a JSON file is a finite number."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))
