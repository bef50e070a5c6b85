"""A training's state on disk, from which it goes on as if it had never stopped.

RUN/checkpoints/step-N is a folder: `manifest.json`, and under `state` what Lightning's strategy
writes, one file or a folder with a part for each process. It is written under another name, and
gets its own in one rename when every byte is there, with the size and the SHA-256 of each file in
the manifest. So a killed run leaves whole checkpoints alone, and a file that was damaged later is
noticed before anything is read from it.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from pose.errors import CheckpointError, Interrupted, TrainingError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of schedulers, some time before they kill


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        folder: of the checkpoint.
        step: optimizer steps done.
        settings: of the run that wrote it, as it gave them to `Checkpoints`.
    """

    folder: Path
    step: int
    settings: dict[str, Any]

    @property
    def state(self) -> Path:
        """What Lightning's Trainer.fit takes as ckpt_path."""
        return self.folder / "state"


def find_checkpoint(folder: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint of a folder of checkpoints; None where there is none.

    Says which damaged ones it passes over.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for candidate in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(candidate)
        except CheckpointError as error:
            damaged.append(str(error))
            rank_zero_only(print)(f"Warning: {error}; the one before it is taken", flush=True)
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}. Remove the folder to start from the beginning"
        )
    return None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, damaged or not, by step."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Checks every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: no checkpoint there, or one that is damaged; names the file.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        checkpoint = Checkpoint(folder, manifest["step"], manifest["settings"])
        for name, (size, digest) in manifest["files"].items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size or _digest(file) != digest:
                raise CheckpointError(f"the checkpoint {folder} is damaged: {name} is not the file that was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: its manifest.json cannot be read") from error
    return checkpoint


class CheckpointIO(TorchCheckpointIO):
    """torch.save straight to the file: Lightning's own collects the bytes in memory first, to be atomic."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None):
        torch.save(checkpoint, path)


class Checkpoints(L.Callback):
    """Writes checkpoints, and stops the training in good order when the process is asked to.

    A checkpoint is written every so many steps, after the last one, and when SIGTERM or SIGUSR1
    arrives at any process; then the training ends with `Interrupted`. It is written when the step
    has been logged, so that nothing of the step is missing from a run that goes on.

    Args:
        folder: of the checkpoints.
        every_n_steps: optimizer steps; None writes one only when asked to stop.
        keep: the newest ones that stay.
        settings: what a run that goes on must have in common with this one; JSON.
        saved: the step of the folder's checkpoint from which training goes on.
    """

    def __init__(
        self,
        folder: str | Path,
        every_n_steps: int | None,
        keep: int,
        settings: dict[str, Any],
        saved: int | None = None,
    ):
        self.folder, self.every_n_steps, self.keep, self.settings = Path(folder), every_n_steps, keep, settings
        self.seen, self.saved = saved, saved
        self.signal: int | None = None

    def on_train_start(self, trainer, pl_module):
        self.seen = trainer.global_step
        # Lightning's own handler of SIGTERM starts a collective operation in the middle of others. It puts the
        # handlers of before the training back at its end.
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        if trainer.is_global_zero:
            for leftover in self.folder.glob(".step-*"):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches:
            return
        step, is_new = trainer.global_step, trainer.global_step != self.seen
        self.seen = step
        stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if stop or (is_new and self.every_n_steps and step % self.every_n_steps == 0):
            self.save(trainer)
        if stop:
            raise Interrupted(
                f"asked to stop at step {step}: the state is in {self.folder}/step-{step}. The same command with "
                "resume=auto goes on"
            )

    def on_train_end(self, trainer, pl_module):
        if self.every_n_steps:
            self.save(trainer)

    def save(self, trainer: L.Trainer):
        """Writes a checkpoint of the step the trainer is at, if there is none yet. Every process must call this.

        Raises:
            TrainingError: it cannot be written; the ones before it stay.
        """
        step = trainer.global_step
        if step == self.saved:
            return
        partial, folder = self.folder / f".step-{step}.partial", self.folder / f"step-{step}"
        try:
            if trainer.is_global_zero:
                _remove(partial)
                partial.mkdir(parents=True)
            trainer.strategy.barrier("checkpoint folder")
            trainer.save_checkpoint(partial / "state", weights_only=False)
            self._seal(trainer, partial, step)
            if trainer.is_global_zero:
                _remove(folder)
                partial.rename(folder)
                for old in list_checkpoints(self.folder)[: -self.keep]:
                    _remove(old)
            trainer.strategy.barrier("checkpoint written")
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            kept = [path.name for path in list_checkpoints(self.folder)]
            free = shutil.disk_usage(next(path for path in partial.parents if path.is_dir())).free
            raise TrainingError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({str(error).splitlines()[0]}; "
                f"{free / 2**20:,.0f} MiB are free). There is still {', '.join(kept) or 'none before it'}: make room, "
                "and the same command with resume=auto goes on from there"
            ) from error
        self.saved = step

    def _seal(self, trainer: L.Trainer, partial: Path, step: int):
        """Writes the manifest; each process reads a share of the files."""
        names = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
        names = trainer.strategy.broadcast(names)
        mine = names[trainer.global_rank :: trainer.world_size]
        mine = {name: (os.path.getsize(partial / name), _digest(partial / name)) for name in mine}
        shares = [mine]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, mine)
        if trainer.is_global_zero:
            files = {name: entry for share in shares for name, entry in share.items()}
            manifest = {"step": step, "settings": self.settings, "files": files, "time": time.time()}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))

    def _note(self, number, frame):
        self.signal = number


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _remove(folder: Path):
    """Takes a checkpoint's name from it before its files: a half-removed one must not look like one."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name.lstrip('.')}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)
