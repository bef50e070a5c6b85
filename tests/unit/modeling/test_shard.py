"""Models that are built without weights and filled one weight at a time, against those of transformers."""

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from hydra import compose, initialize_config_dir
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import Strategy
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTJConfig, GPTJForCausalLM

from pose.app import build, schema
from pose.errors import CheckpointError, ConfigError
from pose.files import CONF
from pose.modeling import compat
from pose.modeling.export import export_model
from pose.modeling.layers import decoder_layers
from pose.modeling.load import build_model, load_config
from pose.modeling.lora import LoraOptions, add_lora
from pose.modeling.rotary import rotary_modules
from pose.modeling.shard import FullyShard, Whole, fill, set_masters
from pose.training import strategies

schema.register()
SHAPE = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
LAYOUT = Whole(torch.device("cpu"), torch.float32)


def small_config(model_type: str = "llama", **options):
    return AutoConfig.for_model(model_type, **SHAPE | options)


def save(folder, model_type: str = "llama", **options):
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(small_config(model_type, **options)).save_pretrained(folder)
    return folder


def rewrite(folder, change):
    """change(tensors) on what the weights' file holds."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path)


@pytest.fixture
def mesh(tmp_path):
    """Of one process, this one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def equal(one, two) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi", "gemma"])
def test_random_weights_are_those_of_a_whole_model(model_type, tie, lora):
    config = small_config(model_type, tie_word_embeddings=tie)
    prepare = partial(add_lora, options=LoraOptions(rank=2)) if lora else None
    torch.manual_seed(11)
    whole = build_model(config, None, "sdpa", prepare=prepare)
    after = torch.rand(1)
    torch.manual_seed(11)
    filled = build_model(config, None, "sdpa", layout=LAYOUT, prepare=prepare)
    assert equal(whole, filled) and torch.equal(after, torch.rand(1))
    trainable = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in filled.named_parameters() if p.requires_grad}
    assert (filled.get_input_embeddings().weight is filled.get_output_embeddings().weight) == tie


def test_a_folder_is_filled_in_with_or_without_the_prefix(folder):
    whole = build_model(load_config(str(folder)), str(folder), "sdpa")
    assert equal(whole, build_model(load_config(str(folder)), str(folder), "sdpa", layout=LAYOUT))
    file = folder / "model.safetensors"
    renamed = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    renamed["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # as old checkpoints hold them
    save_file(renamed, file, {"format": "pt"})
    filled = build_model(load_config(str(folder)), str(folder), "sdpa", layout=LAYOUT)
    assert equal(whole, filled)
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(filled(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])  # on the hub, and in the class
def test_names_that_transformers_changes_while_it_loads(head, tmp_path, monkeypatch):
    save(tmp_path, "gpt_neox")
    rewrite(tmp_path, lambda tensors: tensors.update({head: tensors.pop("embed_out.weight")}))
    whole = build_model(load_config(str(tmp_path)), str(tmp_path), "sdpa")
    filled = build_model(load_config(str(tmp_path)), str(tmp_path), "sdpa", layout=LAYOUT)
    assert equal(whole, filled)
    masters = {}
    monkeypatch.setattr("deepspeed.utils.safe_set_full_fp32_param", lambda p, value: masters.update({id(p): value}))
    set_masters(filled, filled.source())
    for name, parameter in filled.named_parameters():
        assert torch.equal(masters[id(parameter)], whole.get_parameter(name).flatten())


@pytest.mark.parametrize("source", ["embed_out.weight", "lm_head.weight", "random"])
def test_an_export_has_the_names_of_one_process(source, mesh, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
    save(tmp_path, "gpt_neox", vocab_size=len(tokenizer))
    path = None if source == "random" else str(tmp_path)
    if path is not None:
        rewrite(tmp_path, lambda tensors: tensors.update({source: tensors.pop("embed_out.weight")}))
    tensors = []
    for layout in (None, FullyShard(mesh, torch.device("cpu"), None)):
        torch.manual_seed(8)
        model = build_model(load_config(str(tmp_path)), path, "sdpa", layout=layout)
        export_model(model, tokenizer, tmp_path / "export")
        tensors.append(load_file(tmp_path / "export" / "model.safetensors"))
    whole, sharded = tensors
    assert whole.keys() == sharded.keys() and all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert ("embed_out.weight" if source == "random" else source) in sharded


@pytest.mark.parametrize("change", [lambda head: head * 2, lambda head: head[1:].clone()])
def test_tied_embeddings_that_differ_are_named(change, tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    build = partial(build_model, load_config(str(tmp_path)), str(tmp_path), "sdpa")
    whole = build()
    rewrite(tmp_path, lambda tensors: tensors.update({head: tensors[embeddings].clone()}))
    filled = build(layout=LAYOUT)
    assert equal(whole, filled) and filled.get_output_embeddings().weight is filled.get_input_embeddings().weight
    rewrite(tmp_path, lambda tensors: tensors.update({head: change(tensors[head])}))
    message = rf"{tmp_path}: {head} and {embeddings} differ, .* \(tie_word_embeddings: true\): set it to false"
    with pytest.raises(CheckpointError, match=message):
        build(layout=LAYOUT)
    with pytest.raises(CheckpointError, match=f"{head} and {embeddings} differ"):
        set_masters(filled, filled.source())


@pytest.mark.parametrize(
    ("model_type", "options"),
    [("mixtral", {"num_local_experts": 2}), ("qwen3_moe", {"num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8})],
)
def test_experts_that_are_merged_while_they_are_read_are_refused(model_type, options, tmp_path):
    save(tmp_path, model_type, **options)
    message = (
        rf"{tmp_path}: model.*experts.0\..* a {model_type} model .* strategy=ddp or finetune=lora with strategy=auto"
    )
    with pytest.raises(CheckpointError, match=message):
        build_model(load_config(str(tmp_path)), str(tmp_path), "sdpa", layout=LAYOUT)


def test_a_checkpoint_of_another_form_is_converted_on_the_way(tmp_path):
    torch.manual_seed(4)
    gptj = GPTJForCausalLM(GPTJConfig(vocab_size=48, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64))
    gptj.save_pretrained(tmp_path)
    filled = build_model(load_config(str(tmp_path)), str(tmp_path), "sdpa", layout=LAYOUT)
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(filled(tokens).logits, gptj.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
    frozen = [p for name, p in filled.named_parameters() if not p.requires_grad]
    assert len(frozen) == 2 * 4


def test_buffers_are_computed_and_parameters_take_no_memory():
    config = small_config(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0})
    model = compat.build_empty(config)
    assert all(p.is_meta for p in model.parameters())
    (mine,), (real,) = rotary_modules(model), rotary_modules(AutoModelForCausalLM.from_config(config))
    assert torch.equal(mine.inv_freq, real.inv_freq) and mine.inv_freq.dtype == torch.float32
    assert not torch.nn.Linear(2, 2).weight.is_meta
    assert len(decoder_layers(model)) == SHAPE["num_hidden_layers"]


def test_what_got_no_value_is_said():
    model = compat.build_empty(small_config())
    with pytest.raises(CheckpointError, match=r"no value for model.embed_tokens.weight, .* and \d+ more"):
        fill(model, iter(()), LAYOUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "processes"), [(7, 2), (3, 4), (8, 4), (1, 2)])
def test_slices_put_together_are_the_weight(rows, processes, dtype):
    """Rows that processes cannot share evenly; every rank in turn holds what FSDP2 asks of it, and no more."""
    weight, parts = torch.arange(rows * 2.0).view(rows, 2).to(dtype), []
    for rank in range(processes):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
        try:
            mesh = init_device_mesh("cpu", (processes,))
            with torch.device("meta"):
                module = torch.nn.Linear(2, rows, bias=False)
            fully_shard(module, mesh=mesh)
            placed = FullyShard(mesh, torch.device("cpu"), None).place(module.weight, weight)
            assert placed.shape == weight.shape and placed.placements == module.weight.placements
            parts.append(placed.to_local().detach())
            assert parts[-1].shape == module.weight.to_local().shape and parts[-1].dtype == torch.float32
            assert parts[-1].untyped_storage().nbytes() == 4 * parts[-1].numel()
        finally:
            torch.distributed.destroy_process_group()
    assert torch.equal(torch.cat(parts), weight.float())


def test_strategies_that_cannot_work_are_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"strategy.stage=4 is not accepted: choose 1, 2 or 3"):
        strategies.DeepSpeed(4)
    with pytest.raises(ConfigError, match=r"strategy.offload_parameters=true needs strategy.stage=3, and it is 2"):
        strategies.DeepSpeed(2, offload_parameters=True)
    strategy = strategies.DeepSpeed(3)
    strategy._accelerator = CPUAccelerator()
    with pytest.raises(ConfigError, match=r"DeepSpeed's strategies need a GPU: choose strategy=fsdp or ddp"):
        strategies.check_strategy(strategy, "32-true")
    with pytest.raises(ConfigError, match=r"trainer.precision=16-mixed is not supported .* choose 32-true, bf16-mixed"):
        strategies.check_strategy(strategies.FSDP(), "16-mixed")
    strategy.needs_gpu = False
    with pytest.raises(ConfigError, match=r"trainer.on_nonfinite=skip is not supported by DeepSpeed"):
        strategies.check_strategy(strategy, "32-true", "skip")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package deepspeed, which is not installed"):
        strategies.DeepSpeed(3)


@pytest.mark.parametrize("choice", ["zero3", "zero3_offload"])
def test_the_papers_set_up(choice, monkeypatch):
    """LLaMA-7B on eight GPUs: section 4.1 of the paper, in the config and in what DeepSpeed would get."""
    overrides = ["model=llama7b", f"strategy={choice}", "trainer.devices=8", "pose.target_len=16384"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides)
    assert (cfg.trainer.max_steps, cfg.trainer.global_batch, cfg.trainer.micro_batch) == (1000, 64, 1)
    assert (cfg.finetune.lr, list(cfg.finetune.betas), cfg.finetune.weight_decay) == (2e-5, [0.9, 0.999], 0.0)
    assert (cfg.finetune.schedule, cfg.finetune.warmup_steps) == ("linear", 10)
    assert cfg.model.gradient_checkpointing and cfg.model.path == "huggyllama/llama-7b" and cfg.pose.num_chunks == 2
    trainer = Mock(world_size=8, gradient_clip_val=cfg.trainer.gradient_clip)
    assert (
        build.accumulate(trainer, cfg.trainer.micro_batch, cfg.trainer.global_batch) == 1
        and trainer.accumulate_grad_batches == 8
    )

    strategy = build.make(cfg.strategy, Strategy, "strategy")
    strategy._lightning_module = Mock(trainer=trainer)
    strategy._precision_plugin = Mock(precision="bf16-mixed")
    strategy._auto_select_batch_size = lambda: 1
    strategy._init_config_if_needed()
    config = strategy.config
    assert config["zero_optimization"]["stage"] == 3 and config["bf16"]["enabled"]
    assert config["gradient_accumulation_steps"] * config["train_micro_batch_size_per_gpu"] * 8 == 64
    assert config["gradient_clipping"] == 0.0 and config["data_types"]["grad_accum_dtype"] == "fp32"
    zero = config["zero_optimization"]
    offloaded = {zero.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")}
    assert offloaded == ({"cpu"} if choice == "zero3_offload" else {None})
    # As DeepSpeed itself reads it, on eight devices
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda: 0)
    read = DeepSpeedConfig(config, Mock(**{"get_data_parallel_world_size.return_value": 8}))
    assert read.train_batch_size == 64 and read.zero_optimization_stage == 3
