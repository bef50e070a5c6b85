"""What is relied on of names that transformers, peft, DeepSpeed and torch do not document: it must hold for every
version that the requirements allow."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
)

from pose.modeling import compat
from pose.modeling.lora import LoraOptions, add_lora

SHAPE = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip


def small(model_type: str = "llama", **options):
    return AutoConfig.for_model(model_type, **SHAPE | options)


def test_what_is_kept_in_fp32():
    model = LlamaForCausalLM(small())
    assert not compat.kept_in_fp32(model, torch.bfloat16)("lm_head.weight")
    model._keep_in_fp32_modules_strict, model._keep_in_fp32_modules = {"bias_of_router"}, {"wo"}
    for dtype, wo in ((torch.bfloat16, False), (torch.float16, True)):
        is_kept = compat.kept_in_fp32(model, dtype)
        names = ("a.bias_of_router", "bias_of_router.x", "a.my_bias_of_router", "a.wo.weight", "a.two.weight")
        assert [is_kept(name) for name in names] == [True, True, False, wo, False]
    for name in ("_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"):
        assert hasattr(PreTrainedModel, name)


def test_the_class_of_a_config():
    assert compat.causal_lm_class(small()) is LlamaForCausalLM
    assert compat.causal_lm_class(GPT2Config()).__name__ == "GPT2LMHeadModel"
    assert compat.causal_lm_class(T5Config()) is None


def test_classes_say_whether_they_keep_a_state():
    """Of their own, beside keys and values."""
    stateful = ("mamba", "mamba2", "jamba", "qwen3_next", "falcon_h1", "recurrent_gemma", "bamba", "zamba2", "rwkv")
    for model_type, kept in {
        **dict.fromkeys(stateful, True),
        "llama": False,
        "mixtral": False,
        "gpt_neox": False,
    }.items():
        assert compat.keeps_state(compat.causal_lm_class(AutoConfig.for_model(model_type))) is kept, model_type


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_model_on_meta_can_be_run(model_type):
    """With buffers there too, with experts, and with the config that was given as it was."""
    config = small(model_type, **{"num_local_experts": 2} if model_type == "mixtral" else {})
    before, state = copy.deepcopy(config), torch.get_rng_state()
    AttentionInterface.register("pose_test", lambda module, query, *_, **__: (query.transpose(1, 2), None))
    model = compat.build_on_meta(config, "pose_test")
    assert config.to_dict() == before.to_dict() and config._attn_implementation == before._attn_implementation
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    tokens = torch.zeros(1, 5, dtype=torch.long, device="meta")
    assert model(input_ids=tokens, position_ids=tokens, use_cache=False).logits.shape == (1, 5, 48)


def test_an_empty_model_has_its_buffers_and_ties():
    model = compat.build_empty(small(tie_word_embeddings=True), attn_implementation="eager", dtype=torch.bfloat16)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert compat.attention_of(model) == "eager"
    assert not torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize(
    ("model_type", "options", "name", "renamed"),
    [
        ("llama", {}, "model.norm.weight", "model.norm.weight"),
        ("llama", {}, "model.norm.LayerNorm.gamma", "model.norm.LayerNorm.weight"),  # of before PyTorch 1.0
        ("gpt_neox", {}, "embed_out.weight", "lm_head.weight"),
    ],
)
def test_names_are_changed_as_from_pretrained_does(model_type, options, name, renamed):
    model = compat.build_on_meta(small(model_type, **options), "sdpa")
    compat.note_conversions(model, from_checkpoint=True)
    assert compat.renamed(model, name) == (renamed, None)
    assert len(model._weight_conversions) > 0
    compat.keep_used_conversions(model)
    assert len(model._weight_conversions) == (name != renamed)


def test_what_merges_experts_says_of_what_and_into_what():
    model = compat.build_on_meta(small("mixtral", num_local_experts=2), "sdpa")
    compat.note_conversions(model, from_checkpoint=True)
    merged = set()
    for number in (1, 2, 3):
        name = f"model.layers.1.block_sparse_moe.experts.0.w{number}.weight"
        renamed, converter = compat.renamed(model, name)
        assert renamed in model.state_dict()
        merged.add((renamed, len(converter.source_patterns), len(converter.target_patterns)))
    assert sorted((kinds, made) for _, kinds, made in merged) == [(1, 1), (2, 1)]  # w1 and w3 become one


def test_random_models_are_saved_without_changes_of_prefixes(tmp_path):
    model = compat.build_on_meta(small("gpt_neox"), "sdpa")
    compat.note_conversions(model, from_checkpoint=False)
    noted = model._weight_conversions
    assert [type(c).__name__ for c in noted] and "PrefixChange" not in {type(c).__name__ for c in noted}


def test_classes_name_what_they_leave_out():
    model = compat.build_on_meta(small("gpt_neox"), "sdpa")
    assert compat.is_left_out(model, "gpt_neox.layers.0.attention.masked_bias")
    assert not compat.is_left_out(model, "gpt_neox.layers.0.attention.dense.weight")
    assert not compat.is_left_out(compat.build_on_meta(small(), "sdpa"), "anything")


def test_a_module_is_drawn_as_its_class_does():
    model = AutoModelForCausalLM.from_config(small(initializer_range=0.5))
    linear = torch.nn.Linear(100, 100)
    with torch.no_grad():
        compat.initialise(model, linear)
    assert 0.45 < linear.weight.std() < 0.55 and not linear.bias.any()


def test_weights_are_put_back_into_the_form_of_their_checkpoint():
    model = compat.build_empty(small("gpt_neox"))
    compat.note_conversions(model, from_checkpoint=True)
    compat.renamed(model, "embed_out.weight")
    compat.keep_used_conversions(model)
    head = torch.ones(48, 32)
    assert compat.as_in_checkpoint(model, {"lm_head.weight": head}) == {"embed_out.weight": head}


def test_files_of_a_folder_and_what_a_tokenizer_says(tmp_path):
    (tmp_path / "one.json").write_text("{}")
    assert compat.find_file(str(tmp_path), "one.json", revision=None) == str(tmp_path / "one.json")
    assert compat.find_file(str(tmp_path), "two.json", revision=None) is None
    assert compat.tokenizer_settings(str(tmp_path), revision=None) == {}
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert compat.tokenizer_settings(str(tmp_path), revision=None)["bos_token"] == "<s>"
    assert {"default", "linear", "dynamic", "yarn", "longrope", "llama3"} <= compat.ROPE_TYPES


def test_files_of_the_hub_that_are_missing_are_errors(tmp_path):
    with pytest.raises(OSError):
        compat.find_files("some-owner/some-model", ["a.json"], cache_dir=tmp_path, local_files_only=True)


ROPE = {"rope_theta": 1e4, "factor": 4.0}
TYPES = {
    "dynamic": ROPE,
    "longrope": ROPE
    | {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]},
}


@pytest.mark.parametrize("rope_type", TYPES)
def test_rotary_modules_have_what_is_asked_of_them(rope_type):
    """Their own forward lies below a decorator that changes frequencies with the positions, and reads two values."""
    config = LlamaConfig(**SHAPE, rope_parameters=TYPES[rope_type] | {"rope_type": rope_type})
    (module,) = compat.rotary_modules(AutoModelForCausalLM.from_config(config))
    assert isinstance(module.attention_scaling, float) and module.rope_type == rope_type
    assert module.config.rope_parameters["rope_type"] == rope_type
    inv_freq, positions = module.inv_freq.clone(), torch.tensor([[0, 1, 500]])
    assert inv_freq.dtype == torch.float32 and inv_freq.shape == (4,)
    bare = SimpleNamespace(inv_freq=inv_freq, attention_scaling=module.attention_scaling)
    cos, sin = compat.rotation(module)(bare, torch.zeros(1, 3, 32), positions)
    angles = torch.cat([positions[0, :, None] * inv_freq] * 2, -1)
    torch.testing.assert_close(cos[0], angles.cos() * module.attention_scaling)
    torch.testing.assert_close(sin[0], angles.sin() * module.attention_scaling)
    assert torch.equal(module.inv_freq, inv_freq)
    decorated, _ = module(torch.zeros(1, 3, 32), positions)
    assert (decorated - cos).abs().max() > 0.01  # it has looked at position 500


def test_frequencies_of_a_length_and_of_several():
    config = LlamaConfig(**SHAPE, rope_parameters=TYPES["dynamic"] | {"rope_type": "dynamic"})
    base = 1e4 * (4 * 256 / 64 - 3) ** (8 / 6)
    wanted = base ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(compat.frequencies(config, "dynamic", "cpu", 256), wanted)
    several = compat.frequencies(config, "dynamic", "cpu", torch.tensor([[64], [256]]))
    torch.testing.assert_close(several, torch.stack([1e4 ** (-torch.arange(0, 8, 2) / 8), wanted]))
    config = LlamaConfig(**SHAPE, rope_parameters=TYPES["longrope"] | {"rope_type": "longrope"})
    short, long = (compat.frequencies(config, "longrope", "cpu", n) for n in (64, 65))
    torch.testing.assert_close(short / long, torch.tensor([2.0, 3.0, 4.0, 5.0]))


def test_attention_is_called_by_name_and_gets_no_mask():
    """transformers makes none for a name that it has no mask function for, whatever the positions are."""
    seen = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, tuple(query.shape), tuple(key.shape), attention_mask, "scaling" in kwargs))
        return query.transpose(1, 2), None

    AttentionInterface.register("pose_test", attend)
    model = AutoModelForCausalLM.from_config(small(), attn_implementation="pose_test")
    model(torch.arange(6)[None], position_ids=torch.tensor([[0, 1, 2, 40, 41, 42]]), use_cache=False)
    assert seen == [(i, (1, 4, 6, 8), (1, 2, 6, 8), None, True) for i in (0, 1)]


def test_a_cache_can_be_cut_and_repeated():
    model = AutoModelForCausalLM.from_config(small()).eval()
    cache = DynamicCache(config=model.config)
    model(torch.arange(6)[None], past_key_values=cache, use_cache=True)
    before = cache.layers[1].keys.clone()
    cache.crop(-2)
    assert torch.equal(cache.layers[1].keys, before[:, :, :4]) and not any(cache.is_sliding)
    cache.batch_repeat_interleave(3)
    assert cache.layers[0].values.shape == (3, 2, 4, 8)
    sliding = AutoConfig.for_model("mistral", **SHAPE | {"sliding_window": 4})
    assert all(DynamicCache(config=sliding).is_sliding)


def test_adapters_of_peft_have_the_names_that_are_read():
    model = AutoModelForCausalLM.from_config(small())
    add_lora(model, LoraOptions(rank=2, alpha=6.0))
    layer = model.model.layers[0].mlp.up_proj
    (key,) = layer.active_adapters
    assert (layer.r[key], layer.scaling[key]) == (2, 3.0) and layer.base_layer.weight.shape == (40, 32)
    assert (layer.in_features, layer.out_features) == (32, 40)
    assert layer.lora_A[key].weight.shape == (2, 32) and layer.lora_B[key].weight.shape == (40, 2)
    assert not layer.lora_B[key].weight.any() and layer.lora_A[key].weight.any()


def test_adapters_of_peft_can_be_off_without_a_change_of_what_trains():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small())
    tokens = torch.arange(6)[None]
    wanted = model(tokens).logits
    add_lora(model, LoraOptions(rank=2))
    adapted = {name for name, _ in model.named_parameters() if compat.is_of_adapter(name)}
    assert adapted == {name for name in dict(model.named_parameters()) if "lora_A" in name or "lora_B" in name} != set()
    for name in adapted:
        torch.nn.init.ones_(model.get_parameter(name))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with compat.without_adapters(model):
        torch.testing.assert_close(model(tokens).logits, wanted)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert (model(tokens).logits - wanted).abs().max() > 0.1


def test_what_a_process_holds(tmp_path):
    """FSDP2 keeps a slice of a DTensor; ZeRO-3 an empty parameter with its part beside it."""
    plain = torch.nn.Parameter(torch.ones(3, 2))
    assert compat.local_part(plain) is plain and compat.full_shape(plain) == (3, 2)
    assert not compat.is_partitioned(plain) and not compat.has_master(plain)
    sharded = torch.nn.Parameter(torch.ones(0))
    sharded.ds_tensor = torch.ones(1)
    assert compat.local_part(sharded) is sharded.ds_tensor
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = torch.nn.Linear(2, 3)
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        assert isinstance(module, FSDPModule) and isinstance(module.weight, DTensor)
        assert type(compat.local_part(module.weight)) is torch.Tensor and compat.full_shape(module.weight) == (3, 2)
    finally:
        torch.distributed.destroy_process_group()


def test_memory_that_runs_out_in_whatever_words():
    for error in (MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("CUDA error: out of memory")):
        assert compat.is_out_of_memory(error)
    assert compat.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."))
    assert not compat.is_out_of_memory(RuntimeError("size mismatch")) and not compat.is_out_of_memory(OSError())


def test_the_names_of_deepspeed():
    """Read in its source: it has no processes here."""
    partition = pytest.importorskip("deepspeed.runtime.zero.partition_parameters")
    source = inspect.getsource(partition)
    for name in ("ds_id", "ds_shape", "ds_tensor"):
        assert f"param.{name} = " in source
    mixed = inspect.getsource(pytest.importorskip("deepspeed.utils.mixed_precision_linkage"))
    assert "lp_param._hp_mapping = " in mixed
