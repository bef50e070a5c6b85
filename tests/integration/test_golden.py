"""The training itself, to the digit: what does not mean to change it gives these losses."""

import csv

import pytest

pytestmark = pytest.mark.slow
LOSSES = [
    3.517744779586792, 2.7222931385040283, 2.953396797180176, 4.060414791107178, 3.224910020828247, 3.3432581424713135,
    3.1780035495758057, 4.14887809753418, 3.8293440341949463, 3.675374746322632,
]  # fmt: skip


def test_ten_steps_have_the_losses_they_always_had(script, tmp_path):
    """The shipped model, books and retrieval, PoSE and YaRN to 1,024 tokens, in fp32 on one thread."""
    result = script(
        "train.py", "eval=none", "pose.target_len=1024", "trainer.max_steps=10", "trainer.log_every_n_steps=1",
        "trainer.precision=32-true", "trainer.checkpoint_every_n_steps=null", "num_threads=1",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    with open(tmp_path / "metrics.csv", newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses == pytest.approx(LOSSES, rel=1e-4)
