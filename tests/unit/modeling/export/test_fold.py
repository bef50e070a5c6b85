"""An attention factor in the weights of queries and keys is the same function, in every family that is known."""

import json
import logging
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch.distributed.device_mesh import init_device_mesh
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

import pose.modeling.export.weights
from pose.errors import ConfigError, GuardError
from pose.modeling.compat import rotary_modules
from pose.modeling.export import export_model, verify_export
from pose.modeling.export.fold import FAMILIES, Fold
from pose.modeling.held import Held
from pose.modeling.load import build_model, load_config, rope_geometry, scale_config
from pose.modeling.lora import LoraOptions, add_lora
from pose.modeling.shard import FullyShard
from pose.rope import NTK, Cope, Drope, Linear, LongRope, Unscaled, Yarn, YarnRevised

VOCAB, WINDOW, TARGET_LEN, FACTOR = 101, 64, 512, 1.3
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": WINDOW, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
# Where a class has them; None as well, where its default is of another size.
MORE = {
    "num_key_value_heads": 2, "head_dim": 16, "sliding_window": None, "layer_types": None, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1, "original_max_position_embeddings": WINDOW,
}  # fmt: skip
VARIANTS = {
    "phi with norms": ("phi", {"qk_layernorm": True}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "phi3 with a share": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 24}),
}
TOKENS = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(40)[None] * 11


def make_config(model_type="llama", **options):
    cls = CONFIG_MAPPING[model_type]
    known = cls().to_dict()
    return cls(**SIZES | {key: value for key, value in MORE.items() if key in known} | options)


def make_model(scaling, model_type="llama", path=None, layout=None, prepare=None, **options):
    """With every weight random, biases and norms too, so that each counts."""
    config = load_config(str(path)) if path else make_config(model_type, **options)
    scale_config(config, scaling, TARGET_LEN)
    torch.manual_seed(0)
    model = build_model(config, path and str(path), "sdpa", layout=layout, prepare=prepare).eval()
    with torch.no_grad():
        for parameter in () if path else model.parameters():
            parameter.normal_(0.0, 0.2).add_(0.5 if parameter.ndim == 1 else 0.0)
    return model


@torch.no_grad()
def logits_of(model):
    mask = torch.ones_like(TOKENS)  # transformers' own attention would take the skips for borders
    return model(TOKENS, position_ids=POSITIONS, attention_mask=mask).logits


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")


def read(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", [*sorted(FAMILIES & set(CONFIG_MAPPING)), *VARIANTS])
@torch.no_grad()
def test_the_function_is_the_same(name):
    """In fp64, but for norms and cosines, and for experts: of every family, shares of heads and layouts included."""
    model_type, options = VARIANTS.get(name, (name, {}))
    model = make_model(Yarn(attention_factor=FACTOR), model_type, **options)
    has_experts = any("experts" in key for key in model.state_dict())
    model = model if has_experts else model.double()
    wanted, fold = logits_of(model), Fold(model, FACTOR)
    for rotary in rotary_modules(model):
        rotary.attention_scaling = 1.0
    without = logits_of(model)
    for key, parameter in model.named_parameters():
        parameter.copy_(fold(key, parameter))
    tolerance = 2e-5 if has_experts else 5e-6
    assert (logits_of(model) - wanted).abs().max() < tolerance * wanted.std()
    assert (without - wanted).abs().max() > 1e-2 * wanted.std()


@torch.no_grad()
def test_nothing_but_rounding_is_between_the_two():
    """cos and sin in fp64 too: what is left is less than the 1e-6 that one rounding of fp32 could make."""
    model = make_model(Yarn(attention_factor=FACTOR)).double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = partial(torch.nn.functional.rms_norm, normalized_shape=(64,), weight=module.weight)
    rotary, positions = model.model.rotary_emb, POSITIONS[..., None].double()

    def rotate(x, position_ids):
        angles = torch.cat([positions * rotary.inv_freq] * 2, -1)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    rotary.forward = rotate
    wanted, fold = logits_of(model), Fold(model, FACTOR)
    for key, parameter in model.named_parameters():
        parameter.copy_(fold(key, parameter))
    rotary.attention_scaling = 1.0
    assert (logits_of(model) - wanted).abs().max() < 1e-11 * wanted.std()


def test_the_families_that_are_listed_are_there():
    """Those of docs/MODELS.md: GPT-J is read as phi, Baichuan as llama."""
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "gpt_neox"} <= FAMILIES & set(CONFIG_MAPPING)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi", "phi3", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_is_folded(tmp_path, tokenizer, model_type, dtype):
    """The folder says no factor that its type does not imply, and gives the trained model's logits."""
    model = make_model(YarnRevised(attention_factor=FACTOR), model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, tokenizer, tmp_path / "model", dtype)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    config = read(tmp_path / "model")
    assert config["rope_parameters"]["attention_factor"] == 1.0
    assert config["pose"]["attention_factor"] == config["pose"]["folded"] == FACTOR
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert rotary_modules(got)[0].attention_scaling == 1.0
    if dtype == torch.float32:
        wanted = logits_of(model)
        assert (logits_of(got) - wanted).abs().max() < 1e-4 * wanted.std()


def test_the_factor_is_multiplied_before_the_rounding(tmp_path, tokenizer):
    model = make_model(YarnRevised(attention_factor=FACTOR))
    export_model(model, tokenizer, tmp_path / "model", torch.bfloat16)
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        own = model.get_parameter(name)
        scaled = name.endswith(("q_proj.weight", "k_proj.weight"))
        assert torch.equal(tensor, (own.double() * FACTOR if scaled else own).float().bfloat16()), name


@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_adapters_are_merged_and_multiplied(tmp_path, tokenizer, monkeypatch, size):
    """a (W + scale B A), in one file or many; and a wrong product is noticed."""
    monkeypatch.setattr(pose.modeling.export.weights, "SHARD_SIZE", size)
    model = make_model(YarnRevised(attention_factor=FACTOR))
    base = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    add_lora(model, LoraOptions(rank=2, alpha=6.0, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        parts = {name: p.normal_(0, 0.2) for name, p in model.named_parameters() if "lora" in name}
    export_model(model, tokenizer, tmp_path / "model")
    files = [load_file(file) for file in (tmp_path / "model").glob("*.safetensors")]
    assert (len(files) > 1) == (size == "50KB")
    saved = {name: tensor for file in files for name, tensor in file.items()}
    down, up = (parts[f"model.layers.0.self_attn.q_proj.lora_{kind}.default.weight"] for kind in "AB")
    torch.testing.assert_close(
        saved["model.layers.0.self_attn.q_proj.weight"], FACTOR * (base + 3 * up.detach() @ down.detach())
    )
    with torch.no_grad():
        up.mul_(1.5)
    with pytest.raises(GuardError, match="gives other logits"):
        verify_export(model, tmp_path / "model")


def test_what_is_held_in_fewer_bits_is_folded_as_its_checkpoint_has_it(tmp_path, tokenizer):
    """The check takes the rounding of the trained model's weights along, with the factor."""
    make_model(Unscaled()).save_pretrained(tmp_path / "base")
    held = Held(torch.device("cpu"), "bfloat16")
    prepare = partial(add_lora, options=LoraOptions(rank=2))
    model = make_model(Yarn(attention_factor=3.0), path=tmp_path / "base", layout=held, prepare=prepare)
    export_model(model, tokenizer, tmp_path / "model")
    base, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "model"))
    name = "model.layers.1.self_attn.k_proj.weight"
    torch.testing.assert_close(saved[name], base[name] * read(tmp_path / "model")["pose"]["folded"])


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_an_export_of_parts_is_that_of_the_whole(tmp_path, tokenizer, model_type):
    make_model(Unscaled(), model_type).save_pretrained(tmp_path / "base")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parts = FullyShard(init_device_mesh("cpu", (1,)), torch.device("cpu"), None)
        for name, layout in (("whole", None), ("parts", parts)):
            model = make_model(YarnRevised(), path=tmp_path / "base", layout=layout)
            export_model(model, tokenizer, tmp_path / name)
    finally:
        torch.distributed.destroy_process_group()
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert read(tmp_path / "whole") == read(tmp_path / "parts")


def kept(caplog, folder):
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING and "stays in config.json" in r.message]
    rope = read(folder)["rope_parameters"]
    assert rope["attention_factor"] == rope["short_mscale"] == rope["long_mscale"] == FACTOR
    assert "folded" not in read(folder)["pose"]


@pytest.mark.parametrize(
    ("model_type", "options", "why"),
    [
        ("olmo", {"clip_qkv": 1.0}, "clipped"),
        ("stablelm", {"qk_layernorm": True}, "q_layernorm is not of the form"),
        ("cohere", {"use_qk_norm": True}, "q_norm is not of the form"),
        ("hunyuan_v1_dense", {}, "how a hunyuan_v1_dense model"),
    ],
)
def test_what_cannot_be_folded_keeps_its_factor(tmp_path, tokenizer, caplog, model_type, options, why):
    """In the config, with a warning; the weights are as they were."""
    model = make_model(YarnRevised(attention_factor=FACTOR), model_type, **options)
    export_model(model, tokenizer, tmp_path / "model")
    kept(caplog, tmp_path / "model")
    assert why in caplog.text
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.named_parameters() if name in saved)


def test_the_factor_stays_where_it_is_wanted(tmp_path, tokenizer, caplog):
    model = make_model(YarnRevised(attention_factor=FACTOR))
    export_model(model, tokenizer, tmp_path / "model", fold=False)
    kept(caplog, tmp_path / "model")
    assert "model.export_fold is false" in caplog.text
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.named_parameters() if name in saved)


METHODS = [
    Linear(attention_factor=1.1), NTK(attention_factor=1.1), Yarn(), Yarn(attention_factor=1.0), YarnRevised(),
    LongRope(long_factor=[1.5**i for i in range(8)]), LongRope(long_factor=[2.0] * 8, attention_factor=1.1),
    LongRope(long_factor=[2.0] * 8, short_factor=[2.0] * 8), Drope(attention_factor=1.2),
    Cope(attention_factor=1.2), Yarn(rcd_shift=True), NTK(rcd_shift=True, attention_factor=1.1),
]  # fmt: skip


@pytest.mark.parametrize("scaling", METHODS, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_nothing_is_folded_twice(tmp_path, tokenizer, scaling, first):
    """The export of an import of an export has the same weights, and says the same; one that was not folded can be."""
    model = make_model(scaling)
    export_model(model, tokenizer, tmp_path / "1", fold=first)
    for name in ("1", "2"):
        again = build_model(load_config(str(tmp_path / name)), str(tmp_path / name), "sdpa").eval()
        export_model(again, tokenizer, tmp_path / str(int(name) + 1))
        wanted = logits_of(model)
        assert (logits_of(again) - wanted).abs().max() < 1e-4 * wanted.std()
    one, two, three = (load_file(tmp_path / name / "model.safetensors") for name in "123")
    assert all(torch.equal(two[key], three[key]) for key in two) and read(tmp_path / "2") == read(tmp_path / "3")
    if first:
        assert all(torch.equal(one[key], two[key]) for key in one) and read(tmp_path / "1") == read(tmp_path / "2")


@pytest.mark.parametrize("scaling", METHODS, ids=str)
def test_a_folded_folder_is_trained_on_as_what_it_is(tmp_path, tokenizer, scaling):
    """Method, window and factor are known by their names; rope=none extends it further, another method says why not."""
    export_model(make_model(scaling), tokenizer, tmp_path / "model")
    config = load_config(str(tmp_path / "model"))
    geometry = rope_geometry(config)
    assert (geometry.window, geometry.rope_type) == (WINDOW, scaling.name)
    assert config.pose["factor"] == TARGET_LEN / WINDOW and config.max_position_embeddings == TARGET_LEN
    with pytest.raises(ConfigError, match=f"already scaled .*{scaling.name}"):
        scale_config(config, Linear(), 2 * TARGET_LEN)
    scale_config(config, Unscaled(), 2 * TARGET_LEN)
    model = build_model(config, str(tmp_path / "model"), "sdpa").eval()
    export_model(model, tokenizer, tmp_path / "further")
    further = load_config(str(tmp_path / "further"))
    assert further.max_position_embeddings == 2 * TARGET_LEN and rope_geometry(further) == geometry
    (rotary,) = rotary_modules(build_model(further, str(tmp_path / "further"), "sdpa"))
    whole = rotary.attention_scaling * further.pose.get("folded", 1.0)
    assert whole == pytest.approx(further.pose.get("attention_factor", 1.0), rel=1e-9)
