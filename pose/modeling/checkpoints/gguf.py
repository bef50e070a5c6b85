"""GGUF files of the LLaMA architecture as ordinary Hugging Face folders.

python -m pose.modeling.checkpoints.gguf SOURCE FOLDER

SOURCE is a .gguf file, or an installed Python package that carries one. Quantised weights are dequantised: what
they lost when they were quantised stays lost.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

if __name__ == "__main__":  # before what takes seconds to import
    import runpy

    runpy.run_module("pose.app.gguf", run_name="__main__")
    raise SystemExit

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pose.errors import CheckpointError, DataError, one_line
from pose.files import Memo, atomic_folder, digest
from pose.modeling.checkpoints.checks import SIZES, WINDOW, check_rope, is_integer, is_number
from pose.modeling.export.rope import for_old_readers

# Raise it whenever the same file would give another folder than before.
FORMAT_VERSION = 4
SCALES = ("scaling.factor", "scaling.attn_factor", "scale_linear")  # each of which is 1 where nothing is scaled
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
LONGEST_ARRAY = 1 << 22  # items


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
    return f"{one_line(file.name)} (weights {kinds.most_common(1)[0][0]}, dequantised)"


def convert(file: str | Path, folder: str | Path):
    """Writes a GGUF file as a folder: fp32 safetensors, config, tokenizer. It appears in one rename.

    Args:
        file: .gguf.
        folder: must not be there yet, or be empty.

    Raises:
        CheckpointError: not a GGUF file, or one of an architecture, a tokenizer or a RoPE that is not read here, or of
            values that cannot be.
    """
    file, folder = Path(file), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} cannot be written: it exists. Give a new folder")
    reader = _open(file)
    try:
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = _config(fields, {tensor.name for tensor in reader.tensors})
        check_rope(config, "the GGUF")
        tokenizer, license = _tokenizer(fields), _text(fields, "general.license")
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.load_state_dict(_weights(reader, config), assign=True)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except StrictDataclassError as error:
        raise CheckpointError(f"{file} has a config that LLaMA cannot have: {one_line(error)}") from error
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} does not hold the weights of its own config: {error}") from error
    model.tie_weights()
    try:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        with atomic_folder(folder) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            for_old_readers(partial)
            if license:
                head = yaml.safe_dump({"license": one_line(license)}, allow_unicode=True)
                (partial / "README.md").write_text(f"---\n{head}---\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def cached_folder(file: Path, cache_dir: str | Path) -> Path:
    """The folder that a GGUF file converts to, kept in cache_dir; converted if it is not there yet.

    The key is the file's bytes and FORMAT_VERSION. Two processes that start at once both end with one folder.

    Raises:
        CheckpointError: as `convert`; or the file cannot be read.
    """
    cache = Path(cache_dir).expanduser()
    try:
        contents = digest(file, Memo(cache / ".memo"))
    except DataError as error:
        raise CheckpointError(str(error)) from error
    key = hashlib.sha256(f"{FORMAT_VERSION} {contents}".encode()).hexdigest()[:16]
    folder = cache / "gguf" / key / file.stem
    if not folder.is_dir():
        try:
            convert(file, folder)
        except CheckpointError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def _open(file: Path):
    try:
        from gguf import GGUFReader, GGUFValueType
    except ImportError as error:
        raise CheckpointError(f"reading {file} needs the package gguf: pip install gguf") from error

    class Reader(GGUFReader):
        """Checks every length: beyond the end of a file GGUFReader reads empty items, as many as the file claims."""

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type == GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > LONGEST_ARRAY:
                raise ValueError("it has an array that is longer than any vocabulary")
            return super()._get_field_parts(orig_offs, raw_type)

        def _get(self, offset, dtype, count=1, override_order=None):
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends before its contents do")
            return super()._get(offset, dtype, count, override_order)

    try:
        return Reader(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a GGUF file: {error}") from error


def _field(fields: dict[str, Any], key: str, fits: Callable[[Any], bool], expected: str, default: Any = None) -> Any:
    """A value of the file's head, or the default, where it is as expected."""
    value = fields.get(key, default)
    if not fits(value):
        raise CheckpointError(f"it has {f'{value!r}'[:60]} under {key!r}, where {expected} is expected")
    return value


def _size(fields: dict[str, Any], key: str, limit: int, default: int | None = None) -> int:
    return _field(fields, key, lambda n: is_integer(n) and 1 <= n <= limit, f"an integer from 1 to {limit:,}", default)


def _number(fields: dict[str, Any], key: str, default: float | None = None) -> float:
    return _field(fields, key, lambda value: is_number(value) and value > 0, "a number above 0", default)


def _list(fields: dict[str, Any], key: str, kind: type, default: list | None = None) -> list:
    def fits(value):
        return isinstance(value, list) and all(isinstance(item, kind) for item in value)

    return _field(fields, key, fits, f"a list of {kind.__name__}", default)


def _text(fields: dict[str, Any], key: str) -> str | None:
    return _field(fields, key, lambda value: value is None or isinstance(value, str), "a text")


def _special_ids(fields: dict[str, Any], num_tokens: int) -> dict[str, int]:
    """The ids of special tokens, by the names of transformers."""

    def fits(value):
        return value is None or (is_integer(value) and 0 <= value < num_tokens)

    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {
        name: _field(fields, f"tokenizer.ggml.{key}_token_id", fits, f"the id of one of {num_tokens} tokens")
        for name, key in keys.items()
    }
    return {name: i for name, i in ids.items() if i is not None}


def _config(fields: dict[str, Any], tensors: set[str]) -> LlamaConfig:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"the GGUF's general.architecture is {architecture!r}: only 'llama' is read")
    scaling = fields.get("llama.rope.scaling.type")
    is_scaled = scaling not in (None, "none") or "rope_freqs.weight" in tensors
    for key in SCALES:  # without a type llama.cpp takes "linear"
        is_scaled |= scaling is None and fields.get(f"llama.rope.{key}") not in (None, 0, 1)
    if is_scaled:
        raise CheckpointError("the GGUF's RoPE is scaled already: start from the unscaled model")
    heads = _size(fields, "llama.attention.head_count", SIZES["num_attention_heads"])
    width = _size(fields, "llama.embedding_length", SIZES["hidden_size"])
    head_dim = _size(fields, "llama.attention.key_length", SIZES["head_dim"], width // heads)
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(
            f"the GGUF rotates {fields['llama.rope.dimension_count']} of {head_dim} dimensions, which LLaMA does not"
        )
    layers = _size(fields, "llama.block_count", SIZES["num_hidden_layers"])
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if blocks != set(map(str, range(layers))):
        raise CheckpointError(f"it has {layers} under 'llama.block_count', and tensors of {len(blocks)} blocks")
    tokens = _list(fields, "tokenizer.ggml.tokens", str)
    special = _special_ids(fields, len(tokens))
    return LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=_size(fields, "llama.feed_forward_length", SIZES["intermediate_size"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_size(fields, "llama.attention.head_count_kv", heads, heads),
        head_dim=head_dim,
        max_position_embeddings=_size(fields, "llama.context_length", WINDOW),
        # stored as fp32; rounded back to 1e-5
        rms_norm_eps=float(f"{_number(fields, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": _number(fields, "llama.rope.freq_base", 10_000.0)},
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=special.get("bos"),
        eos_token_id=special.get("eos"),
        pad_token_id=special.get("pad"),
        dtype="float32",
    )


def _weights(reader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    weights: dict[str, torch.Tensor] = {}
    head_dim = config.head_dim or 0  # which `_config` has set
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if len(parts) != (4 if parts[0] == "blk" else 2) or parts[-2] not in NAMES:
            raise CheckpointError(f"the GGUF's tensor {tensor.name!r} has no place in a LLaMA model")
        name = f"{NAMES[parts[-2]]}.{parts[-1]}"
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{name}"
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if parts[-2] in ("attn_q", "attn_k"):  # rotary pairs are neighbours in the file, half a head apart here
            pairs = values.view(-1, head_dim // 2, 2, *values.shape[1:])
            values = pairs.transpose(1, 2).reshape(values.shape)
        weights[name] = values
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    kind, rules = _text(fields, "tokenizer.ggml.model"), _text(fields, "tokenizer.ggml.pre")
    if kind != "gpt2" or rules not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"the GGUF's tokenizer is of model {kind!r} and pre-tokenizer {rules!r}: only 'gpt2' with "
            f"{' or '.join(map(repr, PRE_TOKENIZERS))} is read"
        )
    tokens = _list(fields, "tokenizer.ggml.tokens", str)
    if len(set(tokens)) < len(tokens):
        raise CheckpointError("it has a token twice under 'tokenizer.ggml.tokens'")
    merges = [tuple(merge.split(" ")) for merge in _list(fields, "tokenizer.ggml.merges", str)]
    try:
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"its 'tokenizer.ggml.merges' do not fit its tokens: {error}") from error
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[rules]
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _list(fields, "tokenizer.ggml.token_type", int, [])
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    for key, what in (("add_bos_token", "a BOS before"), ("add_eos_token", "an EOS after")):
        if fields.get(f"tokenizer.ggml.{key}"):
            raise CheckpointError(f"the GGUF's tokenizer puts {what} every text ({key}), which is not read")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
        chat_template=_text(fields, "tokenizer.chat_template"),
        **{f"{name}_token": tokens[i] for name, i in _special_ids(fields, len(tokens)).items()},
    )
