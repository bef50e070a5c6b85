"""evaluate.py as a user runs it: one checkpoint, several, killed and given again."""

import csv
import json
import shutil
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "assets" / "tiny"
QUICK = (
    "eval.tasks=[perplexity,passkey,needle]", "eval.lengths=[128,256]", "eval.windows=2", "eval.tail=16", "eval.bin=64",
    "eval.stride=100", "eval.sliding_tokens=700", "eval.trials=2", "eval.depths=[0.0,0.5]",
)  # fmt: skip
KEYS = {
    "ppl@128", "ppl@256", "tail_ppl@128", "tail_ppl@256", "sliding_ppl@128", "sliding_ppl@256", "bits_per_byte@128",
    "bits_per_byte@256", "position_ppl@0-64", "position_ppl@64-128", "position_ppl@128-192", "position_ppl@192-256",
    "passkey@128", "passkey@256", "needle@128", "needle@256", "needle@128/0", "needle@128/0.5", "needle@256/0",
    "needle@256/0.5",
}  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A second checkpoint: the shipped one with its embeddings doubled."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name: 2 * tensor if "embed" in name else tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def evaluate(script, folder, *overrides):
    result = script("evaluate.py", f"hydra.run.dir={folder}", f"cache_dir={folder.parent / 'cache'}", *overrides)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_one_checkpoint(script, load_json, tmp_path):
    result = evaluate(script, tmp_path / "run", "ckpt=assets/tiny", *QUICK)
    metrics = load_json(tmp_path / "run" / "metrics.json")
    assert set(metrics) == KEYS
    assert 20 < metrics["ppl@256"] < 80 and 1 < metrics["bits_per_byte@256"] < 4
    found = load_json(tmp_path / "run" / "results.json")["checkpoints"]["assets/tiny"]
    assert {name: entry["value"] for name, entry in found["metrics"].items()} == metrics
    assert found["window"] == 256 and found["took"]["peak_memory_gib"] > 0.1
    (document,) = found["measured"]["perplexity"].values()
    assert len(document["sha256"]) == 64
    with open(tmp_path / "run" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"]: float(row["value"]) for row in rows} == metrics
    assert {row["checkpoint"] for row in rows} == {"assets/tiny"}
    passkey = next(row for row in rows if row["metric"] == "passkey@256")
    assert float(passkey["low"]) < float(passkey["value"]) and passkey["num"] == "2"
    assert {png.name for png in (tmp_path / "run" / "plots").iterdir()} == {"evaluation.png", "needle.png"}
    assert "sliding-window perplexity" in result.stdout and "@256" in result.stdout


def test_a_sweep_ends_with_one_table_and_one_page(script, tmp_path):
    result = script(
        "evaluate.py", "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", f"cache_dir={tmp_path / 'cache'}",
        "ckpt=assets/tiny", "eval.tasks=[perplexity]", "eval.lengths=[128]", "eval.tail=16", "eval.windows=1,2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    with open(tmp_path / "sweep" / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["overrides"].split()[-1] for row in rows] == ["eval.windows=1", "eval.windows=2"]
    assert rows[0]["tail_ppl@128"] != rows[1]["tail_ppl@128"]
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "eval.windows=1" in page and "eval.windows=2" in page
    assert "Sweep" in result.stdout and "Page" in result.stdout


def test_a_sweep_with_a_job_that_fails_has_its_table_and_page_too(script, tmp_path):
    result = script(
        "evaluate.py", "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", f"cache_dir={tmp_path / 'cache'}",
        "ckpt=assets/tiny", "eval.tasks=[perplexity]", "eval.lengths=[128]", "eval.tail=16", "eval.windows=0,1",
    )  # fmt: skip
    assert result.returncode == 1 and "eval.windows=0" in result.stdout
    assert "Sweep (" in result.stdout and "eval.windows=1" in (tmp_path / "sweep" / "sweep.csv").read_text()
    assert "assets/tiny" in (tmp_path / "sweep" / "report.html").read_text()


@pytest.mark.nightly
def test_several_checkpoints_and_nothing_is_measured_twice(script, load_json, tmp_path, other):
    evaluate(script, tmp_path / "alone", "ckpt=assets/tiny", *QUICK)
    outcomes = tmp_path / "cache" / ".outcomes"
    before = {file: file.stat().st_mtime_ns for file in outcomes.iterdir()}
    result = evaluate(script, tmp_path / "both", f"ckpt=[assets/tiny,{other}]", *QUICK)
    metrics = load_json(tmp_path / "both" / "metrics.json")
    assert list(metrics) == ["assets/tiny", str(other)]
    assert metrics["assets/tiny"] == load_json(tmp_path / "alone" / "metrics.json")
    page = (tmp_path / "both" / "report.html").read_text()
    assert all(f'data-line="{name}"' in page for name in metrics)
    assert metrics[str(other)]["ppl@256"] != metrics["assets/tiny"]["ppl@256"]
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())
    assert len(list(outcomes.iterdir())) == 2 * len(before)
    assert "1 of 1 results reused from the cache" in result.stdout
    evaluate(script, tmp_path / "anew", "ckpt=assets/tiny", "reuse=false", *QUICK)
    assert all(file.stat().st_mtime_ns > then for file, then in before.items())
    assert load_json(tmp_path / "anew" / "metrics.json") == pytest.approx(metrics["assets/tiny"], rel=1e-6)


@pytest.mark.nightly
def test_a_killed_evaluation_goes_on(scripts, script, load_json, tmp_path, other):
    arguments = [f"ckpt=[{other},assets/tiny]", f"cache_dir={tmp_path}/cache", *QUICK]
    outcomes, killed = tmp_path / "cache" / ".outcomes", 0
    out, err = tmp_path / "out", tmp_path / "err"
    for _ in range(30):
        known = len(list(outcomes.glob("*.json")))
        with open(out, "w") as stdout, open(err, "w") as stderr:
            run = scripts.start(
                "evaluate.py", *arguments, f"hydra.run.dir={tmp_path}/run", stdout=stdout, stderr=stderr
            )
        while run.poll() is None and len(list(outcomes.glob("*.json"))) < known + 4:
            time.sleep(0.001)
        if run.poll() is not None:
            break
        run.kill()
        run.wait(60)
        killed += 1
    assert run.wait(600) == 0, err.read_text()[-3000:]
    assert killed >= 2 and "results reused from the cache" in out.read_text()
    evaluate(script, tmp_path / "whole", arguments[0], f"cache_dir={tmp_path}/other", *QUICK)
    found, expected = (load_json(tmp_path / folder / "metrics.json") for folder in ("run", "whole"))
    assert list(found) == list(expected) == [str(other), "assets/tiny"]
    for name, metrics in expected.items():
        assert found[name] == pytest.approx(metrics, rel=1e-6)


def test_ruler_by_its_names(script, load_json, tmp_path):
    evaluate(
        script, tmp_path / "run", "ckpt=assets/tiny", "eval=ruler", "eval.tasks=[niah_single_1,fwe]",
        "eval.lengths=[512]", "eval.trials=2",
    )  # fmt: skip
    metrics = load_json(tmp_path / "run" / "metrics.json")
    assert set(metrics) == {"ruler/niah_single_1@512", "ruler/fwe@512"}
    outcome = next(
        json.loads(file.read_text())["value"]["outcome"] for file in (tmp_path / "cache" / ".outcomes").iterdir()
    )
    assert len(outcome["predictions"]) == 2
