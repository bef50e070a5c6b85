"""The training itself, to the digit: what does not mean to change it gives these losses."""

import csv

import pytest

pytestmark = pytest.mark.slow
LOSSES = [
    3.556739568710327, 2.6375181674957275, 2.6836020946502686, 2.5991461277008057, 1.761946439743042,
    2.7923877239227295, 2.2687466144561768, 2.6447978019714355, 2.5665578842163086, 2.540569305419922,
]  # fmt: skip


def test_ten_steps_have_the_losses_they_always_had(script, tmp_path):
    """The shipped model, books and retrieval, PoSE and YaRN to 1,024 tokens, in fp32 on one thread."""
    result = script(
        "train.py", "eval=none", "pose.target_len=1024", "trainer.max_steps=10", "trainer.log_every_n_steps=1",
        "trainer.precision=32-true", "trainer.checkpoint_every_n_steps=null", "num_threads=1", "trainer.global_batch=4",
        "trainer.micro_batch=4", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    with open(tmp_path / "metrics.csv", newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses == pytest.approx(LOSSES, rel=1e-4)
