"""Runs that hold their weights in few bits: they train, go on to the same bits, and leave a plain folder."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes"
)
SMALL = ("experiment=smoke", "eval=none", "trainer.checkpoint_every_n_steps=2", "trainer.keep_checkpoints=3")
FAST = ("finetune.lr=0.01", "finetune.warmup_steps=0")
KINDS = {
    "lora": ["finetune=lora", *FAST],
    "qlora": ["finetune=qlora", *FAST],
    "adamw8bit": ["finetune.optimizer=adamw8bit"],
    "adamw8bit_fp32": ["finetune.optimizer=adamw8bit", "trainer.precision=32-true"],
    "qlora_adamw8bit": ["finetune=qlora", "finetune.optimizer=adamw8bit", "trainer.precision=32-true"],
    "adamw8bit_bf16": [
        "finetune.optimizer=adamw8bit", "trainer.precision=32-true", "finetune.weights_dtype=bfloat16",
        "model.gradient_checkpointing=true", "trainer.gradient_clip=1",
    ],
}  # fmt: skip


@pytest.fixture
def run(script, tmp_path):
    """Trains; returns the run folder."""

    def run_(name, *overrides):
        folder = tmp_path / name
        result = script("train.py", *SMALL, *overrides, f"hydra.run.dir={folder}")
        assert result.returncode == 0, result.stderr[-3000:]
        return folder

    return run_


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [k if k == "lora" else pytest.param(k, marks=needs_bitsandbytes) for k in KINDS])
def test_a_run_trains_and_goes_on_to_the_same_bits(run, kind):
    whole = run("whole", *KINDS[kind])
    resumed = run("resumed", *KINDS[kind], f"resume={whole}/checkpoints/step-2")
    assert same_bits(whole, resumed)
    base = {name: tensor.float() for name, tensor in load_file("assets/tiny/model.safetensors").items()}
    after = weights(whole)
    assert after.keys() == base.keys() and {tensor.dtype for tensor in after.values()} == {torch.float32}
    changed = {name for name in base if not torch.equal(after[name], base[name])}
    is_lora = "lora" in kind
    assert changed == {name for name in base if name.endswith("_proj.weight") or not is_lora}, "all that should train"
    config = json.loads((whole / "model" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    state = (whole / "checkpoints" / "step-2" / "state").stat().st_size
    num_weights = sum(tensor.numel() for tensor in base.values())
    if kind == "qlora":
        embedding = base["model.embed_tokens.weight"].numel()
        assert state < 2 * embedding + 16 * 236_544 + 3e5, "no weights of 4 bits"
    elif kind == "lora":
        assert state < 2 * num_weights + 16 * 236_544 + 3e5


def test_what_is_held_in_bf16_is_what_is_held_in_fp32(run):
    precise = ("finetune=lora", *FAST, "trainer.precision=32-true")
    narrow = weights(run("narrow", *precise))
    wide = weights(run("wide", *precise, "finetune.lora.frozen_dtype=float32"))
    assert all((narrow[name] - wide[name]).abs().max() < 1e-5 for name in wide)


@needs_bitsandbytes
def test_four_bits_below_adapters_learn_what_sixteen_do(run):
    precise = (*FAST, "trainer.precision=32-true", "trainer.max_steps=8")
    rows = {}
    for kind in ("lora", "qlora"):
        folder = run(kind, f"finetune={kind}", *precise)
        rows[kind] = json.loads((folder / "metrics.json").read_text())["train/loss"]
    assert rows["qlora"] == pytest.approx(rows["lora"], rel=0.05)
