"""The folder of a run: one run at a time is at work there, and what it wrote bears its id."""

import contextlib
import fcntl
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from pose.errors import ConfigError
from pose.files import atomic_file
from pose.training.compat import rank
from pose.training.launch import PARENT

LOCK = ".lock"  # who holds its lock is at work in the folder; opened once alone, since any close gives the lock up
ID = ".run"  # the id of the run
# What each command leaves in its folder, and no other one writes
LEFT = {
    "a training": ("model", "best", "checkpoints", "metrics.csv"), "an evaluation": ("results.json",),
    "a search": ("search.csv", "needles.csv", "settings.json"),
}  # fmt: skip


def run_id(run_dir: Path) -> str | None:
    """The id of the run of a folder; None before one has begun there."""
    try:
        text = (run_dir / ID).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch("[0-9a-f]{32}", text) else None


def check_kind(run_dir: Path, own: str):
    """Whether no command of another kind has left something in a folder, whose config.yaml would be overwritten.

    Args:
        run_dir: of the run.
        own: a kind of LEFT.

    Raises:
        ConfigError: one has; names what is there.
    """
    for kind, names in LEFT.items():
        if kind != own and (left := [name for name in names if (run_dir / name).exists()]):
            raise ConfigError(
                f"hydra.run.dir={run_dir} holds what {kind} has left ({', '.join(left)}), whose config.yaml would be "
                "overwritten: give another folder"
            )


@contextlib.contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Keeps other runs out of a folder while it lasts; a process that is killed keeps nobody out.

    The first run in a folder gives it its id.

    Raises:
        ConfigError: another run is at work there, or it cannot be written to.
    """
    if PARENT in os.environ or rank():  # whoever started this one has seen to it
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / LOCK, "w")  # noqa: SIM115
    except IsADirectoryError as error:
        raise ConfigError(f"{run_dir / LOCK} is a folder, where a run keeps a file of its own: remove it") from error
    except OSError as error:
        raise ConfigError(f"hydra.run.dir={run_dir} cannot be written to: {error.strerror or error}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the processes that read
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(
                f"another run is at work in hydra.run.dir={run_dir}: give another folder, or wait"
            ) from error
        except OSError:  # a file system without locks
            pass
        if run_id(run_dir) is None:
            with atomic_file(run_dir / ID) as new:
                new.write(uuid.uuid4().hex + "\n")
        yield
