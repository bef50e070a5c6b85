"""Every family of models, in its own on-disk form, against one forward pass in plain torch.

Shapes: L tokens, H hidden size, D head size.
"""

import json
import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pose.errors import CheckpointError, ConfigError
from pose.modeling.export import export_model, verify_export
from pose.modeling.guards import run_guards
from pose.modeling.load import build_model, load_config, rope_geometry, scale_config
from pose.modeling.loss import causal_lm_loss
from pose.rope import Linear, RopeGeometry, Unscaled, YarnRevised

VOCAB, WINDOW, TARGET_LEN, FACTOR = 101, 64, 512, 8.0
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
TOLERANCE = 3e-4  # of the logits' standard deviation; fp32 rounding makes up to 7e-5 of it
POSITIONS = torch.tensor([*range(5), *range(97, 103), *range(TARGET_LEN - 9, TARGET_LEN)])
TOKENS = torch.randint(VOCAB, (len(POSITIONS),), generator=torch.Generator().manual_seed(0))
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclass
class Family:
    """What the plain forward must know of a family, and how its checkpoints are made.

    `names` are those of its weights on disk: of the embedding, the last norm, the layers, and in a
    layer norm, query, key, value, output, MLP's in and out.
    """

    config: type
    options: dict = field(default_factory=dict)
    layer: str = "model.layers.{}."
    embed: str = "model.embed_tokens"
    last_norm: str = "model.norm"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    out: str = "self_attn.o_proj"
    mlp: tuple[str, str] = ("mlp.up_proj", "mlp.down_proj")
    gate: str | None = "mlp.gate_proj"
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    rotary_dim: int = 16
    base: float = 10_000.0
    eps: float = 1e-6
    rms: bool = True
    one_plus: bool = False  # a norm multiplies by 1 + w
    embed_scale: float = 1.0
    activation: str = "silu"
    parallel: bool = False  # attention and MLP read the same hidden state
    interleaved: bool = False  # rotary pairs are neighbours


GQA = {"num_key_value_heads": 2}
FAMILIES = {
    "llama": Family(LlamaConfig, {"rope_theta": 5e5, "head_dim": None} | GQA, kv_heads=2, base=5e5),
    "llama_biases": Family(LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": Family(MistralConfig, {"sliding_window": None, "rope_theta": 1e6} | GQA, kv_heads=2, base=1e6),
    "qwen2": Family(Qwen2Config, {"rope_theta": 1e6} | GQA, kv_heads=2, base=1e6),
    "qwen3": Family(
        Qwen3Config, {"head_dim": 24, "rope_theta": 1e6} | GQA, kv_heads=2, head_dim=24, rotary_dim=24, base=1e6
    ),
    "gemma": Family(
        GemmaConfig,
        {"head_dim": 32, "num_key_value_heads": 1},
        kv_heads=1,
        head_dim=32,
        rotary_dim=32,
        one_plus=True,
        embed_scale=8.0,
        activation="gelu_tanh",
    ),
    "phi": Family(
        PhiConfig,
        {"partial_rotary_factor": 0.5},
        last_norm="model.final_layernorm",
        norms=("input_layernorm", "input_layernorm"),
        out="self_attn.dense",
        mlp=("mlp.fc1", "mlp.fc2"),
        gate=None,
        rotary_dim=8,
        eps=1e-5,
        rms=False,
        activation="gelu_tanh",
        parallel=True,
    ),
    "phi3": Family(Phi3Config, {"original_max_position_embeddings": WINDOW} | GQA, kv_heads=2, eps=1e-5),
    "gpt_neox": Family(
        GPTNeoXConfig,
        {"rotary_pct": 0.25},
        layer="gpt_neox.layers.{}.",
        embed="gpt_neox.embed_in",
        last_norm="gpt_neox.final_layer_norm",
        out="attention.dense",
        mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        gate=None,
        rotary_dim=4,
        eps=1e-5,
        rms=False,
        activation="gelu",
        parallel=True,
    ),
    "gptj": Family(
        GPTJConfig,
        {"n_inner": 96, "rotary_dim": 8},
        layer="transformer.h.{}.",
        embed="transformer.wte",
        last_norm="transformer.ln_f",
        norms=("ln_1", "ln_1"),
        out="attn.out_proj",
        mlp=("mlp.fc_in", "mlp.fc_out"),
        gate=None,
        rotary_dim=8,
        eps=1e-5,
        rms=False,
        activation="gelu_tanh",
        parallel=True,
        interleaved=True,
    ),
}
BAICHUAN = Family(LlamaConfig)
FAMILIES["gpt_neox_serial"] = Family(
    **vars(FAMILIES["gpt_neox"]) | {"options": {"rotary_pct": 0.25, "use_parallel_residual": False}, "parallel": False}
)


BAICHUAN_CONFIG = {key: SIZES[key] for key in SIZES if key != "pad_token_id"} | {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
    },
    "tokenizer_class": "BaichuanTokenizer",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "z_loss_weight": 0,
}


def save_random(family, folder):
    """A checkpoint that transformers writes itself, with every weight random: norms and biases too."""
    config = family.config(**SIZES | family.options)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.5
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")


def ramp(family):
    """The share of its own frequency that each dimension keeps, by the YaRN paper's rule."""

    def dimension(turns):
        return family.rotary_dim * math.log(WINDOW / (turns * 2 * math.pi)) / (2 * math.log(family.base))

    low = max(math.floor(dimension(32)), 0)
    high = min(math.ceil(dimension(1)), family.rotary_dim - 1)
    j = torch.arange(family.rotary_dim // 2, dtype=torch.float64)
    return ((high - j) / (high - low)).clamp(0, 1)


def frequencies(family, method):
    """inv_freq, float64 [rotary_dim / 2], and the factor on cos and sin."""
    theta = family.base ** (-2 * torch.arange(family.rotary_dim // 2, dtype=torch.float64) / family.rotary_dim)
    if method == "none":
        return theta, 1.0
    if method == "linear":
        return theta / FACTOR, 1.0
    keep = ramp(family)
    return 1 / (keep / theta + (1 - keep) * FACTOR / theta), 0.1 * math.log(FACTOR) + 1


def plain_logits(family, weights, method, tokens=TOKENS, positions=POSITIONS):
    """The whole model on one text, one head at a time; fp64 [L, V]."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    inv_freq, factor = frequencies(family, method)
    angles = positions[:, None].double() * inv_freq  # [L, rotary_dim / 2]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    future = torch.arange(len(tokens)) > torch.arange(len(tokens))[:, None]

    def linear(name, x):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(name, x):
        gain = weights[f"{name}.weight"] + (1.0 if family.one_plus else 0.0)
        if family.rms:
            return x / (x.pow(2).mean(-1, keepdim=True) + family.eps).sqrt() * gain
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + family.eps).sqrt() * gain + weights[f"{name}.bias"]

    def rotate(x_LD):
        x, rest = x_LD[:, : family.rotary_dim], x_LD[:, family.rotary_dim :]
        if family.interleaved:
            a, b = x[:, 0::2], x[:, 1::2]
            rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(1)
        else:
            a, b = x.chunk(2, -1)
            rotated = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        return torch.cat([rotated, rest], -1)

    def project(prefix, x):
        """Query heads, key heads and value heads, [L, D] each."""
        d = family.head_dim
        if f"{prefix}attention.query_key_value.weight" in weights:  # q, k, v of a head lie side by side
            by_head = linear(f"{prefix}attention.query_key_value", x).split(3 * d, -1)
            return [[head[:, i * d : (i + 1) * d] for head in by_head] for i in range(3)]
        if f"{prefix}self_attn.qkv_proj.weight" in weights:  # all q, then all k, then all v
            q, k, v = linear(f"{prefix}self_attn.qkv_proj", x).split(
                [n * d for n in (family.heads, *[family.kv_heads] * 2)], -1
            )
            return [part.split(d, -1) for part in (q, k, v)]
        if f"{prefix}self_attn.W_pack.weight" in weights:
            return [part.split(d, -1) for part in linear(f"{prefix}self_attn.W_pack", x).chunk(3, -1)]
        room = "attn" if family.config is GPTJConfig else "self_attn"
        return [linear(f"{prefix}{room}.{n}_proj", x).split(d, -1) for n in "qkv"]

    def attention(prefix, x):
        queries, keys, values = project(prefix, x)
        outputs = []
        for i, query in enumerate(queries):
            group = i * family.kv_heads // family.heads
            key = keys[group]
            if f"{prefix}self_attn.q_norm.weight" in weights:
                query, key = norm(f"{prefix}self_attn.q_norm", query), norm(f"{prefix}self_attn.k_norm", key)
            scores = rotate(query) @ rotate(key).T / math.sqrt(family.head_dim)
            outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ values[group])
        return linear(f"{prefix}{family.out}", torch.cat(outputs, -1))

    def mlp(prefix, x):
        activation = ACTIVATIONS[family.activation]
        if f"{prefix}mlp.gate_up_proj.weight" in weights:
            gate, up = linear(f"{prefix}mlp.gate_up_proj", x).chunk(2, -1)
            return linear(f"{prefix}{family.mlp[1]}", activation(gate) * up)
        inner = linear(f"{prefix}{family.mlp[0]}", x)
        inner = activation(inner) if family.gate is None else activation(linear(f"{prefix}{family.gate}", x)) * inner
        return linear(f"{prefix}{family.mlp[1]}", inner)

    x = weights[f"{family.embed}.weight"][tokens] * family.embed_scale
    for i in range(SIZES["num_hidden_layers"]):
        prefix = family.layer.format(i)
        first, second = (f"{prefix}{name}" for name in family.norms)
        if family.parallel:
            x = x + attention(prefix, norm(first, x)) + mlp(prefix, norm(second, x))
        else:
            x = x + attention(prefix, norm(first, x))
            x = x + mlp(prefix, norm(second, x))
    x = norm(family.last_norm, x)
    if "embed_out.weight" in weights:
        return linear("embed_out", x)
    return linear("lm_head" if "lm_head.weight" in weights else family.embed, x)


@torch.no_grad()
def built_logits(folder, method, backend="sdpa"):
    scaling = {"none": Unscaled(), "linear": Linear(), "yarn_revised": YarnRevised()}[method]
    config = load_config(str(folder))
    scale_config(config, scaling, TARGET_LEN)
    model = build_model(config, str(folder), backend)
    return model, model(input_ids=TOKENS[None], position_ids=POSITIONS[None]).logits[0].double()


def assert_equal(got, wanted):
    assert (got - wanted).abs().max() < TOLERANCE * wanted.std()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_every_family(tmp_path, name, backend):
    """At positions that skip, scaled, with attention by index."""
    weights = save_random(FAMILIES[name], tmp_path)
    seen = []
    for method in ("none", "linear", "yarn_revised"):
        wanted = plain_logits(FAMILIES[name], weights, method)
        model, got = built_logits(tmp_path, method, backend)
        assert_equal(got, wanted)
        assert not any((wanted - other).abs().max() < 0.01 * wanted.std() for other in seen)
        seen.append(wanted)
    run_guards(model, None, TARGET_LEN, "cpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_export_of_every_family(tmp_path, name, tokenizer):
    """A class of transformers, loaded by it alone, with the same logits."""
    weights = save_random(FAMILIES[name], tmp_path / "base")
    model, _ = built_logits(tmp_path / "base", "yarn_revised")
    export_model(model, tokenizer, tmp_path / "out")
    verify_export(model, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        got = exported(TOKENS[None], position_ids=POSITIONS[None], attention_mask=torch.ones(1, len(TOKENS))).logits[0]
    assert_equal(got.double(), plain_logits(FAMILIES[name], weights, "yarn_revised"))


OLD_FORMS = {
    "llama": {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float32", "pretraining_tp": 1},
    "mistral": {"rope_theta": 1e6, "sliding_window": None, "torch_dtype": "bfloat16"},
    "qwen2": {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 28},
    "phi": {"rope_theta": 10_000.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10_000},
    "gemma": {"rope_theta": 10_000.0, "rope_scaling": None, "hidden_act": "gelu"},
}


@pytest.mark.parametrize("name", OLD_FORMS)
def test_configs_of_transformers_4(tmp_path, name):
    """What folders on the hub hold: RoPE at the top level, and frequencies among the weights."""
    weights = save_random(FAMILIES[name], tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"], config["dtype"], config["transformers_version"]
    config.pop("layer_types", None)
    file.write_text(json.dumps(config | OLD_FORMS[name]))
    extra = "attention" if name == "gpt_neox" else "self_attn"
    stored = {f"{FAMILIES[name].layer.format(0)}{extra}.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float16)}
    save_file(weights | stored, tmp_path / "model.safetensors", {"format": "pt"})
    _, got = built_logits(tmp_path, "yarn_revised")
    assert_equal(got, plain_logits(FAMILIES[name], weights, "yarn_revised"))


def test_gptj_equals_transformers_own(tmp_path):
    """Unscaled, over contiguous positions, against the class that it is not built from."""
    save_random(FAMILIES["gptj"], tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(own).__name__ == "GPTJForCausalLM"
    model = build_model(load_config(str(tmp_path)), str(tmp_path), "sdpa")
    tokens = torch.randint(VOCAB, (2, WINDOW), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got, wanted = model(tokens).logits, own(tokens).logits
    assert (got - wanted).abs().max() < TOLERANCE * wanted.std()


def test_gptj_without_a_window_is_refused(tmp_path):
    save_random(FAMILIES["gptj"], tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["n_positions"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"has no n_positions, its window"):
        load_config(str(tmp_path))


def test_gptj_trains_its_own_parameters_only(tmp_path):
    """Phi's attention biases stay the zeros that GPT-J has in their place; the loss has the head's bias in it."""
    weights = save_random(FAMILIES["gptj"], tmp_path)
    config = load_config(str(tmp_path))
    assert rope_geometry(config) == RopeGeometry(10_000.0, 8, WINDOW)
    model = build_model(config, str(tmp_path), "sdpa").train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(tensor.numel() for tensor in weights.values())
    hidden = model.base_model(input_ids=TOKENS[None], position_ids=POSITIONS[None]).last_hidden_state
    loss = causal_lm_loss(hidden, model.get_output_embeddings(), TOKENS[None])
    wanted = F.cross_entropy(plain_logits(FAMILIES["gptj"], weights, "none")[:-1], TOKENS[1:])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    assert model.lm_head.bias.grad.abs().sum() > 0
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith(("_proj.bias", "dense.bias")))


def test_gptj_in_shards_of_pickles(tmp_path):
    """pytorch_model.bin and its index, with the masks of old checkpoints in it."""
    weights = save_random(FAMILIES["gptj"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, WINDOW, WINDOW, dtype=torch.bool)
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e9)
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, inside in shards.items():
        torch.save({name: weights[name] for name in inside}, tmp_path / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    _, got = built_logits(tmp_path, "linear")
    assert_equal(got, plain_logits(FAMILIES["gptj"], weights, "linear"))


def test_gptj_lacking_a_weight_is_refused(tmp_path):
    weights = save_random(FAMILIES["gptj"], tmp_path)
    del weights["lm_head.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights .*lm_head\.bias"):
        build_model(load_config(str(tmp_path)), str(tmp_path), "sdpa")


@pytest.mark.parametrize("raw", [{"model_type": "gptj"}, BAICHUAN_CONFIG], ids=lambda raw: raw["model_type"])
def test_scaled_checkpoints_of_other_code_are_refused(tmp_path, raw):
    """As the released PoSE code leaves them."""
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": {"type": "vanilla_ntk", "factor": 8.0}}))
    with pytest.raises(CheckpointError, match=rf"{tmp_path} is a {raw['model_type']} .*'vanilla_ntk'.*unscaled model"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("rotary_dim", [0, 18])
def test_gptj_without_a_share_of_a_head_is_refused(tmp_path, rotary_dim):
    config = GPTJConfig(n_embd=64, n_head=4).to_dict() | {"rotary_dim": rotary_dim}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*rotary_dim={rotary_dim} .*heads of 16 dimensions"):
        load_config(str(tmp_path))


def save_baichuan(folder, **changes):
    """As Baichuan2-7B lies on the hub: packed projections in pickles, a config of its own, and code to run."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape, shift=0.0):
        return torch.empty(shape).normal_(shift, 0.25, generator=generator)

    h, m = SIZES["hidden_size"], SIZES["intermediate_size"]
    weights = {"model.embed_tokens.weight": random(VOCAB, h), "model.norm.weight": random(h, shift=0.5)}
    weights["lm_head.weight"] = 3 * random(VOCAB, h)
    for i in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        weights[f"{prefix}self_attn.W_pack.weight"] = random(3 * h, h)
        weights[f"{prefix}self_attn.o_proj.weight"] = random(h, h)
        weights[f"{prefix}self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        for name, shape in {"gate_proj": (m, h), "up_proj": (m, h), "down_proj": (h, m)}.items():
            weights[f"{prefix}mlp.{name}.weight"] = random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = random(h, shift=0.5)
    (folder / "config.json").write_text(json.dumps(BAICHUAN_CONFIG | changes))
    for name in ("configuration_baichuan", "modeling_baichuan"):
        (folder / f"{name}.py").write_text("raise SystemExit('remote code ran')")
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


@pytest.mark.parametrize("architecture", ["BaichuanForCausalLM", "BaiChuanForCausalLM"])
def test_baichuan_is_read_as_llama(tmp_path, architecture, tokenizer):
    """Baichuan2's head has rows of length one, Baichuan-7B's (which spells its class otherwise) has not."""
    weights = save_baichuan(tmp_path, architectures=[architecture])
    if architecture == "BaichuanForCausalLM":
        weights["lm_head.weight"] /= weights["lm_head.weight"].pow(2).sum(1, keepdim=True).sqrt()
    for method in ("linear", "yarn_revised"):
        wanted = plain_logits(BAICHUAN, weights, method)
        model, got = built_logits(tmp_path, method)
        assert_equal(got, wanted)
    export_model(model, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 5120, "num_attention_heads": 40}, "ALiBi"),
        ({"max_position_embeddings": None, "model_max_length": 4096}, "ALiBi"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised"),
    ],
)
def test_baichuans_that_are_not_read_are_refused(tmp_path, changes, words):
    config = {key: value for key, value in (BAICHUAN_CONFIG | changes).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: .*{words}"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("how", [{"quant_method": "fp8"}, {"load_in_4bit": True}])
def test_quantised_folders_are_refused(tmp_path, how):
    """They would train, or not, and could not be exported."""
    LlamaConfig(quantization_config=how).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{tmp_path} has quantised weights .*give the folder with the full"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Gemma2Config(), "gemma2 model with attn_logit_softcapping, which is not supported"),
        (
            GraniteConfig(logits_scaling=8.0),
            r"granite model that changes its logits after the head \(logits_scaling=8.0",
        ),
        (CohereConfig(), r"cohere model that changes its logits after the head \(logit_scale=0.0625"),
        (PhimoeConfig(max_position_embeddings=4096), "a phimoe model takes no rope=linear"),
        (Gemma3TextConfig(num_hidden_layers=6), "no single rotary embedding"),
        (MptConfig(), "no single rotary embedding"),
        (MistralConfig(sliding_window=4096, max_position_embeddings=32768), "last 4096 tokens only"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_cannot_be_extended_is_refused(tmp_path, config, words):
    """Before any weights are read."""
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=words):
        scale_config(load_config(str(tmp_path)), Linear(), 65536)
