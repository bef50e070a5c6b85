"""Every strategy on one GPU, as a user runs it: it trains, and exports what plain training on the GPU does."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
RUN = ("experiment=smoke", "eval=none", "trainer.devices=1", "trainer.precision=bf16-mixed", "model.attention=sdpa")


@pytest.fixture(scope="module")
def plain(script, tmp_path_factory):
    return run(script, tmp_path_factory.mktemp("plain") / "run", "strategy=auto")


def run(script, folder, *overrides):
    result = script("train.py", *RUN, *overrides, f"hydra.run.dir={folder}", fresh=True)  # CUDA outlives no fork
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["cost/peak_memory_gib"] > 0
    return load_file(folder / "model" / "model.safetensors"), metrics["train/loss"]


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_run_resumes_between_two_logged_steps(script, tmp_path, strategy):
    """What was not logged yet goes on where new losses are: Lightning reads it before it moves the model there."""
    settings = ("trainer.max_steps=6", "trainer.log_every_n_steps=4", "trainer.checkpoint_every_n_steps=3")
    run(script, tmp_path / "run", f"strategy={strategy}", *settings)
    step = tmp_path / "run" / "checkpoints" / "step-3"
    _, loss = run(script, tmp_path / "again", f"strategy={strategy}", *settings, f"resume={step}")
    assert loss > 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_every_strategy_trains_on_a_gpu(script, plain, tmp_path, strategy):
    weights, loss = run(script, tmp_path / "run", f"strategy={strategy}")
    wanted, wanted_loss = plain
    assert loss == pytest.approx(wanted_loss, rel=1e-2)
    for name in wanted:  # four steps of Adam at a learning rate of 5e-4, whose signs rounding may turn
        torch.testing.assert_close(weights[name].float(), wanted[name].float(), rtol=0, atol=4e-3)
