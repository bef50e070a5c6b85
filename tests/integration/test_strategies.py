"""Two processes of gloo on the CPU, under every strategy, against one process that has the whole model.

One group of processes trains all cases, since a start costs as much as a case.
"""

import csv
import gc
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import strategy_worker  # noqa: E402
from cpu_strategies import BUCKET  # noqa: E402

pytestmark = pytest.mark.slow
ZERO = "strategy._target_=cpu_strategies.CpuDeepSpeed"
STRATEGIES = {
    "ddp": ["strategy=ddp"],
    "fsdp": ["strategy=fsdp"],
    "zero1": ["strategy=zero1", ZERO],
    "zero2": ["strategy=zero2", ZERO],
    "zero3": ["strategy=zero3", ZERO],
    "zero3_offload": ["strategy=zero3_offload", ZERO],
}
SHARDED = ("fsdp", "zero3", "zero3_offload")
NUM_LAYERS = 3
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 100,  # which two processes cannot share evenly in every matrix
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
COMMON = [
    "model.tokenizer=assets/tiny",
    "model.gradient_checkpointing=true",
    "pose.target_len=256",
    "data.synthetic={passkey:0,copy:0.3,key_value:0}",
    "trainer.accelerator=cpu",
    "trainer.max_steps=4",
    "trainer.global_batch=8",
    "trainer.micro_batch=2",
    "trainer.log_every_n_steps=1",
    "trainer.checkpoint_every_n_steps=null",
    "finetune.warmup_steps=2",
    "finetune.weight_decay=0.1",
    "eval=none",
]
# From random weights, an untied head, an attention factor that the export has in its weights. Some gradients are above
# the clipping norm, and none would be at half its size.
RANDOM = [
    "experiment=pretrain_tiny",
    *(f"++model.init.{key}={value}" for key, value in SHAPE.items()),
    "model.init.tie_word_embeddings=false",
    "data.curriculum=[]",
    "data.documents=assets/corpora/books.train.jsonl.gz",
    "data.synthetic.passkey=0",
    "rope=yarn_revised",
    "pose=pose",
    "model.export_dtype=float32",
    "finetune.lr=1e-3",
    "trainer.gradient_clip=1.2",
    "trainer.precision=32-true",
    "trainer.checkpoint_every_n_steps=2",
]
TIED = ["trainer.max_steps=2", "finetune.lr=1e-3"]
WATCH = [
    "watch.every_n_steps=2", "watch.best=tail_ppl@256", "watch.lengths=[128,256]", "watch.tail=100",
    "watch.max_documents=1", "watch.windows=1", "watch.trials=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A model with tied embeddings, saved in fp32 that bf16 cannot hold, in two files."""
    folder = tmp_path_factory.mktemp("tied")
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SHAPE))
    model.save_pretrained(folder, max_shard_size="600KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder / "in_bf16")
    tokenizer.save_pretrained(folder / "in_bf16")
    return folder


@contextmanager
def one_thread():
    """For trainings in this process, as the worker's are."""
    threads = torch.get_num_threads()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tied, tmp_path_factory):
    """The run folders by name; whole/... are those of one process."""
    out = tmp_path_factory.mktemp("strategies")
    random, from_tied = [*RANDOM, *COMMON_AFTER], [f"model.path={tied}", *COMMON, *TIED]
    kinds = {
        "random": random,
        "bf16": [*from_tied, "trainer.precision=bf16-mixed"],
        "lora": [
            *from_tied, "trainer.precision=32-true", "finetune=lora", "finetune.lora.train_embeddings_and_norms=true",
        ],
        "held": [
            *from_tied, f"model.path={tied}/in_bf16", "trainer.precision=32-true", "finetune=lora", "finetune.lr=1e-3",
        ],
        "held_mixed": [*from_tied, "trainer.precision=bf16-mixed", "finetune=lora", "finetune.lr=1e-3"],
        "frozen": [*from_tied, "trainer.precision=bf16-mixed", "finetune.lr=1e-12"],
        "watched": [*random, *WATCH],
        "watched_bf16": [*random, *WATCH, "trainer.precision=bf16-mixed"],
    }  # fmt: skip
    cases = {}
    for kind, names in {
        "random": STRATEGIES,
        "bf16": ("fsdp", "zero1", "zero2", "zero3"),
        "lora": ("fsdp", "zero3"),
        "held": ("ddp", "fsdp", "zero3"),
        "held_mixed": ("fsdp", "zero3"),
        "frozen": ("zero1", "zero3_offload"),
        "watched": ("ddp", "fsdp", "zero3"),
        "watched_bf16": ("fsdp",),
    }.items():
        for name in names:
            cases[f"{kind}/{name}"] = [*kinds[kind], *STRATEGIES[name], "trainer.devices=2"]
    for name in ("ddp", "fsdp"):
        cases[f"auto/{name}"] = [*cases[f"random/{name}"], "trainer.micro_batch=auto"]
    for name in ("ddp", "fsdp", "zero3"):
        resumed = [f"resume={out}/random/{name}/checkpoints/step-2", "trust_pickle=true"]
        cases[f"resumed/{name}"] = [*cases[f"random/{name}"], *resumed]
    with one_thread():
        for kind, overrides in kinds.items():
            if kind not in ("frozen", "watched_bf16"):
                strategy_worker.train(f"{kind}/whole", [*overrides, "trainer.devices=1"], out)
    strategy_worker.in_two_processes(cases, out)
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The run folders of a model that two processes share, and of the same in one: few enough for every day."""
    out = tmp_path_factory.mktemp("sharded")
    random = [*RANDOM, *COMMON_AFTER]
    with one_thread():
        strategy_worker.train("whole", [*random, "trainer.devices=1"], out)
    cases = {name: [*random, *STRATEGIES[name], "trainer.devices=2"] for name in ("fsdp", "zero3")}
    strategy_worker.in_two_processes(cases, out)
    return out


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_two_processes_that_share_a_model_train_it_as_one(sharded, name):
    assert losses(sharded / name) == pytest.approx(losses(sharded / "whole"), rel=1e-5)
    assert len(losses(sharded / name)) == 4
    assert largest_difference(weights(sharded / "whole"), weights(sharded / name)) < 1e-5


COMMON_AFTER = [item for item in COMMON if not item.startswith(("data.synthetic", "trainer.checkpoint"))]


def logged(folder: Path, key: str) -> list[float]:
    with open(folder / "metrics.csv") as file:
        return [float(row[key]) for row in csv.DictReader(file) if row[key]]


def losses(folder: Path) -> list[float]:
    return logged(folder, "train/loss")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def seen(folder: Path) -> list[dict]:
    return [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(2)]


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.nightly
def test_two_processes_train_the_same_model_as_one(runs, name):
    one, two = runs / "random" / "whole", runs / "random" / name
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len(losses(one)) == 4
    norms = logged(one, "train/grad_norm")
    assert min(norms) < 1.2 < max(norms) < 2.4
    for key in ("train/grad_norm", "train/lr", "train/loss_text", "train/loss_retrieval"):
        assert logged(two, key) == pytest.approx(logged(one, key), rel=1e-4), key
        assert len(logged(two, key)) == 4
    # Adam divides by the gradient's size: rounding of the smallest gradients shows, at a thousandth of a step of 1e-3.
    assert largest_difference(weights(one), weights(two)) < 1e-5


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.nightly
def test_a_global_batch_has_the_same_examples_and_the_same_learning_rate(runs, name):
    one, two = json.loads((runs / "random" / "whole" / "seen.0.json").read_text()), seen(runs / "random" / name)

    def by_step(*processes):
        steps = {}
        for process in processes:
            for step, rows in process["batches"]:
                steps.setdefault(step, []).extend(rows)
        return {step: sorted(rows) for step, rows in steps.items()}

    expected = by_step(one)
    assert by_step(*two) == expected and {len(rows) for rows in expected.values()} == {8}
    assert not set(by_step(two[0])[0]) & set(by_step(two[1])[0])
    # linear, of 4 steps with 2 of warm-up: 0, 1/2, 1, 1/2 of the peak
    for process in two:
        assert [process["lr"][str(step)] for step in range(4)] == pytest.approx([0, 5e-4, 1e-3, 5e-4])


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@pytest.mark.nightly
def test_processes_agree_on_the_largest_micro_batch(runs, name):
    """That of the one with least memory; nothing else is left of the search: each process sees and ends the same."""
    found, given = runs / "auto" / name, runs / "random" / name
    assert "micro_batch: 2" in (found / "config.yaml").read_text()
    for one, other in zip(seen(found), seen(given), strict=True):
        assert one["batches"] == other["batches"] and one["lr"] == other["lr"]
    assert largest_difference(weights(found), weights(given)) == 0


@pytest.mark.parametrize("kind", ["random", "bf16"])
@pytest.mark.nightly
def test_frequencies_are_fp32_inside_every_strategy(runs, kind):
    whole = json.loads((runs / kind / "whole" / "seen.0.json").read_text())["inv_freq"]
    names = [folder.name for folder in (runs / kind).iterdir() if folder.name != "whole"]
    assert len(names) >= 4 and whole[0][0] == "torch.float32"
    for name in names:
        for process in seen(runs / kind / name):
            assert [(dtype, values) for dtype, _, values in process["inv_freq"]] == [(d, v) for d, _, v in whole]


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.nightly
def test_no_process_holds_a_whole_model(runs, name):
    for process in seen(runs / "random" / name):
        assert process["held"] <= 0.51 * process["total"]
        assert process["whole_at_once"] <= 2  # the one that is dealt out, and the one read before it


@pytest.mark.parametrize("name", ["fsdp", "zero1", "zero2", "zero3"])
@pytest.mark.nightly
def test_bf16_stays_close_to_one_process(runs, name):
    one, two = runs / "bf16" / "whole", runs / "bf16" / name
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert largest_difference(weights(one), weights(two)) < 2.5e-3  # two steps of at most 1e-3, in either direction


@pytest.mark.parametrize("name", ["zero1", "zero3_offload"])
@pytest.mark.nightly
def test_master_weights_are_the_checkpoints_own(runs, tied, name):
    """Under bf16-mixed DeepSpeed makes them from bf16 weights, which would show in what is exported."""
    before = LlamaForCausalLM.from_pretrained(tied).state_dict()
    after = weights(runs / "frozen" / name)
    matrix = before["model.layers.0.mlp.up_proj.weight"]
    assert (matrix.bfloat16().float() - matrix).abs().max() > 1e-5  # so that rounding would show
    for key, value in after.items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
@pytest.mark.nightly
def test_adapters_are_merged_into_the_same_weights(runs, name):
    one, two = weights(runs / "lora" / "whole"), weights(runs / "lora" / name)
    assert largest_difference(one, two) < 1e-5
    assert losses(runs / "lora" / name) == pytest.approx(losses(runs / "lora" / "whole"), rel=1e-5)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
@pytest.mark.nightly
def test_frozen_weights_held_in_bf16_give_the_same_adapters(runs, name):
    one, two = runs / "held" / "whole", runs / "held" / name
    assert largest_difference(weights(one), weights(two)) < 1e-5
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    wanted = {"torch.float32": {"norm", "lora"}, "torch.bfloat16": {"matrix"}}
    for process in seen(two):
        held = {dtype: set(kinds) for dtype, kinds in process["dtypes"].items()}
        assert held == (wanted if name != "zero3" else {"torch.float32": {"norm", "lora", "matrix"}})


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
@pytest.mark.nightly
def test_frozen_weights_are_exported_as_the_checkpoint_has_them(runs, tied, name):
    """DeepSpeed holds them in bf16, which cannot hold these."""
    before, one, two = LlamaForCausalLM.from_pretrained(tied).state_dict(), *(
        weights(runs / "held_mixed" / run) for run in ("whole", name)
    )  # fmt: skip
    assert torch.equal(two["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert largest_difference(one, two) < 1e-3


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
@pytest.mark.nightly
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(runs, name):
    whole, resumed = runs / "random" / name, runs / "resumed" / name
    assert largest_difference(weights(whole), weights(resumed)) == 0
    assert len(losses(resumed)) == 2


def measured(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv") as file:
        found = [row for row in csv.DictReader(file) if row["val/ppl@256"]]
    return [{name: float(value) for name, value in row.items() if name.startswith("val/")} for row in found]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
@pytest.mark.nightly
def test_a_model_in_parts_is_measured_whole_and_trains_on_unchanged(runs, name):
    run = runs / "watched" / name
    assert largest_difference(weights(run), weights(runs / "random" / name)) == 0
    one, two = measured(runs / "watched" / "whole"), measured(run)
    assert len(one) == len(two) == 3
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    best = json.loads((run / "best" / "pose_best.json").read_text())
    assert best["value"] == min(metrics["val/tail_ppl@256"] for metrics in two[1:])
    if best["step"] == 4:  # the last step's is the run's model
        assert (run / "best" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.nightly
def test_it_measures_in_the_precision_that_trains(runs):
    whole, low = measured(runs / "watched" / "whole"), measured(runs / "watched_bf16" / "fsdp")
    for alone, bf16 in zip(whole, low, strict=True):
        assert bf16["val/ppl@256"] == pytest.approx(alone["val/ppl@256"], rel=1e-2)
        assert bf16["val/ppl@256"] != pytest.approx(alone["val/ppl@256"], rel=1e-6)


def persistent_bytes(strategy: str, total: float, trainable: float, processes: int, weight: int) -> float:
    """The formula of docs/STRATEGIES.md: bytes of weights, gradients and optimizer states in one process.

    Args:
        strategy: a choice of conf/strategy.
        total, trainable: parameters.
        processes: W.
        weight: bytes of a weight as it computes under DeepSpeed: 2 in bf16-mixed, 4 in 32-true.
    """
    share = 1 / processes
    return {
        "ddp": 4 * total + 12 * trainable,
        "fsdp": (4 * total + 12 * trainable) * share,
        "zero1": weight * total + (8 - weight + 12 * share) * trainable,
        "zero2": weight * total + 16 * trainable * share,
        "zero3": (weight * total + 16 * trainable) * share,
        "zero3_offload": (weight * total + 20 * trainable) * share,
    }[strategy]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("random", name) for name in STRATEGIES]
    + [("bf16", name) for name in ("fsdp", "zero1", "zero2", "zero3")]
    + [("frozen", "zero3_offload")]
    + [("lora", name) for name in ("fsdp", "zero3")],
)
@pytest.mark.nightly
def test_memory_is_that_of_the_formula(runs, kind, name):
    weight = 2 if kind in ("bf16", "frozen") else 4
    # DeepSpeed may still hold buffers of up to two reductions, which do not grow with the model
    buffers = range(3) if name.startswith("zero") else (0,)
    for process in seen(runs / kind / name):
        expected = persistent_bytes(name, process["total"], process["trainable"], 2, weight)
        assert any(process["live"] == pytest.approx(expected + n * BUCKET * weight, rel=0.02) for n in buffers)


def test_the_table_of_the_docs_is_the_formula():
    total = 6_738_415_616  # LLaMA-7B
    lines = (HERE.parents[1] / "docs" / "STRATEGIES.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert [row[0] for row in rows] == list(STRATEGIES)
    for name, _, on_eight, on_one in rows:
        for cell, processes in ((on_eight, 8), (on_one, 1)):
            assert float(cell) == pytest.approx(persistent_bytes(name, total, total, processes, 2) / 2**30, abs=0.06)
