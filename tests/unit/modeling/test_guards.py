"""The guards pass on sound models, and catch each fault that is planted."""

import contextlib
import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)

from pose.errors import GuardError
from pose.modeling.guards import check_chunks_attend, check_computing, check_loss, check_rotation, run_guards
from pose.modeling.load import build_model, rope_geometry, scale_config
from pose.modeling.rotary import keep_frequencies_fp32, rotary_modules
from pose.rope import NTK, Cope, Drope, Dynamic, Linear, LongRope, Unscaled, Yarn, YarnRevised

TARGET_LEN = 2048
STATIC = [Unscaled(), Linear(), NTK(), Yarn(), YarnRevised(), Cope(), Yarn(rcd_shift=True)]
BY_LENGTH = [Dynamic(), LongRope(long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 8.0, 9.0])]
PRECISIONS = ("fp32", "bf16 weights", "bf16 autocast", "bf16 both")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_config(cls=LlamaConfig, **options):
    sizes = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    return cls(**sizes | options)


def scaled(scaling, config=None):
    """A scaled config and the closed form of its frequencies at the target."""
    config = tiny_config() if config is None else config
    geometry = rope_geometry(config)
    return config, scale_config(config, scaling, TARGET_LEN).frequencies(geometry, TARGET_LEN)


def stock_model(config, attention):
    """A model as transformers builds it, without anything of pose."""
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@contextlib.contextmanager
def in_precision(model, precision):
    if precision in ("bf16 weights", "bf16 both"):
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision in ("bf16 autocast", "bf16 both")):
        yield


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scaling", [*STATIC, Drope(), *BY_LENGTH], ids=lambda s: s.name)
def test_sound_models_pass(backend, precision, scaling):
    config, expected = scaled(scaling)
    model = build_model(config, None, backend)
    with in_precision(model, precision):
        run_guards(model, expected, TARGET_LEN, "cpu")


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [
        tiny_config(num_key_value_heads=4),
        tiny_config(tie_word_embeddings=True),
        tiny_config(MistralConfig, sliding_window=None),
        tiny_config(Qwen2Config),
    ],
    ids=["mha", "tied", "mistral", "qwen2"],
)
def test_sound_architectures_pass(backend, config):
    config, expected = scaled(Linear(), copy.deepcopy(config))
    run_guards(build_model(config, None, backend), expected, TARGET_LEN, "cpu")


def test_target_len_at_the_window_passes():
    """No room for a skip beyond the window: still two chunks, still a check."""
    run_guards(build_model(tiny_config(), None, "sdpa"), None, 16, "cpu")


@pytest.mark.parametrize("mode", [True, False])
def test_training_mode_is_restored(mode):
    config, expected = scaled(Linear())
    model = build_model(config, None, "sdpa").train(mode)
    run_guards(model, expected, TARGET_LEN, "cpu")
    assert model.training is mode
    with pytest.raises(GuardError):
        run_guards(model, expected._replace(attention_factor=2.0), TARGET_LEN, "cpu")
    assert model.training is mode
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_does_not_hide_a_fault():
    """With dropout on, any two passes differ, and every attention would seem to attend."""
    config, expected = scaled(Linear(), tiny_config(attention_dropout=0.5))
    model = stock_model(config, "sdpa").train()
    with pytest.raises(GuardError, match="border of two documents"):
        run_guards(model, expected, TARGET_LEN, "cpu")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_stock_attention_is_caught(attention, precision):
    """transformers hides all before a jump of the position ids when no mask is given."""
    config, expected = scaled(Linear())
    model = stock_model(config, attention)
    keep_frequencies_fp32(model)
    with (
        in_precision(model, precision),
        pytest.raises(GuardError, match=rf"border of two documents.*short contexts.*'{attention}'"),
    ):
        run_guards(model, expected, TARGET_LEN, "cpu")


@pytest.mark.parametrize("rows", [1, 2])
def test_attention_that_cuts_at_one_batch_size_only_is_caught(rows):
    """FlashAttention's wrapper in transformers cuts at batch 1, and not at 2."""
    config, _ = scaled(Linear())
    model = build_model(config, None, "sdpa")

    def cut(module, args, kwargs):
        name = "sdpa" if len(kwargs["input_ids"]) == rows else "pose_sdpa"
        module.set_attn_implementation(name)

    model.base_model.register_forward_pre_hook(cut, with_kwargs=True)
    with pytest.raises(GuardError, match=f"batch of {rows}"), torch.no_grad():
        check_chunks_attend(model, TARGET_LEN, "cpu")


def test_frequencies_rounded_to_bf16_are_caught():
    config, expected = scaled(Linear())
    model = build_model(config, None, "sdpa")
    (module,) = rotary_modules(model)
    module.inv_freq = module.inv_freq.bfloat16()
    with pytest.raises(GuardError, match="inv_freq is bfloat16, not float32"):
        run_guards(model, expected, TARGET_LEN, "cpu")


def test_frequencies_rounded_and_taken_back_to_fp32_are_caught():
    """The dtype is right again, the digits are gone."""
    config, expected = scaled(Linear())
    model = build_model(config, None, "sdpa")
    (module,) = rotary_modules(model)
    module.inv_freq = module.inv_freq.bfloat16().float()
    with pytest.raises(GuardError, match="not that of the configured scaling"):
        run_guards(model, expected, TARGET_LEN, "cpu")


@pytest.mark.parametrize("rope", [Linear(), Yarn(), BY_LENGTH[0]], ids=lambda s: s.name)
@pytest.mark.parametrize("bits", [11, 8])
def test_angles_of_rounded_products_are_caught(rope, bits, monkeypatch):
    """A GPU that makes fp32 products in TF32 keeps 11 bits of a position, and of a frequency; the buffers are right."""
    config, expected = scaled(rope)
    model = build_model(config, None, "sdpa")
    own, step = type(rotary_modules(model)[0]).forward, 2.0 ** -(bits - 1)

    def rounds(x):
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp((mantissa / step).round() * step, exponent).float()

    def forward(self, x, position_ids):
        frequencies = SimpleNamespace(inv_freq=rounds(self.inv_freq), attention_scaling=self.attention_scaling)
        return inspect.unwrap(own)(frequencies, x, rounds(position_ids.float()))

    check_rotation(model, TARGET_LEN, "cpu")
    monkeypatch.setattr(type(rotary_modules(model)[0]), "forward", forward)
    with pytest.raises(GuardError, match=r"rotates positions up to 2,047 by other angles .* TF32"):
        run_guards(model, expected, TARGET_LEN, "cpu")
    with pytest.raises(GuardError, match="by other angles"):
        check_computing(model, "cpu")


@pytest.mark.parametrize("scaling", BY_LENGTH, ids=lambda s: s.name)
def test_frequencies_that_do_not_follow_the_length_are_caught(scaling):
    """A model whose rotation stays that of its window at every length."""
    config, expected = scaled(scaling)
    model = build_model(config, None, "sdpa")
    (module,) = rotary_modules(model)
    del module.forward
    with pytest.raises(GuardError, match="not that of the configured scaling"):
        run_guards(model, expected, TARGET_LEN, "cpu")


@pytest.mark.parametrize(
    ("scaling", "buffer"),
    [(BY_LENGTH[0], "inv_freq"), (BY_LENGTH[1], "inv_freq"), (BY_LENGTH[1], "long_inv_freq")],
)
def test_every_buffer_of_frequencies_is_looked_at(scaling, buffer):
    """Also the one that serves texts within the window."""
    config, expected = scaled(scaling)
    model = build_model(config, None, "sdpa")
    (module,) = rotary_modules(model)
    setattr(module, buffer, getattr(module, buffer).bfloat16())
    with pytest.raises(GuardError, match="inv_freq is bfloat16, not float32"):
        run_guards(model, expected, TARGET_LEN, "cpu")


def test_another_dynamic_factor_is_caught():
    config, _ = scaled(Dynamic(factor=4.0))
    _, expected = scaled(Dynamic(factor=4.001))
    with pytest.raises(GuardError, match=r"not that of the configured scaling \(0\.0% off at worst\)"):
        run_guards(build_model(config, None, "sdpa"), expected, TARGET_LEN, "cpu")


def test_drope_over_a_huge_base_passes():
    """Its slowest frequencies are below what fp32 can hold, and 0 in the model."""
    config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 1e12})
    config, expected = scaled(Drope(), config)
    assert expected.inv_freq[-1] < 1e-39
    run_guards(build_model(config, None, "sdpa"), expected, TARGET_LEN, "cpu")


def test_positions_left_in_are_told_from_drope():
    _, expected = scaled(Drope())
    with pytest.raises(GuardError, match="not that of the configured scaling"):
        run_guards(build_model(scaled(Linear(factor=1e6))[0], None, "sdpa"), expected, TARGET_LEN, "cpu")


@pytest.mark.parametrize("expect", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_of_an_unprotected_model_is_caught(expect, dtype):
    config, expected = scaled(Linear())
    model = stock_model(config, "pose_sdpa").to(dtype)
    with pytest.raises(GuardError, match="not float32"):
        run_guards(model, expected if expect else None, TARGET_LEN, "cpu")


@pytest.mark.parametrize("scaling", [*STATIC[1:], Drope(), *BY_LENGTH], ids=lambda s: s.name)
def test_scaling_set_after_the_model_was_built_is_caught(scaling):
    wanted, expected = scaled(scaling)
    model = build_model(tiny_config(), None, "sdpa")
    model.config.rope_parameters = wanted.rope_parameters
    model.config.max_position_embeddings = TARGET_LEN
    with pytest.raises(GuardError, match=r"not that of the configured scaling.*before the model is built"):
        run_guards(model, expected, TARGET_LEN, "cpu")


def test_yarn_and_its_revised_form_are_told_apart():
    config, _ = scaled(Yarn())
    _, expected = scaled(YarnRevised())
    with pytest.raises(GuardError, match="not that of the configured scaling"):
        run_guards(build_model(config, None, "sdpa"), expected, TARGET_LEN, "cpu")


def test_frequencies_of_another_head_size_are_caught():
    config, _ = scaled(Linear())
    _, expected = scaled(Linear(), tiny_config(head_dim=32))
    with pytest.raises(GuardError, match="8 of them, 16 expected"):
        run_guards(build_model(config, None, "sdpa"), expected, TARGET_LEN, "cpu")


def test_wrong_attention_factor_is_caught():
    config, expected = scaled(Yarn())
    model = build_model(config, None, "sdpa")
    (module,) = rotary_modules(model)
    module.attention_scaling = 1.0
    with pytest.raises(GuardError, match=r"attention factor is 1, and the configured scaling has 1\.20794"):
        run_guards(model, expected, TARGET_LEN, "cpu")


def test_model_without_rope_is_caught():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=64))
    with pytest.raises(GuardError, match="no rotary embedding"):
        run_guards(model, None, 64, "cpu")


class Softcapped(LlamaForCausalLM):
    """LLaMA with the soft cap that Gemma 2 puts on its logits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logits_changed_after_the_head_are_caught(precision):
    config, expected = scaled(Linear())
    config._attn_implementation = "pose_sdpa"
    model = Softcapped(config)
    keep_frequencies_fp32(model)
    with (
        in_precision(model, precision),
        pytest.raises(GuardError, match=r"\(llama\) changes its logits after the head"),
    ):
        run_guards(model, expected, TARGET_LEN, "cpu")


def test_logits_that_the_model_divides_are_caught():
    """Granite divides its logits by a number of its config."""
    model = build_model(tiny_config(GraniteConfig, logits_scaling=8.0), None, "sdpa")
    with pytest.raises(GuardError, match=r"\(granite\) changes its logits after the head"), torch.no_grad():
        check_loss(model, "cpu")
    plain = build_model(tiny_config(GraniteConfig, logits_scaling=1.0), None, "sdpa")
    with torch.no_grad():
        check_loss(plain, "cpu")


def test_a_model_of_nan_is_refused():
    model = build_model(tiny_config(LlamaConfig), None, "sdpa")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(GuardError, match="NaN"):
        run_guards(model, None, 256, "cpu")
