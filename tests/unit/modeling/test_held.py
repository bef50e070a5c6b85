"""Weights held in fewer bits than they are computed with: exact where nothing is lost, and never lost in an export."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from pose.errors import CheckpointError, GuardError
from pose.modeling import compat, held
from pose.modeling.export import export_model, verify_export
from pose.modeling.guards import run_guards
from pose.modeling.held import Held, HeldEmbedding, HeldLinear, add_quantised, drop_quantised, hold
from pose.modeling.load import build_model, is_merged, load_config, rope_geometry, scale_config
from pose.modeling.lora import LoraOptions, adapters, add_lora, count_parameters
from pose.modeling.loss import causal_lm_loss
from pose.rope import Yarn

VOCAB, WINDOW, TARGET_LEN = 101, 64, 512
CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes"
)
NF4 = pytest.param("nf4", marks=needs_bitsandbytes)


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", model_max_length=WINDOW)


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a random model in a dtype; returns its folder."""

    def save(dtype=torch.bfloat16, model_type="llama", **options):
        config = AutoConfig.for_model(
            model_type, vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=WINDOW, initializer_range=0.15,
            bos_token_id=0, eos_token_id=0, pad_token_id=None, **options,
        )  # fmt: skip
        torch.manual_seed(0)
        folder = tmp_path / f"{model_type}-{str(dtype)[6:]}"
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
        return folder

    return save


def load(folder, frozen="auto", lora=None, trained=torch.float32):
    """The scaled model of a folder with adapters that do something, and the closed form of its frequencies."""
    config = load_config(str(folder))
    geometry = rope_geometry(config)
    scaling = scale_config(config, Yarn(), TARGET_LEN)
    prepare = None if lora is None else lambda model: add_lora(model, lora)
    torch.manual_seed(1)
    layout = None if frozen == "plain" else Held(CPU, frozen, trained)
    model = build_model(config, str(folder), "sdpa", layout=layout, prepare=prepare).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.up.normal_(std=0.1, generator=generator)
    return model, scaling.frequencies(geometry)


def loss_of(model):
    tokens = torch.randint(VOCAB, (2, 48), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(20), 300 + torch.arange(28)]).expand(2, -1)
    hidden = model.base_model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
    return causal_lm_loss(hidden, model.get_output_embeddings(), tokens)


def gradients_of(model, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(model)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def pair(dtype, bias, num_out=24):
    """A layer that holds its weight in a dtype, and one that holds the same in fp32."""
    torch.manual_seed(0)
    layer = nn.Linear(16, num_out, bias)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype))
    plain = nn.Linear(16, num_out, bias)
    plain.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()})
    hold(layer)
    return layer, plain


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("rows", [5, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_computes_as_one_that_holds_fp32(monkeypatch, dtype, rows, trains, bias, autocast):
    monkeypatch.setattr(held, "BLOCK", rows * 16)
    layer, plain = pair(dtype, bias)
    layer.weight.requires_grad_(trains)
    inputs = [torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = []
    for module, x in zip((layer, plain), inputs, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(module(x))
        outputs[-1].square().sum().backward()
    assert outputs[0].dtype == outputs[1].dtype
    near = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(outputs[0], outputs[1], **near)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **near)
    if bias:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=2e-2, atol=5e-2)
    if trains:
        assert layer.weight.grad.dtype == dtype
        near = {"rtol": 2e-2, "atol": 0.1} if autocast else {"rtol": 2**-7, "atol": 1e-5}
        torch.testing.assert_close(layer.weight.grad.float(), plain.weight.grad, **near)
    else:
        assert layer.weight.grad is None


def test_no_wide_copy_of_a_weight_waits_for_the_backward_pass():
    layer, _ = pair(torch.bfloat16, bias=False)
    layer.weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(4, 16, requires_grad=True))
    assert {tensor.data_ptr() for tensor in kept} == {layer.weight.data_ptr()}


def test_an_embedding_gives_fp32():
    embedding = nn.Embedding(5, 4).to(torch.bfloat16)
    wanted = embedding.weight[torch.tensor([1, 3])].float()
    hold(embedding)
    found = embedding(torch.tensor([1, 3]))
    assert type(embedding) is HeldEmbedding and found.dtype == torch.float32 and torch.equal(found, wanted)


def test_weights_that_other_layers_share_are_left_alone():
    class Scaled(nn.Embedding):
        pass

    model = nn.ModuleDict({"in": Scaled(5, 4), "out": nn.Linear(4, 5, bias=False), "own": nn.Linear(4, 4)})
    model["out"].weight = model["in"].weight
    assert hold(model) == {id(model["own"].weight)}
    assert type(model["in"]) is Scaled and type(model["own"]) is HeldLinear


@pytest.mark.parametrize(
    ("stored", "frozen", "wanted"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_frozen_matrices_are_held_as_asked_and_everything_else_in_fp32(checkpoint, stored, frozen, wanted):
    folder = checkpoint(stored, "qwen2", tie_word_embeddings=False)
    model, _ = load(folder, frozen, LoraOptions(rank=4, train_embeddings_and_norms=True))
    original = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("base_layer.weight") or name == "lm_head.weight"
        assert parameter.dtype == (wanted if is_matrix else torch.float32), name
        assert not (is_matrix and parameter.requires_grad)
        plain = name.replace(".base_layer.", ".")
        if plain in original:
            assert torch.equal(parameter, original[plain].to(wanted if is_matrix else torch.float32))
    assert bool(model.rounded) == (stored == torch.float32 and wanted == torch.bfloat16)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("qwen2", False), ("gemma", True)])
def test_losses_and_gradients_are_those_of_weights_held_in_fp32(checkpoint, model_type, tied, autocast):
    folder = checkpoint(torch.bfloat16, model_type, tie_word_embeddings=tied)
    lora = LoraOptions(rank=4, train_embeddings_and_norms=True)
    (loss, gradients), (wanted_loss, wanted) = (
        gradients_of(load(folder, frozen, lora)[0], autocast) for frozen in ("auto", "plain")
    )
    assert gradients.keys() == wanted.keys()
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-3 if autocast else 1e-6, atol=0)
    for name, gradient in gradients.items():
        apart = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert apart < (2e-2 if autocast else 1e-5), name


@pytest.mark.parametrize("frozen", ["auto", "bfloat16", NF4])
def test_the_guards_pass(checkpoint, frozen):
    model, expected = load(checkpoint(), frozen, LoraOptions(rank=4))
    run_guards(model, expected, TARGET_LEN, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        run_guards(model, expected, TARGET_LEN, "cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("stored", "frozen"),
    [
        (torch.bfloat16, "auto"),
        (torch.float32, "bfloat16"),
        pytest.param(torch.float32, "nf4", marks=needs_bitsandbytes),
    ],
)  # fmt: skip
def test_the_export_is_the_checkpoint_with_the_adapters_merged(checkpoint, tokenizer, tmp_path, stored, frozen, tied):
    folder = checkpoint(stored, tie_word_embeddings=tied)
    model, _ = load(folder, frozen, LoraOptions(rank=4))
    export_model(model, tokenizer, tmp_path / "model")
    verify_export(model, tmp_path / "model")
    original, saved = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "model"))
    added = {name.replace(".base_layer.", "."): adapter for name, adapter in adapters(model).items()}
    assert saved.keys() == original.keys() and len(added) == 14
    for name, tensor in saved.items():
        wanted = original[name].float()
        if name in added:
            down, up, scale = added[name]
            wanted = wanted.double() + scale * (up.detach().double() @ down.detach().double())
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(tensor, wanted), name
    config = load_config(str(tmp_path / "model"))
    assert getattr(config, "quantization_config", None) is None


def test_the_export_equals_that_of_a_run_held_in_fp32(checkpoint, tokenizer, tmp_path):
    folder, lora = checkpoint(), LoraOptions(rank=4, train_embeddings_and_norms=True)
    for frozen in ("auto", "plain"):
        export_model(load(folder, frozen, lora)[0], tokenizer, tmp_path / frozen)
    held_in_bf16, held_in_fp32 = (load_file(tmp_path / name / "model.safetensors") for name in ("auto", "plain"))
    assert all(torch.equal(tensor, held_in_fp32[name]) for name, tensor in held_in_bf16.items())


@pytest.mark.parametrize("frozen", ["bfloat16", NF4])
def test_a_wrong_export_is_noticed_whatever_the_rounding(checkpoint, tokenizer, tmp_path, frozen):
    model, _ = load(checkpoint(torch.float32), frozen, LoraOptions(rank=4))
    export_model(model, tokenizer, tmp_path / "model")
    with torch.no_grad():
        next(iter(adapters(model).values())).up.mul_(1.2)
    with pytest.raises(GuardError, match="gives other logits"):
        verify_export(model, tmp_path / "model")


def test_a_checkpoint_that_is_gone_is_named(checkpoint, tokenizer, tmp_path):
    folder = checkpoint(torch.float32)
    model, _ = load(folder, "bfloat16", LoraOptions(rank=4))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=str(folder)):
        export_model(model, tokenizer, tmp_path / "model")


@pytest.mark.parametrize("frozen", ["bfloat16", NF4])
def test_adapters_are_not_merged_into_another_checkpoint(checkpoint, tokenizer, tmp_path, frozen):
    """Which may have come into its place while they trained; the rounded weights in memory tell."""
    folder = checkpoint(torch.float32)
    model, _ = load(folder, frozen, LoraOptions(rank=4))
    weights = load_file(folder / "model.safetensors")
    changed = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {changed: weights[changed] * 1.1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{changed} has other values in the checkpoint"):
        export_model(model, tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    export_model(model, tokenizer, tmp_path / "model")


def test_random_weights_are_exported_as_they_are_held(tokenizer, tmp_path):
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=WINDOW, initializer_range=0.15, pad_token_id=None,
    )  # fmt: skip
    scale_config(config, Yarn(), TARGET_LEN)
    layout = Held(CPU, "bfloat16")
    model = build_model(config, None, layout=layout, prepare=lambda model: add_lora(model, LoraOptions(rank=2)))
    export_model(model, tokenizer, tmp_path / "model")


def test_experts_cannot_be_placed_alone(checkpoint):
    dense, experts = checkpoint(), checkpoint(model_type="mixtral", num_local_experts=2)
    assert not is_merged(load_config(str(dense)), str(dense))
    assert is_merged(load_config(str(experts)), str(experts))


def test_trained_weights_of_bf16_have_gradients_of_fp32(checkpoint):
    model, expected = load(checkpoint(), trained=torch.bfloat16)
    run_guards(model, expected, TARGET_LEN, "cpu")
    dtypes = {(p.dtype, p.ndim) for p in model.parameters()}
    assert dtypes == {(torch.bfloat16, 2), (torch.float32, 1)}
    first = gradients_of(model)[1]
    assert {gradient.dtype for gradient in first.values()} == {torch.float32}
    _, wanted = gradients_of(load(checkpoint(), "plain")[0])
    for name, gradient in first.items():
        assert (gradient - wanted[name]).norm() < 2e-2 * wanted[name].norm()
    before = {name: gradient.clone() for name, gradient in first.items()}
    twice = gradients_of(model)[1]
    assert all(torch.equal(gradient, 2 * before[name]) for name, gradient in twice.items()), "they add up"


def test_the_table_of_the_docs_is_the_formula():
    hidden, inner, layers, vocab, rank = 4096, 11008, 32, 32000, 8  # LLaMA-7B
    linear = layers * (4 * hidden**2 + 3 * hidden * inner)
    ends, norms = 2 * vocab * hidden, (2 * layers + 1) * hidden
    moments = 2 * (1 + 4 / 256)  # codes, and an fp32 scale for 256 elements
    four_bits = 0.5 + 1 / 64 + 4 / (64 * 256)  # and a code of the scale for 64, with an fp32 scale for 256 of these
    wanted = {
        "finetune=full": 16 * (linear + ends + norms),
        "finetune=full, adamw8bit, fp32 weights": (8 + moments) * (linear + ends) + 16 * norms,
        "finetune=full, adamw8bit, bf16 weights": (6 + moments) * (linear + ends) + 16 * norms,
        "finetune=lora": 2 * (linear + ends) + 4 * norms,
        "finetune=qlora": four_bits * linear + 2 * ends + 4 * norms,
    }
    text = (Path(__file__).resolve().parents[3] / "docs" / "STRATEGIES.md").read_text()
    for name, num_bytes in wanted.items():
        cell = re.search(rf"^\| {re.escape(name)} \|[^|]*\| ([\d.]+) \|", text, re.MULTILINE)
        assert float(cell[1]) == pytest.approx(num_bytes / 2**30, abs=0.06), name
    adapters = 16 * layers * rank * (4 * 2 * hidden + 3 * (hidden + inner))
    said = re.search(r"adapters of rank 8 add ([\d.]+) GiB", text)
    assert float(said[1]) == pytest.approx(adapters / 2**30, abs=0.06)


@needs_bitsandbytes
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_four_bits_are_those_of_from_pretrained(checkpoint, stored):
    folder = checkpoint(stored, tie_word_embeddings=False)
    model, _ = load(folder, "nf4", LoraOptions(rank=4))
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)
    packed = {name: p for name, p in model.named_parameters() if compat.is_quantised(p)}
    assert len(packed) == 14, "every linear layer but the head"
    for name, parameter in packed.items():
        wanted = theirs.get_parameter(name.replace(".base_layer.", "."))
        assert torch.equal(parameter.data, wanted.data)
        assert torch.equal(compat.dequantised(parameter), compat.dequantised(wanted))
    assert model.lm_head.weight.dtype == stored and model.model.embed_tokens.weight.dtype == stored


@needs_bitsandbytes
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # the second has biases
def test_four_bits_compute_as_what_they_stand_for(checkpoint, model_type, autocast):
    model, _ = load(checkpoint(model_type=model_type), "nf4", LoraOptions(rank=4))
    plain, _ = load(checkpoint(model_type=model_type), "plain", LoraOptions(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if compat.is_quantised(parameter):
                plain.get_parameter(name).copy_(compat.dequantised(parameter))
    biases = {name: p.clone() for name, p in model.named_parameters() if name.endswith("bias")}
    (loss, gradients), (wanted_loss, wanted) = gradients_of(model, autocast), gradients_of(plain, autocast)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-3 if autocast else 1e-6, atol=0)
    assert gradients.keys() == wanted.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() < (2e-2 if autocast else 1e-5) * wanted[name].norm(), name
    assert all(torch.equal(model.get_parameter(name), bias) for name, bias in biases.items())


@needs_bitsandbytes
def test_gradients_are_there_after_an_evaluation(checkpoint):
    model, _ = load(checkpoint(), "nf4", LoraOptions(rank=4))
    loss, before = gradients_of(model)
    before = {name: gradient.clone() for name, gradient in before.items()}
    model.zero_grad()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss_of(model.eval())
    again, after = gradients_of(model.train())
    assert torch.equal(loss, again)
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())


@needs_bitsandbytes
def test_a_training_state_is_without_four_bits_and_knows_them(checkpoint):
    folder = checkpoint()
    model, _ = load(folder, "nf4", LoraOptions(rank=4))
    assert count_parameters(model)[1] == count_parameters(load(folder, "plain", LoraOptions(rank=4))[0])[1]
    state = model.state_dict()
    sums = drop_quantised(state, model)
    assert len(sums) == 14 and not [name for name in state if name.endswith("base_layer.weight")]
    again, _ = load(folder, "nf4", LoraOptions(rank=4))
    add_quantised(state, again, sums)
    again.load_state_dict(state)
    assert torch.equal(loss_of(again), loss_of(model))
    torch.manual_seed(7)
    other = AutoModelForCausalLM.from_config(load_config(str(folder)))
    other.to(torch.bfloat16).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"is model\.path the same"):
        add_quantised(state, load(folder, "nf4", LoraOptions(rank=4))[0], sums)


def test_a_model_without_four_bits_keeps_its_state(checkpoint):
    model, _ = load(checkpoint(), "auto", LoraOptions(rank=4))
    state = model.state_dict()
    names = set(state)
    assert drop_quantised(state, model) == {} and set(state) == names
    add_quantised(state, model, {})
    assert set(state) == names


def test_a_layer_of_autocast_keeps_its_own_dtype():
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    hold(layer)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
