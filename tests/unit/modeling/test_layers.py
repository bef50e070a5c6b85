"""Which models' layers are what PoSE takes them for; small random ones of transformers' classes."""

from unittest.mock import Mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from pose.app import compare, preflight, schema
from pose.errors import ConfigError
from pose.files import CONF
from pose.modeling import layers
from pose.modeling.layers import cache_can_be_cut, cache_is_exact, check_layers
from pose.modeling.load import build_model, scale_config
from pose.modeling.rotary import target_len_of
from pose.rope import Cope, Drope, Dynamic, Linear, LongRope, Unscaled, Yarn

schema.register()
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
LATENT = {
    "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4,
}  # fmt: skip
SUPPORTED = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "sliding window": (MistralConfig, {"sliding_window": 9}),
    "parallel, partial": (PhiConfig, {"partial_rotary_factor": 0.5}),
    "packed": (Phi3Config, {"original_max_position_embeddings": 64}),
    "stablelm": (StableLmConfig, {"partial_rotary_factor": 0.5}),
    "gpt_neox": (GPTNeoXConfig, {"rotary_pct": 0.25}),
    "experts": (MixtralConfig, {"num_local_experts": 2}),
    "two attentions a layer": (DiffLlamaConfig, {"head_dim": 8}),
    "latent": (DeepseekV3Config, LATENT),
}
STATE = "has layers with a state of their own"
KEPT = "attention cannot be replaced by pose's"
REFUSED = {
    "falcon, alibi": ("falcon", {"alibi": True}, "FalconForCausalLM is not supported: it has ALiBi in place of RoPE"),
    "falcon": ("falcon", {}, f"FalconForCausalLM .*{KEPT}"),
    "gptj": ("gptj", {"n_embd": 32, "n_head": 4, "rotary_dim": 4, "n_layer": 2}, f"GPTJForCausalLM .*{KEPT}"),
    "codegen": ("codegen", {"n_embd": 32, "n_head": 4, "rotary_dim": 4, "n_layer": 2}, f"CodeGenForCausalLM .*{KEPT}"),
    "bloom": ("bloom", {"n_head": 4}, "BloomForCausalLM .*ALiBi"),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "MptForCausalLM .*ALiBi"),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}, "SmolLM3ForCausalLM .*: layers 1, 3 have no RoPE"),
    "one of four": ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, "layer 2 has no RoPE: .*a skip is none for them"),
    "cohere2": ("cohere2", {"sliding_window": 8}, "Cohere2ForCausalLM .*layer 3 has no RoPE"),
    "llama4": ("llama4_text", {}, "Llama4ForCausalLM .*layer_types in its config has chunked_attention"),
    "qwen3_next": ("qwen3_next", {}, f"Qwen3NextForCausalLM .*{STATE} .*linear attention"),
    "jamba": ("jamba", {}, f"JambaForCausalLM .*{STATE}"),
    "falcon_h1": ("falcon_h1", {}, f"FalconH1ForCausalLM .*{STATE}"),
    "mamba": ("mamba", {}, f"MambaForCausalLM .*{STATE}"),
    "minimax": ("minimax", {}, "MiniMaxForCausalLM .*has linear_attention, and only full_attention"),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "Lfm2ForCausalLM .*has conv"),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, "GPT2LMHeadModel .*it has no RoPE"),
    "soft cap": ("gemma2", {"head_dim": 8}, "Gemma2ForCausalLM .*its attention uses softcap"),
    "sinks": ("gpt_oss", {"head_dim": 8, "num_local_experts": 4}, "GptOssForCausalLM .*its attention uses s_aux"),
    "its own mask": ("doge", {}, "DogeForCausalLM .*a mask of its own"),
    "bert": ("bert", {}, "BertLMHeadModel is not supported: BertModel has no list of layers"),
    "t5": ("t5", {}, "a t5 model is not supported: it is no causal language model"),
    "slides by its mask": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2,
                                         "layer_types": ["full_attention", "sliding_attention"] * 2},
                           "Qwen2MoeForCausalLM .*layers 1, 3 have a sliding window of 16 tokens .* by a mask alone"),
    "slides by its mask everywhere": ("phimoe", {"sliding_window": 16, "num_local_experts": 2},
                                      "PhimoeForCausalLM .*layers 0, 1, 2, 3 have a sliding window of 16 tokens"),
    "rotates by a way of its own": ("phimoe", {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "short_mscale": 1.0,
                            "long_factor": [2.0] * 4, "long_mscale": 1.0, "factor": 4.0,
                            "original_max_position_embeddings": 16},
        "num_local_experts": 2}, "PhimoeForCausalLM .*works out its rotation in a way of its own, so longrope"),
    "a share that it does not read": ("llama", {"partial_rotary_factor": 0.5},
                                      "LlamaForCausalLM .*says that 4 dimensions .*, and the class rotates 8"),
    "nonsense": ("llama", {"hidden_act": "nosuch"}, "LlamaForCausalLM cannot be built .*KeyError.*nosuch"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(layers, "_passed", set())


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_supported_passes_and_runs(name, grad):
    """Whether gradients are on or off, and without a random number drawn."""
    cls, options = SUPPORTED[name]
    before = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        check_layers(cls(**SIZES | options))
    assert torch.equal(torch.get_rng_state(), before)
    build_model(cls(**SIZES | options), None, "sdpa")(torch.arange(12)[None])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named_with_its_class_and_the_reason(name):
    model_type, options, words = REFUSED[name]
    sizes = SIZES if not {"n_embd", "d_model", "n_head"} & options.keys() else {"vocab_size": 48}
    config = AutoConfig.for_model(model_type, **sizes | options)
    with pytest.raises(ConfigError, match=words):
        check_layers(config)
    with pytest.raises(ConfigError, match=words):
        build_model(config, None, "sdpa")


@pytest.mark.parametrize(
    "scaling",
    [Linear(), Yarn(), Drope(), Cope(), Yarn(rcd_shift=True), Dynamic(), LongRope(long_factor=[2.0] * 4)],
    ids=lambda s: s.name,
)
def test_a_scaling_does_not_matter(scaling):
    """Not even one whose frequencies are as good as none."""
    config = LlamaConfig(**SIZES)
    scale_config(config, scaling, 256)
    check_layers(config)


def test_a_model_is_looked_at_once(monkeypatch):
    check_layers(LlamaConfig(**SIZES))
    monkeypatch.setattr("pose.modeling.compat.build_on_meta", Mock(side_effect=RuntimeError("built again")))
    check_layers(LlamaConfig(**SIZES))
    with pytest.raises(ConfigError, match="built again"):
        check_layers(LlamaConfig(**SIZES | {"num_hidden_layers": 5}))


def test_attention_that_is_not_causal_is_refused(monkeypatch):
    config = LlamaConfig(**SIZES)
    made = layers.compat.build_on_meta

    def bidirectional(*args):
        model = made(*args)
        model.model.layers[2].self_attn.is_causal = False
        return model

    monkeypatch.setattr("pose.modeling.compat.build_on_meta", bidirectional)
    with pytest.raises(ConfigError, match="LlamaForCausalLM is not supported: its attention is not causal"):
        check_layers(config)


@pytest.mark.parametrize("model_type", ["falcon", "smollm3", "qwen3_next"])
def test_training_and_measuring_refuse_before_weights_are_read(model_type, tmp_path):
    """While they plan; there are no weights in the folder."""
    options = {"alibi": True} if model_type == "falcon" else {}
    config = AutoConfig.for_model(model_type, **SIZES | options)
    config.architectures = ["Any"]
    config.save_pretrained(tmp_path / "base")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        train = compose("train", [f"model.path={tmp_path}/base", "model.tokenizer=assets/tiny", "pose.target_len=256"])
        measure = compose("evaluate", [f"ckpt={tmp_path}/base", f"cache_dir={tmp_path}"])
    for plan in (lambda: preflight.plan_training(train, tmp_path), lambda: compare.plan_evaluation(measure)):
        with pytest.raises(ConfigError, match=r"ForCausalLM is not supported: .*(ALiBi|no RoPE|state of their own)"):
            plan()


def test_a_class_that_cannot_be_looked_at_is_told_from_a_broken_config(monkeypatch):
    def refuse(*args):
        raise NotImplementedError("no meta function for torch.nonzero()")

    monkeypatch.setattr("pose.modeling.compat.build_on_meta", refuse)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot be run without weights, which the look .*nonzero"):
        check_layers(LlamaConfig(**SIZES))


def test_a_window_that_a_class_does_not_know_is_no_reason():
    """It hands nothing on, and its mask has no window either."""
    check_layers(LlamaConfig(sliding_window=16, **SIZES))


def test_a_dynamic_that_is_static_is_taken_as_that():
    """HunYuan's checkpoints: `alpha` stretches the base once, whatever the length of the text."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
    config = AutoConfig.for_model("hunyuan_v1_dense", rope_parameters=rope, head_dim=8, **SIZES)
    check_layers(config)
    assert cache_is_exact(config) and target_len_of(config) == 64
    scale_config(config, Unscaled(), 256)
    assert config.max_position_embeddings == 256 == target_len_of(config)
    llama = LlamaConfig(rope_parameters=rope | {"factor": 4.0}, **SIZES)  # whose class does not read it
    assert not cache_is_exact(llama) and target_len_of(llama) == 256


def test_what_can_be_asked_of_a_cache():
    """Exact: the same in parts as in one pass. Cut: cropped and repeated."""
    llama, dynamic = LlamaConfig(**SIZES), LlamaConfig(**SIZES)
    scale_config(dynamic, Dynamic(), 256)
    sliding = MistralConfig(sliding_window=9, **SIZES)
    assert [cache_is_exact(c) for c in (llama, dynamic, sliding)] == [True, False, True]
    assert [cache_can_be_cut(c) for c in (llama, dynamic, sliding)] == [True, False, False]
