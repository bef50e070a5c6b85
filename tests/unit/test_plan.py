"""What a training costs: FLOPs against torch's own counter, memory against the allocator, the rest by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from benchmarks.plan import OBJECTIVES, SHAPES, compare
from benchmarks.plan import main as benchmark
from pose import plan
from pose.errors import ConfigError
from pose.modeling import loss, speed
from pose.modeling.load import build_model
from pose.modeling.lora import add_lora, count_parameters
from pose.modeling.options import LoraOptions
from pose.modeling.teacher import Teacher, freeze
from pose.modeling.views import shares_beginnings
from pose.plan import (
    GIB,
    GPUS,
    PARTS,
    STRATEGIES,
    Shape,
    Training,
    advise,
    as_json,
    duration,
    fits,
    micro_batch_of_views,
    peak_flops,
    summary,
)
from pose.training import strategies
from pose.training.objectives import LanguageModel, LongShort, SelfDistill
from pose.training.options import OPTIMIZERS

LLAMA_7B = Shape(4096, 32, 32, 32, 128, 11008, 32000)
PAPER = Training(LLAMA_7B, train_len=2048, target_len=32768)
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
DOCS = Path(__file__).resolve().parents[2] / "docs"


def model_and_shape(model_type: str, lora: LoraOptions | None = None, attention: str = "sdpa", **more):
    config = AutoConfig.for_model(model_type, **{**SMALL, **more})
    prepare = None if lora is None else lambda model: add_lora(model, lora)
    with torch.device("meta"):
        model = build_model(config, None, attention, prepare=prepare)
    return model, Shape.of(config.to_dict())


# ----- numbers of weights -----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("llama", {"attention_bias": True}),
        ("mistral", {"num_key_value_heads": 2, "head_dim": 16}),
        ("gemma", {"num_key_value_heads": 1, "head_dim": 16}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
        ("phi", {}),
        ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}),
        ("gpt_neox", {}),
    ],
)
def test_parameters_are_those_of_the_model(model_type, more, tied):
    if model_type == "phi" and tied:
        pytest.skip("it has no tied head")
    model, shape = model_and_shape(model_type, tie_word_embeddings=tied, **more)
    assert shape.num_parameters == count_parameters(model)[1]


@pytest.mark.parametrize(
    "lora",
    [
        LoraOptions(rank=4),
        LoraOptions(rank=2, target_modules=["q_proj", "self_attn.o_proj"]),
        LoraOptions(rank=2, target_modules=["v_proj"], train_embeddings_and_norms=True),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_trained_parameters_are_those_of_the_model(lora, tied):
    model, shape = model_and_shape("llama", lora, num_key_value_heads=2, tie_word_embeddings=tied)
    trained, total = count_parameters(model)
    training = Training(
        shape, 8, 16, rank=lora.rank, targets=lora.target_modules and tuple(lora.target_modules),
        train_embeddings_and_norms=lora.train_embeddings_and_norms,
    )  # fmt: skip
    assert (training.num_trained, training.num_trained + training.num_frozen) == (trained, total)


# ----- FLOPs -----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_flops_are_those_that_torch_counts(rank, tied):
    """It counts all of the scores, which is twice the causal half."""
    length, layers = 16, 12
    lora = None if rank is None else LoraOptions(rank=rank)
    more = {"num_key_value_heads": 2, "tie_word_embeddings": tied, "num_hidden_layers": layers}
    model, shape = model_and_shape("llama", lora, "eager", **more)
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counted:
        model(input_ids=tokens, position_ids=tokens, use_cache=False).logits.sum().backward()
    training = Training(shape, length, 2 * length, rank=rank)
    norms = shape.norm_weights  # which it does not count
    vectors = norms * (6 if rank is None else 4)
    expected = training.flops_per_token + training.attention_flops - vectors
    # The first layer's inputs get no gradient where the embedding is frozen. Angles of RoPE that are made by a matrix
    # product (transformers 5.17) are counted too
    assert counted.get_total_flops() / length == pytest.approx(expected, rel=1e-4 if rank is None else 0.03)


def test_flops_of_the_paper():
    n = 6_738_415_616 - 32000 * 4096
    assert PAPER.flops_per_token == 6 * n + 6 * 32 * 4096 * 2048
    assert PAPER.flops == PAPER.flops_per_token * 1000 * 64 * 2048
    full = PAPER.full_length()
    assert full.flops / PAPER.flops == pytest.approx(16 * (6 * n + 6 * 32 * 4096 * 32768) / PAPER.flops_per_token)


def test_hours():
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100")
    assert PAPER.hours(h100, 0.5) == pytest.approx(PAPER.flops / (0.5 * 989e12) / 3600)
    assert replace(PAPER, devices=8).hours(h100, 0.5) == pytest.approx(PAPER.hours(h100, 0.5) / 8)
    again = replace(PAPER, gradient_checkpointing=True)
    layers = 32 * LLAMA_7B.layer_matrices
    ratio = 1 + (2 * layers + 2 * 32 * 4096 * 2048) / PAPER.flops_per_token
    assert again.hours(h100) == pytest.approx(PAPER.hours(h100) * ratio)
    assert again.mfu(0.4) == pytest.approx(0.4 / ratio)


@pytest.mark.parametrize("rank", [None, 2])
def test_flops_of_selective_recomputation_are_those_that_torch_counts(rank):
    """Eager attention is computed again, and counted whole: twice the causal half."""
    length, counts = 16, []
    for how in (False, "selective"):
        model, shape = model_and_shape("llama", None if rank is None else LoraOptions(rank=rank), "eager")
        model.train()
        model.enable_input_require_grads()  # of a frozen embedding's too, which recomputation needs
        speed.recompute(model, how)
        tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
        with FlopCounterMode(display=False) as counted:
            model(input_ids=tokens, position_ids=tokens, use_cache=False).logits.sum().backward()
        counts.append(counted.get_total_flops() / length)
    training = Training(shape, length, 2 * length, attention="eager", rank=rank, gradient_checkpointing="selective")
    assert counts[1] - counts[0] == training.recomputed_flops_per_token + training.attention_flops / 3
    without_attention = replace(training, attention="sdpa").recomputed_flops_per_token
    assert without_attention == training.recomputed_flops_per_token - training.attention_flops / 3


@pytest.mark.parametrize("rank", [None, 8])
def test_flops_of_two_views(rank):
    """By hand: LLaMA-7B, of whose tokens 0.4 come after the first skip."""
    lm = replace(PAPER, rank=rank)
    adapters, attention, head = lm.adapters, 6 * 32 * 4096 * 2048, 32000 * 4096
    layers = 6_738_415_616 - 2 * head
    of_layers = 6 * layers if rank is None else 4 * layers + 6 * adapters
    of_head = 6 if rank is None else 4
    assert lm.flops_per_token == of_layers + of_head * head + attention
    distilled = replace(lm, objective="self_distill", skipped=0.4)
    wanted = 1.4 * of_layers + 1.4 * of_head * head + 2 * attention
    assert distilled.flops_per_token == pytest.approx(wanted, rel=1e-12)
    short = replace(lm, objective="long_short", skipped=0.4)
    wanted = 1.4 * of_layers + of_head * head + 2 * attention + 2 * layers + attention / 3
    assert short.flops_per_token == pytest.approx(wanted, rel=1e-12)
    assert distilled.full_length() == replace(lm, train_len=32768, skipped=0.4), "which has one view"
    again = replace(distilled, gradient_checkpointing=True)
    matrices = 32 * LLAMA_7B.layer_matrices + adapters
    assert again.recomputed_flops_per_token == pytest.approx(1.4 * 2 * matrices + 2 * attention / 3, rel=1e-12)


@pytest.mark.parametrize("name", ["self_distill", "long_short"])
@pytest.mark.parametrize("share", [True, False])
def test_flops_of_two_views_are_those_that_torch_counts(name, share):
    """It counts all of the scores, which is twice the causal half; 3/4 of the tokens are moved."""
    length, objective = 16, OBJECTIVES[name]
    rope = {} if share else {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    config = AutoConfig.for_model("llama", **SMALL, num_key_value_heads=2, **rope)
    model, shape = build_model(config, None, "eager"), Shape.of(config.to_dict())
    teacher = Teacher(build_model(config, None, "eager", prepare=freeze))
    tokens = torch.zeros(length, dtype=torch.long)
    positions = torch.arange(length) + 5 * (torch.arange(length) >= length // 4)
    batch = objective.collate([{"input_ids": tokens, "labels": tokens, "position_ids": positions}])
    assert shares_beginnings(model.config) is share  # the first time runs a model without weights
    with FlopCounterMode(display=False) as counted:
        objective.losses(model, batch, teacher).loss.backward()
    training = Training(shape, length, 2 * length, objective=name, skipped=0.75, views_share=share)
    once, norms = training.attention_flops / 2, shape.norm_weights  # which it does not count
    teacher_attention = once / 3 if name == "long_short" else 0.0
    vectors = norms * (6 * (1.75 if share else 2) + (2 if name == "long_short" else 0))
    # The last token is not scored, and goes through the head all the same where it has a student
    of_head = 1 if name == "self_distill" else 15 / 16
    last = 6 * shape.embedding * (1 - of_head)
    # Of the head's gradient it does not count what is added in place
    in_place = 2 * shape.embedding * (of_head + (0.75 if name == "self_distill" else 0))
    expected = training.flops_per_token + training.attention_flops + teacher_attention - vectors - last - in_place
    assert counted.get_total_flops() / length == pytest.approx(expected, rel=1e-4)


# ----- memory -----


def test_states_are_those_of_the_docs():
    """The table of docs/STRATEGIES.md, whose formulas are tested against live tensors of two processes."""
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in (DOCS / "STRATEGIES.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    assert len(rows) == 6
    for name, _, *cells in rows:
        offload = name.endswith("_offload")
        kind = {"strategy": name.removesuffix("_offload"), "offload_optimizer": offload, "offload_parameters": offload}
        for devices, cell in zip((8, 1), cells, strict=True):
            training = replace(PAPER, devices=devices, **kind)
            assert sum(training.states.values()) / GIB == pytest.approx(float(cell), abs=0.06)
            assert training.host_memory == (sum(training.states.values()) if offload else 0)
            lies = [training.memory[part] for part in ("weights", "gradients", "optimizer")]
            assert lies == ([0, 0, 0] if offload else list(training.states.values()))


def test_states_of_adapters_and_of_fp32():
    lora = replace(PAPER, rank=8)
    assert lora.states["gradients"] == 4 * lora.num_trained
    assert lora.states["optimizer"] == 8 * lora.num_trained
    zero1 = replace(PAPER, strategy="zero1", devices=4)
    mixed, true = (sum(replace(zero1, precision=name).states.values()) for name in ("bf16-mixed", "32-true"))
    assert mixed == true


@pytest.mark.parametrize("objective", ["self_distill", "long_short"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["deep", "large vocabulary"])
@pytest.mark.slow
@pytest.mark.nightly
def test_memory_of_two_views_is_what_is_measured(name, checkpointing, objective):
    planned, measured = compare(SHAPES[name], checkpointing=checkpointing, objective=objective)
    assert 0.99 < planned / measured < 1.05


def test_a_frozen_original_is_in_the_weights():
    """In the bits of its checkpoint; over the devices where the model is; none beside adapters."""
    short = replace(PAPER, objective="long_short", original_bytes=2)
    num = LLAMA_7B.num_parameters
    for kind, share in (({}, 1), ({"strategy": "fsdp", "devices": 8}, 1 / 8), ({"strategy": "zero1", "devices": 8}, 1)):
        one = replace(short, **kind)
        assert one.states["weights"] - replace(one, objective="lm").states["weights"] == pytest.approx(2 * num * share)
    beside = replace(short, rank=8)
    assert beside.states == replace(beside, objective="lm").states
    assert replace(short, objective="self_distill").states == PAPER.states


@pytest.mark.parametrize(
    ("given", "num_views", "share", "taken"),
    [(16, 1, 16, 16), (16, 2, 16, 8), (1, 2, 16, 1), (6, 2, 4, 2), (3, 2, 5, 1)],
)
def test_micro_batches_of_views(given, num_views, share, taken):
    assert micro_batch_of_views(given, num_views, share) == taken


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in SHAPES), ("deep", "eager")])
@pytest.mark.slow
def test_memory_is_what_is_measured(name, attention, checkpointing):
    planned, measured = compare(SHAPES[name], attention=attention, checkpointing=checkpointing)
    assert 0.99 < planned / measured < 1.05


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"rank": 8},
        {"precision": "bf16-mixed"},
        {"rank": 8, "precision": "bf16-mixed"},
        {"model_type": "qwen3", "head_dim": 64},
        {"model_type": "phi", "resid_pdrop": 0.0, "hidden_act": "gelu_new", "num_key_value_heads": 4},
        {"model_type": "phi3", "pad_token_id": 0, "eos_token_id": 1},
        {"model_type": "gpt_neox", "num_key_value_heads": 4},
    ],
    ids=str,
)
@pytest.mark.slow
@pytest.mark.nightly
def test_memory_of_other_models_is_what_is_measured(options, checkpointing):
    planned, measured = compare(SHAPES["deep"], checkpointing=checkpointing, **options)
    assert planned == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "eager"},
        {"precision": "bf16-mixed"},
        {"rank": 8, "precision": "bf16-mixed"},
        {"model_type": "phi3", "pad_token_id": 0, "eos_token_id": 1},
    ],
    ids=str,
)
@pytest.mark.slow
@pytest.mark.nightly
def test_memory_of_selective_recomputation_is_what_is_measured(options):
    planned, measured = compare(SHAPES["deep"], checkpointing="selective", **options)
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_memory_of_a_small_shape_is_what_is_measured(checkpointing):
    planned, measured = compare((64, 3, 4, 2, 176, 256, 256, 1), checkpointing=checkpointing)
    assert planned == pytest.approx(measured, rel=0.1)


def test_the_benchmark_compares_them(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("benchmarks.plan.SHAPES", {"small": (64, 2, 4, 2, 176, 256, 64, 1)})
    monkeypatch.setattr("sys.argv", ["plan", "--quick", "--json", str(tmp_path / "plan.json")])
    benchmark()
    *lines, last = capsys.readouterr().out.splitlines()
    cases = json.loads(last)["cases"]
    assert len(cases) == 6  # all weights and adapters; kept, made again, selective
    assert len(lines) == 8  # the range, the heads of the columns
    assert all(case["ratio"] == case["planned"] / case["measured"] for case in cases)
    assert json.loads((tmp_path / "plan.json").read_text())["cases"] == cases


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_total_is_the_sum_and_grows_with_the_length(strategy):
    training = replace(PAPER, strategy=strategy, devices=8)
    assert training.memory["total"] == pytest.approx(sum(training.memory[part] for part in PARTS))
    assert training.full_length().memory["total"] > training.memory["total"]
    checkpointed = replace(training, gradient_checkpointing=True)
    selective = replace(training, gradient_checkpointing="selective")
    needs = [one.memory["activations"] for one in (checkpointed, selective, training)]
    assert needs[0] < needs[1] < needs[2]


# ----- what to change -----


def test_advice_lowers_the_need():
    big = replace(PAPER, micro_batch=4, global_batch=64, attention="eager")
    for gpu in GPUS:
        found = advise(big, gpu)
        assert found
        for one in found:
            assert one.total < big.memory["total"]
            assert one.fits == (one.total <= 0.95 * gpu.memory)
        assert not advise(replace(big, rank=8, micro_batch=1, attention="sdpa", gradient_checkpointing=True), GPUS[0])


def test_the_full_length_of_two_views_is_that_of_plain_training():
    """The objective is what differs; its layers that are compared are not a part of it."""
    short = replace(PAPER, objective="long_short", rank=8, num_compared=5, skipped=0.5)
    assert short.full_length().memory == replace(PAPER, rank=8).full_length().memory


def test_advice_joins_changes_where_none_suffices():
    full = replace(PAPER, global_batch=1).full_length()  # one device: there is nothing to deal out
    found = advise(full, GPUS[2])
    assert not fits(full, GPUS[2])
    alone, together = found[:-1], found[-1]
    assert alone and not any(one.fits for one in alone)
    assert len(together.overrides) > 1 and together.fits
    assert together.total < min(one.total for one in alone)


def test_what_is_shown():
    found = as_json(PAPER)
    assert set(found["memory_gib"]) == {*PARTS, "total"}
    assert found["memory_gib"]["total"] == PAPER.memory["total"] / GIB
    assert set(found["hours"]) == {"A100", "H100", "RTX 4090"} == set(found["full_length"]["hours"])
    assert found["full_length"]["flops_per_token"] == PAPER.full_length().flops_per_token
    lines = summary(PAPER).splitlines()
    assert len(lines) == 2 and all(len(line) < 150 for line in lines)
    assert [duration(h) for h in (2000, 2.5, 0.5, 0.001, 1e-5)] == ["2,000 h", "2.5 h", "30.0 min", "4 s", "under 1 s"]


# ----- what is refused -----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"devices": 3}, ["trainer.global_batch=64", "divides"]),
        ({"strategy": "zero4"}, ["strategy='zero4'", "zero3"]),
        ({"precision": "bf16-true"}, ["trainer.precision='bf16-true'", "bf16-mixed"]),
        ({"rank": 8, "targets": ("lm_head",)}, ["'lm_head'", "q_proj"]),
    ],
)
def test_values_that_cannot_be_are_errors(change, words):
    with pytest.raises(ConfigError) as error:
        replace(PAPER, **change)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": "llama", "num_local_experts": 8}, "num_local_experts=8"),
        ({"model_type": "llama", **SMALL, "hidden_size": 0}, "hidden_size=0"),
        ({"model_type": "llama", **SMALL, "vocab_size": None}, "vocab_size=None"),
    ],
)
def test_configs_without_a_plan_are_errors(config, word):
    with pytest.raises(ConfigError, match=word):
        Shape.of(config, "FOLDER")


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989e12),
        ("NVIDIA H200", "bf16-mixed", 989e12),
        ("NVIDIA A100-SXM4-80GB", "16-mixed", 312e12),
        ("NVIDIA GeForce RTX 4090", "32-true", 82.6e12),
        ("NVIDIA A100-PCIE-40GB", "bf16-mixed", 312e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", None),
        ("NVIDIA H100 NVL", "bf16-mixed", None),
        ("NVIDIA H200 NVL", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16-mixed", None),
        ("NVIDIA L4", "bf16-mixed", None),
        ("NVIDIA RTX A1000 6GB Laptop GPU", "bf16-mixed", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name, precision, expected):
    assert peak_flops(name, precision) == expected


def test_what_other_modules_say_of_the_same():
    """pose.plan imports none of them, which takes seconds; here they are held together."""
    assert plan.CHUNK_LEN == loss.CHUNK_LEN and plan.CHUNK_LEN_OF_VIEWS == loss.CHUNK_LEN_OF_VIEWS
    assert {*plan.OPTIMIZER_BYTES} == {*OPTIMIZERS} and {*plan.PRECISIONS} == {*strategies.PRECISIONS}
    assert {*plan.OBJECTIVES} == {kind.name for kind in (LanguageModel, SelfDistill, LongShort)}
