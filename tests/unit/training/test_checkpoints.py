"""Checkpoints on disk: whole or not there, and noticed when damaged. Whole runs: tests/integration/test_resume.py."""

import json
import os

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from pose.errors import CheckpointError, Interrupted, TrainingError
from pose.training.checkpoints import CheckpointIO, Checkpoints, find_checkpoint, list_checkpoints, read_checkpoint


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

    def fit_(max_steps, callback=None, **arguments):
        folder = tmp_path / "checkpoints"
        callback = callback or Checkpoints(
            folder, **{"every_n_steps": 2, "keep": 2, "settings": {"seed": 3}} | arguments
        )
        trainer = L.Trainer(
            max_steps=max_steps, max_epochs=-1, callbacks=[callback], plugins=[CheckpointIO()], accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
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
    rewrite(files={}), rewrite(step="4"), rewrite(settings=None), rewrite(files={"state": 3}),
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
    with pytest.raises(TrainingError, match=r"step 4 cannot be written .*No space left.*still step-2.*resume=auto"):
        fit(6)


def test_a_manifest_names_every_file(fit):
    folder = fit(2)
    manifest = json.loads((folder / "step-2" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"state"} and manifest["step"] == 2
