"""Baichuan's 7B checkpoints, read as transformers' LLaMA, without the code that they bring.

They are LLaMA but for two things: one packed matrix holds queries, keys and values, and Baichuan2's head uses
its rows at unit length. The matrix is split, and the rows are normalised once, while reading. While training,
Baichuan's own code would normalise them again at each step; here they are ordinary weights that may move.
https://github.com/baichuan-inc/Baichuan2
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from pose.errors import CheckpointError

# Classes that its folders name, and bring the code of: sentencepiece and nothing else.
TOKENIZERS = ("BaichuanTokenizer", "BaiChuanTokenizer")
CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class Baichuan:
    """A Baichuan checkpoint in its own form.

    Args:
        raw: its config.json.

    Attributes:
        config: the LlamaConfig of the same model.
        frozen: none.

    Raises:
        CheckpointError: a 13B model, which has ALiBi in place of RoPE, or quantised weights.
    """

    frozen = ()

    def __init__(self, raw: dict[str, Any]):
        # The 13B configs name their window model_max_length; ALiBi needs no positions.
        if "max_position_embeddings" not in raw or raw.get("hidden_size") == 5120:
            raise CheckpointError(
                "this Baichuan has ALiBi in place of RoPE, as the 13B models do, so there are no frequencies to scale: "
                "take a 7B model"
            )
        if raw.get("quantization_config"):
            raise CheckpointError("this Baichuan's weights are quantised (quantization_config): take the full ones")
        # Baichuan-7B spells its class BaiChuan, and has a plain head.
        self.unit_head = raw.get("architectures") != ["BaiChuanForCausalLM"] and raw.get("vocab_size") != 64_000
        self.config = LlamaConfig(
            **{key: raw[key] for key in CONFIG_KEYS if key in raw},
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )

    def convert(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a tensor of the checkpoint is in the LLaMA model, by name; {} for stored frequencies."""
        if name.endswith("rotary_emb.inv_freq"):
            return {}
        if name.endswith("W_pack.weight"):
            parts = (f"{x}_proj" for x in "qkv")
            return {name.replace("W_pack", part): x for part, x in zip(parts, tensor.chunk(3), strict=True)}
        if name == "lm_head.weight" and self.unit_head:
            return {name: F.normalize(tensor.float()).to(tensor.dtype)}
        return {name: tensor}
