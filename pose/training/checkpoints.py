"""A training's state on disk, from which it goes on as if it had never stopped.

RUN/checkpoints/step-N is a folder: `manifest.json`, and under `state` what Lightning's strategy
writes, one file or a folder with a part for each process. It is written under another name, and
gets its own in one rename when every byte is there, with the size and the SHA-256 of each file in
the manifest. So a killed run leaves whole checkpoints alone, and a file that was damaged later is
noticed before anything is read from it. The manifest also names the run that wrote it, by the id
in RUN/.run: a checkpoint that came there from another run, by a link or a copy, is not its own.
"""

import logging
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from pose.errors import CheckpointError, Interrupted, PoseError, TrainingError, first_line
from pose.files import is_inside, load_json, read_json, remove_folder, same_path, sha256, write_json
from pose.modeling.compat import local_part
from pose.training import signals
from pose.training.folder import run_id
from pose.training.processes import gather

log = logging.getLogger(__name__)

# What torch.save says, as a RuntimeError, when the disk is full, or the folder gone or read-only
WRITING_FAILED = ("inline_container", "Parent directory", "cannot be opened")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        folder: of the checkpoint.
        step: optimizer steps done.
        settings: of the run that wrote it, as it gave them to `Checkpoints`.
        run: the id of that run; None where it had none.
    """

    folder: Path
    step: int
    settings: dict[str, Any]
    run: str | None = None

    @property
    def state(self) -> Path:
        """What Lightning's Trainer.fit takes as ckpt_path."""
        return self.folder / "state"

    def is_own(self, run_dir: Path) -> bool:
        """Whether a run wrote it: it lies among the run's checkpoints, links and `..` resolved, and names the run."""
        is_there = same_path(self.folder.resolve().parent, run_dir / "checkpoints")
        return is_there and self.run is not None and self.run == run_id(run_dir)


def names_another(folder: Path, run_dir: Path) -> bool:
    """Whether a checkpoint, which may be damaged, says that another run wrote it than that of a folder."""
    run = read_json(folder / "manifest.json").get("run")
    return run is not None and run != run_id(run_dir)


def is_foreign(folder: Path, run_dir: Path) -> bool:
    """Whether a checkpoint is of another run than that of a folder.

    One that names no run, of an older version of this package, belongs to the run among whose checkpoints it lies.
    """
    if read_json(folder / "manifest.json").get("run") is not None:
        return names_another(folder, run_dir)
    own = run_dir / "checkpoints"
    return not (same_path(folder.resolve().parent, own) and is_inside(own, run_dir))


def find_checkpoint(folder: str | Path, run_dir: Path | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a folder of checkpoints; None where there is none.

    Says which ones it passes over. Damaged ones are removed when the run has written the next one.

    Args:
        folder: with checkpoints.
        run_dir: of the run that they must be of; None takes those of any.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    damaged = []
    for candidate in reversed(list_checkpoints(folder)):
        if run_dir is not None and is_foreign(candidate, run_dir):
            log.warning(f"the checkpoint {candidate} is of another run: it is skipped")
            continue
        try:
            return read_checkpoint(candidate)
        except CheckpointError as error:
            damaged.append(str(error))
            log.warning(f"{error}; it is skipped")
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}. Remove the run's folder to start anew"
        )
    return None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder, damaged or not, by step. A file of such a name is none."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
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
    manifest = load_json(folder / "manifest.json", CheckpointError, {"step": int, "settings": dict, "files": dict})
    files, run = manifest["files"], manifest.get("run")
    for name, entry in files.items():
        match entry:
            case [int(size), str(digest)]:
                file = folder / name
            case _:
                raise CheckpointError(f"{folder / 'manifest.json'} has {entry!r} for {name!r}, not its size and digest")
        try:
            is_whole = file.is_file() and file.stat().st_size == size and (not verify or sha256(file) == digest)
        except OSError as error:
            raise CheckpointError(f"the checkpoint {folder} cannot be read: {error}") from error
        if not is_whole:
            raise CheckpointError(f"the checkpoint {folder} is damaged: {file.name} is not the file that was written")
    state = [file for file in (folder / "state", *(folder / "state").rglob("*")) if file.is_file()]
    stray = [name for name in (str(file.relative_to(folder)) for file in state) if name not in files]
    if stray or not state:
        what = f"{stray[0]} is not in its manifest" if stray else "it has no state"
        raise CheckpointError(f"the checkpoint {folder} is damaged: {what}")
    return Checkpoint(folder, manifest["step"], manifest["settings"], run if isinstance(run, str) else None)


class CheckpointIO(TorchCheckpointIO):
    """torch.save straight to the file: Lightning's own collects the bytes in memory first, to be atomic."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None):
        torch.save(checkpoint, path)


class Checkpoints(L.Callback):
    """Writes checkpoints, and stops the training in good order when the process is asked to.

    A checkpoint is written every so many steps, after the last one, and when SIGTERM, SIGUSR1,
    SIGHUP or Ctrl-C arrives at any process; then the training ends with `Interrupted`. It is
    written when the step has been logged, so that nothing of the step is missing from a run that
    goes on. A second Ctrl-C ends the process at once, without one.

    Args:
        folder: of the checkpoints.
        every_n_steps: optimizer steps; None writes one only when asked to stop, or when the export at the end fails.
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
        self.requests = signals.Requests(_announce, self._end_at_once)
        self._handlers: signals.Handlers = {}  # of before the training
        self._is_over = False

    def on_train_start(self, trainer, pl_module):
        self.seen = trainer.global_step
        if self.seen == 0:  # torch makes the states of sharded parameters by a step without gradients, and counts it
            for optimizer in trainer.optimizers:
                if isinstance(optimizer, torch.optim.Optimizer):
                    optimizer.state.clear()
        # Lightning's own handler of SIGTERM starts a collective operation in the middle of others. It puts the
        # handlers of before the training back at its end.
        self._handlers = signals.install(self.requests)
        if trainer.is_global_zero:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*"):  # of a killed process
                remove_folder(leftover)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches:
            return
        step, is_new = trainer.global_step, trainer.global_step != self.seen
        self.seen = step
        stop = self._is_asked_to_stop(trainer)
        if stop or (is_new and self.every_n_steps and step % self.every_n_steps == 0):
            self.save(trainer)
        if stop:
            raise self._interrupted(f"asked to stop at step {step}")

    def on_train_end(self, trainer, pl_module):
        self._is_over = True
        if self.every_n_steps:
            self.save(trainer)
        stop = self._is_asked_to_stop(trainer)  # while that was written too, which may take minutes
        if stop:
            self.save(trainer)
        signals.end_again(self._handlers)
        if stop:
            raise self._interrupted(f"asked to stop at the last step, {trainer.global_step}")

    def on_exception(self, trainer, pl_module, exception):
        signals.end_again(self._handlers)
        if self._is_over and trainer.world_size == 1 and not getattr(exception, "anew", False):
            self._save_for_another_export(trainer)

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
                "Start anew in another folder with a lower finetune.lr or with trainer.gradient_clip=1",
                changes=("trainer.gradient_clip=1",),
                anew=True,
            )
        partial, folder = self.folder / f".step-{step}.partial", self.folder / f"step-{step}"
        if names_another(folder, self.folder.parent):
            raise TrainingError(
                f"the checkpoint of step {step} cannot be written: {folder} is one of another run. Move it away"
            )
        try:
            if trainer.is_global_zero:
                if not self.folder.parent.is_dir():
                    raise FileNotFoundError(2, "the run's folder is gone", str(self.folder.parent))
                remove_folder(partial)
                partial.mkdir(parents=True)
            trainer.strategy.barrier("checkpoint folder")
            trainer.save_checkpoint(partial / "state", weights_only=False)
            self._seal(trainer, partial, step)
            if trainer.is_global_zero:
                remove_folder(folder)
                partial.rename(folder)
        except (OSError, RuntimeError, CheckpointException) as error:
            if (cause := _failed_write(error)) is None:
                raise
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            kept = ", ".join(path.name for path in list_checkpoints(self.folder)) or "none before it"
            free = shutil.disk_usage(next(path for path in partial.parents if path.is_dir())).free
            failed = TrainingError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {first_line(cause)} "
                f"({free / 2**20:,.0f} MiB are free). There is still {kept}, to go on from when the cause is fixed"
            )
            failed.is_everywhere = isinstance(error, CheckpointException)
            raise failed from error
        self.saved = step
        if trainer.is_global_zero:
            self._prune(step)
        trainer.strategy.barrier("checkpoint written")

    def _save_for_another_export(self, trainer: L.Trainer):
        """A checkpoint of a training that is over, whose export has failed or was stopped; several processes, of which
        each may be elsewhere, have none but that of `every_n_steps`.
        """
        if trainer.global_step == self.saved:
            return
        try:
            self.save(trainer)
        except PoseError as error:
            log.error(f"The trained weights are lost: {error}")
        else:
            log.info(f"The training is over, and its state in {self.folder}/step-{self.saved}: resume=auto exports it")

    def _is_asked_to_stop(self, trainer: L.Trainer) -> bool:
        """Whether any process is; all must ask together."""
        return trainer.strategy.reduce_boolean_decision(self.requests.first is not None, all=False)

    def _interrupted(self, what: str) -> Interrupted:
        error = Interrupted(f"{what}: the state is in {self.folder}/step-{self.saved}")
        error.status = signals.status_of(self.requests.first)
        return error

    def _end_at_once(self):
        kept = ", ".join(path.name for path in list_checkpoints(self.folder)) or "no checkpoint"
        signals.end_now(signal.SIGINT, f"Stopped at once, with {kept} in {self.folder},")

    def _prune(self, step: int):
        """Leaves the newest ones, this one the newest: those beyond it are damaged, or of an abandoned continuation."""
        found = [path for path in list_checkpoints(self.folder) if not names_another(path, self.folder.parent)]
        upto = [path for path in found if _step(path) <= step]
        for path in [*upto[: -self.keep], *found[len(upto) :]]:
            remove_folder(path)

    def _seal(self, trainer: L.Trainer, partial: Path, step: int):
        """Writes the manifest; each process reads a share of the files."""
        names = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
        names = trainer.strategy.broadcast(names)
        mine = names[trainer.global_rank :: trainer.world_size]
        shares = gather({name: ((partial / name).stat().st_size, sha256(partial / name)) for name in mine})
        if trainer.is_global_zero:
            files = {name: entry for share in shares for name, entry in share.items()}
            manifest = {"step": step, "settings": self.settings, "files": files, "time": time.time()}
            write_json(partial / "manifest.json", manifest | {"run": run_id(self.folder.parent)})


def _failed_write(error: BaseException) -> BaseException | None:
    """The error of the system that kept a checkpoint from being written; None where it was another error.

    Of sharded weights torch tells by an exception that is no Exception, with what happened at each process.
    """
    causes = [one for one, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    signs = (one for one in causes if isinstance(one, OSError) or any(sign in str(one) for sign in WRITING_FAILED))
    return next(signs, None)


def _announce(number: int):
    again = " (Ctrl-C once more: at once, without one)" if number == signal.SIGINT else ""
    log.info(f"{signals.name_of(number)}: stopping after this step, with a checkpoint{again}")


@torch.no_grad()
def _is_finite(module: torch.nn.Module) -> bool:
    """Whether the trained weights that this process holds are; one look at the device."""
    parts = [local_part(p) for p in module.parameters() if p.requires_grad]
    return bool(torch.stack([part.isfinite().all() for part in parts]).all())


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
