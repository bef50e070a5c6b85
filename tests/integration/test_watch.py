"""Evaluation during training, as a user runs it: curves, the best model, kills, several processes."""

import csv
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow
# On so little text that it takes a second
LITTLE = ("watch.max_documents=1", "watch.windows=1", "watch.trials=4")
WATCH = ("watch.every_n_steps=2", "watch.best=tail_ppl@512", *LITTLE)
SMOKE = ("experiment=smoke", "eval=none", "trainer.precision=32-true", "trainer.max_steps=6")


@pytest.fixture(scope="module")
def train(script):
    def train_(folder, *overrides):
        result = script("train.py", *SMOKE, *overrides, f"hydra.run.dir={folder}")
        assert result.returncode == 0, result.stderr[-3000:]
        return result

    return train_


@pytest.fixture(scope="module")
def watched(train, tmp_path_factory):
    """A run, and what it printed."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    return folder, train(folder, *WATCH, "trainer.checkpoint_every_n_steps=2").stdout


def rows(folder: Path) -> dict[int, dict[str, float]]:
    """What was measured, by the step of metrics.csv, which counts from 0."""
    with open(folder / "metrics.csv", newline="") as file:
        found = {
            int(row["step"]): {name: float(value) for name, value in row.items() if name.startswith("val/") and value}
            for row in csv.DictReader(file)
            if row["val/ppl@512"]
        }
    assert found
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.nightly
def test_the_best_step_by_the_gain_of_needles(train, load_json, tmp_path):
    """As a user asks for it, in `watch` and in `eval`; a metric of a length that is not measured is refused."""
    gains = ("watch.tasks=[needle_gain]", "watch.every_n_steps=3", "watch.best=needle_gain@512", "watch.trials=5")
    measured = ("eval=needle_gain", "eval.trials=5", "eval.before=false")
    train(tmp_path / "run", *measured, *gains)
    found = load_json(tmp_path / "run" / "metrics.json")
    assert found["best/needle_gain@512"] and found["best/step"] in (3, 6)
    for name in ("needle_gain@256", "needle_gain@512", "needle_gain_kept@512", "needle_gain@512/0.125"):
        assert math.isfinite(found[name])
    assert (tmp_path / "run" / "best" / "pose_best.json").exists()
    assert (tmp_path / "run" / "plots" / "needle_gain.png").exists()


def test_curves_are_logged_and_the_best_step_is_a_folder(watched, load_json, script, tmp_path):
    run, printed = watched
    found = rows(run)
    assert list(found) == [-1, 1, 3, 5], "before, and after steps 2, 4 and 6"
    for name in ("tail_ppl@256", "tail_ppl@512", "passkey@256", "passkey@512", "short_ppl_increase"):
        assert all(math.isfinite(metrics[f"val/{name}"]) for metrics in found.values())
    tails = {step + 1: metrics["val/tail_ppl@512"] for step, metrics in found.items() if step >= 0}
    best = load_json(run / "best" / "pose_best.json")
    assert (best["metric"], best["step"]) == ("tail_ppl@512", min(tails, key=tails.get))
    assert best["value"] == tails[best["step"]]
    metrics = load_json(run / "metrics.json")
    assert (metrics["best/tail_ppl@512"], metrics["best/step"]) == (best["value"], best["step"])
    assert f"Step 4: tail_ppl@256 {found[3]['val/tail_ppl@256']:.1f}" in printed
    assert f"{run}/best  (tail_ppl@512 {best['value']:.4g} at step {best['step']})" in printed

    result = script(
        "evaluate.py", f"ckpt={run}/best", "eval.lengths=[256,512]", "eval.max_documents=1", "eval.windows=1",
        "eval.trials=4", "eval.seed=1", "reuse=false", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    measured, step = load_json(tmp_path / "metrics.json"), best["step"] - 1
    measured = measured.get("best", measured)
    for name in ("tail_ppl@512", "ppl@256", "passkey@512"):
        assert measured[name] == pytest.approx(found[step][f"val/{name}"], rel=1e-4)


@pytest.mark.nightly
def test_without_it_the_same_model_comes_out(watched, train, tmp_path):
    run, _ = watched
    train(tmp_path, "watch.documents=nowhere.jsonl")
    assert equal(run / "model", tmp_path / "model")
    assert not (tmp_path / "best").exists() and "val/" not in (tmp_path / "metrics.csv").read_text()


@pytest.mark.nightly
def test_a_run_that_is_killed_ends_with_the_same_best_and_the_same_curves(watched, scripts, train, load_json, tmp_path):
    """Killed once right after the first checkpoint, and once while the best of a later step is exported."""
    whole, run = watched[0], tmp_path / "run"
    overrides = [*SMOKE, *WATCH, "trainer.checkpoint_every_n_steps=2", "resume=auto", f"hydra.run.dir={run}"]
    for waits_for in (run / "checkpoints" / "step-2", run / "best" / "pose_best.json"):
        changed = waits_for.stat().st_mtime_ns if waits_for.exists() else 0
        with open(tmp_path / "log", "w") as log:
            process = scripts.start("train.py", *overrides, stdout=log, stderr=log)
        while process.poll() is None and not (waits_for.exists() and waits_for.stat().st_mtime_ns > changed):
            time.sleep(0.001)
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        process.kill()
        process.wait(60)
    train(run, *WATCH, "trainer.checkpoint_every_n_steps=2", "resume=auto")
    assert rows(run) == rows(whole)
    assert load_json(run / "best" / "pose_best.json") == load_json(whole / "best" / "pose_best.json")
    assert equal(run / "best", whole / "best") and equal(run / "model", whole / "model")


@pytest.mark.nightly
def test_a_run_that_goes_on_elsewhere_takes_the_best_along(watched, train, load_json, tmp_path):
    whole = watched[0]
    more = [*WATCH, "trainer.checkpoint_every_n_steps=2", "logger=wandb"]
    result = train(tmp_path / "run", *more, f"resume={whole}/checkpoints/step-6")
    best = load_json(whole / "best" / "pose_best.json")
    assert load_json(tmp_path / "run" / "best" / "pose_best.json") == best
    assert f"at step {best['step']}" in result.stdout
    assert rows(tmp_path / "run") == rows(whole)


@pytest.mark.parametrize(("lr", "warns"), [(3e-3, True), (1e-5, False)])
@pytest.mark.nightly
def test_the_gate_tells_a_run_that_ruins_short_texts(train, tmp_path, lr, warns):
    """At the model's own frequencies and window, so that nothing but the training changes it."""
    printed = train(
        tmp_path, "watch.every_n_steps=3", *LITTLE, "watch.tasks=[perplexity]", "rope=none", "pose.target_len=300",
        f"finetune.lr={lr}", "finetune.warmup_steps=0", "logger=tensorboard",
    ).stdout  # fmt: skip
    assert ("Warning: perplexity at the model's own window of 256 tokens" in printed) == warns
    with open(tmp_path / "metrics.csv") as file:
        increases = [float(row["val/short_ppl_increase"]) for row in csv.DictReader(file) if row["val/ppl@300"]]
    assert increases[0] == pytest.approx(0, abs=1e-4), "the model is the untuned one before the first step"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("val/short_ppl_increase")
    assert [event.step for event in events] == [-1, 2, 5]
    assert [event.value for event in events] == pytest.approx(increases, rel=1e-5, abs=1e-8)
    assert (max(increases) > 0.05) == warns
