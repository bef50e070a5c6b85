"""A training's state on disk, from which it goes on as if it had never stopped.

RUN/checkpoints/step-N is a folder: `manifest.json`, and under `state` what Lightning's strategy
writes, one file or a folder with a part for each process. It is written under another name, and
gets its own in one rename when every byte is there, with the size and the SHA-256 of each file in
the manifest. So a killed run leaves whole checkpoints alone, and a file that was damaged later is
noticed before anything is read from it.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from pose.data.network import first_line
from pose.errors import CheckpointError, Interrupted, TrainingError

log = logging.getLogger(__name__)

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

    Says which damaged ones it passes over. They are removed when the run has written the next one.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for candidate in reversed(list_checkpoints(folder)):
        try:
            return read_checkpoint(candidate)
        except CheckpointError as error:
            damaged.append(str(error))
            log.warning(f"{error}; it is passed over")
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}. Remove the run's folder to start anew"
        )
    return None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, damaged or not, by step."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step)


def read_checkpoint(folder: str | Path, verify: bool = True) -> Checkpoint:
    """Checks every file of a checkpoint against its manifest.

    Args:
        folder: of the checkpoint.
        verify: whether to read the files; without it their sizes are compared.

    Raises:
        CheckpointError: no checkpoint there, or one that is damaged; names the file.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        step, settings, files = manifest["step"], manifest["settings"], manifest["files"]
        if not (isinstance(step, int) and isinstance(settings, dict) and files):
            raise ValueError("of another form")
        entries = [(folder / name, size, digest) for name, (size, digest) in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: its manifest.json cannot be read") from error
    for file, size, digest in entries:
        if not file.is_file() or file.stat().st_size != size or (verify and _digest(file) != digest):
            raise CheckpointError(f"the checkpoint {folder} is damaged: {file.name} is not the file that was written")
    return Checkpoint(folder, step, settings)


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
        saved: the step of the folder's checkpoint from which training goes on, which is not written again.
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
        end_at_signals(replace=True)

    def save(self, trainer: L.Trainer):
        """Writes a checkpoint of the step the trainer is at, if there is none yet. Every process must call this.

        Raises:
            TrainingError: it cannot be written; the ones before it stay.
        """
        step = trainer.global_step
        if step == self.saved:
            return
        if not trainer.strategy.reduce_boolean_decision(_is_finite(trainer.lightning_module)):
            raise TrainingError(
                f"weights are infinite or NaN after step {step}: it is not saved, and the checkpoints before it stay. "
                "Start anew in another folder with a lower finetune.lr or with trainer.gradient_clip=1"
            )
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
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and "inline_container" not in str(error):  # torch.save on a full disk
                raise
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            kept = ", ".join(path.name for path in list_checkpoints(self.folder)) or "none before it"
            free = shutil.disk_usage(next(path for path in partial.parents if path.is_dir())).free
            raise TrainingError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {first_line(error)} "
                f"({free / 2**20:,.0f} MiB are free). There is still {kept}. When the cause is mended, the same "
                "command with resume=auto goes on from there"
            ) from error
        if trainer.is_global_zero:
            self._prune(step)
        trainer.strategy.barrier("checkpoint written")

    def _prune(self, step: int):
        """Leaves the newest ones, this one the newest: those beyond it are damaged, or of a way that was given up."""
        found = list_checkpoints(self.folder)
        upto = [path for path in found if _step(path) <= step]
        for path in [*upto[: -self.keep], *found[len(upto) :]]:
            _remove(path)

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


def end_at_signals(replace: bool = False):
    """Has SIGTERM and SIGUSR1 end the process with the status of SIGTERM, outside of training: what is written in one
    step is whole or not there.

    Args:
        replace: handlers that are there; without it only the system's own.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOP_SIGNALS:
        if replace or signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number, frame):
    name = signal.Signals(number).name
    log.error(f"Stopped by {name}: the same command with resume=auto goes on")
    raise SystemExit(Interrupted.status)


@torch.no_grad()
def _is_finite(module: torch.nn.Module) -> bool:
    """Whether the trained weights that this process holds are; one look at the device."""
    parts = [getattr(p, "ds_tensor", p) for p in module.parameters() if p.requires_grad]
    parts = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
    return bool(torch.stack([part.isfinite().all() for part in parts]).all())


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _remove(folder: Path):
    """Takes a checkpoint's name from it before its files: a half-removed one must not look like one."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name.lstrip('.')}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
