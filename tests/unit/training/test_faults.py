"""Whatever stops a run says in one line what has happened, what is kept, and how to go on. Whole runs: integration."""

import errno
import os
import shutil
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pose.errors import ConfigError, DataError, GuardError, Interrupted, TrainingError
from pose.training import faults, launch
from pose.training.folder import alone_in


@pytest.fixture(autouse=True)
def command(monkeypatch):
    """The command that goes on, without Hydra."""
    monkeypatch.delenv(launch.PARENT, raising=False)

    def resume_command(run_dir, *changes, anew=False, sweep=False):
        return " ".join(["GO", str(run_dir.name), *changes, *["anew"] * anew, *["sweep"] * sweep])

    monkeypatch.setattr(faults, "resume_command", resume_command)


@pytest.fixture
def run(tmp_path):
    """A run's folder with two checkpoints."""
    folder = tmp_path / "run"
    for step in (3, 6):
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("error", "way"),
    [
        (TrainingError("out of memory"), "To go on: GO run"),
        (TrainingError("nan", changes=("trainer.on_nonfinite=skip",)), "To go on: GO run trainer.on_nonfinite=skip"),
        (
            TrainingError("diverged", changes=("finetune.lr=1e-6",), anew=True),
            "To start anew: GO run finetune.lr=1e-6 anew",
        ),
        (Interrupted("asked to stop"), "To go on: GO run sweep"),
        (GuardError("other logits"), "There is step-3, step-6 in {}/checkpoints. To go on: GO run"),
    ],
)
def test_every_stop_names_the_command_that_goes_on(run, error, way):
    said = str(error)
    with pytest.raises(type(error)) as caught, faults.explained(run):
        raise error
    assert str(caught.value) == f"{said}\n{way.format(run)}"


@pytest.mark.parametrize("error", [ConfigError("no such key"), DataError("line 2")])
def test_what_has_to_be_mended_first_is_left_as_it_is(run, error):
    said = str(error)
    with pytest.raises(type(error)) as caught, faults.explained(run):
        raise error
    assert str(caught.value) == said


def test_a_guard_before_anything_is_kept_needs_no_command(tmp_path):
    with pytest.raises(GuardError) as caught, faults.explained(tmp_path):
        raise GuardError("x")
    assert str(caught.value) == "x"


def test_the_process_that_waits_says_it_for_those_that_it_started(run, monkeypatch):
    monkeypatch.setenv(launch.PARENT, "1")
    with pytest.raises(Interrupted) as caught, faults.explained(run):
        raise Interrupted("asked to stop")
    assert str(caught.value) == "asked to stop"


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (TrainingError("x", changes=("trainer.micro_batch=2",)), True),
        (TrainingError("x", anew=True), True),
        (TrainingError("x"), False),
    ],
)
def test_what_to_change_is_told_to_it(run, monkeypatch, error, is_told):
    told = []
    monkeypatch.setenv(launch.PARENT, "1")
    monkeypatch.setattr(launch, "tell", told.append)
    with pytest.raises(TrainingError), faults.explained(run):
        raise error
    assert told == [error] * is_told


def gone(run):
    shutil.rmtree(run)
    return FileNotFoundError(errno.ENOENT, "No such file or directory", str(run / "metrics.csv"))


ERRORS = {
    "full": (lambda run: OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
    "quota": (lambda run: OSError(errno.EDQUOT, "Disk quota exceeded"), "The disk is full"),
    "files": (lambda run: OSError(errno.EMFILE, "Too many open files"), r"too few file handles .*ulimit -n 4096"),
    "shared": (lambda run: RuntimeError("received 0 items of ancdata"), r"too few file handles .*data.num_workers"),
    "read-only": (
        lambda run: OSError(errno.EROFS, "Read-only file system", str(run / "metrics.csv")),
        r"the run's folder .*run cannot be used any more .*Read-only.*removed, renamed or made read-only",
    ),
    "denied": (
        lambda run: PermissionError(errno.EACCES, "Permission denied", str(run / ".." / "run" / "metrics.json")),
        r"the run's folder .*cannot be used any more",
    ),
    "gone": (gone, r"the run's folder .*cannot be used any more .*No such file"),
    "reader": (
        lambda run: RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        r"a process that reads the data has ended .*killed by signal: Killed.*memory runs out.*data.num_workers",
    ),
    "readers": (
        lambda run: RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
        r"a process that reads the data has ended .*data.num_workers",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_the_system_is_one_line_with_what_is_kept(run, name):
    make, words = ERRORS[name]
    with pytest.raises(TrainingError, match=words) as caught, faults.explained(run):
        raise make(run)
    kept = "There is no checkpoint" if name == "gone" else "There is step-3, step-6 in "
    assert kept in str(caught.value) and str(caught.value).endswith("\nTo go on: GO run")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory", "/elsewhere/x"),
        RuntimeError("shapes do not fit"),
        KeyError("x"),
    ],
)
def test_any_other_error_keeps_its_traceback_and_is_told_the_same(run, capsys, error):
    with pytest.raises(type(error)), faults.explained(run):
        raise error
    said = capsys.readouterr().err
    assert said.startswith(f"{type(error).__name__}: ") and said.endswith(
        f". There is step-3, step-6 in {run}/checkpoints\nTo go on: GO run\n"
    )
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(type(error)), faults.explained(run):
        raise error
    assert capsys.readouterr().err == "", "where nothing is kept there is nothing to say"


def test_a_signal_meanwhile_ends_with_the_command(run, capsys):
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught, faults.explained(run):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "Stopped by Ctrl-C. To go on: GO run sweep\n"


class Dies(Dataset):
    """Whose reader is killed at the second item."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)


def test_a_reader_that_is_killed_is_recognised(run):
    """By what torch says today."""
    with pytest.raises(TrainingError, match="a process that reads the data has ended"), faults.explained(run):
        list(DataLoader(Dies(), num_workers=1))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_so_is_one_that_is_killed_while_it_hands_over_a_batch(run, error, monkeypatch):
    """Such an error of something else, as of a network, is not taken for it."""

    def lost(*arguments):
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", lost)
    with pytest.raises(TrainingError, match="a process that reads the data has ended"), faults.explained(run):
        list(DataLoader(torch.zeros(4, 1), num_workers=1))
    with pytest.raises(type(error)), faults.explained(run):
        raise type(error)("of a network")


def test_a_folder_that_cannot_hold_a_run_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(launch.PARENT, raising=False)
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "run"
    with pytest.raises(ConfigError, match=r"hydra.run.dir=.*file/run cannot be written to: Not a dir"), alone_in(where):
        pass
