"""Baichuan's 7B checkpoints, read as transformers' LLaMA, without the code that they bring.

They are LLaMA but for two things: one packed matrix holds queries, keys and values, and Baichuan2's head uses
its rows at unit length. The matrix is split, and the rows are normalised once, while reading. While training,
Baichuan's own code would normalise them again at each step; here they are ordinary weights that may move.
https://github.com/baichuan-inc/Baichuan2
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pose.errors import CheckpointError

TOKENIZERS = ("BaichuanTokenizer", "BaiChuanTokenizer")  # classes that its folders name, and bring the code of
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
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of pieces in a sentencepiece model
BPE = 2  # of a sentencepiece model's algorithms


class Baichuan:
    """A Baichuan checkpoint in its own form.

    Args:
        raw: its config.json.

    Attributes:
        config: the LlamaConfig of the same model.
        model_class: of the model it becomes.
        frozen: none.

    Raises:
        CheckpointError: a 13B model, which has ALiBi in place of RoPE, or quantised weights.
    """

    model_class = LlamaForCausalLM
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
            rope_theta=10_000.0,
            rope_scaling=raw.get("rope_scaling"),
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


def load_tokenizer(vocab_file: str | Path, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Baichuan's tokenizer from its sentencepiece model, in the form of the library `tokenizers`.

    Spaces, prefix and normalisation are those that the model itself asks for. Special tokens in a text are read as
    such, as Baichuan's own class does.

    Args:
        vocab_file: tokenizer.model.
        settings: tokenizer_config.json.

    Raises:
        CheckpointError: sentencepiece is not installed, or the model is not one of BPE.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise CheckpointError(
            f"reading {vocab_file} needs the packages sentencepiece and protobuf: pip install sentencepiece protobuf"
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(Path(vocab_file).read_bytes())
    except Exception as error:  # protobuf's own class of errors is not importable everywhere
        raise CheckpointError(f"{vocab_file} is not a sentencepiece model: {error}") from error
    rules = proto.normalizer_spec
    if proto.trainer_spec.model_type != BPE or proto.trainer_spec.treat_whitespace_as_suffix:
        raise CheckpointError(f"{vocab_file} is not a sentencepiece model of BPE with spaces before words")

    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(proto.pieces),
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", left=1)] * rules.add_dummy_prefix)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    special = {key: _content(settings.get(key)) for key in ("unk_token", "bos_token", "eos_token", "pad_token")}
    special = {key: token for key, token in special.items() if token is not None}
    if settings.get("add_bos_token"):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=settings.get("model_max_length"),
        **special,
    )


def _merges(pieces) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third, by its score: sentencepiece stores the pieces alone."""
    normal = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    pairs = [
        (-score, whole[:i], whole[i:])
        for whole, score in normal.items()
        for i in range(1, len(whole))
        if whole[:i] in normal and whole[i:] in normal
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]


def _content(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
