"""What stands in an exported config.json: every engine reads the same from it, whichever of its keys it reads."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from pose.modeling.compat import rotary_modules
from pose.modeling.export import export_model
from pose.modeling.export.rope import attention_factor, where_the_factor_is
from pose.modeling.load import build_model, load_config, rope_geometry, scale_config
from pose.rope import (
    NTK,
    Cope,
    Drope,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    NTKByParts,
    Theta,
    Unscaled,
    Yarn,
    YarnRevised,
)  # fmt: skip

WINDOW, TARGET_LEN, BASE = 64, 512, 10_000.0
DIVISORS = [1.3**i for i in range(8)]
SIZES = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": WINDOW, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
PHI3 = {"sliding_window": None, "original_max_position_embeddings": WINDOW}


def llama3(factor, low, high):
    return {
        "rope_type": "llama3", "factor": factor, "original_max_position_embeddings": WINDOW, "low_freq_factor": low,
        "high_freq_factor": high,
    }  # fmt: skip


YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": WINDOW, "beta_fast": 32.0, "beta_slow": 1.0
}  # fmt: skip
# Every divisor is used at every length, so the window is said to be the new one: no engine works out a factor.
EQUAL = {
    "rope_type": "longrope",
    "factor": 1.0,
    "original_max_position_embeddings": TARGET_LEN,
    "attention_factor": 1.0,
}
UNEQUAL = {
    "rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": WINDOW, "short_factor": [1.0] * 8,
    "long_factor": DIVISORS, "attention_factor": math.sqrt(1 + math.log(8) / math.log(WINDOW)),
}  # fmt: skip
NTK_BASE = BASE * 8 ** (16 / 14)
# The method, what it comes out as (lists of equal divisors are compared apart), its base, and what it was folded by.
SAID = {
    "none": (Unscaled(), None, BASE, None),
    "linear": (Linear(), {"rope_type": "linear", "factor": 8.0}, BASE, None),
    "linear with a factor": (Linear(attention_factor=1.2), {"rope_type": "linear", "factor": 8.0}, BASE, 1.2),
    "ntk": (NTK(), None, NTK_BASE, None),
    "ntk with a factor": (NTK(attention_factor=1.2), None, NTK_BASE, 1.2),
    "theta": (Theta(theta=7e4), None, 7e4, None),
    "yarn": (Yarn(), YARN, BASE, None),
    "yarn without a factor": (Yarn(attention_factor=1.0), YARN, BASE, 1 / (0.1 * math.log(8) + 1)),
    "yarn_revised": (YarnRevised(), EQUAL, BASE, 0.1 * math.log(8) + 1),
    "yarn_revised without a factor": (YarnRevised(attention_factor=1.0), EQUAL, BASE, None),
    "ntk_by_parts": (NTKByParts(), llama3(8.0, 1.0, 32.0), BASE, None),
    "ntk_by_parts with a factor": (NTKByParts(attention_factor=1.2), llama3(8.0, 1.0, 32.0), BASE, 1.2),
    "llama3": (Llama3(), llama3(8.0, 1.0, 4.0), BASE, None),
    "drope": (Drope(), llama3(1e30, 1e6, 2e6), BASE, None),
    "drope with a factor": (Drope(attention_factor=1.2), llama3(1e30, 1e6, 2e6), BASE, 1.2),
    "yarn shifted": (Yarn(rcd_shift=True), EQUAL, BASE, 0.1 * math.log(8) + 1),
    "ntk shifted": (NTK(rcd_shift=True), EQUAL, BASE, None),
    "cope": (Cope(), EQUAL, BASE, None),
    "cope over another base": (Cope(theta=7e4, num_tapered=5), EQUAL, BASE, None),
    "longrope": (LongRope(long_factor=DIVISORS), UNEQUAL, BASE, None),
    "longrope without a factor": (
        LongRope(long_factor=DIVISORS, attention_factor=1.0), UNEQUAL, BASE, 1 / UNEQUAL["attention_factor"],
    ),
    "longrope of one list": (LongRope(long_factor=DIVISORS, short_factor=DIVISORS), EQUAL, BASE, math.sqrt(1.5)),
    "dynamic": (Dynamic(), {"rope_type": "dynamic", "factor": 8.0}, BASE, None),
}  # fmt: skip


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", extra_special_tokens=["w3"])


def make_model(scaling, config=None):
    config = config or LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": BASE})
    scaling = scale_config(config, scaling, TARGET_LEN)
    torch.manual_seed(0)
    return build_model(config, None, "sdpa").eval(), scaling


def exported(model, tokenizer, folder, **options):
    export_model(model, tokenizer, folder, **options)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", SAID)
def test_the_keys_of_every_method(tmp_path, tokenizer, name):
    """In both spellings, and nothing beside them."""
    scaling, wanted, base, folded = SAID[name]
    model, _ = make_model(scaling)
    config = exported(model, tokenizer, tmp_path / "model")
    assert config["rope_theta"] == pytest.approx(base, rel=1e-12)
    said = dict(config["rope_parameters"])
    assert said.pop("rope_theta") == config["rope_theta"]
    if wanted is None:
        assert said == {"rope_type": "default"} and "rope_scaling" not in config
    else:
        assert config["rope_scaling"] == said | {"type": said["rope_type"]}
        if wanted is EQUAL:
            short, long = said.pop("short_factor"), said.pop("long_factor")
            assert short == long and len(short) == 8
        assert said == pytest.approx(wanted) if "short_factor" not in wanted else said == wanted
    assert config.get("pose", {}).get("folded") == (None if folded is None else pytest.approx(folded))
    # Where transformers 4 looks for the length at which lists change; others take it for the window.
    assert ("original_max_position_embeddings" in config) == (wanted is UNEQUAL)
    assert "without_attention_factor" not in json.dumps(config)


@pytest.mark.parametrize(
    "name", [name for name, (scaling, *_) in SAID.items() if scaling.name not in ("dynamic", "none")]
)
def test_the_frequencies_are_those_of_the_method(tmp_path, tokenizer, name):
    """As a reader of the older keys alone works them out, and as transformers does; the method keeps its own name."""
    model, scaling = make_model(SAID[name][0])
    geometry = rope_geometry(LlamaConfig(**SIZES))
    exported(model, tokenizer, tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    del raw["rope_parameters"]
    for config in (load_config(str(tmp_path / "model")), LlamaConfig(**raw)):
        (rotary,) = rotary_modules(build_model(config, None, "sdpa"))
        for length, found in (
            (WINDOW, rotary.inv_freq),
            (TARGET_LEN, getattr(rotary, "long_inv_freq", rotary.inv_freq)),
        ):
            wanted = scaling.frequencies(geometry, length)
            torch.testing.assert_close(found.double(), wanted.inv_freq, rtol=1e-6, atol=1e-30)
        folded = config.pose.get("folded", 1.0)
        assert rotary.attention_scaling * folded == pytest.approx(wanted.attention_factor, rel=1e-12)
        assert (rope_geometry(config).rope_type, rope_geometry(config).window) == (scaling.name, WINDOW)


@pytest.mark.parametrize("name", SAID)
def test_engines_that_read_no_attention_factor_work_the_same_one_out(tmp_path, tokenizer, name):
    """vLLM's and MLX's longrope and phi3 in llama.cpp from the windows; yarn in SGLang, MLX and llama.cpp from s."""
    model, _ = make_model(SAID[name][0])
    config = exported(model, tokenizer, tmp_path / "model")
    rope = config.get("rope_scaling", {"type": "default"})
    (rotary,) = rotary_modules(build_model(load_config(str(tmp_path / "model")), None, "sdpa"))
    worked_out = 1.0
    if rope["type"] == "yarn":
        worked_out = 0.1 * math.log(rope["factor"]) + 1.0
    elif rope["type"] == "longrope":
        window = rope["original_max_position_embeddings"]
        factor = config["max_position_embeddings"] / window
        worked_out = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(window))
    assert worked_out == pytest.approx(rotary.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "fold", "said"),
    [
        ("linear", True, None),
        ("yarn", True, "1.20794, which engines work out themselves"),
        ("yarn without a factor", True, "1: 0.827853 times are in the weights"),
        ("yarn without a factor", False, "1, in config.json alone"),
        ("drope with a factor", True, "1.2: 1.2 times are in the weights"),
        ("drope with a factor", False, "1.2, in config.json alone"),
        ("linear with a factor", False, "1.2, in config.json alone"),
    ],
)
def test_the_card_says_where_the_factor_is(tmp_path, tokenizer, name, fold, said):
    config = exported(make_model(SAID[name][0])[0], tokenizer, tmp_path / "model", fold=fold)
    found = where_the_factor_is(config)
    assert found is None if said is None else found.startswith(said)


def test_phi3_has_the_three_keys_that_transformers_4_accepts(tmp_path, tokenizer):
    model, _ = make_model(Linear(attention_factor=1.2), Phi3Config(**SIZES | PHI3))
    config = exported(model, tokenizer, tmp_path / "model")
    assert set(config["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert config["original_max_position_embeddings"] == TARGET_LEN  # its class prefers that to rope_parameters
    kept = exported(model, tokenizer, tmp_path / "kept", fold=False)
    assert kept["rope_scaling"]["attention_factor"] == 1.2 and kept["original_max_position_embeddings"] == WINDOW


LONGER = 4 * TARGET_LEN


def further(folder, tokenizer, out):
    """A folder extended by rope=none; its attention factor, and that of what it is exported as."""
    config = load_config(str(folder))
    scale_config(config, Unscaled(), LONGER)
    model = build_model(config, str(folder), "sdpa").eval()
    written = exported(model, tokenizer, out)
    return model, written, build_model(load_config(str(out)), str(out), "sdpa").eval()


def test_longrope_that_does_not_say_its_attention_factor_keeps_it(tmp_path, tokenizer):
    """Phi-3-128k: transformers works it out of max_position_embeddings, which rope=none changes."""
    rope = {"rope_type": "longrope", "rope_theta": BASE, "short_factor": [1.0] * 8, "long_factor": DIVISORS}
    config = Phi3Config(**SIZES | PHI3 | {"max_position_embeddings": TARGET_LEN}, rope_parameters=rope)
    torch.manual_seed(0)
    model = build_model(config, None, "sdpa").eval()
    own = UNEQUAL["attention_factor"]
    assert attention_factor(model) == pytest.approx(own)
    model.save_pretrained(tmp_path / "base")
    extended, written, again = further(tmp_path / "base", tokenizer, tmp_path / "further")
    assert attention_factor(extended) == pytest.approx(own)
    implied = math.sqrt(1 + math.log(LONGER / WINDOW) / math.log(WINDOW))
    assert attention_factor(again) == pytest.approx(implied)
    assert written["pose"]["folded"] == pytest.approx(own / implied), "so engines multiply by the model's own"
    assert where_the_factor_is(written).startswith(f"{own:.6g}: {own / implied:.6g} times are in the weights")
    tokens = torch.arange(40)[None]
    wanted = extended(input_ids=tokens).logits
    assert (again(input_ids=tokens).logits - wanted).abs().max() < 1e-4 * wanted.std()


def test_an_export_of_phi3_is_extended_with_the_factor_that_it_has(tmp_path, tokenizer):
    model, _ = make_model(Yarn(), Phi3Config(**SIZES | PHI3))
    exported(model, tokenizer, tmp_path / "model")
    extended, written, again = further(tmp_path / "model", tokenizer, tmp_path / "further")
    assert attention_factor(extended) == attention_factor(again) == 1.0
    assert written["pose"]["folded"] == pytest.approx(0.1 * math.log(8) + 1), "once"


def test_names_of_families(tmp_path, tokenizer):
    """transformers 4 reads GPT-NeoX's share and base, and Qwen's experts, under names of their own."""
    rope = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}
    model, _ = make_model(NTK(), GPTNeoXConfig(**SIZES, rope_parameters=rope))
    config = exported(model, tokenizer, tmp_path / "neox")
    assert config["rotary_emb_base"] == config["rope_theta"] == config["rope_parameters"]["rope_theta"] > 5e4
    assert config["rotary_pct"] == config["partial_rotary_factor"] == 0.5
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model, _ = make_model(Yarn(), Qwen3MoeConfig(**SIZES | options, num_key_value_heads=2))
    config = exported(model, tokenizer, tmp_path / "moe")
    assert config["num_experts"] == config["num_local_experts"] == 4


@pytest.mark.parametrize("fold", [True, False])
def test_a_checkpoint_that_came_scaled_stays_as_it_came(tmp_path, tokenizer, fold):
    """Under rope=none: nothing is known of what it was meant to be, and engines read it as they did."""
    rope = YARN | {"rope_theta": BASE, "attention_factor": 1.5}
    model, _ = make_model(Unscaled(), LlamaConfig(**SIZES, rope_parameters=dict(rope)))
    config = exported(model, tokenizer, tmp_path / "model", fold=fold)
    assert config["rope_parameters"] == rope and "pose" not in config


def test_the_tokenizer_has_a_class_and_keys_that_both_major_versions_know(tmp_path, tokenizer):
    exported(make_model(Linear())[0], tokenizer, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["w3"] and "extra_special_tokens" not in settings
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.get_vocab() == tokenizer.get_vocab() and again.model_max_length == TARGET_LEN
    assert again.all_special_tokens == tokenizer.all_special_tokens and again.eos_token == "w0"
    assert AutoConfig.from_pretrained(tmp_path / "model").model_type == "llama"
