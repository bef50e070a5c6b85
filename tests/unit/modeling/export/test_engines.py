"""What engines misread is known by the rules of their own readers, and stops a run that is for one of them."""

import json

import pytest
from transformers import GemmaConfig, GPTNeoXConfig, LlamaConfig, MixtralConfig, PhiConfig, Qwen2Config

from pose.errors import ConfigError
from pose.modeling.export.engines import check_engine, misread_by
from pose.modeling.load import scale_config
from pose.rope import NTK, Drope, Dynamic, Linear, Llama3, LongRope, Theta, Yarn

RISING = [1.0 + i for i in range(8)]


def make_config(scaling, kind=LlamaConfig):
    config = kind(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=1, max_position_embeddings=64, rope_theta=500.0
    )
    scale_config(config, scaling, 512)
    return config


def misread(tmp_path, config, old_keys=True, **rope):
    """Of a folder with this config, with the older keys beside the new ones, and some keys of RoPE changed."""
    written = config.to_dict()
    written["rope_parameters"] |= rope
    config.rope_parameters = written["rope_parameters"]
    if old_keys:
        written |= {"rope_theta": written["rope_parameters"]["rope_theta"], "rope_scaling": written["rope_parameters"]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    return misread_by(tmp_path, config)


@pytest.mark.parametrize("scaling", [Linear(), NTK(), Llama3()])
def test_what_is_a_type_of_its_own_is_read_by_all(tmp_path, scaling):
    assert misread(tmp_path, make_config(scaling)) == {}


@pytest.mark.parametrize("scaling", [Linear(), NTK(), Llama3(), Yarn()])
def test_mlx_reads_older_keys_alone(tmp_path, scaling):
    found = misread(tmp_path, make_config(scaling), old_keys=False)
    assert list(found) == ["mlx"] and "rope_scaling" in found["mlx"]


def test_a_factor_of_yarn_that_is_not_its_own(tmp_path):
    found = misread(tmp_path, make_config(Yarn(attention_factor=1.0)))
    assert list(found) == ["sglang", "mlx"]
    assert "multiplies cos and sin by 1.208, and this model by 1" in found["mlx"]
    assert misread(tmp_path, make_config(Yarn())) == {}
    # mlx-lm takes the quotient of the two, SGLang another name
    own = {"mscale": 1.0, "mscale_all_dim": 1.0, "attn_factor": 1 / 1.2079441541679836}
    assert misread(tmp_path, make_config(Yarn(attention_factor=1.0)), **own) == {}


def test_a_factor_of_longrope(tmp_path):
    scaling = LongRope(long_factor=RISING, short_factor=RISING, attention_factor=1.0)
    assert list(misread(tmp_path, make_config(scaling))) == ["vllm", "sglang", "mlx"]
    assert list(misread(tmp_path, make_config(scaling), short_mscale=1.0, long_mscale=1.0)) == ["mlx"]
    assert misread(tmp_path, make_config(scaling), original_max_position_embeddings=512) == {}
    assert misread(tmp_path, make_config(LongRope(long_factor=RISING, short_factor=RISING))) == {}
    assert misread(tmp_path, make_config(Drope())) == {}, "it is llama3 there"


@pytest.mark.parametrize(
    ("scaling", "engines"),
    [
        (Dynamic(), ["vllm", "sglang", "llama.cpp", "ollama"]),
        (LongRope(long_factor=RISING), ["vllm", "sglang", "llama.cpp", "ollama", "mlx"]),
    ],
)
def test_frequencies_by_length_are_not_served(tmp_path, scaling, engines):
    config = make_config(scaling)
    assert list(misread(tmp_path, config)) == engines
    for engine in engines:
        with pytest.raises(ConfigError, match="depend on the length of the text"):
            check_engine(engine, config)
    check_engine("transformers", config)


def test_other_architectures_are_not_written_as_gguf(tmp_path):
    config = make_config(Linear(), Qwen2Config)
    assert list(misread(tmp_path, config)) == ["llama.cpp", "ollama"]
    with pytest.raises(ConfigError, match="architecture 'llama' alone, and this model is 'qwen2'"):
        check_engine("ollama", config)


@pytest.mark.parametrize("kind", [GemmaConfig, PhiConfig, GPTNeoXConfig, MixtralConfig])
def test_mlx_leaves_families_unscaled(kind):
    """Their classes in mlx-lm have a RoPE of rope_theta alone."""
    for scaling in (Linear(), Yarn()):
        with pytest.raises(ConfigError, match=r"mlx cannot serve this model right: .*is not known to read a scaling"):
            check_engine("mlx", make_config(scaling, kind))
    check_engine("mlx", make_config(Theta(), kind))
    check_engine("mlx", make_config(Yarn(), Qwen2Config))


def test_what_the_export_can_mend_stops_no_run():
    for engine in ("transformers", "vllm", "sglang", "llama.cpp", "ollama", "mlx"):
        check_engine(engine, make_config(Yarn(attention_factor=1.0)))


def test_an_unknown_engine_is_named():
    with pytest.raises(ConfigError, match=r"model\.engine='tgi' is unknown: choose transformers, vllm"):
        check_engine("tgi", make_config(Linear()))
