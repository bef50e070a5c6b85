"""Whether a run starts, goes on, or is complete. Whole runs: tests/integration/test_resume.py."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from pose.app import run as outcome
from pose.errors import CheckpointError, ConfigError
from pose.evaluation.task import Estimate
from pose.training import launch, loggers
from pose.training.checkpoints import Checkpoint
from pose.training.resume import check_resume, find_resume


def config(**keys):
    return OmegaConf.create(
        {
            "resume": "auto",
            "trust_pickle": False,
            "trainer": {"max_steps": 9},
            "eval": {"tasks": ["passkey"]},
            "model": {"path": "a"},
            "logger": {"name": "tensorboard"},
        }
        | keys
    )


def write_checkpoint(run_dir: Path, step: int, digest: str = "wrong") -> Path:
    folder = run_dir / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "state").write_text("x")
    (folder / "manifest.json").write_text(json.dumps({"step": step, "settings": {}, "files": {"state": [1, digest]}}))
    return folder


def test_the_choice_of_the_process_that_started_this_one_is_taken(tmp_path, monkeypatch):
    """It has read every byte: the others look at sizes alone, and choose nothing."""
    older, _ = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path, 6)
    with pytest.raises(CheckpointError, match="is whole"):
        find_resume(config(), tmp_path)
    monkeypatch.setenv(launch.PARENT, str(os.getppid()))
    monkeypatch.setenv(launch.CHECKPOINT, str(older))
    assert find_resume(config(), tmp_path).step == 3
    monkeypatch.setenv(launch.CHECKPOINT, "")
    assert find_resume(config(resume=None), tmp_path) is None
    (older / "state").write_text("xx")
    monkeypatch.setenv(launch.CHECKPOINT, str(older))
    with pytest.raises(CheckpointError, match="step-3 is damaged"):
        find_resume(config(), tmp_path)


@pytest.mark.parametrize(
    ("strategy", "inside", "refused"), [("FSDP", False, True), ("FSDP", True, False), ("any", False, False)]
)
def test_what_is_unpickled_from_another_folder_is_asked_for(tmp_path, strategy, inside, refused):
    folder = tmp_path / ("run" if inside else "other") / "checkpoints" / "step-3"
    arguments = Checkpoint(folder, 3, {"strategy": strategy}), {"strategy": strategy}, tmp_path / "run"
    if refused:
        with pytest.raises(ConfigError, match="trust_pickle=true"):
            check_resume(config(), *arguments)
        check_resume(config(trust_pickle=True), *arguments)
    else:
        check_resume(config(), *arguments)


def test_what_was_measured_is_taken_under_the_same_settings_alone(tmp_path):
    measured = []
    model = SimpleNamespace(to=lambda device: "model")
    suite = SimpleNamespace(run=lambda model: measured.append(model) or {"passkey@8": Estimate(1.0, 0.5, 1.0, 4)})
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device="cpu"))
    plan = SimpleNamespace(checkpoint=None, suite=suite, settings={"seed": 0}, trainer=trainer)

    def start(plan=plan, **keys):
        results = outcome.pick_up(config(**keys), plan, tmp_path)
        outcome.measure(config(**keys), plan, tmp_path, results, "untuned", lambda: model)
        return results

    assert start() == start() == {"untuned": {"passkey@8": 1.0}} and len(measured) == 1
    start(eval={"tasks": ["passkey"], "trials": 3})
    assert len(measured) == 2
    start(SimpleNamespace(**vars(plan) | {"settings": {"seed": 1}}))
    assert len(measured) == 3
    assert start(SimpleNamespace(**vars(plan) | {"suite": None})) == {} and len(measured) == 3


def test_tensorboard_drops_what_was_logged_beyond_the_step(tmp_path):
    assert loggers.build_loggers(config(), tmp_path, 7)[1]._kwargs["purge_step"] == 7
    assert loggers.build_loggers(config(), tmp_path)[1]._kwargs["purge_step"] is None
