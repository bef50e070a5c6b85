"""A GGUF file holds the weights, the rotation and the head of its folder; what cannot be is refused."""

import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pose.app.export import main
from pose.data.tokenizer import train_tokenizer
from pose.errors import CheckpointError, ConfigError
from pose.modeling.checkpoints.gguf import convert
from pose.modeling.export import gguf as module
from pose.modeling.export.gguf import rope_divisors, write_gguf
from pose.modeling.load import load_config, scale_config
from pose.rope import (
    NTK,
    Cope,
    Drope,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    NTKByParts,
    Theta,
    Unscaled,
    Yarn,
    YarnRevised,
)

gguf = pytest.importorskip("gguf")

D = 16  # rotary dimensions of a head
RISING = [1 + 0.5 * i for i in range(D // 2)]
STATIC = {
    "linear": Linear(),
    "ntk": NTK(),
    "theta": Theta(),
    "yarn": Yarn(),
    "yarn without its factor": Yarn(attention_factor=1.0),
    "yarn_revised": YarnRevised(),
    "ntk_by_parts": NTKByParts(),
    "llama3": Llama3(),
    "drope": Drope(attention_factor=1.3),
    "cope": Cope(),
    "yarn shifted": Yarn(rcd_shift=True),
    "ntk shifted": NTK(rcd_shift=True),
    "longrope of one list": LongRope(long_factor=RISING, short_factor=RISING),
}


@functools.cache
def make_tokenizer():
    return train_tokenizer(["the cat sat on the mat, and the dog on 12 logs. " * 50], vocab_size=300, window=64)


def make_folder(folder, scaling=None, target=256, kind=LlamaForCausalLM, **changes):
    """A small model of random weights, 64 tokens wide, extended to `target`."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 304, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 500.0,
    }  # fmt: skip
    config = {LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config}[kind](**sizes | changes)
    if scaling is not None:
        scale_config(config, scaling, target)
    model = kind(config)
    for parameter in model.parameters():  # norms of ones would hide an exchange
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def read(file):
    """The tensors of a file as fp32 numbers, and the values of its head."""
    reader = gguf.GGUFReader(file)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    return tensors, kinds, {name: field.contents() for name, field in reader.fields.items()}


def llama_cpp_rows(weight, heads):
    """`LlamaModel.permute` of llama.cpp's converter."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def test_a_folder_in_place_of_the_file_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path} cannot be written: it is a folder"):
        write_gguf(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_every_tensor_comes_back(tmp_path, dtype, tied):
    model = make_folder(tmp_path / "model", tie_word_embeddings=tied, attention_bias=True)
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", dtype)
    tensors, kinds, _ = read(tmp_path / "x.gguf")
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    for name, value in state.items():
        place, _, kind = name.rpartition(".")
        block = ""
        if place.startswith("model.layers."):
            block, place = f"blk.{place.split('.')[2]}.", place.split(".", 3)[3]
        if (heads := {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(place)) is not None:
            value = llama_cpp_rows(value, heads)
        found = tensors.pop(f"{block}{names[place]}.{kind}")
        if value.ndim == 1 or dtype == "f32":
            assert np.array_equal(found, value), name
        elif dtype == "f16":
            assert np.array_equal(found, value.astype(np.float16).astype(np.float32)), name
        else:  # half a step of 1/127 of the largest in 32 numbers, and that one's rounding to fp16
            largest = np.abs(value.reshape(-1, 32)).max(1, keepdims=True)
            apart = np.abs(found - value).reshape(-1, 32)
            assert (apart <= largest * (0.5 / 127 + 2**-10)).all() and apart.max() > 0, name
    assert not tensors
    assert {k for n, k in kinds.items() if n.endswith("norm.weight")} == {"F32"}
    assert kinds["token_embd.weight"] == dtype.upper()


@pytest.mark.parametrize("layout", ["the head alone", "both copies", "of the base model"])
def test_names_of_other_checkpoints_are_the_same_file(tmp_path, layout):
    """What transformers loads: one name of a tied matrix or both, in any order; names without `model.`."""
    folder = tmp_path / "model"
    make_folder(folder, tie_word_embeddings=True)
    write_gguf(folder, tmp_path / "usual.gguf")
    weights = load_file(folder / "model.safetensors")
    if layout == "of the base model":
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    else:
        weights = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()} | weights
        if layout == "the head alone":
            del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_gguf(folder, tmp_path / "other.gguf")
    usual, other = (read(tmp_path / name)[0] for name in ("usual.gguf", "other.gguf"))
    assert usual.keys() == other.keys() >= {"token_embd.weight", "output_norm.weight"}
    assert all(np.array_equal(usual[name], other[name]) for name in usual)


def test_rows_that_are_no_whole_blocks_stay_f16(tmp_path):
    make_folder(tmp_path / "model", intermediate_size=80)
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", "q8_0")
    _, kinds, _ = read(tmp_path / "x.gguf")
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


def test_the_head_is_the_configs(tmp_path):
    make_folder(tmp_path / "model", Yarn(), rms_norm_eps=1e-5, head_dim=32)
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f16")
    _, _, head = read(tmp_path / "x.gguf")
    expected = {
        "general.architecture": "llama", "llama.context_length": 256, "llama.embedding_length": 64,
        "llama.feed_forward_length": 96, "llama.block_count": 2, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 32, "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32, "llama.rope.freq_base": 500.0, "llama.vocab_size": 304,
        "general.file_type": 1, "general.name": tmp_path.name, "tokenizer.ggml.pre": "smollm",
    }  # fmt: skip
    assert {key: head[key] for key in expected} == expected
    assert head["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert len(head["tokenizer.ggml.tokens"]) == 304


@pytest.mark.parametrize("name", STATIC)
def test_llama_cpp_rotates_as_transformers_does(tmp_path, name):
    """By the formula of ggml_rope_ext: position / f_j * base^(-2j/d), cos and sin times attn_factor."""
    model = make_folder(tmp_path / "model", STATIC[name])
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32")
    tensors, _, head = read(tmp_path / "x.gguf")
    base = head["llama.rope.freq_base"] ** (-np.arange(0, D, 2) / D)
    found = base / tensors.get("rope_freqs.weight", np.ones(D // 2))
    rotary = model.model.rotary_emb
    assert found == pytest.approx(rotary.inv_freq.double().numpy(), rel=1e-6)
    assert head.get("llama.rope.scaling.attn_factor", 1.0) == pytest.approx(rotary.attention_scaling)
    assert "llama.rope.scaling.type" not in head  # which would scale once more
    assert ("rope_freqs.weight" in tensors) == (name not in ("ntk", "theta"))


def test_an_unscaled_model_has_no_divisors(tmp_path):
    model = make_folder(tmp_path / "model")
    divisors, factor = rope_divisors(model.config)
    assert divisors is None and factor == 1.0


def test_a_file_is_read_back_by_the_importer(tmp_path):
    """`pose.modeling.checkpoints.gguf` reads foreign files of llama.cpp: both have to mean the same by a row."""
    model = make_folder(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32")
    convert(tmp_path / "x.gguf", tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scaling": Dynamic()}, "depend on the length"),
        ({"scaling": LongRope(long_factor=RISING)}, "longrope with unequal lists"),
        ({"kind": Qwen2ForCausalLM}, "architecture 'llama' alone, and this model is 'qwen2'"),
    ],
)
def test_what_llama_cpp_would_serve_wrong_is_refused(tmp_path, changes, words):
    make_folder(tmp_path / "model", **changes)
    with pytest.raises(ConfigError, match=words):
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_an_activation_of_its_own_is_refused(tmp_path):
    make_folder(tmp_path / "model", hidden_act="gelu")
    with pytest.raises(CheckpointError, match="hidden_act 'gelu'"):
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32")


def test_a_weight_too_large_for_f16_is_refused_and_nothing_is_left(tmp_path):
    model = make_folder(tmp_path / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e5
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "x.gguf").write_text("the old one")
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight has values beyond 65504"):
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f16")
    assert (tmp_path / "x.gguf").read_text() == "the old one"
    assert {file.name for file in tmp_path.iterdir()} == {"model", "x.gguf"}
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32")
    assert read(tmp_path / "x.gguf")[0]["blk.1.ffn_up.weight"][3, 5] == 1e5


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    make_folder(tmp_path / "model")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_head", stop)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_command_line(tmp_path, capsys):
    make_folder(tmp_path / "run" / "model", Yarn())
    main([str(tmp_path / "run"), "gguf", "dtype=q8_0"])
    file = tmp_path / "run" / "model-q8_0.gguf"
    assert str(file) in capsys.readouterr().out and read(file)[2]["general.name"] == "run"
    main([str(tmp_path / "run" / "model"), "gguf", f"out={tmp_path / 'own.gguf'}"])
    assert read(tmp_path / "own.gguf")[1]["token_embd.weight"] == "F16"
    assert load_config(str(tmp_path / "run" / "model")).max_position_embeddings == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "gguf"], "RUN=nowhere is no folder"),
        (["{run}", "gguf", "dtype=int4"], "dtype='int4' is unknown: choose f16, f32, q8_0"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, capsys, arguments, words):
    make_folder(tmp_path / "model", Unscaled())
    with pytest.raises(SystemExit):
        main([argument.format(run=tmp_path / "model") for argument in arguments])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["x", "onnx"], ["x", "gguf", "type=f16"], ["x", "gguf", "out="]])
def test_arguments_are_checked_before_anything_is_read(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err
