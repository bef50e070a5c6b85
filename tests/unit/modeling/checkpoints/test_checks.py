"""JSON files that somebody else wrote: what cannot be is named, with file, key and value, before any long work."""

import contextlib
import copy
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM

from pose.data.tokenizer import train_tokenizer
from pose.errors import CheckpointError, PoseError
from pose.modeling.load import build_model, load_config, load_tokenizer, rope_geometry, scale_config
from pose.modeling.rotary import target_len_of
from pose.rope import Linear, Yarn

TINY = Path(__file__).resolve().parents[4] / "assets" / "tiny"
ODD = ([], {}, "x", -1, 0, 10**9, None, float("nan"), float("inf"), True, 0.5, [1], {"content": 1})
SMALL = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 300}
FAST = 10.0  # seconds, a hundred times what any of these takes
OLD = {
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32},
    "rope_theta": 500.0,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "auto_map": {},
    "quantization_config": None,
    "pose": {"rope": "linear", "window": 64, "factor": 4.0, "target_len": 256},
}
NEW = {
    "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.1,
    "long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "beta_fast": 32, "partial_rotary_factor": 1.0,
}  # fmt: skip


def keys(value, path=()):
    """The paths of all keys of a JSON object."""
    for key in value:
        yield (*path, key)
        if isinstance(value[key], dict):
            yield from keys(value[key], (*path, key))


def changed(value, path, new):
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def use_tokenizer(folder):
    """What a run does with a tokenizer."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.decode(tokenizer("in 1999,  a<|endoftext|>b").input_ids)


def use_model(folder):
    """What a run does with a model before it trains."""
    config = load_config(str(folder))
    geometry = rope_geometry(config)
    assert target_len_of(config) >= 1 and geometry.window >= 1
    for scaling in (Linear(), Yarn()):
        with contextlib.suppress(PoseError):
            scale_config(copy.deepcopy(config), scaling, max(2048, config.max_position_embeddings))
    with torch.no_grad():
        build_model(config, str(folder), "sdpa")(torch.arange(8)[None])


def walk(folder, name, content, use, paths=None):
    """Puts every odd value under every key: each is used, or named in an error, in little time.

    Returns:
        How many were used, and how many refused.
    """
    (folder / name).write_text(json.dumps(content))
    use(folder)
    used = refused = 0
    for path in paths or list(keys(content)):
        for value in ODD:
            (folder / name).write_text(json.dumps(changed(content, path, value)))
            start = time.perf_counter()
            try:
                use(folder)
                used += 1
            except PoseError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{name}, {path}={value!r}: {type(error).__name__}: {error}") from error
            assert time.perf_counter() - start < FAST, f"{name}, {path}={value!r}"
    return used, refused


@pytest.fixture
def tiny(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


@pytest.fixture
def small(tiny):
    """The shipped folder with a smaller model and tokenizer in it; their files have the same keys."""
    train_tokenizer(["in 1999, a book of twelve chapters. " * 20], vocab_size=300, window=256).save_pretrained(tiny)
    config = json.loads((tiny / "config.json").read_text()) | SMALL
    weights = LlamaForCausalLM(LlamaConfig(**config)).state_dict()
    save_file({name: x for name, x in weights.items() if name != "lm_head.weight"}, tiny / "model.safetensors")
    (tiny / "config.json").write_text(json.dumps(config))
    return tiny


def test_every_key_of_the_config_with_odd_values(small):
    own = json.loads((small / "config.json").read_text())
    used, refused = walk(small, "config.json", own, use_model)
    assert used > 40 and refused > 100


@pytest.mark.parametrize("key", OLD)
def test_every_key_of_older_configs_with_odd_values(small, key):
    own = json.loads((small / "config.json").read_text())
    if key.startswith("rope"):
        del own["rope_parameters"]
    own |= {key: OLD[key]}
    walk(small, "config.json", own, use_model, [path for path in keys(own) if path[0] == key])


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "longrope", "llama3"])
def test_every_key_of_the_rope_with_odd_values(small, rope_type):
    own = json.loads((small / "config.json").read_text()) | {"rope_parameters": {"rope_type": rope_type} | NEW}
    walk(small, "config.json", own, use_model, [path for path in keys(own) if path[0] == "rope_parameters"])


BESIDE = {
    "generation_config.json": {"temperature": 0.5, "do_sample": True, "stop_strings": None, "max_length": 20},
    "tokenizer_config.json": {
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}},
        "extra_special_tokens": [], "auto_map": {}, "chat_template": None, "padding_side": "left",
        "add_bos_token": False, "truncation_side": "right", "unk_token": None, "tokenizer_file": None,
        "fast_tokenizer_files": [],
    },
    "special_tokens_map.json": {"bos_token": {"content": "<|endoftext|>"}, "additional_special_tokens": ["<x>"]},
    "added_tokens.json": {"<|endoftext|>": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_every_key_of_the_files_beside_it_with_odd_values(small, name):
    own = json.loads((small / name).read_text()) if (small / name).exists() else {}
    walk(small, name, own | BESIDE[name], use_model if name == "generation_config.json" else use_tokenizer)


def test_every_key_of_the_tokenizer_with_odd_values(small):
    own = json.loads((small / "tokenizer.json").read_text())
    paths = [(key,) for key in own] + [("model", key) for key in own["model"]]
    walk(small, "tokenizer.json", own, use_tokenizer, paths)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000])
def test_files_that_are_no_json_object_are_named(tiny, name, content):
    (tiny / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{tiny}/{name} (is not valid JSON|holds a)"):
        load_config(str(tiny)), load_tokenizer(str(tiny))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, "has 1000000000 under 'num_hidden_layers', where an integer from 1 to 1,000 is"),
        ({"num_attention_heads": 0}, "has 0 under 'num_attention_heads', where an integer from 1"),
        ({"num_key_value_heads": 3}, "has 3 under 'num_key_value_heads', where a divisor of num_attention_heads=4 is"),
        ({"head_dim": 0}, "has 0 under 'head_dim'"),
        ({"head_dim": 1}, r"rotates 1 dimensions of a head .*head_dim=1.* an even number of at least 2"),
        ({"hidden_size": 10**9}, "has 1000000000 under 'hidden_size'"),
        (
            {"rope_parameters": {"rope_theta": 0.0}},
            r"has 0.0 under 'rope_parameters\.rope_theta', where a number above 1",
        ),
        ({"rope_parameters": {"rope_theta": float("inf")}}, r"has inf under 'rope_parameters\.rope_theta'"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, r"has nan under 'rope_parameters\.rope_theta'"),
        ({"rope_theta": -1.0}, "has -1.0 under 'rope_theta'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 1e9}},
            r"extended to 2\.56e\+11 tokens \(rope_parameters\.factor=1e\+09\): up to 268,435,456 are",
        ),
        (
            {"rope_parameters": NEW | {"rope_type": "longrope"}},
            r"has 8 numbers under 'rope_parameters\.short_factor', where 32 are expected",
        ),
        ({"pose": {"rope": "linear"}}, r"has None under 'pose\.window'"),
        ({"transformers_weights": "../x.safetensors"}, "names other files"),
    ],
)
def test_values_that_cannot_be_are_named(tiny, change, words):
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=words) as error:
        load_config(str(tiny))
    assert str(tiny) in str(error.value)
    if change.keys() & {"num_hidden_layers", "num_attention_heads", "rope_theta"}:  # transformers asks it for these too
        with pytest.raises(CheckpointError, match=words):
            load_tokenizer(str(tiny))


def test_a_config_that_is_no_file_is_asked_too():
    """model.init: no folder to name."""
    for options in ({"num_attention_heads": 0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}):
        config = LlamaConfig(hidden_size=64)
        for key, value in options.items():
            setattr(config, key, value)
        with pytest.raises(CheckpointError, match=rf"the llama model has .*{next(iter(options))}"):
            rope_geometry(config)


def test_a_prefix_that_would_end_the_process_is_refused(tiny):
    """tokenizers cuts it from each merge unasked, and aborts where a letter is cut in two."""
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    tokenizer["model"]["continuing_subword_prefix"] = "##"
    (tiny / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"'##' under 'model\.continuing_subword_prefix', where what the merge"):
        load_tokenizer(str(tiny))


@pytest.mark.parametrize("model_type", ["qwen2", "gpt_neox", "phi3", "gemma", "mistral", "qwen3_moe", "stablelm"])
def test_ordinary_configs_pass(tmp_path, model_type):
    """As transformers writes them, at the sizes of real models."""
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    assert rope_geometry(load_config(str(tmp_path))).dim >= 2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"configuration_files": ["../config.4.0.0.json"]}),
        ("config.json", {"transformers_weights": "../model.safetensors"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}),
    ],
)
def test_other_files_are_not_read_instead(tiny, name, change):
    """transformers would take them, wherever they lie."""
    content = json.loads((tiny / name).read_text())
    (tiny / name).write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match=f"{name} (names other files|has .* a list of files in its folder)"):
        load_config(str(tiny)), load_tokenizer(str(tiny))
