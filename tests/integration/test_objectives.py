"""Objectives of two views under every strategy: two processes of gloo on the CPU against one that has all.

One group of processes trains all cases, since a start costs as much as a case.
"""

import csv
import gc
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import strategy_worker  # noqa: E402
from test_strategies import COMMON, SHAPE, STRATEGIES  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
EMBEDDINGS = "finetune.lora.train_embeddings_and_norms=true"
LORA = ["finetune=lora", "finetune.lr=5e-3"]
BF16 = ["trainer.precision=bf16-mixed"]
# Two chunks of the loss in some processes, one in others: a text of 255 scored tokens, or a few that are an answer
UNEVEN = [
    "pose.train_len=256", "pose.target_len=1024", "trainer.global_batch=16",
    "data.synthetic={passkey:0,copy:0,key_value:0.7}",
]  # fmt: skip
KINDS = {
    "lm_uneven": ["objective=lm", *UNEVEN, "trainer.micro_batch=8"],
    "self_distill_uneven": ["objective=self_distill", *UNEVEN, "trainer.micro_batch=16"],
    "self_distill": ["objective=self_distill"],
    "self_distill_lora": ["objective=self_distill", *LORA],
    "long_short": ["objective=long_short"],
    "long_short_lora": ["objective=long_short", *LORA],
    "long_short_lora_all": ["objective=long_short", *LORA, EMBEDDINGS],
    "long_short_bf16": ["objective=long_short", *BF16],
    "long_short_lora_bf16": ["objective=long_short", *LORA, *BF16],
}
CASES = {
    "lm_uneven": ("zero3",),
    "self_distill_uneven": ("zero3",),
    "self_distill": ("fsdp", "zero1"),
    "self_distill_lora": ("fsdp",),
    "long_short": ("ddp", "fsdp"),
    "long_short_lora": ("fsdp", "zero3"),
    "long_short_lora_all": ("zero1",),
    "long_short_bf16": ("zero2",),
    "long_short_lora_bf16": ("zero3",),
}
RESUMED = (("self_distill", "fsdp"), ("long_short", "fsdp"), ("long_short_lora", "zero3"))
# What changes how a step computes, and not what; the others compute layers again
HOW = {
    ("self_distill", "kept"): ["model.gradient_checkpointing=false"],
    ("long_short", "selective"): ["model.gradient_checkpointing=selective"],
    ("long_short_lora_all", "compiled"): ["trainer.compile=true"],
}
AUTO = (("long_short", "fsdp"),)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A model with an untied head, in the bits of whose weights a frozen copy is held."""
    folder = tmp_path_factory.mktemp("original")
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, initializer_range=0.1, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(original, tmp_path_factory):
    """The run folders by name; KIND/whole are those of one process."""
    out = tmp_path_factory.mktemp("objectives")
    common = [
        f"model.path={original}", *COMMON, "trainer.precision=32-true", "finetune.lr=1e-3", "model.export_dtype=float32"
    ]  # fmt: skip
    kinds = {kind: [*common, *overrides] for kind, overrides in KINDS.items()}
    cases = {
        f"{kind}/{name}": [*kinds[kind], *STRATEGIES[name], "trainer.devices=2"]
        for kind, names in CASES.items()
        for name in names
    }
    for kind, name in RESUMED:
        cases[f"{kind}/{name}"].append("trainer.checkpoint_every_n_steps=2")
        resumed = [f"resume={out}/{kind}/{name}/checkpoints/step-2", "trust_pickle=true"]
        cases[f"{kind}/{name}_resumed"] = [*cases[f"{kind}/{name}"], *resumed]
    for kind, name in AUTO:
        cases[f"{kind}/{name}_auto"] = [*cases[f"{kind}/{name}"], "trainer.micro_batch=auto"]
    threads = torch.get_num_threads()
    gc.freeze()  # as the worker does
    for kind, overrides in kinds.items():
        strategy_worker.train(f"{kind}/whole", [*overrides, "trainer.devices=1"], out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # its C++ takes more than a minute
        for kind, how in HOW:
            strategy_worker.train(f"{kind}/{how}", [*kinds[kind], "trainer.devices=1", *HOW[kind, how]], out)
    gc.unfreeze()
    torch.set_num_threads(threads)
    strategy_worker.in_two_processes(cases, out)
    return out


def logged(folder: Path) -> dict[str, list[float]]:
    """What is logged of losses and gradients, by name."""
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("train/loss") or name == "train/grad_norm"]
    return {name: [float(row[name]) for row in rows if row[name]] for name in names}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def share_apart(a: dict, b: dict) -> float:
    """The share of the weights that differ by more than a hundredth of a step: Adam makes steps of rounding, where a
    gradient is next to nothing.
    """
    assert a.keys() == b.keys()
    apart = sum(((a[name].float() - b[name].float()).abs() > 1e-5).sum().item() for name in a)
    return apart / sum(value.numel() for value in a.values())


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CASES.items() for name in names])
def test_two_processes_train_the_same_model_as_one(runs, kind, name):
    one, two = logged(runs / kind / "whole"), logged(runs / kind / name)
    names = {"lm": (), "self": ("lm", "kl"), "long": ("lm", "short", "skipped")}[kind.split("_")[0]]
    parts, in_bf16 = {f"train/loss_{name}" for name in names}, kind.endswith("bf16")
    assert parts < one.keys() and len(one["train/loss"]) == 4
    for key in parts | {"train/loss", "train/loss_text", "train/loss_retrieval", "train/grad_norm"}:
        rel = (2e-2 if key == "train/grad_norm" else 5e-3) if in_bf16 else 1e-4
        assert two[key] == pytest.approx(one[key], rel=rel, abs=rel / 100), key
    if not in_bf16:
        assert share_apart(weights(runs / kind / "whole"), weights(runs / kind / name)) < 1e-5


@pytest.mark.parametrize(("kind", "name"), RESUMED)
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(runs, kind, name):
    """The teacher is the model before any step, not that of the checkpoint."""
    whole, resumed = runs / kind / name, runs / kind / f"{name}_resumed"
    got, wanted = weights(resumed), weights(whole)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    for key, values in logged(resumed).items():
        assert values == logged(whole)[key][2:], key


@pytest.mark.parametrize(("kind", "name"), AUTO)
def test_processes_agree_on_the_largest_micro_batch(runs, kind, name):
    found = runs / kind / f"{name}_auto"
    assert "micro_batch: 4" in (found / "config.yaml").read_text()  # 2 examples, each seen twice
    assert share_apart(weights(found), weights(runs / kind / name)) < 1e-5


@pytest.mark.parametrize(("kind", "how"), HOW)
def test_how_a_step_computes_changes_nothing(runs, kind, how):
    one, two = logged(runs / kind / "whole"), logged(runs / kind / how)
    for key, values in one.items():
        assert two[key] == pytest.approx(values, rel=1e-5, abs=1e-7), key
