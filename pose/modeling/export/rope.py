"""What an exported config.json says of RoPE, in the words that most engines read right.

transformers 5 reads everything from `rope_parameters`. transformers 4, MLX and converters know only the keys of before,
and no two engines agree on an attention factor: vLLM and SGLang drop that of `longrope` and take the one that the type
implies, llama.cpp, SGLang and MLX do so with that of `yarn`. So the folder says the factor that the type implies by
itself, and the rest is in the weights (`pose.modeling.export.fold`).
"""

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from pose.files import load_json, write_json
from pose.modeling.compat import rotary_modules
from pose.modeling.export.fold import Fold
from pose.modeling.load import FACTORLESS
from pose.modeling.rotary import target_len_of
from pose.rope import longrope_attention, yarn_attention

SHARE = "partial_rotary_factor"
ORIGINAL = "original_max_position_embeddings"


class Said(NamedTuple):
    """How a model's rotation is said.

    Attributes:
        config: of the model, with other words for the same.
        fold: what the weights are multiplied by; None where they stay.
        kept: what to warn of; "" where engines have nothing to overlook.
    """

    config: PretrainedConfig
    fold: Fold | None = None
    kept: str = ""


def said(model: PreTrainedModel, fold: bool) -> Said:
    """Whatever is scaled by this package in the form that most engines read right; what came scaled stays as it came.

    Args:
        model: under any strategy.
        fold: whether weights may change; if not, an attention factor stays in the config.
    """
    config = copy.deepcopy(model.config)
    if not isinstance(getattr(config, "pose", None), dict):
        return Said(config)
    without = config.pose.pop(FACTORLESS, config.rope_parameters)
    factor, multiply, kept = attention_factor(model), None, ""
    parameters, implied = _implied(without, target_len_of(config))
    if not math.isclose(factor, implied, rel_tol=1e-9):
        reason = "model.export_fold is false"
        try:
            multiply = Fold(model, factor / implied) if fold else None
        except LookupError as error:
            reason = str(error)
        if multiply is not None:
            config.pose["folded"] = config.pose.get("folded", 1.0) * factor / implied
        else:
            kept = f"The attention factor {factor:.6g} stays in config.json, where engines may overlook it: {reason}"
            parameters = config.rope_parameters
            if parameters["rope_type"] == "longrope":  # where vLLM and SGLang look
                parameters |= {"short_mscale": factor, "long_mscale": factor}
    config.rope_parameters = parameters
    if hasattr(config, ORIGINAL) and ORIGINAL in parameters:
        config.original_max_position_embeddings = parameters[ORIGINAL]
    return Said(config, multiply, kept)


def attention_factor(model: PreTrainedModel) -> float:
    """What cos and sin of a model are multiplied by."""
    return float(getattr(rotary_modules(model)[0], "attention_scaling", 1.0))


def _implied(parameters: dict[str, Any], target_len: int) -> tuple[dict[str, Any], float]:
    """The same frequencies as `rope_parameters` with no attention factor of their own, and the one that these imply."""
    parameters = {key: value for key, value in parameters.items() if key not in ("type", "short_mscale", "long_mscale")}
    if parameters["rope_type"] == "yarn":
        parameters.pop("attention_factor", None)
        return parameters, yarn_attention(parameters["factor"])
    if parameters["rope_type"] != "longrope":
        return parameters, 1.0
    if list(parameters["short_factor"]) == list(parameters["long_factor"]):
        parameters[ORIGINAL] = target_len  # a window that has not grown implies none, and no list is the wrong one
    window = parameters[ORIGINAL]
    factor = target_len / window
    implied = longrope_attention(factor, window)
    return parameters | {"factor": factor, "attention_factor": implied}, implied


def with_old_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what transformers 4, MLX and converters read in place of `rope_parameters`.

    Args:
        raw: as transformers 5 writes it, and which it reads the same in both forms.
    """
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return raw
    old = {key: rope[key] for key in ("rope_theta", SHARE) if key in rope}
    if "num_local_experts" in raw:  # Qwen's name of before
        old["num_experts"] = raw["num_local_experts"]
    if raw["model_type"] == "gpt_neox":
        old |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get(SHARE, 1.0)}
    if rope["rope_type"] != "default":
        scaling = {key: value for key, value in rope.items() if key not in old} | {"type": rope["rope_type"]}
        if raw["model_type"] == "phi3" and "short_mscale" not in rope:  # whose class accepts these three and no more
            scaling = {key: scaling[key] for key in ("type", "short_factor", "long_factor")}
        old["rope_scaling"] = scaling
    if rope["rope_type"] == "longrope" and rope["short_factor"] != rope["long_factor"]:
        old[ORIGINAL] = rope[ORIGINAL]  # where transformers 4 looks for the length at which the lists change
    return raw | old


def where_the_factor_is(raw: dict[str, Any]) -> str | None:
    """What a model card says of the attention factor; None where there is none.

    Args:
        raw: the config.json of an export.
    """
    noted, rope = raw.get("pose") or {}, raw.get("rope_parameters") or {}
    factor, folded = f"{noted.get('attention_factor', 1.0):.6g}", noted.get("folded")
    if folded is not None:
        return f"{factor}: {folded:.6g} times are in the weights of queries and keys, where no engine overlooks it"
    if "short_mscale" in rope or (rope.get("rope_type") == "yarn" and "attention_factor" in rope):
        return f"{factor}, in config.json alone: an engine that overlooks it there serves another model"
    return None if "attention_factor" not in noted else f"{factor}, which engines work out themselves"


def for_old_readers(folder: Path):
    """Rewrites what save_pretrained has written of config and tokenizer, for readers of either major version."""
    write_json(folder / "config.json", with_old_keys(load_json(folder / "config.json")))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        write_json(settings, for_old_tokenizers(load_json(settings)))


def for_old_tokenizers(settings: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that both major versions of transformers read alike.

    Args:
        settings: as transformers 5 writes it: with a class that 4 does not know, and a list where 4 wants names.
    """
    settings = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings
