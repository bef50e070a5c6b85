"""A checkpoint and its config that do not fit together are refused alike, whatever reads the weights."""

import json
import re
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pose.app import compare, schema
from pose.app.preflight import plan_training
from pose.errors import CheckpointError
from pose.files import CONF
from pose.modeling.load import build_model, load_config
from pose.modeling.lora import LoraOptions, add_lora
from pose.modeling.shard import FullyShard, Whole
from pose.modeling.weights import is_no_weight, listed, not_finite

schema.register()
SHAPE = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
Q, UP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def save(folder, model_type: str = "llama", **options):
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **SHAPE | options)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def rewrite(folder, change):
    """change(tensors) on what the weights' file holds."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture(params=["whole", "dealt out", "fsdp", "fsdp, lora"])
def load(request, tmp_path):
    """A folder as each strategy reads it."""
    layout = prepare = None
    if request.param == "dealt out":
        layout = Whole(torch.device("cpu"), torch.float32)
    if "fsdp" in request.param:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        layout = FullyShard(init_device_mesh("cpu", (1,)), torch.device("cpu"), None)
    if "lora" in request.param:
        prepare = partial(add_lora, options=LoraOptions(rank=2))
    yield lambda folder: build_model(load_config(str(folder)), str(folder), "sdpa", layout=layout, prepare=prepare)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "base")


def refused(folder, words):
    return pytest.raises(CheckpointError, match=rf"^{re.escape(str(folder))}: {words}")


def test_weights_without_a_place_are_refused(folder, load):
    """As biases that the config does not mention: training, measuring and export would be of another model."""
    biases = {f"model.layers.{i}.mlp.{part}_proj.bias": torch.ones(40) for i in (0, 1) for part in ("gate", "up")}
    biases |= {f"model.layers.{i}.mlp.down_proj.bias": torch.ones(32) for i in (0, 1)}
    rewrite(folder, lambda tensors: tensors.update(biases))
    shown = ", ".join([r"model\.layers\.\d\.mlp\.\w+_proj\.bias"] * 5)
    with refused(folder, f"it holds weights that its config has no place for: {shown} and 1 more. Correct config.json"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    load(folder)


def test_everything_that_is_wrong_is_said_at_once(folder, load):
    def change(tensors):
        tensors["more"] = tensors.pop(Q)
        tensors[UP] = tensors[UP][:-1].contiguous()

    rewrite(folder, change)
    lacks = rf"it lacks weights of its own config: {Q}; it holds weights that its config has no place for: more; "
    with refused(
        folder, rf"{lacks}it holds weights of other shapes than its config says: {UP} \[39, 32\] for \[40, 32\]"
    ):
        load(folder)


def test_a_config_of_fewer_key_value_heads_names_tensors_and_both_shapes(folder, load):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    with refused(folder, r"it holds weights of other shapes .*k_proj\.weight \[16, 32\] for \[8, 32\], .*v_proj"):
        load(folder)


@pytest.mark.parametrize("change", [lambda head: head * 1.1, lambda head: head[1:].clone()])
def test_a_config_that_ties_an_untied_head_is_refused(tmp_path, load, change):
    folder = save(tmp_path / "base", tie_word_embeddings=True)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDINGS].clone()}))
    model = load(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rewrite(folder, lambda tensors: tensors.update({HEAD: change(tensors[HEAD])}))
    with refused(folder, rf"({HEAD} and {EMBEDDINGS}|{EMBEDDINGS} and {HEAD}) differ, .*tie_word_embeddings"):
        load(folder)


def test_an_untied_config_without_a_head_is_refused(tmp_path, load):
    folder = save(tmp_path / "base", tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with refused(folder, f"it lacks weights of its own config: {HEAD}"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(folder, load, value):
    """One number in a matrix is enough."""

    def change(tensors):
        tensors[UP][3, 5] = value
        tensors["model.norm.weight"].fill_(value)

    rewrite(folder, change)
    with refused(folder, rf"weights are not finite \(NaN, or infinite in torch.float32\): {UP}, model.norm.weight"):
        load(folder)


def test_what_a_dtype_cannot_hold_is_not_finite(folder):
    rewrite(folder, lambda tensors: tensors[UP].fill_(1e5))
    build_model(load_config(str(folder)), str(folder), "sdpa", torch.bfloat16)
    with refused(folder, rf"weights are not finite .*infinite in torch.float16\): {UP}"):
        build_model(load_config(str(folder)), str(folder), "sdpa", torch.float16)


def test_random_weights_that_are_not_finite_are_said():
    def spoil(model):
        model.model.norm.weight.data.fill_(float("nan"))

    with pytest.raises(CheckpointError, match=r"model.init: weights are not finite .*: model.norm.weight"):
        build_model(AutoConfig.for_model("llama", **SHAPE), None, "sdpa", prepare=spoil)


def test_every_process_says_what_another_has_found(folder, monkeypatch):
    """Each looks at its own part of the weights only; else one would fail, and the others wait for it."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)

    def gather(everywhere, names):
        everywhere[:] = [["theirs"], names]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    build = partial(build_model, load_config(str(folder)), str(folder), "sdpa")
    with refused(folder, "weights are not finite .*: theirs$"):
        build(layout=Whole(torch.device("cpu"), torch.float32))
    build()  # which every process has whole, and may load alone


def test_tensors_that_old_checkpoints_hold_are_no_loss(tmp_path, load):
    """Frequencies and causal masks; a vector of the mask's name is none."""
    folder = save(tmp_path / "base", "gpt_neox")
    layer = "gpt_neox.layers.0.attention"
    masks = {f"{layer}.bias": torch.ones(1, 1, 64, 64).bool(), f"{layer}.masked_bias": torch.tensor(-1e9)}
    rewrite(folder, lambda t: t.update(masks | {f"{layer}.rotary_emb.inv_freq": torch.ones(1)}))
    load(folder)
    rewrite(folder, lambda t: t.update({f"{layer}.dense.scale": torch.ones(32)}))
    with refused(folder, rf"it holds weights that its config has no place for: {layer}.dense.scale\."):
        load(folder)


def test_which_tensors_are_no_weights():
    one, mask = torch.ones(4), torch.ones(1, 1, 4, 4)
    for name in ("model.layers.3.self_attn.rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "model.position_ids"):
        assert is_no_weight(name, one)
    assert is_no_weight("transformer.h.0.attn.bias", mask) and is_no_weight("h.0.attn.masked_bias", torch.tensor(1.0))
    for name in ("h.0.attn.bias", "h.0.attn.c_attn.bias", "embed_positions.weight", "my_rotary.weight"):
        assert not is_no_weight(name, one)


def test_weights_that_the_class_has_no_use_for_are_named(tmp_path, load, capsys):
    """DeepSeek's layer for the prediction of further tokens, which transformers' class leaves out by its number."""
    folder = save_deepseek(tmp_path / "base")
    load(folder)
    assert "has no use for" not in capsys.readouterr().out
    rewrite(folder, lambda tensors: tensors.update({"model.layers.61.eh_proj.weight": torch.ones(2)}))
    load(folder)
    out = capsys.readouterr().out
    assert "Weights that transformers' deepseek_v3 has no use for are not read: model.layers.61.eh_proj.weight" in out


def save_deepseek(folder):
    """Without experts, so that it can be dealt out."""
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4}
    return save(folder, "deepseek_v3", first_k_dense_replace=2, **sizes)


def test_buffers_of_a_checkpoint_are_read_too(tmp_path):
    """As the corrections of a router's scores; dealt out, they used to stay as they were made."""
    model_class = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model("llama"))]
    folder = save(tmp_path / "base")
    made = model_class.__init__

    def with_buffer(self, config):
        made(self, config)
        self.model.register_buffer("correction", torch.zeros(3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_class, "__init__", with_buffer)
        build = partial(build_model, load_config(str(folder)), str(folder), "sdpa")
        layout = Whole(torch.device("cpu"), torch.float32)
        for options in ({}, {"layout": layout}):
            with refused(folder, "it lacks weights of its own config: model.correction"):
                build(**options)
        rewrite(folder, lambda tensors: tensors.update({"model.correction": torch.arange(3.0)}))
        for options in ({}, {"layout": layout}):
            assert build(**options).model.correction.tolist() == [0, 1, 2]
        rewrite(folder, lambda tensors: tensors.update({"model.correction": torch.full((3,), float("nan"))}))
        for options in ({}, {"layout": layout}):
            with refused(folder, "weights are not finite .*: model.correction"):
                build(**options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("model.layers.0.mlp.experts.1.up_proj.weight"),
            r"lacks weights .*: model\.layers\.0\.mlp\.experts\.#\.up_proj\.weight \(there are 1 of 2\)",
        ),
        (
            lambda t: [t.pop(f"model.layers.0.mlp.experts.{i}.up_proj.weight") for i in (0, 1)],
            r"lacks weights .*: a part of model\.layers\.0\.mlp\.experts\.gate_up_proj\.",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "experts.1." in name],
            r"other shapes .*experts\.(gate_up|down)_proj \[1, ",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.1.down_proj.weight": torch.ones(32, 39)}),
            r"other shapes .*experts\.1\.down_proj\.weight \[32, 39\] for \[32, 40\]",
        ),
        (lambda t: t.update({"model.layers.0.mlp.experts.1.bias": torch.ones(2)}), r"no place for: .*experts\.1\.bias"),
        (lambda t: t.pop("model.layers.1.mlp.gate.weight"), r"lacks weights .*layers\.1\.mlp\.gate\.weight"),
        (lambda t: t[UP.replace("up_proj", "experts.1.up_proj")].fill_(float("nan")), r"not finite .*experts"),
    ],
)
def test_experts_that_are_merged_while_they_are_read(tmp_path, change, words):
    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 40, "head_dim": 8}
    folder = save(tmp_path / "base", "qwen3_moe", **sizes)
    build = partial(build_model, load_config(str(folder)), str(folder), "sdpa")
    build()
    rewrite(folder, change)
    with refused(folder, f".*{words}"):
        build()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"transformer.h.1.attn.q_proj.bias": torch.ones(32)}, r"no place for: transformer\.h\.1\.attn\.q_proj\.bias"),
        ({"transformer.h.1.ln_2.weight": torch.ones(32)}, r"no place for: transformer\.h\.1\.ln_2\.weight"),
        (
            {"transformer.h.1.mlp.fc_in.bias": torch.ones(7)},
            r"other shapes .*layers\.1\.mlp\.fc1\.bias \[7\] for \[128\]",
        ),
        ({"transformer.ln_f.bias": torch.full((32,), float("nan"))}, r"not finite .*model\.final_layernorm\.bias"),
    ],
)
def test_checkpoints_of_another_form_are_held_to_the_same(tmp_path, load, more, words):
    folder = tmp_path / "base"
    config = AutoConfig.for_model("gptj", vocab_size=48, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load(folder)
    rewrite(folder, lambda tensors: tensors.update(more))
    with refused(folder, f".*{words}"):
        load(folder)


def test_a_weight_that_two_tensors_are_for_is_refused(folder, load):
    """With and without the prefix of the base model."""
    rewrite(folder, lambda tensors: tensors.update({UP.removeprefix("model."): torch.ones(40, 32)}))
    with refused(folder, "it holds several tensors for one weight: .*layers.1.mlp.up_proj.weight"):
        load(folder)


def test_training_and_measuring_refuse_before_anything_long(folder, tmp_path):
    """While they plan, before texts are tokenised or another checkpoint is measured."""
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
    folder = save(tmp_path / "tiny", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    rewrite(folder, lambda tensors: tensors.pop(Q))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        train = compose("train", [f"model.path={folder}", "pose.target_len=256", f"cache_dir={tmp_path}/cache"])
        measure = compose("evaluate", [f"ckpt=[assets/tiny,{folder}]", f"cache_dir={tmp_path}/cache"])
    for plan in (lambda: plan_training(train, tmp_path / "run"), lambda: compare.plan_evaluation(measure)):
        with refused(folder, f"it lacks weights of its own config: {Q}"):
            plan()
    assert not list((tmp_path / "cache").glob("tokens/*"))


def test_long_lists_are_cut():
    assert listed("abcde") == "a, b, c, d, e" and listed("abcdefg") == "a, b, c, d, e and 2 more"


def test_not_finite_looks_at_everything(folder):
    model = build_model(load_config(str(folder)), str(folder), "sdpa")
    assert not_finite(model) == []
    for parameter in model.parameters():
        parameter.data.view(-1)[-1] = float("nan")
    assert set(not_finite(model)) == {name for name, _ in model.named_parameters()}
