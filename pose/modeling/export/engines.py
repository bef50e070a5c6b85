"""What serving engines make of an exported folder: which of a model's RoPE they read wrong, and why.

Several drop what they do not know without a word, and serve another model. Each rule here was read in the engine's own
reader (vLLM 0.32, SGLang 0.5.23, mlx-lm 0.32.2, llama.cpp of October 2026); `python -m pose.engines` measures the same.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from pose.errors import CheckpointError, ConfigError, require_choice
from pose.files import load_json
from pose.modeling.options import ENGINES
from pose.modeling.rotary import depends_on_length
from pose.rope import RopeScaling, Yarn, longrope_attention, yarn_attention

_OF_GGUF = ("llama.cpp", "ollama")
_OF_ONE_LIST = {
    "vllm": "takes one of the two lists for all texts, by its own maximal length",
    "sglang": "takes one of the two lists for all texts of a batch",
    "llama.cpp": "would take one of the two lists for all texts, by the size of its cache",
    "ollama": "would take one of the two lists for all texts, by the size of its cache",
    "mlx": "takes the long list for all texts",
}
_OF_DYNAMIC = {
    "vllm": "gives NaN or something else beyond the old window",
    "sglang": "takes the frequencies of the full window for every text",
    "llama.cpp": "has no such scaling, and would leave the model unscaled",
    "ollama": "has no such scaling, and would leave the model unscaled",
}
# Families whose classes in mlx-lm read `rope_scaling`. Others (Gemma, Phi, GPT-NeoX, Mixtral) drop it without a word.
_MLX_SCALES = {
    "llama", "mistral", "qwen2", "qwen3", "granite", "granitemoe", "olmo2", "olmoe", "seed_oss", "phi3",
}  # fmt: skip


def check_engine(engine: str, config: PretrainedConfig):
    """Whether an engine can serve a model right, in any form that its export may have: before anything is trained.

    Args:
        engine: one of ENGINES.
        config: of the scaled model.

    Raises:
        ConfigError: it cannot, or is unknown; says why.
    """
    require_choice("model.engine", engine, ENGINES)
    if (why := _never(engine, config)) is not None:
        raise ConfigError(
            f"{engine} cannot serve this model right: {why}. docs/SERVING.md lists the methods that it can serve"
        )


def misread_by(folder: str | Path, config: PretrainedConfig) -> dict[str, str]:
    """The engines that serve an exported folder wrong, each with why.

    Args:
        folder: with config.json as it is written.
        config: the same, as transformers reads it.

    Raises:
        CheckpointError: config.json cannot be read.
    """
    written = load_json(Path(folder, "config.json"), CheckpointError)
    found = {engine: _never(engine, config) or _as_written(engine, config, written) for engine in ENGINES}
    return {engine: why for engine, why in found.items() if why is not None}


def _never(engine: str, config: PretrainedConfig) -> str | None:
    if engine in _OF_GGUF and config.model_type != "llama":
        return f"GGUF files are written of the architecture 'llama' alone, and this model is {config.model_type!r}"
    rope_type = config.rope_parameters["rope_type"]
    if engine == "mlx" and rope_type != "default" and config.model_type not in _MLX_SCALES:
        return f"its class of {config.model_type!r} models is not known to read a scaling of RoPE ({rope_type})"
    if not depends_on_length(config):
        return None
    is_dynamic = rope_type == "dynamic"
    why = (_OF_DYNAMIC if is_dynamic else _OF_ONE_LIST).get(engine)
    named = "dynamic" if is_dynamic else "longrope with unequal lists"
    return why and f"its frequencies depend on the length of the text ({named}), and {engine} {why}"


def _as_written(engine: str, config: PretrainedConfig, written: Mapping[str, Any]) -> str | None:
    """What is wrong with this folder's form alone: other keys would be read right."""
    if engine in ("transformers", *_OF_GGUF):  # which get another file
        return None
    rope, plain = config.rope_parameters, config.rope_parameters["rope_type"] == "default"
    if engine == "mlx" and not (
        written.get("rope_theta", 10_000.0) == rope["rope_theta"]
        and (plain or isinstance(written.get("rope_scaling"), dict))
    ):
        return (
            "it reads the older keys rope_theta and rope_scaling alone, and config.json has them under rope_parameters"
        )
    longest = config.max_position_embeddings
    read, meant = _factor_read(engine, rope, longest), _factor_meant(rope, longest)
    if not math.isclose(read, meant, rel_tol=1e-4):
        return f"it multiplies cos and sin by {read:.4g}, and this model by {meant:.4g} (attention_factor)"
    return None


def factor_is_not_ratio(scaling: RopeScaling, window: int, target_len: int) -> bool:
    """Whether a model is exported with a YaRN factor that is not target / window.

    transformers 4.51 to 4.55 take that ratio all the same (read in their source), which is another model; 4.56 and
    newer take the factor, and warn of it.

    Args:
        scaling: with everything filled in.
        window: the model's own, in tokens.
        target_len: in tokens.
    """
    return type(scaling) is Yarn and not scaling.rcd_shift and scaling.factor not in (None, target_len / window)


def _factor_meant(rope: Mapping[str, Any], longest: int) -> float:
    """What transformers multiplies cos and sin by."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    if rope["rope_type"] == "yarn":
        return yarn_attention(rope["factor"], rope.get("mscale") or 1) / yarn_attention(
            rope["factor"], rope.get("mscale_all_dim") or 0
        )
    if rope["rope_type"] == "longrope":
        window = rope["original_max_position_embeddings"]
        return longrope_attention(rope.get("factor") or longest / window, window)
    return 1.0


def _factor_read(engine: str, rope: Mapping[str, Any], longest: int) -> float:
    """What an engine multiplies cos and sin by."""
    if rope["rope_type"] == "yarn":
        own = yarn_attention(rope["factor"])
        if engine == "sglang":
            return own * rope.get("attn_factor", 1.0)
        if engine == "mlx":
            return yarn_attention(rope["factor"], rope.get("mscale", 1)) / yarn_attention(
                rope["factor"], rope.get("mscale_all_dim", 0)
            )
        return float(rope.get("attention_factor") or own)  # vLLM
    if rope["rope_type"] == "longrope":
        window = rope["original_max_position_embeddings"]
        own = longrope_attention(longest / window, window)
        return own if engine == "mlx" else float(rope.get("long_mscale") or own)
    return 1.0
