"""Loggers end with their job, and one that goes on is the same."""

import sys
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from pose.errors import TrainingError
from pose.training import loggers

wandb = pytest.importorskip("wandb")


def build(run_dir: Path, resume=None, name="wandb", **options):
    options = {"project": "pose", "offline": True} | options
    return loggers.build_loggers(name, run_dir, goes_on=resume is not None, options=options)


@pytest.fixture(autouse=True)
def no_run(monkeypatch):
    """No W&B run before and after."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert wandb.run is None
    yield
    if wandb.run is not None:
        wandb.finish()


class Noted(DummyLogger):
    def __init__(self, error=None):
        super().__init__()
        self.ends, self.error = [], error

    def finalize(self, status):
        self.ends.append(status)
        if self.error is not None:
            raise self.error


def test_loggers_are_finished_however_a_job_ends(capsys):
    good = Noted()
    with loggers.closing([good]):
        pass
    assert good.ends == ["success"]
    for error in (TrainingError("diverged"), KeyboardInterrupt(), SystemExit(143)):
        broken, after = Noted(OSError(28, "No space left on device")), Noted()
        with pytest.raises(type(error)), loggers.closing([broken, after]):
            raise error
        assert broken.ends == after.ends == ["failed"]
    assert "Noted could not be finished: [Errno 28] No space left" in capsys.readouterr().out
    with pytest.raises(OSError), loggers.closing([Noted(OSError("disk"))]):
        pass


def test_a_job_that_fails_ends_its_run_and_the_next_has_its_own(tmp_path):
    """Lightning's logger would log into the run that is open, in the folder of the job before."""
    ids = []
    for job in ("0", "1"):
        csv, logger = build(tmp_path / job)
        with pytest.raises(TrainingError), loggers.closing([csv, logger]):
            logger.log_metrics({"train/loss": 1.0}, step=0)
            ids.append(wandb.run.id)
            raise TrainingError("diverged")
        assert wandb.run is None
        assert len(list((tmp_path / job / "wandb").glob("offline-run-*"))) == 1
        assert (tmp_path / job / ".wandb_id").read_text() == ids[-1]
    assert ids[0] != ids[1]


def test_a_job_that_never_logged_opens_no_run(tmp_path):
    with pytest.raises(TrainingError), loggers.closing(build(tmp_path)):
        raise TrainingError("before the training")
    assert wandb.run is None and not (tmp_path / "wandb").exists()


def test_a_run_of_somebody_else_goes_on(tmp_path):
    theirs = wandb.init(mode="offline", dir=tmp_path)
    with loggers.closing(build(tmp_path / "run")):
        pass
    assert wandb.run is theirs


@pytest.mark.parametrize("content", ["", "../../x", "ABCDEF12", "0123456789", b"\\xff\\xfe", None])
def test_an_id_that_is_none_is_thrown_away(tmp_path, capsys, content):
    kept = build(tmp_path)[1].version
    assert build(tmp_path, resume="auto")[1].version == kept
    file = tmp_path / ".wandb_id"
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert build(tmp_path, resume="auto")[1].version not in (kept, content)
    assert "does not hold the id of a W&B run" in capsys.readouterr().out


def test_wandb_has_nothing_to_warn_of(tmp_path, capsys, monkeypatch):
    """Of a setting that Lightning passes on and nobody here has made."""
    monkeypatch.setenv("WANDB_SILENT", "false")
    csv, logger = build(tmp_path)
    with warnings.catch_warnings(), loggers.closing([csv, logger]):
        warnings.simplefilter("error")
        assert logger.experiment.id == logger.version
    assert "anonymous" not in capsys.readouterr().err
    assert isinstance(csv, CSVLogger) and isinstance(logger, WandbLogger) and "wandb" in sys.modules
