"""The shapes of the ready models, so that a plan needs neither network nor weights.

By the `path` of conf/model/*.yaml: the numbers of the config.json of each repository of the hub, under their names
there. A test compares their numbers of parameters with those that the repositories state.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pose.rope import RopeGeometry


def _llama(hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int, window: int, **more: Any) -> dict:
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": vocab, "max_position_embeddings": window,
        "rope_theta": 10_000.0, "dtype": "bfloat16", **more,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(
        576, 30, 9, 3, 1536, 49152, 8192, tie_word_embeddings=True, rope_theta=100_000.0
    ),
    "huggyllama/llama-7b": _llama(4096, 32, 32, 32, 11008, 32000, 2048, dtype="float16"),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 32, 32, 32, 11008, 32000, 4096, dtype="float16"),
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 32, 32, 8, 14336, 128256, 8192, rope_theta=500_000.0),
    "mistralai/Mistral-7B-v0.3": _llama(
        4096, 32, 32, 8, 14336, 32768, 32768, model_type="mistral", rope_theta=1_000_000.0
    ),
    "Qwen/Qwen2.5-7B": _llama(3584, 28, 28, 4, 18944, 152064, 131072, model_type="qwen2", rope_theta=1_000_000.0),
    "Qwen/Qwen3-8B-Base": _llama(
        4096, 36, 32, 8, 12288, 151936, 32768, model_type="qwen3", head_dim=128, rope_theta=1_000_000.0
    ),
    "google/gemma-7b": _llama(
        3072, 28, 16, 16, 24576, 256000, 8192, model_type="gemma", head_dim=256, tie_word_embeddings=True
    ),
    "baichuan-inc/Baichuan2-7B-Base": _llama(4096, 32, 32, 32, 11008, 125696, 4096, model_type="baichuan"),
    "microsoft/phi-2": _llama(
        2560, 32, 32, 32, 10240, 51200, 2048, model_type="phi", hidden_act="gelu_new", partial_rotary_factor=0.4,
        dtype="float16",
    ),
    "EleutherAI/gpt-j-6b": _llama(
        4096, 28, 16, 16, 16384, 50400, 2048, model_type="gptj", hidden_act="gelu_new", partial_rotary_factor=0.25,
        dtype="float32",
    ),
}  # fmt: skip


def geometry_of(shape: dict[str, Any]) -> "RopeGeometry":
    """What one of SHAPES says of its rotary embedding."""
    from pose.rope import RopeGeometry

    head_dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    rotary_dim = int(head_dim * shape.get("partial_rotary_factor", 1.0))
    return RopeGeometry(shape["rope_theta"], rotary_dim, shape["max_position_embeddings"])
