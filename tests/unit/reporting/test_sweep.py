"""The table over the jobs of a sweep."""

import csv
import json

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from pose.app.callbacks import SweepTable
from pose.app.report import read
from pose.reporting.sweep import over_seeds, write_sweep


def config(folder, mode=RunMode.MULTIRUN):
    return OmegaConf.create({"hydra": {"mode": mode, "sweep": {"dir": str(folder)}}})


def job(folder, overrides, metrics=None):
    """Leaves what a job of a multirun leaves; without metrics, what one leaves that failed."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides) or "[]\n")
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))


def test_sweep_table_joins_the_jobs(tmp_path, capsys):
    """In the order of the jobs, 10 after 2; no row for a job that failed, and numbers alone."""
    job(tmp_path / "0", ["rope=linear"], {"tail_ppl@256": 20.5, "passkey@256": 1.0, "model": "a name"})
    job(tmp_path / "2", ["rope=ntk"], {"tail_ppl@256": 19.0})
    job(tmp_path / "10", ["rope=yarn", "seed=${hydra:job.num}"], {"tail_ppl@256": 18, "tail_ppl@512": 17.5})
    job(tmp_path / "3", ["rope=broken"])
    SweepTable().on_multirun_end(config(tmp_path))
    with open(tmp_path / "sweep.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["overrides", "passkey@256", "tail_ppl@256", "tail_ppl@512"],
        ["rope=linear", "1.0", "20.5", ""],
        ["rope=ntk", "", "19.0", ""],
        ["rope=yarn seed=${hydra:job.num}", "", "18", "17.5"],
    ]
    printed = capsys.readouterr().out
    for text in ("rope=linear", "rope=yarn", "20.5", "17.5", "100%"):
        assert text in printed


def test_what_is_not_a_number_keeps_its_place(tmp_path):
    """A share of a gain that is none, written as null."""
    job(tmp_path / "0", ["rope=linear"], {"needle_gain_kept@512": None})
    job(tmp_path / "1", ["rope=yarn"], {"needle_gain_kept@512": 0.75})
    SweepTable().on_multirun_end(config(tmp_path))
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert list(csv.reader(file))[1:] == [["rope=linear", "nan"], ["rope=yarn", "0.75"]]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_of_seeds_of_which_one_has_no_number_there_is_no_mean(tmp_path, capsys, place):
    values = [0.5, 0.7]
    values.insert(place, None)
    for seed, value in enumerate(values):
        job(tmp_path / str(seed), [f"seed={seed}"], {"needle_gain_kept@512": value})
    SweepTable().on_multirun_end(config(tmp_path))
    printed = capsys.readouterr().out
    assert "nan" in printed and "0.5" not in printed and "0.7" not in printed


def test_an_evaluation_of_several_checkpoints_has_a_row_for_each(tmp_path):
    job(tmp_path / "0", ["eval.trials=5"], {"base": {"ppl@256": 20.5}, "mine": {"ppl@256": 19.5, "passkey@256": 1.0}})
    job(tmp_path / "1", ["eval.trials=9"], {"ppl@256": 18.5})
    SweepTable().on_multirun_end(config(tmp_path))
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["overrides", "passkey@256", "ppl@256"],
            ["eval.trials=5 base", "", "20.5"],
            ["eval.trials=5 mine", "1.0", "19.5"],
            ["eval.trials=9", "", "18.5"],
        ]


def test_a_sweep_of_other_tasks_shows_what_was_measured(tmp_path, capsys):
    job(tmp_path / "0", ["rope=ntk"], {"needle@256": 0.375, "train/loss": 2.0})
    SweepTable().on_multirun_end(config(tmp_path))
    printed = capsys.readouterr().out
    assert "needle" in printed and "@256" in printed and "38%" in printed


@pytest.mark.parametrize("damage", ["{", "[]", "", "\\x80", '{"ppl@256": "a"}'])
def test_a_job_that_cannot_be_read_is_left_out_and_named(tmp_path, capsys, damage):
    """Its folder may be of a full disk: the table of the others comes all the same."""
    for i in range(2):
        job(tmp_path / str(i), [f"rope=ntk{i}"], {"tail_ppl@256": 19.0})
    (tmp_path / "0" / "metrics.json").write_text(damage)
    job(tmp_path / "2", ["rope=yarn"], {"tail_ppl@256": 18.0})
    (tmp_path / "2" / ".hydra" / "overrides.yaml").write_text("- [")
    job(tmp_path / "3", [], {"tail_ppl@256": 17.0})
    SweepTable().on_multirun_end(config(tmp_path))
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert [row["overrides"] for row in csv.DictReader(file)] == ["rope=ntk1", ""]
    printed = capsys.readouterr().out
    for i in (0, 2):
        assert f"{tmp_path}/{i} is left out of the sweep's table" in printed
    assert "rope=ntk1" in printed and "default" in printed and f"{tmp_path}/3 " not in printed


def test_sweep_table_grows_with_every_job(tmp_path):
    callback = SweepTable()
    callback.on_job_end(config(tmp_path), None)
    assert not (tmp_path / "sweep.csv").exists()
    for i in range(3):
        job(tmp_path / str(i), [f"seed={i}"], {"ppl@256": float(i)})
        callback.on_job_end(config(tmp_path), None)
        with open(tmp_path / "sweep.csv", newline="") as file:
            assert [row["overrides"] for row in csv.DictReader(file)] == [f"seed={j}" for j in range(i + 1)]


def test_a_job_that_goes_on_for_more_steps_is_left_out_until_it_has_them(tmp_path, caplog):
    """Its overrides say the new number already, and its metrics are of the old one."""
    for seed, steps in ((0, 500), (1, 250)):
        metrics = {"ppl@8": 1.0 + seed, "train/steps": steps}
        job(tmp_path / str(seed), ["trainer.max_steps=500", f"seed={seed}"], metrics)
        (tmp_path / str(seed) / "config.yaml").write_text("trainer: {max_steps: 500}\n")
    assert [metrics["ppl@8"] for _, metrics in write_sweep(tmp_path)] == [1.0]
    assert "what was measured is of 250 of 500 steps" in caplog.text
    for seed in "01":
        (tmp_path / seed / "metrics.json").unlink()
    SweepTable().on_multirun_end(config(tmp_path))
    assert not (tmp_path / "sweep.csv").exists(), "the table of before does not stay"


def test_numbers_have_the_settings_that_they_were_made_with(tmp_path):
    """A start that was refused has left its overrides in Hydra's file; an evaluation that has begun, in both."""
    for name, overrides in (("0", ["trainer.max_steps=500"]), ("1", ["ckpt=b"])):
        job(tmp_path / name, overrides, {"ppl@8": 1.0, "train/steps": 250})
        (tmp_path / name / "config.yaml").write_text("trainer: {max_steps: 250}\n")
    (tmp_path / "0" / "provenance.json").write_text(json.dumps({"overrides": ["trainer.max_steps=250"]}))
    (tmp_path / "1" / "provenance.json").write_text(json.dumps({"overrides": ["ckpt=b"]}))
    (tmp_path / "1" / "results.json").write_text(json.dumps({"provenance": {"overrides": ["ckpt=a"]}}))
    assert [overrides for overrides, _ in write_sweep(tmp_path)] == ["trainer.max_steps=250", "ckpt=a"]
    assert [source.name for source in read(tmp_path)] == ["trainer.max_steps=250", "ckpt=a"]


def test_a_sweep_of_which_no_job_is_complete_has_a_page(tmp_path, capsys):
    job(tmp_path / "0", ["rope=yarn"])
    (tmp_path / "0" / "config.yaml").write_text("seed: 0\n")
    SweepTable().on_multirun_end(config(tmp_path))
    assert (tmp_path / "report.html").is_file() and not (tmp_path / "sweep.csv").exists()


def test_single_runs_write_no_sweep(tmp_path):
    job(tmp_path / "0", ["seed=0"], {"ppl@256": 1.0})
    SweepTable().on_job_end(config(tmp_path, RunMode.RUN), None)
    assert not (tmp_path / "sweep.csv").exists()


def test_a_sweep_without_results_says_nothing(tmp_path, capsys):
    SweepTable().on_multirun_end(config(tmp_path))
    assert capsys.readouterr().out == ""


def test_jobs_that_differ_in_their_seed_are_one_row():
    jobs = [("seed=0", {"ppl@8": 1.0}), ("seed=1", {"ppl@8": 3.0}), ("data.seed=1 seed=2", {"ppl@8": 5.0})]
    assert over_seeds(jobs) == {
        "default": [{"ppl@8": 1.0}, {"ppl@8": 3.0}], "data.seed=1": [{"ppl@8": 5.0}]
    }  # fmt: skip
    assert list(over_seeds([("seed=0", {}), ("seed=1 resume=auto +logger.mode=online", {})])) == ["default"]
    assert list(over_seeds([("num_threads=1", {}), ("num_threads=2", {})])) == ["num_threads=1", "num_threads=2"]
