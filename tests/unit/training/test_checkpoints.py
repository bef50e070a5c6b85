"""Checkpoints on disk: whole or not there, and noticed when damaged. Whole runs: tests/integration/test_resume.py."""

import json
import os
import re
import shutil
import signal
from traceback import StackSummary
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader

from pose.errors import CheckpointError, GuardError, Interrupted, TrainingError
from pose.training import signals
from pose.training.checkpoints import (
    Checkpoint,
    CheckpointIO,
    Checkpoints,
    find_checkpoint,
    is_foreign,
    list_checkpoints,
    read_checkpoint,
)
from pose.training.folder import alone_in, run_id


class Line(L.LightningModule):
    """One weight."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.fixture
def fit(tmp_path):
    """Trains for some steps with checkpoints; returns their folder."""

    def fit_(max_steps, callback=None, then=(), **arguments):
        folder = tmp_path / "checkpoints"
        callback = callback or Checkpoints(
            folder, **{"every_n_steps": 2, "keep": 2, "settings": {"seed": 3}} | arguments
        )
        trainer = L.Trainer(
            max_steps=max_steps, max_epochs=-1, callbacks=[callback, *then], plugins=[CheckpointIO()],
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Line(), DataLoader(torch.ones(64, 1), 1))
        return folder

    return fit_


def test_the_newest_ones_stay(fit):
    folder = fit(7, keep=3)
    assert [path.name for path in list_checkpoints(folder)] == ["step-4", "step-6", "step-7"]
    found = find_checkpoint(folder)
    assert (found.step, found.settings, found.state) == (7, {"seed": 3}, folder / "step-7" / "state")
    state = torch.load(found.state, weights_only=True)
    assert state["global_step"] == 7 and set(state["state_dict"]) == {"layer.weight", "layer.bias"}


def test_none_unless_asked_to_stop(fit):
    assert find_checkpoint(fit(5, every_n_steps=None)) is None


class Fails(L.Callback):
    """An export that does not come to its end."""

    def __init__(self, error):
        self.error = error

    def on_train_end(self, trainer, pl_module):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SystemExit(143), KeyboardInterrupt(), GuardError("other logits")]
)
def test_a_training_is_kept_whose_export_does_not_end(fit, tmp_path, error, caplog):
    """Also where no checkpoint was asked for; otherwise the one of the last step is there already."""
    with caplog.at_level("INFO", "pose"), pytest.raises(BaseException, match=re.escape(f"{error}")):
        fit(5, every_n_steps=None, then=[Fails(error)])
    assert find_checkpoint(tmp_path / "checkpoints").step == 5
    assert "step-5: resume=auto exports it" in caplog.text


def test_what_training_has_broken_is_not_kept(fit, tmp_path):
    with pytest.raises(TrainingError):
        fit(5, every_n_steps=None, then=[Fails(TrainingError("broken", anew=True))])
    assert find_checkpoint(tmp_path / "checkpoints") is None


def test_steps_are_numbers_not_words(fit, tmp_path):
    folder = fit(11, keep=9)
    assert [path.name for path in list_checkpoints(folder)][-2:] == ["step-10", "step-11"]
    (folder / "step-final").mkdir()
    assert find_checkpoint(folder).step == 11


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(folder):
    with open(folder / "state", "r+b") as file:
        file.truncate(os.path.getsize(folder / "state") - 1)


def flip(folder):
    content = bytearray((folder / "state").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state").write_bytes(content)


def scribble(folder):
    (folder / "manifest.json").write_text("{")


def empty(folder):
    (folder / "manifest.json").write_text("{}")


def rewrite(**entries):
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text()) | entries
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


DAMAGES = [
    remove("state"), remove("manifest.json"), cut, flip, scribble, empty, rewrite(files=None), rewrite(files=[]),
    rewrite(files={}), rewrite(step="4"), rewrite(step=True), rewrite(settings=None), rewrite(files={"state": 3}),
    rewrite(files={"state": [None, "x"]}), rewrite(files={"state": ["3", 3]}),
    rewrite(files={"manifest.json": [1, ""]}),
    lambda folder: (folder / "manifest.json").write_text("[]"),
    lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"),
    lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_with_a_warning(fit, capsys, damage):
    folder = fit(4)
    damage(folder / "step-4")
    with pytest.raises(CheckpointError, match="step-4"):
        read_checkpoint(folder / "step-4")
    assert find_checkpoint(folder).step == 2
    assert "Warning" in (printed := capsys.readouterr().out) and "step-4" in printed


def test_a_damaged_newer_one_makes_way_for_the_next(fit):
    """It counts for none of those that are kept: else the one just written would go in its place."""
    folder = fit(8, every_n_steps=4)
    flip(folder / "step-8")
    fit(6, every_n_steps=3, keep=1)
    assert [path.name for path in list_checkpoints(folder)] == ["step-6"]
    assert find_checkpoint(folder).step == 6


def test_weights_that_are_not_finite_are_not_saved(fit, monkeypatch, tmp_path):
    training_step = Line.training_step

    def diverges(self, batch, batch_idx):
        if self.global_step == 5:
            self.layer.weight.data.fill_(torch.inf)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(Line, "training_step", diverges)
    with pytest.raises(TrainingError, match=r"infinite or NaN after step 6: it is not saved.*another folder"):
        fit(9)
    assert find_checkpoint(tmp_path / "checkpoints").step == 4


def test_a_signal_to_another_process_stops_this_one(fit, monkeypatch):
    asked = []

    def reduce_boolean_decision(self, decision, all=True):
        asked.append((decision, all))
        return True if all else len(asked) > 3

    monkeypatch.setattr("lightning.pytorch.strategies.Strategy.reduce_boolean_decision", reduce_boolean_decision)
    with pytest.raises(Interrupted, match="asked to stop at step 3"):
        fit(9, every_n_steps=None)
    assert asked[:4] == [(False, False)] * 4


def test_when_all_are_damaged_nothing_is_guessed(fit):
    folder = fit(4)
    for checkpoint in list_checkpoints(folder):
        flip(checkpoint)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole.*Remove the run's folder"):
        find_checkpoint(folder)


def test_what_a_killed_process_left_is_no_checkpoint_and_goes(fit):
    folder = fit(2)
    for name in (".step-4.partial", ".step-2.removed"):
        (folder / name).mkdir()
        (folder / name / "state").write_text("half")
    assert find_checkpoint(folder).step == 2
    fit(2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-2"]


def test_the_step_it_goes_on_from_is_not_written_again(fit):
    folder = fit(4)
    before = (folder / "step-4" / "state").stat().st_mtime_ns
    fit(4, every_n_steps=4, saved=4)
    assert (folder / "step-4" / "state").stat().st_mtime_ns == before


def test_a_failed_write_keeps_the_ones_before_and_says_so(fit, monkeypatch):
    save = torch.save

    def fails_late(state, path):
        if state["global_step"] == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", fails_late)
    with pytest.raises(TrainingError, match=r"step 4 cannot be written .*No space left.*still step-2, to go on"):
        fit(6)


def test_a_manifest_names_every_file(fit):
    folder = fit(2)
    manifest = json.loads((folder / "step-2" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"state"} and manifest["step"] == 2


def test_what_is_not_in_the_manifest_is_no_part_of_a_checkpoint(fit):
    """Lightning reads all that is under state; a file that was put there was never digested."""
    folder = fit(2) / "step-2"
    (folder / "notes.txt").write_text("of somebody")
    assert read_checkpoint(folder).step == 2
    (folder / "state").rename(folder / "part")
    (folder / "state").mkdir()
    (folder / "part").rename(folder / "state" / "0.distcp")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {"state/0.distcp": manifest["files"]["state"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert read_checkpoint(folder).step == 2
    (folder / "state" / ".metadata").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"damaged: state/.metadata is not in its manifest"):
        read_checkpoint(folder)


def test_a_file_of_a_checkpoints_name_makes_way(fit, tmp_path):
    """Twice: what was left of the first stood in the way of the second."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step-2", "step-4", "step-100", ".step-2.removed", ".step-4.partial"):
        (folder / name).write_text("mine")
    assert list_checkpoints(folder) == [] and find_checkpoint(folder) is None
    fit(4)
    assert [path.name for path in list_checkpoints(folder)] == ["step-2", "step-4"]
    assert sorted(path.name for path in folder.iterdir()) == ["step-100", "step-2", "step-4"]


def started(run_dir) -> str:
    """Gives a run's folder its id, as a run does."""
    with alone_in(run_dir):
        return run_id(run_dir)


def test_a_checkpoint_names_its_run(fit, tmp_path):
    own = started(tmp_path)
    assert started(tmp_path) == own and started(tmp_path / "other") != own
    checkpoint = read_checkpoint(fit(2) / "step-2")
    assert checkpoint.run == own and checkpoint.is_own(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    spelt = link / "other" / ".." / "checkpoints" / "step-2"
    assert read_checkpoint(spelt).is_own(tmp_path) and read_checkpoint(spelt).is_own(link)
    assert not is_foreign(spelt, link / "checkpoints" / "..")


def test_what_came_from_another_run_is_not_a_runs_own(fit, tmp_path):
    """However it got there: a link to it, to the folder it lies in, a copy, a nested run."""
    started(tmp_path)
    foreign = fit(2) / "step-2"
    run, nested = tmp_path / "run", tmp_path / "nested"
    own = started(run)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-2").symlink_to(foreign)
    shutil.copytree(foreign, run / "checkpoints" / "step-3")
    nested.mkdir()
    (nested / ".run").write_text(run_id(tmp_path))  # even one that has the same id, as a copied folder has
    (nested / "checkpoints").symlink_to(run / "checkpoints")
    for folder, run_dir in (
        (run / "checkpoints" / "step-2", run),
        (run / "checkpoints" / "step-3", run),
        (foreign, run),
        (run / ".." / "checkpoints" / "step-2", run),
    ):
        assert not read_checkpoint(folder).is_own(run_dir) and is_foreign(folder, run_dir)
    assert not Checkpoint(foreign, 2, {}, run=None).is_own(tmp_path), "one without a name is nobody's"
    assert not read_checkpoint(foreign).is_own(nested), "what lies elsewhere is not its own"
    assert own != read_checkpoint(run / "checkpoints" / "step-3").run


def test_one_of_an_older_version_belongs_where_it_lies(fit, tmp_path):
    old = fit(2) / "step-2"
    assert read_checkpoint(old).run is None and not is_foreign(old, tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "checkpoints")
    assert is_foreign(run / "checkpoints" / "step-2", run)


def test_what_is_of_another_run_is_passed_over_and_neither_replaced_nor_removed(fit, tmp_path, capsys):
    own = started(tmp_path)
    folder = fit(2)
    (tmp_path / ".run").write_text("0" * 32)
    assert find_checkpoint(folder).step == 2 and find_checkpoint(folder, tmp_path) is None
    assert "step-2 is of another run: it is skipped" in capsys.readouterr().out
    with pytest.raises(TrainingError, match=r"step-2 is one of another run. Move it away"):
        fit(2)
    fit(9, every_n_steps=3, keep=1)
    assert [path.name for path in list_checkpoints(folder)] == ["step-2", "step-9"]
    assert read_checkpoint(folder / "step-2").run == own


# Requests to stop


@pytest.fixture(autouse=True)
def heard():
    """Signals that a shell has its background ignore are heard here; and all are afterwards as before."""
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    expected = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    found = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == expected, "a training leaves the handlers that it found"


@pytest.fixture
def signalled(tmp_path):
    """Trains 9 steps; this process gets the given signals at the end of a step."""

    class Send(L.Callback):
        def __init__(self, step, *numbers):
            self.step, self.numbers = step, numbers

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == self.step:
                for number in self.numbers:
                    os.kill(os.getpid(), number)

    def train(step, *numbers, every_n_steps=None):
        checkpoints = Checkpoints(tmp_path / "checkpoints", every_n_steps, 2, {})
        trainer = L.Trainer(
            max_steps=9, max_epochs=-1, callbacks=[Send(step, *numbers), checkpoints], plugins=[CheckpointIO()],
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Line(), DataLoader(torch.ones(64, 1), 1))

    return train


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGUSR1, 143)],
)
def test_a_request_writes_a_checkpoint_of_the_step(signalled, tmp_path, capsys, number, status):
    with pytest.raises(Interrupted, match=r"asked to stop at step 3: the state is in .*step-3") as caught:
        signalled(3, number)
    assert caught.value.status == status
    assert find_checkpoint(tmp_path / "checkpoints").step == 3
    said = capsys.readouterr().out
    assert f"{signals.name_of(number)}: stopping after this step, with a checkpoint" in said
    assert ("once more" in said) == (number == signal.SIGINT)


def test_a_second_interrupt_ends_at_once_without_one(signalled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signals, "AGAIN", 0.0)
    with pytest.raises(SystemExit) as caught:
        signalled(3, signal.SIGINT, signal.SIGINT, every_n_steps=2)
    assert caught.value.code == 130
    assert find_checkpoint(tmp_path / "checkpoints").step == 2
    assert "Stopped at once, with step-2 in" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_that_comes_twice_is_one(signalled, tmp_path, number):
    """Ctrl-C may come from the terminal and from the parent; SLURM sends SIGTERM to both, and again before it kills."""
    with pytest.raises(Interrupted, match="step 3"):
        signalled(3, number, number)
    assert find_checkpoint(tmp_path / "checkpoints").step == 3


def test_one_in_the_last_step_is_not_forgotten(signalled, tmp_path):
    """There the training is over; export and evaluation, which may take hours, are for the next start."""
    with pytest.raises(Interrupted, match=r"at the last step, 9: the state is in .*step-9"):
        signalled(9, signal.SIGTERM)
    assert find_checkpoint(tmp_path / "checkpoints").step == 9


@pytest.mark.parametrize("every_n_steps", [2, None])
def test_one_while_the_last_checkpoint_is_written_is_not_forgotten(fit, monkeypatch, every_n_steps):
    """That may take minutes, and what comes after it hours."""
    asked, save = Checkpoints._is_asked_to_stop, Checkpoints.save

    def is_asked(callback, trainer):
        if trainer.global_step == 9 and not every_n_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(callback, trainer)

    def saves(callback, trainer):
        save(callback, trainer)
        if trainer.global_step == 9 and every_n_steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "_is_asked_to_stop", is_asked)
    monkeypatch.setattr(Checkpoints, "save", saves)
    with pytest.raises(Interrupted, match=r"at the last step, 9: the state is in .*step-9") as caught:
        fit(9, every_n_steps=every_n_steps)
    assert caught.value.status == 143


def test_what_nohup_has_ignored_stays_ignored(signalled, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signalled(3, signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Parent directory /x/.step-4.partial does not exist."), PermissionError(13, "Permission denied")],
)
def test_a_folder_that_cannot_be_written_is_said_so(fit, monkeypatch, error):
    save = torch.save

    def fails(state, path):
        if state["global_step"] == 4:
            raise error
        save(state, path)

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(TrainingError, match=r"step 4 cannot be written .*still step-2"):
        fit(6)


def of_parts(*errors):
    """As torch tells what happened at each process that writes sharded weights: by no Exception."""
    return CheckpointException("write", {rank: (error, StackSummary()) for rank, error in enumerate(errors)})


@pytest.mark.parametrize(
    "error",
    [
        of_parts(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")),
        of_parts(ValueError("of another process"), OSError(28, "No space left on device")),
    ],
)
def test_a_full_disk_under_sharded_weights_is_said_so(fit, monkeypatch, error):
    def fails(state, path):
        raise error

    assert not isinstance(error, Exception)
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(TrainingError, match=r"step 2 cannot be written .*(inline_container|No space).*none") as caught:
        fit(6)
    assert caught.value.is_everywhere


def test_another_failure_of_a_write_is_left_as_it_is(fit, monkeypatch):
    def fails(state, path):
        raise of_parts(ValueError("x"))

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(CheckpointException):
        fit(6)


@pytest.mark.parametrize(("saved", "num"), [(0, 0), (4, 1)])
def test_states_that_no_step_has_made_are_not_gone_on_from(tmp_path, saved, num):
    """torch makes those of sharded parameters by a step of its own, which counts, when a checkpoint is to have them."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.zeros(1)
    optimizer.step()
    trainer = SimpleNamespace(global_step=saved, optimizers=[optimizer], is_global_zero=False)
    callback = Checkpoints(tmp_path, 2, 2, {}, saved=saved)
    callback.on_train_start(trainer, None)
    signals.restore(callback._handlers)
    assert len(optimizer.state) == num


def test_a_runs_folder_that_is_gone_is_not_made_again(tmp_path):
    class Remove(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                shutil.rmtree(tmp_path / "run")

    trainer = L.Trainer(
        max_steps=9, max_epochs=-1, callbacks=[Remove(), Checkpoints(tmp_path / "run" / "checkpoints", 2, 2, {})],
        plugins=[CheckpointIO()], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"step 4 cannot be written .*folder is gone.*still none before it"):
        trainer.fit(Line(), DataLoader(torch.ones(64, 1), 1))
    assert not (tmp_path / "run").exists()
