"""Rotation by the length an example simulates, against transformers on one fresh text, and over model families."""

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, GPTJConfig, LlamaConfig

from pose.app.build import build_scaling
from pose.errors import ConfigError
from pose.evaluation.perplexity import truncated
from pose.evaluation.scoring import Scorer
from pose.modeling.guards import run_guards
from pose.modeling.load import build_model, load_config, rope_geometry, scale_config
from pose.modeling.loss import causal_lm_loss
from pose.modeling.rotary import depends_on_length, frequencies_at, rotary_modules, set_target_len, target_len_of
from pose.positions import Mix, PoSE
from pose.rope import (
    NTK,
    Cope,
    Drope,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    NTKByParts,
    Searched,
    Theta,
    Unscaled,
    Yarn,
    YarnRevised,
)

REPOSITORY = Path(__file__).resolve().parents[3]
BASE, HEAD_DIM, WINDOW, TARGET_LEN, FACTOR = 10_000.0, 16, 64, 512, 8.0
LONG = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 8.0, 9.0]
SHORT = [1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]
BY_LENGTH = [Dynamic(), Dynamic(factor=3.0), LongRope(long_factor=LONG), LongRope(long_factor=LONG, short_factor=SHORT)]
STATIC = [Unscaled(), Linear(), NTK(), NTKByParts(), Yarn(), YarnRevised(), Llama3(), Theta(), Drope(), Cope()]
STATIC += [NTK(rcd_shift=True), Yarn(rcd_shift=True), YarnRevised(rcd_shift=True)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_config(model_type="llama", **options):
    sizes = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return AutoConfig.for_model(model_type, **sizes | options)


def scaled_model(scaling, config=None, dtype=torch.float32):
    config = config or tiny_config()
    scale_config(config, scaling, TARGET_LEN)
    return build_model(config, None, "sdpa", dtype).eval()


def fresh_stock_model(model):
    """The same weights in transformers' own classes, which have not seen any text."""
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    stock.load_state_dict(model.state_dict())
    return stock.eval()


@torch.no_grad()
def stock_logits(model, tokens, positions):
    """Of one example; the mask of ones keeps transformers from taking skips for the borders of documents."""
    output = fresh_stock_model(model)(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens))
    return output.logits


def closed_form(scaling, length):
    """inv_freq of a text of that many tokens, in numpy."""
    theta = BASE ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)
    if isinstance(scaling, LongRope):
        return theta / np.array(LONG if length > WINDOW else scaling.short_factor or 1.0)
    s = scaling.factor or FACTOR
    growth = max(1.0, s * length / WINDOW - (s - 1))
    return theta * growth ** (-2 * np.arange(HEAD_DIM // 2) / (HEAD_DIM - 2))


def skip_positions(length, num=32):
    """Two chunks of positions whose last is length - 1."""
    return torch.cat([torch.arange(num // 2), torch.arange(length - num // 2, length)])


# Below the window, at it, one past it, between, and at the target.
LENGTHS = [40, WINDOW, WINDOW + 1, 200, TARGET_LEN]


@pytest.mark.parametrize("scaling", BY_LENGTH, ids=lambda s: s.name)
def test_cos_and_sin_are_those_of_each_rows_length(scaling):
    (module,) = rotary_modules(scaled_model(scaling))
    positions = torch.stack([skip_positions(n) for n in LENGTHS])
    cos, sin = module(torch.zeros(1), positions)
    attention = math.sqrt(1 + math.log(FACTOR) / math.log(WINDOW)) if isinstance(scaling, LongRope) else 1.0
    for row, length in enumerate(LENGTHS):
        angles = positions[row].numpy()[:, None] * np.tile(closed_form(scaling, length), 2)
        np.testing.assert_allclose(cos[row], attention * np.cos(angles), atol=2e-3)  # 511 rad, rounded to fp32
        np.testing.assert_allclose(sin[row], attention * np.sin(angles), atol=2e-3)
        np.testing.assert_allclose(frequencies_at(module, length), closed_form(scaling, length), rtol=3e-6)


@pytest.mark.parametrize("scaling", BY_LENGTH, ids=lambda s: s.name)
def test_each_example_of_a_batch_is_what_transformers_gives_it_alone_and_fresh(scaling):
    """PoSE positions of several lengths in one batch: no example's rotation depends on its neighbours."""
    model = scaled_model(scaling)
    positions = torch.stack([skip_positions(n) for n in LENGTHS])
    tokens = torch.randint(101, positions.shape)
    with torch.no_grad():
        together = model(tokens, position_ids=positions, use_cache=False).logits
        reversed_ = model(tokens.flip(0), position_ids=positions.flip(0), use_cache=False).logits.flip(0)
    for row in range(len(LENGTHS)):
        alone = stock_logits(model, tokens[row : row + 1], positions[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-4)
        torch.testing.assert_close(reversed_[row], alone, rtol=0, atol=1e-4)
    if isinstance(scaling, Dynamic):  # the premise: transformers rotates a batch by its longest example
        in_batch = stock_logits(model, tokens, positions)[0]
        assert (in_batch - together[0]).abs().max() > 0.01


@pytest.mark.parametrize("scaling", BY_LENGTH, ids=lambda s: s.name)
def test_plain_texts_in_any_order_are_what_transformers_gives_a_fresh_one(scaling):
    """After the longest, a shorter one: nothing is remembered. Positions are left to the model."""
    model = scaled_model(scaling)
    for length in (100, TARGET_LEN, 100, 40, WINDOW, WINDOW + 1):
        tokens = torch.randint(101, (2, length))
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
            wanted = fresh_stock_model(model)(tokens, use_cache=False).logits
        torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("scaling", BY_LENGTH, ids=lambda s: s.name)
def test_cached_decoding_is_that_of_transformers(scaling):
    """Across the border of the window: new tokens have the frequencies of the text up to them."""
    model = scaled_model(scaling)
    prompt = torch.randint(1, 101, (1, WINDOW - 3))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options["return_dict_in_generate"] = True
    with torch.no_grad():
        got = model.generate(prompt, **options)
        wanted = fresh_stock_model(model).generate(prompt, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scaling", [*BY_LENGTH, YarnRevised()], ids=lambda s: s.name)
@pytest.mark.parametrize("cast", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_and_casts_rotate_alike(scaling, cast):
    """In bf16 and under autocast the angles are those of fp32, and a copy computes with its own buffers."""
    model = scaled_model(scaling)
    (module,) = rotary_modules(model)
    positions = torch.stack([skip_positions(n) for n in LENGTHS])
    wanted = module(torch.zeros(1), positions)
    clone = cast(model).to(torch.bfloat16)
    (other,) = rotary_modules(clone)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(wanted, other(torch.zeros(1), positions), strict=True):
            assert torch.equal(ours, theirs)
        assert all(part.dtype == torch.bfloat16 for part in other(torch.zeros(1).bfloat16(), positions))
    other.inv_freq.zero_()
    if hasattr(other, "long_inv_freq"):
        other.long_inv_freq.zero_()
    for ours, again in zip(wanted, module(torch.zeros(1), positions), strict=True):
        assert torch.equal(ours, again)
    if not isinstance(scaling, Dynamic):
        assert not other(torch.zeros(1), positions)[1].any()


@pytest.mark.parametrize("scaling", [YarnRevised(), NTKByParts(), Drope(), LongRope(long_factor=LONG)])
def test_longrope_leaves_its_buffers_alone(scaling):
    """transformers copies into inv_freq on every forward."""
    (module,) = rotary_modules(scaled_model(scaling))
    buffer, version = module.inv_freq, module.inv_freq._version
    for length in (40, TARGET_LEN):
        module(torch.zeros(1), torch.arange(length)[None])
    assert module.inv_freq is buffer and buffer._version == version


def test_perplexity_of_several_lengths_takes_a_pass_for_each():
    """Of a dynamic model: each window has the frequencies of its own length."""
    model = scaled_model(Dynamic())
    document = torch.randint(101, (TARGET_LEN,)).numpy()
    lengths = [40, 100, TARGET_LEN]
    ones = np.ones(101, np.int64)
    got = truncated(Scorer(model, 1024), document, lengths, token_bytes=ones, windows=1, tail=None, bin=1000)
    for n in lengths:
        tokens = torch.from_numpy(document[:n])
        with torch.no_grad():
            logits = fresh_stock_model(model)(tokens[None], use_cache=False).logits[0]
        wanted = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).exp().item()
        nll, tokens, _ = got[f"ppl@{n}"]
        assert np.exp(nll / tokens) == pytest.approx(wanted, rel=1e-4)


# ----- mixed windows -----

MIXED = LongRope(long_factor=LONG, attention_factor=1.0)


def with_weights_of(model, scaling):
    """Another scaling over the same weights."""
    other = scaled_model(scaling)
    other.load_state_dict(model.state_dict())
    return other


def mixed_batch():
    """Two examples of pose=mix: a plain one, and one that skips beyond the window."""
    sampler = Mix(WINDOW, TARGET_LEN, PoSE(WINDOW, TARGET_LEN, num_chunks=2), plain_share=0.5)
    rng = np.random.default_rng(0)
    drawn = [torch.from_numpy(sampler.sample(rng, TARGET_LEN).position_ids) for _ in range(20)]
    plain, skipped = (next(ids for ids in drawn if (ids[-1] >= WINDOW) == skips) for skips in (False, True))
    assert torch.equal(plain, torch.arange(WINDOW))
    return torch.randint(101, (2, WINDOW)), torch.stack([plain, skipped])


def test_in_a_mixed_batch_plain_examples_see_the_original_model_and_others_the_long_list():
    model = scaled_model(MIXED)
    tokens, positions = mixed_batch()
    with torch.no_grad():
        original, long, mixed = (
            m(tokens, position_ids=positions, use_cache=False).logits
            for m in (
                with_weights_of(model, Unscaled()),
                with_weights_of(model, LongRope(long_factor=LONG, short_factor=LONG, attention_factor=1.0)),
                model,
            )
        )
        untouched = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="sdpa").eval()
        untouched.load_state_dict(model.state_dict())
        alone = untouched(tokens[:1], use_cache=False).logits
    torch.testing.assert_close(mixed[0], original[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[:1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], long[1], rtol=0, atol=1e-6)
    for row, other in ((0, long), (1, original)):
        assert (mixed[row] - other[row]).abs().max() > 0.1
    with torch.no_grad():  # what the factor that LongRoPE would have does to the plain example
        scaled = with_weights_of(model, LongRope(long_factor=LONG))(tokens, position_ids=positions).logits
    assert (scaled[0] - original[0]).abs().max() > 0.1


def test_the_gradient_of_a_mixed_batch_is_that_of_both_models():
    """Of one step: the mean of what the original model has for the plain example, and the long one for the other."""
    model = scaled_model(MIXED)
    tokens, positions = mixed_batch()

    def gradients(model, rows):
        hidden = model.base_model(tokens[rows], position_ids=positions[rows], use_cache=False).last_hidden_state
        causal_lm_loss(hidden, model.get_output_embeddings(), tokens[rows]).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    long = LongRope(long_factor=LONG, short_factor=LONG, attention_factor=1.0)
    plain = gradients(with_weights_of(model, Unscaled()), slice(0, 1))
    skipped = gradients(with_weights_of(model, long), slice(1, 2))
    for name, gradient in gradients(model, slice(0, 2)).items():
        wanted = (plain[name] + skipped[name]) / 2
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


# ----- what the config says -----


@pytest.mark.parametrize("mixed", [True, False])
def test_searched_divisors_depend_on_length_where_windows_are_mixed(mixed):
    """The method says the same as the config that it is laid over."""
    config, scaling = tiny_config(), Searched(long_factor=LONG, mixed=mixed)
    scale_config(config, scaling, TARGET_LEN)
    assert depends_on_length(config) is scaling.depends_on_length is mixed


@pytest.mark.parametrize("scaling", STATIC + BY_LENGTH, ids=lambda s: s.name)
def test_the_config_says_what_depends_on_length_and_what_the_target_is(scaling):
    config = tiny_config()
    scale_config(config, scaling, TARGET_LEN)
    assert depends_on_length(config) == scaling.depends_on_length == (scaling in BY_LENGTH)
    assert target_len_of(config) == TARGET_LEN
    assert config.max_position_embeddings == (WINDOW if isinstance(scaling, Dynamic) else TARGET_LEN)
    again = type(config).from_dict(json.loads(config.to_json_string()))
    assert target_len_of(again) == TARGET_LEN
    if scaling.name == "none":
        return
    assert rope_geometry(again).window == WINDOW
    factor = scaling.factor or FACTOR
    noted = {key: value for key, value in again.pose.items() if "attention_factor" not in key}
    assert {**noted, "target_len": TARGET_LEN} == {
        "rope": scaling.name, "window": WINDOW, "factor": factor, "target_len": TARGET_LEN
    }  # fmt: skip
    with pytest.raises(ConfigError, match=f"already scaled.*'{rope_geometry(again).rope_type}'"):
        scale_config(again, Linear(), 2 * TARGET_LEN)


@pytest.mark.parametrize("scaling", [Dynamic(), Linear(), Drope()], ids=lambda s: s.name)
def test_a_scaled_checkpoint_keeps_its_frequencies_under_none_whatever_the_target(scaling):
    config = tiny_config()
    scale_config(config, scaling, TARGET_LEN)
    (before,) = rotary_modules(build_model(config, None, "sdpa"))
    for target_len in (2 * TARGET_LEN, TARGET_LEN):  # a smaller target takes nothing away
        scale_config(config, Unscaled(), target_len)
        assert target_len_of(config) == 2 * TARGET_LEN
    (after,) = rotary_modules(build_model(config, None, "sdpa"))
    for length in LENGTHS:
        assert torch.equal(frequencies_at(before, length), frequencies_at(after, length))
    assert rope_geometry(config).window == WINDOW


def test_the_target_of_a_foreign_dynamic_checkpoint_is_factor_times_its_window():
    config = tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": BASE, "factor": 4.0})
    assert target_len_of(config) == 4 * WINDOW
    assert rope_geometry(config).window == WINDOW
    set_target_len(config, TARGET_LEN)
    assert (target_len_of(config), config.max_position_embeddings) == (TARGET_LEN, WINDOW)
    assert rope_geometry(config).rope_type == "dynamic" and rope_geometry(config).window == WINDOW


def test_models_without_rope_do_not_depend_on_length():
    assert not depends_on_length(GPTJConfig(n_embd=8, n_layer=1, n_head=2))
    assert target_len_of(LlamaConfig(max_position_embeddings=77)) == 77


# ----- model families -----

FAMILIES = {
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2, "sliding_window": None},  # its head_dim is None
    "qwen3": {"head_dim": HEAD_DIM},
    "gemma": {"head_dim": 32},
    "cohere": {"logit_scale": 1.0, "layer_norm_eps": 1e-2},  # dimensions interleaved; Cohere scales by 1 here
    "gpt_neox": {"rope_parameters": {"rope_theta": BASE, "partial_rotary_factor": 0.5}},
    "phi": {"partial_rotary_factor": 0.5},
    "stablelm": {"partial_rotary_factor": 0.5},
    "phi3": {"rope_parameters": {"rope_theta": BASE, "partial_rotary_factor": 0.5}, "sliding_window": None},
}
DIMS = {"gemma": 32, "gpt_neox": 8, "phi": 8, "stablelm": 8, "phi3": 8}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_on_every_family_is_plain_transformers(family):
    """The guards find the closed form of the rotary dimensions; stock classes give the same logits."""
    positions = torch.stack([skip_positions(40), skip_positions(TARGET_LEN)])
    tokens = torch.randint(101, positions.shape)
    for scaling in [*STATIC, Linear(attention_factor=1.2), Dynamic(), LongRope(long_factor=LONG)]:
        config = tiny_config(family, **copy.deepcopy(FAMILIES[family]))
        geometry = rope_geometry(config)
        assert (geometry.dim, geometry.window) == (DIMS.get(family, HEAD_DIM), WINDOW)
        if isinstance(scaling, LongRope):
            scaling = LongRope(long_factor=np.linspace(1, 9, geometry.dim // 2).tolist())
        if (family, scaling.name) == ("phi3", "dynamic"):
            with pytest.raises(ConfigError, match="its class does not know the type 'dynamic'"):
                scale_config(config, scaling, TARGET_LEN)
            continue
        scaling = scale_config(config, scaling, TARGET_LEN)
        model = build_model(config, None, "sdpa").eval()
        run_guards(model, scaling.frequencies(geometry, TARGET_LEN), TARGET_LEN, "cpu")
        with torch.no_grad():
            logits = model(tokens, position_ids=positions, use_cache=False).logits
        for row in range(2):
            wanted = stock_logits(model, tokens[row : row + 1], positions[row : row + 1])[0]
            torch.testing.assert_close(logits[row], wanted, rtol=0, atol=1e-3 * wanted.std().item())


def test_one_rope_for_each_kind_of_layer_is_refused():
    with pytest.raises(ConfigError, match="gemma3_text model has no single rotary embedding"):
        scale_config(tiny_config("gemma3_text"), Linear(), TARGET_LEN)


@pytest.mark.parametrize("choice", sorted((REPOSITORY / "conf" / "rope").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_works_on_the_shipped_model_with_no_further_key(choice):
    needed = {"longrope": "long_factor", "searched": "factors"}.get(choice.stem)
    if needed is not None:
        with pytest.raises(ConfigError, match=rf"rope\.{needed} is not set"):
            build_scaling(OmegaConf.load(choice))
        return
    config = load_config(str(REPOSITORY / "assets" / "tiny"))
    geometry = rope_geometry(config)
    if choice.stem == "searched_smollm2":
        with pytest.raises(ConfigError, match=r"is of a search for base 100000, and here it is \d+"):
            scale_config(config, build_scaling(OmegaConf.load(choice)), 2048)
        return
    scaling = scale_config(config, build_scaling(OmegaConf.load(choice)), 2048)
    assert scaling.name == {"yarn_smollm2": "yarn"}.get(choice.stem, choice.stem), "one has the numbers of a model"
    config.num_hidden_layers = 1
    run_guards(build_model(config, None, "sdpa"), scaling.frequencies(geometry, 2048), 2048, "cpu")
