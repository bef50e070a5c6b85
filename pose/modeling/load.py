"""From a checkpoint, or a bare config, to a model whose RoPE is scaled before it is built."""

import copy
import functools
import logging
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from pose.errors import CheckpointError, ConfigError, first_line
from pose.files import load_json
from pose.modeling import compat
from pose.modeling.attention import resolve_backend
from pose.modeling.checkpoints import baichuan
from pose.modeling.checkpoints.baichuan import Baichuan
from pose.modeling.checkpoints.checks import WINDOW, check_config, check_groups, check_rope, check_tokenizer
from pose.modeling.checkpoints.gptj import GPTJ
from pose.modeling.checkpoints.hub import WEIGHT_FILES, find_file, from_hub, read_weights, weight_files
from pose.modeling.checkpoints.spm_tokenizer import load_spm_tokenizer, merge_settings
from pose.modeling.layers import check_layers
from pose.modeling.rotary import (
    head_dim_of,
    keep_frequencies_fp32,
    rotary_dim_of,
    rotate_by_example_length,
    set_target_len,
    target_len_of,
)
from pose.modeling.shard import Layout, Whole, fill, random_weights
from pose.modeling.weights import Weights, listed, matched, merges, not_finite, refuse
from pose.rope import RopeGeometry, RopeScaling, longrope_attention

log = logging.getLogger(__name__)

# Checkpoints in a form of their own, by the model_type of their config.json: read as a class of transformers.
FORMS: dict[str, type[GPTJ] | type[Baichuan]] = {"gptj": GPTJ, "baichuan": Baichuan}
# In the note `pose` of a config: rope_parameters of the same frequencies in the type that has no place for the model's
# attention factor. An export that puts it into the weights has no need of the other.
FACTORLESS = "without_attention_factor"
PROBE = "A text, № 1: ﬁne é 文"  # tokenised once when a tokenizer is loaded
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """Reads a checkpoint's config. Code that a checkpoint brings is never run.

    Args:
        path: a local Hugging Face folder, or a hub id.
        revision: of the hub repository.

    Raises:
        CheckpointError: nothing there, or not a model's config, or of a model that needs code of its own; names the
            path.
        ConfigError: a model with a part that is not supported here.
    """
    from_hub("config", check_config, path, revision)
    folder = Path(path).expanduser()
    if any((folder / name).exists() for name in WEIGHT_FILES):  # those of the hub come when they are due
        from_hub("weights", weight_files, path, revision)
    form = from_hub("config", _read_form, path, revision)
    if form is not None:
        return form.config
    raw = from_hub("config", PretrainedConfig.get_config_dict, path, revision)[0]
    scaling = raw.get("rope_scaling")
    if isinstance(scaling, dict):
        _check_rope_type(scaling.get("rope_type", scaling.get("type", "default")), path)
    config = from_hub("config", AutoConfig.from_pretrained, path, revision, trust_remote_code=False)
    check_has_window(raw, config, path)
    config.__dict__.pop("auto_map", None)  # it would be exported without the code that it names
    if config.model_type == "gemma" and config.hidden_act == "gelu":
        config.hidden_act = "gelu_pytorch_tanh"  # what its first folders mean by it
    _check_rope_type((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"), path)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise ConfigError(f"{path} is a {config.model_type} model with {name}, which is not supported")
    for name in ("logits_scaling", "logit_scale"):  # Granite's and Cohere's; losses are taken from the head itself
        if getattr(config, name, None) not in (None, 1):
            raise ConfigError(
                f"{path} is a {config.model_type} model that changes its logits after the head "
                f"({name}={getattr(config, name)}), which is not supported"
            )
    _refuse_quantised(config, path)
    check_groups(config, path)
    check_rope(config, path)
    _read_window(config, path)
    return config


def check_has_window(raw: dict[str, Any], config: PretrainedConfig, path: str):
    """A class would take its own default for the window, from which factor and frequencies follow."""
    key = "max_position_embeddings"
    if hasattr(config, key) and not {key, type(config).attribute_map.get(key, key)} & raw.keys():
        raise CheckpointError(
            f"{path} has no {key} in its config.json, and {getattr(config, key)}, the default of {config.model_type} "
            "models, may not be its window: write it there"
        )


def _refuse_quantised(config: PretrainedConfig, path: str):
    """Weights in a form of a library's own: they neither train here nor export, and need that library to be read."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return
    method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
    kind = f", {method}" if method else ""
    raise CheckpointError(
        f"{path} has quantised weights (quantization_config in its config.json{kind}), which are not supported: give "
        "the folder with the full weights (finetune=qlora rounds them by itself)"
    )


def _check_rope_type(rope_type: Any, path: str):
    if isinstance(rope_type, str) and rope_type not in compat.ROPE_TYPES:
        raise CheckpointError(
            f"{path} has a rope_scaling of type {rope_type!r}, which transformers does not know: make a plain "
            "folder of it first, with python -m pose.modeling.legacy SRC DST"
        )


def _read_window(config: PretrainedConfig, path: str):
    """Makes max_position_embeddings the window that a model was extended to, where others note it elsewhere."""
    parameters = getattr(config, "rope_parameters", None) or {}
    rope_type, factor = parameters.get("rope_type"), parameters.get("factor")
    if factor is None or isinstance(getattr(config, "pose", None), dict):  # our own note says it
        return
    longest = config.max_position_embeddings
    if rope_type == "linear" and factor > 1:
        _say_unknown_window(path, longest, factor)
    if rope_type not in ("yarn", "dynamic"):
        return
    extended = factor * (parameters.get("original_max_position_embeddings") or longest)
    if extended > WINDOW:
        raise CheckpointError(
            f"{path} is extended to {extended:g} tokens (rope_parameters.factor={factor:g}): up to {WINDOW:,} are "
            "accepted"
        )
    if rope_type == "yarn":  # for `dynamic` see `target_len_of`
        config.max_position_embeddings = max(longest, int(extended))


@functools.cache
def _say_unknown_window(path: str, longest: int, factor: float):
    """Warns once for a folder, which a run reads several times."""
    log.warning(
        f"{path} has linear RoPE scaling by {factor:g}, and does not tell whether max_position_embeddings={longest} is "
        "the window before or after: it is taken for both. Give the lengths to measure, or make a folder that tells, "
        "with python -m pose.modeling.legacy SRC DST --window TOKENS"
    )


def load_tokenizer(path: str, revision: str | None = None):
    """Reads a checkpoint's tokenizer. Args as `load_config`.

    Raises:
        CheckpointError: nothing there, or no tokenizer, or one that needs code of its own; names the path.
    """
    for check in (check_tokenizer, check_config):  # transformers reads the config for a tokenizer too
        from_hub("tokenizer", check, path, revision)
    settings = from_hub("tokenizer", compat.tokenizer_settings, path, revision)
    if "auto_map" not in settings or settings.get("tokenizer_class") in baichuan.TOKENIZERS:
        tokenizer = from_hub("tokenizer", _tried(_load_spm), path, revision, settings=settings)
        if tokenizer is not None:
            return tokenizer
    try:
        load = _tried(AutoTokenizer.from_pretrained)
        tokenizer = from_hub("tokenizer", load, path, revision, trust_remote_code=False)
    except CheckpointError as error:
        if "auto_map" not in settings:
            folder = Path(path).expanduser()
            if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
                raise _no_tokenizer(path) from error
            raise
        raise CheckpointError(
            f"the tokenizer of {path} needs code of its own (auto_map in its tokenizer_config.json), and such code is "
            "never run: put a tokenizer.json there, or give train.py model.tokenizer=FOLDER"
        ) from error
    tokenizer.init_kwargs.pop("auto_map", None)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one up for some models
        raise _no_tokenizer(path)
    return tokenizer


def _tried(load: Callable) -> Callable:
    """The same loader, which also tokenises a text: a damaged table makes tokenizers panic at the first one."""

    def load_and_try(*args, **kwargs):
        tokenizer = load(*args, **kwargs)
        if tokenizer is not None:
            with suppress(Exception):  # a sound tokenizer may have no token for unknown text
                tokenizer(PROBE)
        return tokenizer

    return load_and_try


def _load_spm(path: str, settings: dict[str, Any], **hub):
    """The tokenizer of a folder with a tokenizer.model and no tokenizer.json; None of another."""
    model = find_file(path, "tokenizer.model", **hub)
    if model is None or find_file(path, "tokenizer.json", **hub) is not None:
        return None
    beside = (find_file(path, name, **hub) for name in ("special_tokens_map.json", "added_tokens.json"))
    special, added = ({} if file is None else load_json(file, CheckpointError) for file in beside)
    return load_spm_tokenizer(model, merge_settings(settings, special, added))


def rope_geometry(config: PretrainedConfig) -> RopeGeometry:
    """What a model's config says of its rotary embedding; no value is assumed.

    Raises:
        ConfigError: the model has no rotary embedding, or one for each kind of layer.
        CheckpointError: sizes of heads, a base or a scaling that cannot be.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or "rope_theta" not in parameters:
        raise ConfigError(
            f"a {config.model_type} model has no single rotary embedding in its config (rope_parameters: "
            f"{parameters}): only models with one RoPE for all layers can be extended"
        )
    check_rope(config, f"the {config.model_type} model")
    dim = rotary_dim_of(config)
    window = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    rope_type = parameters.get("rope_type", "default")
    ours = getattr(config, "pose", None)  # what `scale_config` noted: linear and ntk leave no other trace of the window
    if isinstance(ours, dict):
        window, rope_type = ours["window"], ours["rope"]
    return RopeGeometry(float(parameters["rope_theta"]), dim, window, rope_type)


def check_target(target_len: int, window: int):
    """Raises a ConfigError where the window to extend to is shorter than the model's own; both in tokens."""
    if target_len < window:
        raise ConfigError(
            f"pose.target_len={target_len} is below the model's own window of {window} tokens: give a target of at "
            "least the window"
        )


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
    check_target(target_len, geometry.window)
    sliding = getattr(config, "sliding_window", None)
    if (
        sliding is not None
        and sliding < target_len
        and "full_attention" not in (getattr(config, "layer_types", None) or ())
    ):
        shorter = f"a target of at most {sliding}, or " * (sliding >= geometry.window)
        raise ConfigError(
            f"this model attends to the last {sliding} tokens only (sliding_window in its config), so it cannot use "
            f"{target_len} (pose.target_len): give {shorter}a copy of the folder with sliding_window: null"
        )
    scaling = scaling.resolve(geometry, target_len)
    target_len = max(target_len, target_len_of(config))
    if scaling.name == "none":
        _keep_attention_factor(config, geometry)
        if geometry.rope_type == "default" and target_len > geometry.window:  # nothing else will tell its own window
            config.pose = {"rope": "default", "window": geometry.window, "factor": None}
        set_target_len(config, target_len)
        return scaling
    config.pose = {"rope": scaling.name, "window": geometry.window, "factor": scaling.factor}
    _write_scaling(config, scaling, geometry, target_len)
    if scaling.attention_factor != 1.0:
        same = copy.deepcopy(config)
        _write_scaling(same, replace(scaling, attention_factor=1.0), geometry, target_len)
        config.pose["attention_factor"] = scaling.attention_factor
        if same.rope_parameters["rope_type"] != config.rope_parameters["rope_type"]:
            config.pose[FACTORLESS] = same.rope_parameters
    return scaling


def _keep_attention_factor(config: PretrainedConfig, geometry: RopeGeometry):
    """Writes down what transformers works out of max_position_embeddings, which is about to change."""
    rope, window = config.rope_parameters, geometry.window
    if rope.get("rope_type") not in ("yarn", "longrope") or rope.get("factor") is not None:
        return
    factor = config.max_position_embeddings / rope["original_max_position_embeddings"]
    if rope["rope_type"] == "yarn":
        rope["factor"] = factor
    elif rope.get("attention_factor") is None:
        rope["attention_factor"] = longrope_attention(factor, rope["original_max_position_embeddings"])
        if not isinstance(getattr(config, "pose", None), dict):  # so that an export tells engines of it
            of_itself = {"rope": "longrope", "window": window, "factor": factor}
            config.pose = of_itself | {"attention_factor": rope["attention_factor"]}


def _write_scaling(config: PretrainedConfig, scaling: RopeScaling, geometry: RopeGeometry, target_len: int):
    _write_rope(config, scaling.to_hf(geometry), geometry)
    set_target_len(config, target_len)
    try:
        config.validate_rope()
    except (ValueError, TypeError, KeyError):  # a model class that knows fewer types, such as phi3's
        _write_rope(config, scaling.to_longrope(geometry), geometry)
        try:
            config.validate_rope()
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"a {config.model_type} model takes no rope={scaling.name}: {first_line(error)}; none, ntk and theta "
                "may do"
            ) from error


def _write_rope(config: PretrainedConfig, rope_parameters: dict[str, Any], geometry: RopeGeometry):
    partial = {k: v for k, v in config.rope_parameters.items() if k == "partial_rotary_factor"}
    config.rope_parameters = partial | rope_parameters
    # What transformers' functions read beside rope_parameters.
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = head_dim_of(config)
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = geometry.window


def build_model(
    config: PretrainedConfig,
    path: str | None,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    layout: Layout | None = None,
    prepare: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """Builds a model from a (scaled) config and loads its weights.

    Args:
        config: says everything about the architecture, RoPE included.
        path: folder or hub id of the weights; None initialises them at random.
        attention: a backend of `pose.modeling.attention`.
        dtype: of the weights. Frequencies are fp32 whatever it is, and stay so.
        revision: of the hub repository.
        layout: how the processes share the weights; None gives each process all of them.
        prepare: changes the model before it is sharded (`pose.modeling.lora.add_lora`).

    Raises:
        CheckpointError: the weights cannot be loaded, or do not fit the config.
        ConfigError: the model's layers are not supported (`pose.modeling.layers.check_layers`).
    """
    check_layers(config)
    config = copy.deepcopy(config)  # the model owns its config: another built from the same must not change it
    options: dict[str, Any] = {"config": config, "attn_implementation": resolve_backend(attention), "dtype": dtype}
    form = None if path is None else from_hub("config", _read_form, path, revision)
    if form is not None and layout is None:
        layout = Whole(torch.device("cpu"), dtype)
    if layout is not None:
        model = compat.build_empty(**options)
        compat.note_conversions(model, from_checkpoint=path is not None)
    elif path is None:
        model = AutoModelForCausalLM.from_config(**options)
    else:
        from_hub("weights", weight_files, path, revision)
        model = from_hub("weights", _load, path, revision, **options)
    initial = random_weights(model) if path is None and layout is not None else None
    rotate_by_example_length(model)
    for name, parameter in model.named_parameters():
        if form is not None and name.endswith(form.frozen):
            parameter.requires_grad_(False)
    if prepare is not None:
        prepare(model)
    if layout is not None:
        layout.wrap(model)
        if initial is not None:
            fill(model, initial, layout)
        elif path is not None:
            from_hub("weights", _fill, path, revision, model=model, layout=layout)
    _refuse_not_finite(model, path, is_sharded=layout is not None)
    keep_frequencies_fp32(model)
    model.base_model.register_forward_pre_hook(_refuse_padding, with_kwargs=True)
    source = None if path is None else partial(from_hub, "weights", checkpoint_weights, path, revision)
    model.source = source  # type: ignore[assignment]  # of a module, which could be anything
    return model


def checkpoint_weights(path: str, **hub) -> Weights:
    """The weights of a checkpoint by the names that transformers reads them under. Args as `read_weights`."""
    form = _read_form(path, **hub)
    for name, tensor in read_weights(path, **hub):
        if form is None:
            yield name, tensor
        else:
            yield from form.convert(name, tensor).items()


def check_weights(config: PretrainedConfig, path: str, revision: str | None = None):
    """Whether the weights of a checkpoint are those of a config, by names and shapes: before any of them is loaded.

    Args:
        config: of the model.
        path: folder or hub id of the weights.
        revision: of the hub repository.

    Raises:
        CheckpointError: they cannot be read, or are not; names tensors (`pose.modeling.weights.matched`).
    """
    from_hub("weights", _check_weights, path, revision, config=config)


def is_merged(config: PretrainedConfig, path: str, revision: str | None = None) -> bool:
    """Whether weights of a checkpoint are merged when they are read, so that none can be placed alone.

    Args and Raises as `check_weights`.
    """
    empty = compat.build_on_meta(config, "sdpa")
    compat.note_conversions(empty, from_checkpoint=True)
    weights = from_hub("weights", checkpoint_weights, path, revision)
    return merges(empty, (name for name, _ in weights))


def _check_weights(path: str, config: PretrainedConfig, **hub):
    empty = compat.build_on_meta(config, "sdpa")
    compat.note_conversions(empty, from_checkpoint=True)
    with _named(path):
        for _ in matched(empty, checkpoint_weights(path, **hub), merging=True):
            pass


def _load(path: str, config: PretrainedConfig, **options) -> PreTrainedModel:
    """from_pretrained, which leaves nothing out and adds nothing."""
    hub = {name: options[name] for name in ("revision", "local_files_only") if name in options}
    _check_weights(path, config, **hub)
    options |= {"trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=config, **options)
    model, info = loaded
    with _named(path):
        refuse(info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model


def _fill(path: str, model: PreTrainedModel, layout: Layout, **hub):
    """What from_pretrained does, for a model in parts."""
    with _named(path):
        fill(model, matched(model, checkpoint_weights(path, **hub)), layout)
    compat.keep_used_conversions(model)
    if find_file(path, "generation_config.json", **hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)
    model.eval()


@contextmanager
def _named(path: str):
    """Errors inside begin with the path."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _refuse_not_finite(model: PreTrainedModel, path: str | None, is_sharded: bool):
    """Raises CheckpointError in every process, whichever holds the part that is not finite."""
    names = not_finite(model)
    if is_sharded and torch.distributed.is_initialized():
        everywhere: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, names)
        names = sorted(set().union(*everywhere))
    if names:
        raise CheckpointError(
            f"{path or 'model.init'}: weights are not finite (NaN, or infinite in {model.dtype}): {listed(names)}"
        )


def _refuse_padding(module, args, kwargs):
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is not None and not mask.all():
        raise ValueError(
            "an attention_mask with padding was given: pose's attention is purely causal and would ignore it. Batches "
            "here hold rows of one length; pad on the right and read no padded output, or export the model and load "
            "it with transformers' own attention"
        )


def _read_form(path: str, **hub) -> GPTJ | Baichuan | None:
    """The checkpoint's own form, where it is one of FORMS; None where transformers reads it."""
    raw, _ = PretrainedConfig.get_config_dict(path, **hub)
    model_type = raw.get("model_type")
    if model_type in FORMS:
        if raw.get("rope_scaling"):
            raise CheckpointError(
                f"{path} is a {model_type} whose RoPE is scaled (rope_scaling={raw['rope_scaling']}), which only the "
                "code that made it can read: start from the unscaled model"
            )
        try:
            form = FORMS[model_type](raw)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        form.config.dtype = PretrainedConfig(dtype=raw.get("dtype") or raw.get("torch_dtype")).dtype
        return form
    if "auto_map" in raw and model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path} needs code of its own (auto_map in its config.json, model_type {model_type!r}), and such code is "
            "never run: take a model that transformers has a class for"
        )
    return None


def _no_tokenizer(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds no tokenizer (no {', '.join(TOKENIZER_FILES)}): put one there, or give train.py "
        "model.tokenizer=FOLDER"
    )
