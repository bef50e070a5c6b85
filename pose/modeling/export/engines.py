"""What serving engines make of an exported folder: which of a model's RoPE they would read wrong.

Measured by `python -m pose.engines` (docs/SERVING.md). Several engines drop what they do not know without a word, and
serve another model.
"""

from transformers import PretrainedConfig

from pose.errors import ConfigError, require_choice
from pose.modeling.rotary import depends_on_length

ENGINES = ("transformers", "vllm", "sglang", "llama.cpp", "ollama", "mlx")
_OF_GGUF = ("llama.cpp", "ollama")
_BY_LENGTH = {
    "dynamic": {
        "vllm": "gives NaN beyond the old window",
        "sglang": "takes the frequencies of the full window for every text",
        "llama.cpp": "has no such scaling, and would leave the model unscaled",
        "ollama": "has no such scaling, and would leave the model unscaled",
        "mlx": "has no such scaling",
    },
    "longrope": {
        "vllm": "takes one of the two lists for all texts, by its own maximal length",
        "sglang": "takes one of the two lists for all texts of a batch",
        "llama.cpp": "takes one of the two lists for all texts, by the size of its cache",
        "ollama": "takes one of the two lists for all texts, by the size of its cache",
        "mlx": "takes the long list for all texts",
    },
}


def misread(engine: str, config: PretrainedConfig) -> str | None:
    """Why an engine cannot serve a model right; None where it can.

    Args:
        engine: one of ENGINES.
        config: of the model, scaled.
    """
    if engine in _OF_GGUF and config.model_type != "llama":
        return f"GGUF files are written of the architecture 'llama' alone, and this model is {config.model_type!r}"
    if not depends_on_length(config):
        return None
    rope_type = config.rope_parameters["rope_type"]
    if (why := _BY_LENGTH[rope_type].get(engine)) is None:
        return None
    named = "dynamic" if rope_type == "dynamic" else "longrope with unequal lists"
    return f"its frequencies depend on the length of the text ({named}), and {engine} {why}"


def check_engine(engine: str, config: PretrainedConfig):
    """Whether an engine will serve a model right.

    Raises:
        ConfigError: it will not; says why, and what it serves.
    """
    require_choice("model.engine", engine, ENGINES)
    if (why := misread(engine, config)) is not None:
        raise ConfigError(
            f"{engine} cannot serve this model right: {why}. Choose another method of the group rope, or another "
            "engine (docs/SERVING.md)"
        )


def warnings(config: PretrainedConfig) -> dict[str, str]:
    """The engines that misread a model, each with why."""
    found = {engine: misread(engine, config) for engine in ENGINES}
    return {engine: why for engine, why in found.items() if why is not None}
