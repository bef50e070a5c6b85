"""An exported folder as a GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) serve.

llama.cpp rotates dimension j by position / f_j * b^(-2j/d), with the base b in the file's head and the divisors f_j in
a tensor, and multiplies cos and sin by a factor. So every method whose frequencies do not depend on the length of the
text has one form here, whatever transformers calls it: `rope_freqs.weight` are theta_j / inv_freq_j of the frequencies
that transformers itself builds, and `rope.scaling.attn_factor` is the attention factor.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pose.errors import CheckpointError, require_choice
from pose.files import atomic_file
from pose.modeling import compat
from pose.modeling.checkpoints.gguf import NAMES
from pose.modeling.checkpoints.hub import read_weights
from pose.modeling.export.engines import check_engine
from pose.modeling.export.gguf_tokenizer import Vocabulary, read_vocabulary
from pose.modeling.load import check_weights, load_config, load_tokenizer, rope_geometry
from pose.modeling.rotary import head_dim_of, target_len_of
from pose.modeling.weights import matched

F16_MAX = 65504.0
DTYPES = ("f16", "f32", "q8_0")  # of matrices; everything else is fp32
_NAMES = {theirs: ours for ours, theirs in NAMES.items()}


def write_gguf(folder: str | Path, file: str | Path, dtype: str = "f16"):
    """Writes weights, RoPE and tokenizer of a folder as one file, which appears under its name when it is whole.

    Args:
        folder: with config, weights and tokenizer, as `pose.modeling.export.export_model` writes it.
        file: replaced where it is there already.
        dtype: of the matrices: f16, f32, or q8_0 (8 bits, with an fp16 scale for every 32 weights).

    Raises:
        CheckpointError: the model or its tokenizer has no form in which llama.cpp would serve it right; or a weight is
            too large for f16; or the folder cannot be read.
        ConfigError: its RoPE or architecture has none (`check_engine`); another dtype.
    """
    require_choice("dtype", dtype, DTYPES)
    gguf = _gguf()
    folder, file = Path(folder), Path(file)
    if file.is_dir():
        raise CheckpointError(f"{file} cannot be written: it is a folder. Give a file")
    config = load_config(str(folder))
    check_engine("llama.cpp", config)
    _check_llama(config)
    check_weights(config, str(folder))
    vocabulary = read_vocabulary(load_tokenizer(str(folder)), config.vocab_size)
    kinds = gguf.GGMLQuantizationType
    wanted = {"f16": kinds.F16, "f32": kinds.F32, "q8_0": kinds.Q8_0}[dtype]
    try:
        with atomic_file(file, "wb") as partial:
            writer = gguf.GGUFWriter(partial.name, "llama")
            try:
                _write(writer, folder, config, vocabulary, wanted)
            finally:
                writer.close()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written: {error.strerror or error}") from error


def _write(writer, folder: Path, config: PretrainedConfig, vocabulary: Vocabulary, wanted):
    gguf = _gguf()
    kinds = gguf.GGMLQuantizationType

    def kind_of(shape):  # rows that are no whole number of blocks stay f16, as in llama.cpp's own files
        if len(shape) < 2:
            return kinds.F32
        return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else kinds.F16

    _write_head(writer, folder, config, vocabulary, wanted)
    divisors, factor = rope_divisors(config)
    if factor != 1.0:
        writer.add_rope_scaling_attn_factors(factor)
    rope = [] if divisors is None else [("rope_freqs.weight", torch.from_numpy(divisors))]
    for name, tensor in chain(_tensors(folder, config), rope):
        kind = kind_of(tensor.shape)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = tensor.numel() // block * size
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in chain(_tensors(folder, config), rope):
        values = tensor.float().numpy()
        kind = kind_of(values.shape)
        if kind != kinds.F32 and not np.abs(values).max() <= F16_MAX:
            raise CheckpointError(f"{name} has values beyond {F16_MAX:g}, the most that f16 holds: give dtype=f32")
        writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(values), kind))


def _write_head(writer, folder: Path, config: PretrainedConfig, vocabulary: Vocabulary, wanted):
    types = _gguf().LlamaFileType
    name = folder.resolve()
    heads = config.num_attention_heads
    head_dim = head_dim_of(config)
    writer.add_name(name.parent.name if name.name in ("model", "best") else name.name)
    writer.add_file_type({"F16": types.MOSTLY_F16, "F32": types.ALL_F32, "Q8_0": types.MOSTLY_Q8_0}[wanted.name])
    writer.add_quantization_version(_gguf().GGML_QUANT_VERSION)
    writer.add_context_length(target_len_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope_geometry(config).base)
    vocabulary.write(writer)


def rope_divisors(config: PretrainedConfig) -> tuple[np.ndarray | None, float]:
    """The divisors f_j of llama.cpp, fp32 [d/2], None where all are 1; and the factor of cos and sin."""
    rotary: Any = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]  # `check_engine` has let it pass
    theta = rope_geometry(config).theta()
    divisors = (theta / rotary.inv_freq.double()).numpy()
    plain = np.allclose(divisors, 1, rtol=1e-5, atol=0)  # fp32
    return None if plain else divisors.astype(np.float32), float(rotary.attention_scaling)


def _tensors(folder: Path, config: PretrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by their names in a GGUF; bytes are read when they are looked at."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    empty, has_embedding = compat.build_on_meta(config, "sdpa"), False
    compat.note_conversions(empty, from_checkpoint=True)
    for name, tensor in matched(empty, read_weights(str(folder))):
        parts = name.removeprefix("model.").split(".")
        block = ".".join(["blk", parts[1], ""]) if parts[0] == "layers" else ""
        inner = parts[2:] if block else name.split(".")
        module, kind = ".".join(inner[:-1]), inner[-1]
        if config.tie_word_embeddings and module in ("lm_head", "model.embed_tokens"):  # one matrix, or two copies
            if has_embedding:
                continue
            module, has_embedding = "model.embed_tokens", True
        if (num := heads.get(inner[-2])) is not None:  # rotary pairs are neighbours there, half a head apart here
            pairs = tensor.view(num, 2, -1, *tensor.shape[1:])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        yield f"{block}{_NAMES[module]}.{kind}", tensor


def _check_llama(config: PretrainedConfig):
    head_dim = head_dim_of(config)
    if rope_geometry(config).dim != head_dim:
        raise CheckpointError(
            f"the model rotates {rope_geometry(config).dim} of {head_dim} dimensions of a head, and llama.cpp's LLaMA "
            "all of them"
        )
    if config.hidden_act != "silu":
        raise CheckpointError(f"the model has hidden_act {config.hidden_act!r}, and llama.cpp's LLaMA has 'silu'")


def _gguf():
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError("writing a GGUF file needs the package gguf: pip install gguf") from error
    return gguf
