"""Adapters: what they compute, what trains, and that the merged export is a plain model."""

import json
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pose.errors import ConfigError
from pose.modeling import speed
from pose.modeling.export import export_model
from pose.modeling.guards import run_guards
from pose.modeling.load import build_model, rope_geometry, scale_config
from pose.modeling.lora import LoraOptions, adapters, add_lora, count_parameters, target_names
from pose.modeling.loss import causal_lm_loss
from pose.rope import Yarn

WINDOW, TARGET_LEN, VOCAB, WIDTH = 64, 512, 101, 32
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_model(model_type="llama", **options):
    """A scaled random model in training mode, and its rope's closed form."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **options,
    )
    geometry = rope_geometry(config)
    scaling = scale_config(config, Yarn(), TARGET_LEN)
    torch.manual_seed(0)
    return build_model(config, None, "sdpa").train(), scaling.frequencies(geometry)


def stir(model, std=0.3):
    """Adapters that do something: B starts at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.up.normal_(std=std, generator=generator)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (2, 48), generator=generator)
    positions = torch.cat([torch.arange(20), 300 + torch.arange(28)]).expand(2, -1)
    return tokens, positions


def loss_of(model, seed=0):
    tokens, positions = batch(seed)
    hidden = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
    return causal_lm_loss(hidden, model.get_output_embeddings(), tokens)


def logits_of(model):
    tokens, positions = batch()
    with torch.no_grad():
        return model.eval()(input_ids=tokens, position_ids=positions, use_cache=False).logits


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", model_max_length=WINDOW)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_only_what_should_train_changes(whole, tied):
    model, _ = make_model(tie_word_embeddings=tied)
    add_lora(model, LoraOptions(rank=4, train_embeddings_and_norms=whole))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {name for name in before if "lora_" in name or (whole and ("embed_tokens" in name or "norm" in name))}
    assert changed == expected
    assert ("model.embed_tokens.weight" in changed) is whole and "lm_head.weight" not in changed
    assert len([name for name in changed if "lora_" in name]) == 2 * 2 * 7  # A and B, layers, matrices
    assert len(optimizer.state) == len(changed), "only what trains has optimizer states"
    same_tensor = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same_tensor is tied


@pytest.mark.parametrize(("rank", "alpha"), [(4, 16.0), (8, 4.0)])
def test_an_adapter_adds_alpha_over_rank_b_a(rank, alpha):
    model, _ = make_model()
    plain, _ = make_model()
    assert torch.equal(logits_of(model), logits_of(plain))
    add_lora(model, LoraOptions(rank=rank, alpha=alpha, target_modules=["v_proj", "mlp.up_proj"]))
    assert torch.equal(logits_of(model), logits_of(plain)), "B starts at zero"
    stir(model)
    state = model.state_dict()
    with torch.no_grad():
        for layer in plain.model.layers:
            i = layer.self_attn.layer_idx
            for place, linear in {"self_attn.v_proj": layer.self_attn.v_proj, "mlp.up_proj": layer.mlp.up_proj}.items():
                a, b = (state[f"model.layers.{i}.{place}.lora_{x}.default.weight"] for x in "AB")
                assert a.shape == (rank, WIDTH) and b.shape == (linear.out_features, rank)
                linear.weight += torch.einsum("or,ri->oi", b, a) * alpha / rank
    torch.testing.assert_close(logits_of(model), logits_of(plain), rtol=0, atol=1e-4)
    assert len(adapters(model)) == 4


def test_dropout_is_of_training_alone():
    model, _ = make_model()
    add_lora(model, LoraOptions(rank=4, dropout=0.5))
    stir(model)
    assert torch.equal(logits_of(model), logits_of(model))
    model.train()
    assert loss_of(model) != loss_of(model)


@pytest.mark.parametrize("model_type", ["glm4_moe", "ernie4_5_moe"])
def test_layers_beside_experts_get_their_adapters(model_type, tokenizer, tmp_path):
    """Those of dense and shared parts; peft would give experts some in their place, and the export would be another."""
    experts = {
        "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                     "first_k_dense_replace": 1, "head_dim": 8},
        "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    }[model_type]  # fmt: skip
    model, _ = make_model(model_type, **experts)
    targets = target_names(model, LoraOptions(rank=4))
    add_lora(model, LoraOptions(rank=4))
    assert {name.removesuffix(".base_layer.weight") for name in adapters(model)} == set(targets)
    assert {name.rsplit(".", 1)[-1] for name in targets} >= {"o_proj", "gate_proj", "down_proj"}
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    stir(model)
    export_model(model, tokenizer, tmp_path / "out", progress=False)  # which compares the logits


def test_every_linear_layer_but_the_head_by_default():
    model, _ = make_model(tie_word_embeddings=False)
    wanted = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION]
    wanted += [f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")]
    assert sorted(target_names(model, LoraOptions(rank=1))) == sorted(wanted)
    named = target_names(model, LoraOptions(rank=1, target_modules=["layers.1.self_attn.q_proj", "down_proj"]))
    assert sorted(named) == [
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    ]  # fmt: skip
    add_lora(model, LoraOptions(rank=1))
    assert sorted(adapters(model)) == sorted(f"{name}.base_layer.weight" for name in wanted)


@pytest.mark.parametrize("target", ["lm_head", "proj", "self_attn", "q_proj.weight"])
def test_an_unknown_target_lists_those_there_are(target):
    with torch.device("meta"):  # as `train.py` checks it, before any weights are loaded
        model, _ = make_model()
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ConfigError, match=rf"finetune.lora.target_modules has '{target}'.*{known}$"):
        target_names(model, LoraOptions(rank=1, target_modules=["q_proj", target]))


def test_without_peft_the_message_says_so(monkeypatch):
    model, _ = make_model()
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install peft"):
        add_lora(model, LoraOptions(rank=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"finetune.lora.rank=0 .* at least 1"),
        ({"rank": -2}, r"finetune.lora.rank=-2"),
        ({"rank": 4, "alpha": 0.0}, r"finetune.lora.alpha=0.0 .* above 0"),
        ({"rank": 4, "alpha": float("nan")}, r"finetune.lora.alpha=nan"),
        ({"rank": 4, "alpha": float("inf")}, r"finetune.lora.alpha=inf"),
        ({"rank": 4, "dropout": 1.0}, r"finetune.lora.dropout=1.0 .* below 1"),
        ({"rank": 4, "dropout": -0.1}, r"finetune.lora.dropout=-0.1"),
        ({"rank": 4, "target_modules": []}, r"finetune.lora.target_modules=\[\]"),
        ({"alpha": 32.0}, r"finetune.lora.alpha=32.0 has no effect .* finetune=lora"),
        ({"train_embeddings_and_norms": True}, r"train_embeddings_and_norms=True has no effect"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        LoraOptions(**options)


@pytest.mark.parametrize("whole", [False, True])
def test_the_guards_pass_on_the_model_with_adapters(whole):
    model, expected = make_model()
    add_lora(model, LoraOptions(rank=4, train_embeddings_and_norms=whole))
    stir(model)
    run_guards(model, expected, TARGET_LEN, "cpu")


@pytest.mark.parametrize("whole", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(whole):
    gradients = []
    for checkpointing in (False, True):
        model, _ = make_model()
        torch.manual_seed(0)
        add_lora(model, LoraOptions(rank=4, train_embeddings_and_norms=whole))
        stir(model)
        if checkpointing:
            speed.recompute(model.train(), True)
        loss_of(model).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [("llama", False), ("llama", True), ("qwen2", False), ("qwen2", True), ("phi", False)],  # the last two: with biases
)
def test_the_export_is_merged_and_the_model_in_memory_is_not(tmp_path, tokenizer, model_type, tied):
    model, _ = make_model(model_type, tie_word_embeddings=tied)
    plain_keys, targets = set(model.state_dict()), target_names(model, LoraOptions(rank=4))
    add_lora(model, LoraOptions(rank=4, train_embeddings_and_norms=True))
    stir(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = logits_of(model)
    export_model(model, tokenizer, tmp_path / "model")

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model), wanted) and len(adapters(model)) == len(targets)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert set(saved) == plain_keys - ({"lm_head.weight"} if tied else set())
    assert "lora" not in (tmp_path / "model" / "config.json").read_text()
    tokens, positions = batch()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        got = exported(input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    heads = exported.get_output_embeddings().weight, exported.get_input_embeddings().weight
    assert torch.equal(*heads) is tied


def test_weights_of_bf16_are_merged_in_fp32(tmp_path, tokenizer):
    model, _ = make_model()
    model.to(torch.bfloat16)
    add_lora(model, LoraOptions(rank=4))
    stir(model, std=0.05)
    export_model(model, tokenizer, tmp_path / "model", torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj"
    state = {k: v.double() for k, v in model.state_dict().items()}
    exact = state[f"{name}.base_layer.weight"] + 4.0 * (
        state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]
    )
    saved = load_file(tmp_path / "model" / "model.safetensors")[f"{name}.weight"]
    assert saved.dtype == torch.bfloat16
    assert ((saved.double() - exact).abs() <= exact.abs() * 2**-8).all(), "rounded once"


def test_parameters_are_counted_once():
    model, _ = make_model(tie_word_embeddings=True)
    total = VOCAB * WIDTH + 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * 16 + 3 * WIDTH * 48 + 2 * WIDTH) + WIDTH
    assert count_parameters(model) == (total, total)
    add_lora(model, LoraOptions(rank=2, target_modules=["o_proj"]))
    assert count_parameters(model) == (2 * 2 * (WIDTH + WIDTH), total + 2 * 2 * (WIDTH + WIDTH))


@pytest.mark.slow
def test_a_run_exports_what_plain_transformers_loads_without_peft(script, tmp_path):
    result = script(
        "train.py", "experiment=smoke", "eval=none", "finetune=lora", "finetune.lr=0.01", "finetune.warmup_steps=0",
        "finetune.lora.train_embeddings_and_norms=true", "model.gradient_checkpointing=true", "trainer.global_batch=2",
        f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    adapter = 6 * (4 * (256 + 256) + 3 * (256 + 704)) * 8
    whole = 4096 * 256 + (2 * 6 + 1) * 256
    assert f"Training {adapter + whole:,} of " in result.stdout
    code = """
        import sys
        sys.modules["peft"] = None
        import torch
        from transformers import AutoModelForCausalLM
        base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
        base, new = base.state_dict(), model.state_dict()
        assert base.keys() == new.keys()
        assert not [name for name in base if torch.equal(base[name], new[name])], "everything has learnt"
        name = "model.layers.0.mlp.up_proj.weight"
        rank = torch.linalg.matrix_rank(new[name].double() - base[name].double(), rtol=1e-4)
        assert rank == 8, rank
        assert torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])
        assert model(torch.arange(100)[None]).logits.isfinite().all()
        assert not [name for name in sys.modules if name.split(".")[0] == "pose"]
    """
    loaded = script("-c", textwrap.dedent(code), "assets/tiny", f"{tmp_path}/run/model", fresh=True)
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["max_position_embeddings"] == 512
