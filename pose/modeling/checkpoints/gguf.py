"""GGUF files of the LLaMA architecture as ordinary Hugging Face folders.

python -m pose.modeling.checkpoints.gguf SOURCE FOLDER

SOURCE is a .gguf file, or an installed Python package that carries one. Quantised weights are dequantised: what
they lost when they were quantised stays lost.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pose.errors import CheckpointError

# Raise it whenever the same file would give another folder than before.
FORMAT_VERSION = 2
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
# How a text is cut before it is merged, by the name that the file has for it.
PRE_TOKENIZERS = {
    "gpt-2": _BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
}
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens


def find_gguf(source: str) -> Path:
    """The file that a path, or the name of an installed package, stands for. The package is not imported.

    Raises:
        CheckpointError: neither a file nor a package with exactly one .gguf file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    spec = importlib.util.find_spec(source) if source.isidentifier() else None
    folders = (spec and spec.submodule_search_locations) or ()
    found = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if len(found) != 1:
        raise CheckpointError(
            f"{source} is neither a .gguf file nor an installed package with one .gguf file in it"
            + (f" (it has {len(found)})" if spec else "")
        )
    return found[0]


def describe(file: Path) -> str:
    """The file's name and how most of its weights are kept, in one phrase."""
    kinds = Counter(tensor.tensor_type.name for tensor in _open(file).tensors)
    return f"{file.name} (weights {kinds.most_common(1)[0][0]}, dequantised)"


def convert(file: str | Path, folder: str | Path):
    """Writes a GGUF file as a folder: fp32 safetensors, config, tokenizer. It appears in one rename.

    Args:
        file: .gguf.
        folder: must not be there yet, or be empty.

    Raises:
        CheckpointError: not a GGUF file, or one of an architecture, a tokenizer or a RoPE that is not read here.
    """
    reader = _open(Path(file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, {tensor.name for tensor in reader.tensors})
    tokenizer = _tokenizer(fields)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = _weights(reader, config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{file} does not hold the weights of its own config: {error}") from error
    model.tie_weights()
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if "general.license" in fields:
            (partial / "README.md").write_text(f"---\nlicense: {fields['general.license']}\n---\n")
        partial.chmod(0o755)
        os.rename(partial, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cached_folder(file: Path, cache_dir: str | Path) -> Path:
    """The folder that a GGUF file converts to, kept in cache_dir; converted if it is not there yet.

    The key is the file's bytes and FORMAT_VERSION. Two processes that start at once both end with one folder.

    Raises:
        CheckpointError: as `convert`.
    """
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    key = hashlib.sha256(f"{FORMAT_VERSION} {digest}".encode()).hexdigest()[:16]
    folder = Path(cache_dir).expanduser() / "gguf" / key / file.stem
    if not folder.is_dir():
        try:
            convert(file, folder)
        except CheckpointError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def _open(file: Path):
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(f"reading {file} needs the package gguf: pip install gguf") from error
    try:
        return GGUFReader(file)
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file} is not a GGUF file: {error}") from error


def _config(fields: dict[str, Any], tensors: set[str]) -> LlamaConfig:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"the GGUF's general.architecture is {architecture!r}: only 'llama' is read")
    if fields.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise CheckpointError("the GGUF's RoPE is scaled already: start from the unscaled model")
    heads, width = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    head_dim = fields.get("llama.attention.key_length", width // heads)
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(
            f"the GGUF rotates {fields['llama.rope.dimension_count']} of {head_dim} dimensions, which LLaMA does not"
        )
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # kept as fp32: 1e-5 again
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("llama.rope.freq_base", 10_000.0)},
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def _weights(reader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        name = f"{NAMES.get(parts[-2])}.{parts[-1]}"
        if parts[-2] not in NAMES or len(parts) != (4 if parts[0] == "blk" else 2):
            raise CheckpointError(f"the GGUF's tensor {tensor.name} has no place in a LLaMA model")
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{name}"
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if parts[-2] in ("attn_q", "attn_k"):  # rotary pairs are neighbours in the file, half a head apart here
            pairs = values.view(-1, config.head_dim // 2, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(values.shape)
        weights[name] = values
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    kind, rules = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or rules not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"the GGUF's tokenizer is of model {kind!r} and pre-tokenizer {rules!r}: only 'gpt2' with "
            f"{' or '.join(map(repr, PRE_TOKENIZERS))} is read"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[rules]
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", [])
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    if fields.get("tokenizer.ggml.add_bos_token"):
        raise CheckpointError("the GGUF's tokenizer puts a BOS before every text (add_bos_token), which is not read")
    special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in special.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
        chat_template=fields.get("tokenizer.chat_template"),
        **{name: tokens[i] for name, i in ids.items() if i is not None},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a .gguf file, or an installed package that carries one")
    parser.add_argument("folder", help="to write to; must not be there yet")
    args = parser.parse_args()
    try:
        file = find_gguf(args.source)
        convert(file, args.folder)
    except CheckpointError as error:
        parser.exit(1, f"CheckpointError: {error}\n")
    print(f"{args.folder}: {describe(file)}")


if __name__ == "__main__":
    main()
