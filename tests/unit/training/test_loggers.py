"""Loggers end with their job, and one that goes on is the same."""

import functools
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from wandb_run import read_run

from pose.errors import ConfigError, TrainingError
from pose.reporting.dashboard import log_settings
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


def test_rows_of_metrics_outlive_a_disk_that_is_full(tmp_path, monkeypatch):
    """A metric that is new makes the file anew, and so does a run that goes on: in one step."""
    (logger,) = loggers.build_loggers("csv", tmp_path)
    file = tmp_path / "metrics.csv"
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0 + step}, step)
    before = file.read_text()
    assert before.splitlines() == ["step,train/loss", "0,1.0", "1,2.0", "2,3.0"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space"):
            logger.log_metrics({"val/loss": 5.0}, 2)
        assert file.read_text() == before and list(tmp_path.iterdir()) == [file]
        (again,) = loggers.build_loggers("csv", tmp_path)
        again.experiment.metrics = [{"step": 0, "train/loss": "1.0"}]
        assert file.read_text() == before
        with pytest.raises(OSError, match="No space"):
            again.experiment.save()
        assert file.read_text() == before
    logger.finalize("failed")  # with room again: the row that waits has its column
    assert file.read_text().splitlines()[0::3] == ["step,train/loss,val/loss", "2,3.0,"]
    assert file.read_text().splitlines()[-1] == "2,,5.0"
    (again,) = loggers.build_loggers("csv", tmp_path)
    again.experiment.metrics = [{"step": 0, "train/loss": "1.0"}]
    again.experiment.save()
    again.log_metrics({"train/loss": 9.0, "train/skipped_steps": 1.0}, 1)
    again.log_metrics({"train/loss": 8.0}, 2)
    assert file.read_text().splitlines() == ["step,train/loss,train/skipped_steps", "0,1.0,", "1,9.0,1.0", "2,8.0,"]


def test_every_model_of_an_evaluation_has_a_tensorboard_of_its_own(tmp_path):
    models = ["../run", "run", "a/b", ".."]
    found = loggers.dashboards_of("tensorboard", tmp_path, models)
    folders = [Path(logger.log_dir) for (logger,) in found.values()]
    assert list(found) == models and {folder.parent for folder in folders} == {tmp_path / "tensorboard"}
    assert [folder.name for folder in folders] == ["run", "run (2)", "a b", "model"]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [(-1, 9.0), (1, 9.0)])])
def test_a_run_that_begins_again_hides_what_tensorboard_has_from_there_on(tmp_path, step, kept):
    """At step 0 also what was measured before the training: the run was killed before its first checkpoint."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def log(step, steps, value):
        _, logger = loggers.build_loggers("tensorboard", tmp_path, step)
        for at in steps:
            logger.log_metrics({"val/ppl@64": value}, at)
        logger.finalize("success")

    log(0, (-1, 1, 3), 9.0)
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    file.rename(file.with_name("events.out.tfevents.1"))  # it comes first
    log(step, (-1, 1, 3) if step == 0 else (3,), 5.0)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    again = [(-1, 5.0), (1, 5.0), (3, 5.0)] if step == 0 else [(3, 5.0)]
    assert [(event.step, event.value) for event in events.Scalars("val/ppl@64")] == kept + again


def test_a_server_out_of_reach_leaves_an_offline_run_and_a_warning(tmp_path, capsys, monkeypatch):
    """As wandb reports it; the next job of a sweep does not wait for the server again."""
    init, modes = wandb.init, []

    @functools.wraps(init)  # whose parameters are the options that there are
    def out_of_reach(**given):
        modes.append(given["mode"])
        if modes[-1] is None:
            raise wandb.errors.CommError("dial tcp: connection refused\nwhile retrying")
        return init(**given)

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", out_of_reach)
    monkeypatch.setattr(loggers.WandbRunLogger, "unreachable", "")
    for job in ("0", "1"):
        csv, logger = build(tmp_path / job, offline=False)
        with loggers.closing([csv, logger]):
            log_settings([csv, logger], {"method": "pose + yarn"})
            logger.log_metrics({"train/loss": 1.0}, step=0)
        stored = read_run(tmp_path / job)
        assert stored.config["method"] == "pose + yarn" and stored.history[0]["train/loss"] == 1.0
        assert stored.run.run_id == logger.version
    assert modes == [None, "offline", "offline"] and os.environ["WANDB_MODE"] == "online"
    said = capsys.readouterr().out
    assert said.count("W&B cannot be reached (dial tcp: connection refused): the run is logged offline") == 2
    assert all(f"wandb sync {tmp_path}/{job}/wandb/offline-run-*" in said for job in "01")
    assert "while retrying" not in said


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("AuthenticationError", "the API key is invalid"),
        ("UsageError", "the API key is invalid"),
        ("CommError", "failed to upsert bucket: returned error 403: permission denied"),  # of another's entity
    ],
)
def test_an_account_that_wandb_does_not_accept_is_an_error_with_what_to_do(tmp_path, monkeypatch, error, text):
    @functools.wraps(wandb.init)
    def refuse(**_):
        raise getattr(wandb.errors, error)(text)

    monkeypatch.setattr(wandb, "init", refuse)
    found = build(tmp_path)
    said = re.escape(f"{text}. `wandb login`") + r".*logger\.offline=true"
    with pytest.raises(ConfigError, match=said), loggers.closing(found):
        log_settings(found, {})


@pytest.mark.parametrize("offline", [None, True])
def test_wandb_that_is_disabled_stays_so(tmp_path, monkeypatch, offline):
    """Also where a job is to be offline, by its config or for want of an account."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(loggers, "has_wandb_account", lambda: False)
    csv, logger = build(tmp_path, offline=offline)
    with loggers.closing([csv, logger]):
        logger.log_metrics({"train/loss": 1.0}, step=0)
    assert os.environ["WANDB_MODE"] == "disabled" and not (tmp_path / "wandb").exists() and wandb.run is None


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


@pytest.mark.parametrize("content", ["", "../../x", "two words", "0" * 65, b"\\xff\\xfe", None])
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


@pytest.fixture
def job(tmp_path):
    """Makes the folder of a sweep's job, with what Hydra writes into both."""

    def job_(number, *overrides, of_all=("experiment=smoke", "rope=linear,ntk", "seed=0,1")):
        folder = tmp_path / "2026-11-27" / "03-51-36" / str(number)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
        task = "".join(f"    - {override}\n" for override in of_all)
        (folder.parent / "multirun.yaml").write_text(f"hydra:\n  overrides:\n    task:\n{task}")
        return folder

    return job_


def stored(folder, goes_on=False, **options):
    """What W&B has of a run in a folder."""
    options = {"project": "pose", "offline": True} | options
    csv, logger = loggers.build_loggers(
        "wandb", folder, goes_on=goes_on, options=options, title="tiny 2048: pose + yarn"
    )
    with loggers.closing([csv, logger]):
        logger.log_metrics({"train/loss": 1.0}, step=0)
    return read_run(folder).run


def test_a_sweep_is_a_group_whose_jobs_are_called_by_what_differs(job):
    runs = [stored(job(i, "experiment=smoke", f"rope={rope}", "seed=1")) for i, rope in enumerate(("linear", "ntk"))]
    assert [run.display_name for run in runs] == ["rope=linear seed=1", "rope=ntk seed=1"]
    assert {run.run_group for run in runs} == {"2026-11-27 03-51-36"} and {run.job_type for run in runs} == {"train"}


def test_what_is_given_names_a_run(job):
    run = stored(job(0, "rope=ntk"), group="mine", job_type="ablation", run_name="first", tags=["a"])
    assert (run.run_group, run.job_type, run.display_name, list(run.tags)) == ("mine", "ablation", "first", ["a"])


def test_a_run_alone_is_called_by_its_method(tmp_path):
    (tmp_path / "multirun.yaml").write_text("")  # of a sweep into outputs/, where other runs lie in folders by date
    run = stored(tmp_path / "2026-11-27" / "run")
    assert (run.run_group, run.display_name) == ("", "tiny 2048: pose + yarn")


def test_a_run_that_goes_on_keeps_the_name_that_it_has_in_wandb(job):
    folder = job(0, "rope=ntk")
    first = stored(folder)
    shutil.rmtree(folder / "wandb")
    again = stored(folder, goes_on=True)
    assert (first.display_name, again.display_name) == ("rope=ntk", "") and first.run_id == again.run_id
    assert again.run_group == first.run_group
    shutil.rmtree(folder / "wandb")
    assert stored(folder, goes_on=True, run_name="mine").display_name == "mine"


@pytest.mark.parametrize("content", ["", "[", "hydra: 3", "hydra: {overrides: {task: null}}", None])
def test_a_job_whose_overrides_cannot_be_read_is_called_by_its_method(job, content):
    """Or that differs in nothing from the others."""
    folder = job(0, "rope=ntk")
    if content is None:
        (folder / ".hydra" / "overrides.yaml").write_text("- experiment=smoke\n")
    else:
        (folder.parent / "multirun.yaml").write_text(content)
    run = stored(folder)
    assert (run.run_group, run.display_name) == ("2026-11-27 03-51-36", "tiny 2048: pose + yarn")


def test_a_run_may_have_an_id_of_its_own(tmp_path):
    """And goes on under it when it is resumed without."""
    assert stored(tmp_path, id="mine1234").run_id == "mine1234"
    shutil.rmtree(tmp_path / "wandb")
    assert stored(tmp_path, goes_on=True).run_id == "mine1234"
    shutil.rmtree(tmp_path / "wandb")
    assert stored(tmp_path, goes_on=True, id="other").run_id == "other"
    with pytest.raises(ConfigError, match=r"logger\.id=a/b is not accepted: give up to 64 letters"):
        build(tmp_path, id="a/b")


def test_one_id_for_several_runs_is_refused(job, tmp_path):
    with pytest.raises(ConfigError, match=r"logger\.id=mine is one run of W&B for all jobs of a sweep"):
        build(job(0, "rope=ntk"), id="mine")
    with pytest.raises(ConfigError, match=r"logger\.id=mine is one run of W&B for several checkpoints"):
        loggers.dashboards_of("wandb", tmp_path, ["a", "b"], {"id": "mine"})


@pytest.mark.parametrize("key", ["save_dir", "dir", "nmae"])
def test_an_option_that_there_is_not_is_refused_with_those_that_there_are(tmp_path, key):
    with pytest.raises(ConfigError, match=rf"logger\.{key} is not accepted: .*, entity, .*, tags"):
        build(tmp_path, **{key: "x"})


def test_weights_are_asked_for_by_yes_or_no(tmp_path):
    with pytest.raises(ConfigError, match=r"logger\.log_weights='all'"):
        build(tmp_path, log_weights="all")
