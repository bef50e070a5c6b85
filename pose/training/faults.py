"""What ends a run before its time, said in one line, with what is kept and the exact command that goes on."""

import contextlib
import errno
import logging
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch.utils.data import dataloader

from pose.errors import GuardError, Interrupted, PoseError, TrainingError, first_line
from pose.files import is_inside
from pose.training import launch, signals
from pose.training.checkpoints import list_checkpoints
from pose.training.resume import resume_command

log = logging.getLogger(__name__)

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)
READER_DIED = ("DataLoader worker (pid", "DataLoader worker exited")
READER_STARVED = ("Too many open files", "received 0 items of ancdata")


@contextlib.contextmanager
def explained(run_dir: Path) -> Iterator[None]:
    """Around a whole run: whatever stops it names the command that goes on; what a user can mend has no traceback.

    Raises:
        TrainingError: in place of an error of the system: a full disk, a folder that is gone or read-only, a process
            that reads and was killed, too few file handles.
    """
    with signals.ending(lambda: _way_on(run_dir, sweep=True), is_child=launch.PARENT in os.environ):
        try:
            yield
        except PoseError as error:
            if isinstance(error, TrainingError):
                if launch.PARENT in os.environ and (error.changes or error.anew):
                    launch.tell(error)
                _add(error, _way_on(run_dir, *error.changes, anew=error.anew))
            elif isinstance(error, Interrupted):
                _add(error, _way_on(run_dir, sweep=True))
            elif isinstance(error, GuardError) and list_checkpoints(run_dir / "checkpoints"):
                _add(error, f"{_kept(run_dir)}. {_way_on(run_dir)}")
            raise
        except Exception as error:
            reason = _reason(error, run_dir)
            if reason is not None:
                raise TrainingError(f"{reason}. {_kept(run_dir)}\n{_way_on(run_dir)}".strip()) from error
            if list_checkpoints(run_dir / "checkpoints"):  # it has its traceback, which follows
                log.error(f"{type(error).__name__}: {first_line(error)}. {_kept(run_dir)}\n{_way_on(run_dir)}".strip())
            raise


def _add(error: PoseError, line: str):
    if line:
        error.message += f"\n{line}"


def _way_on(run_dir: Path, *changes: str, anew: bool = False, sweep: bool = False) -> str:
    """A line; the process that `launch.run` waits in says it for all that it has started."""
    if launch.PARENT in os.environ:
        return ""
    return f"To {'start anew' if anew else 'go on'}: {resume_command(run_dir, *changes, anew=anew, sweep=sweep)}"


def _kept(run_dir: Path) -> str:
    checkpoints = [path.name for path in list_checkpoints(run_dir / "checkpoints")]
    if not checkpoints:
        return f"There is no checkpoint in {run_dir}"
    return f"There is {', '.join(checkpoints)} in {run_dir / 'checkpoints'}"


def _reason(error: Exception, run_dir: Path) -> str | None:
    """What has happened, for errors of the system; None for all others."""
    said, number = str(error), getattr(error, "errno", None)
    if number in TOO_MANY_FILES or any(sign in said for sign in READER_STARVED):
        return (
            f"there are too few file handles ({first_line(error)}): raise the limit (ulimit -n 4096), or lower "
            "data.num_workers"
        )
    lost = isinstance(error, ConnectionError | EOFError) and _is_from_loader(error)  # in the middle of a batch
    if lost or any(sign in said for sign in READER_DIED):
        return (
            f"a process that reads the data has ended ({first_line(error)}; the system kills one when memory runs "
            "out). With fewer data.num_workers less memory is needed; with 0 the training process reads"
        )
    if is_full(error):
        return disk_full(error)
    if isinstance(error, OSError):
        names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
        is_ours = any(is_inside(os.fspath(name), run_dir) for name in names)
        if not run_dir.is_dir() or (number in NO_FOLDER and is_ours):
            return (
                f"the run's folder {run_dir} cannot be used any more ({error}): it was removed, renamed or made "
                "read-only, or its disk is gone"
            )
    return None


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or a quota on it, is full."""
    if not isinstance(error, OSError | SafetensorError):
        return False
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def disk_full(error: BaseException) -> str:
    """What is said of it."""
    return f"The disk is full ({error}): make room"


def _is_from_loader(error: Exception) -> bool:
    """Whether it was raised where the training process gets a batch from those that read."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename == dataloader.__file__ for frame, _ in frames)
