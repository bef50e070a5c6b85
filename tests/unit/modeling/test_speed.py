"""Compiled layers, recomputed activations and bf16 residuals: the same training, by other means."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers import LlamaConfig

from pose.errors import ConfigError
from pose.modeling import compat, speed
from pose.modeling.load import build_model
from pose.modeling.lora import add_lora
from pose.modeling.loss import causal_lm_loss
from pose.modeling.options import LoraOptions
from pose.training.strategies import DeepSpeed, check_strategy, is_compiled

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
PRODUCTS = 7  # matrix products of a layer: query, key, value, output, gate, up, down


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make(attention="sdpa", lora=False):
    torch.manual_seed(0)
    prepare = (lambda model: add_lora(model, LoraOptions(rank=4))) if lora else None
    return build_model(CONFIG, None, attention, prepare=prepare).train()


def batch(step, rows=2, length=24):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(CONFIG.vocab_size, (rows, length), generator=generator)
    skipped = torch.arange(length) + 30 * (torch.arange(length) > length // 2)
    return ids, skipped.expand(rows, -1)


def loss_of(model, ids, positions):
    hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return causal_lm_loss(hidden, model.get_output_embeddings(), ids)


def train(model, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for step in range(steps):
        loss = loss_of(model, *batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.nightly
def test_twenty_compiled_steps_end_as_eager_ones(caplog):
    """Names of the weights stay, and one shape is compiled once."""
    eager, compiled = make(), make()
    speed.compile_layers(compiled)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    with caplog.at_level(logging.WARNING):
        assert train(compiled, 20) == pytest.approx(train(eager, 20), abs=1e-4)
    assert not [record for record in caplog.records if record.name.startswith("pose")]
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", [False, True, "selective"])
@pytest.mark.parametrize(("attention", "lora"), [("sdpa", False), ("eager", False), ("sdpa", True)])
def test_compiled_with_everything_else(monkeypatch, caplog, attention, lora, how):
    """Traced and differentiated, but not turned into code, which would take long."""
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: torch_compile(function, backend="aot_eager"))
    eager, compiled = make(attention, lora), make(attention, lora)
    counters["stats"].clear()
    speed.recompute(compiled, how)
    speed.compile_layers(compiled)
    warned = logging.getLogger(compat.SELECTIVE)
    warned.addHandler(caplog.handler)
    torch._logging.warning_once.cache_clear()
    assert train(compiled, 3) == pytest.approx(train(eager, 3), abs=1e-5)
    warned.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.name == compat.SELECTIVE]
    assert counters["stats"]["unique_graphs"] == 1, "all layers are one"


def test_compiling_again_is_a_warning_with_its_cause(monkeypatch, caplog):
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: torch_compile(function, backend="eager"))
    model = make()
    speed.compile_layers(model)
    with caplog.at_level(logging.WARNING):
        loss_of(model, *batch(0))
        loss_of(model, *batch(1))
        assert not caplog.records
        loss_of(model, *batch(2, length=31))
    (record, *_) = caplog.records
    said = record.getMessage()
    assert said.startswith("Compiled again, which takes a while: ") and "expected 24, actual 31" in said
    assert "\n" not in said and len(said) < 200


class Products(TorchDispatchMode):
    """Counts the matrix products that are computed."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in speed.MATRIX_PRODUCTS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("how", "again"), [(False, 0), (True, PRODUCTS - 1), ("selective", PRODUCTS // 2)])
def test_what_is_recomputed(how, again):
    """The same gradients to the bit; of a layer's products those that were not kept, and are needed, are made again."""
    gradients, counts = [], []
    for choice in (False, how):
        model = make()
        speed.recompute(model, choice)
        with Products() as products:
            loss_of(model, *batch(0)).backward()
        gradients.append([p.grad for p in model.parameters()])
        counts.append(products.count)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert counts[1] - counts[0] == again * CONFIG.num_hidden_layers


def test_only_what_trains_is_recomputed():
    """Not what is measured in between, whose activations nobody keeps."""
    model, runs = make(), []
    speed.recompute(model, True)
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    loss_of(model, *batch(0)).backward()
    with torch.no_grad():
        loss_of(model, *batch(0))
    loss_of(model.eval(), *batch(0)).backward()
    assert runs == [True, True, False, True]


def test_a_class_that_does_not_allow_it_is_refused():
    model = make()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"model\.gradient_checkpointing=true .*LlamaForCausalLM: take false"):
        speed.recompute(model, True)
    speed.recompute(model, False)


@pytest.mark.parametrize(("namespace", "kept"), [("flash_attn", True), ("flash_attn_3", True), ("pose_tests", False)])
def test_attention_of_flash_attentions_packages_is_kept(namespace, kept):
    """By the namespace of its operators, whose names differ from version to version."""
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define("pose_test(Tensor query) -> Tensor")
    op = getattr(torch.ops, namespace).pose_test.default
    policy = speed._Policy()(SimpleNamespace(is_recompute=False), op)
    assert policy == (CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE)


@pytest.mark.parametrize(
    ("autocast", "expected"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (None, torch.float32)],
)
def test_residuals_are_bf16_where_layers_compute_in_it(autocast, expected):
    model, seen = make(), []
    speed.residuals_as_computed(model)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = loss_of(model, *batch(0))
    loss.backward()
    assert seen == [expected] * 3 and loss.dtype == torch.float32
    assert model.model.embed_tokens.weight.grad.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies) and frequencies.dtype == torch.float32
    with torch.no_grad():
        assert loss.item() == pytest.approx(loss_of(model, *batch(0)).item(), rel=2e-3)


def test_what_is_compiled(monkeypatch):
    """By itself on a GPU alone; not where weights are gathered inside a layer."""
    on_cpu = type("OnCpu", (), {"root_device": torch.device("cpu")})()
    on_gpu = type("OnGpu", (), {"root_device": torch.device("cuda")})()
    zero3 = DeepSpeed(3)
    monkeypatch.setattr(DeepSpeed, "root_device", torch.device("cuda"))
    assert [is_compiled("auto", one) for one in (on_cpu, on_gpu, zero3)] == [False, True, False]
    assert is_compiled(True, on_cpu) and not is_compiled(False, on_gpu)
    zero3.needs_gpu = False
    with pytest.raises(ConfigError, match=r"trainer\.compile=true is not supported by ZeRO-3"):
        check_strategy(zero3, "bf16-mixed", compiled=True)
    check_strategy(zero3, "bf16-mixed")
