"""What the processes of a job tell each other, before and while they are one group."""

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed import TCPStore

from pose.errors import TrainingError
from pose.files import read_json, remove_folder, write_json
from pose.training import launch
from pose.training.compat import rank

BEAT = 5.0  # seconds from one sign of life of process 0 to the next
PATIENCE = 300.0  # seconds without one, after which it is given up
POLL = 0.5  # seconds; in between signals are heard, which a wait inside of a store would not let through
FOLDER = ".shared"  # in the folder of a run, where there is no store
_calls: Counter[tuple[str, int]] = Counter()  # by name and rank: each call has a key of its own


def gather(value: Any) -> list[Any]:
    """What each process of the group gives, in all of them; of one process alone a list of one.

    Args:
        value: anything that can be pickled; tensors on the CPU.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, value)
    return everywhere


def from_rank_zero(run_dir: Path, name: str, make: Callable[[], Any]) -> Any:
    """What make() gives in process 0, in every process of a job, before they are a group.

    It may take hours, longer than a collective operation would wait: the others ask for it now and then, at the store
    where the processes meet, or, under `srun`, in the run's folder. There process 0 shows that it is alive.

    Args:
        run_dir: of the job.
        name: of what is made, for the message. All processes must ask in the same order.
        make: called in process 0 alone; gives plain JSON.

    Returns:
        The same in all processes, as JSON gives it back.

    Raises:
        TrainingError: process 0 failed, or is not heard of any more.
    """
    if (launch.num_started() or 1) == 1:
        return json.loads(json.dumps(make()))
    _calls[name, rank()] += 1
    board, key = _board(run_dir), f"{name}.{_calls[name, rank()]}"
    if rank() == 0:
        with _alive(board, key):
            try:
                content = {"value": make()}
            except BaseException as error:
                board.put(key, json.dumps({"error": f"{type(error).__name__}: {error}"}))
                raise
        text = json.dumps(content)
        board.put(key, text)
    else:
        text = _wait(board, key, name)
    content = json.loads(text)
    if "error" in content:
        raise _everywhere(
            TrainingError(f"process 0 failed to make what the others wait for ({name}): {content['error']}")
        )
    return content["value"]


class _Board(Protocol):
    """Where process 0 puts short texts for the others."""

    where: str
    hint: str  # where nothing has been heard at all

    def put(self, key: str, text: str): ...

    def get(self, key: str) -> str | None: ...


class _Store:
    """The store at which the processes of `launch.run` and of torchrun meet."""

    hint = ""

    def __init__(self, attempt: str):
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.where, self.prefix = f"the store at {host}:{port}", f"pose/{attempt}"
        self.store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=PATIENCE))

    def put(self, key: str, text: str):
        self.store.set(f"{self.prefix}/{key}", text)

    def get(self, key: str) -> str | None:
        try:
            there = self.store.check([f"{self.prefix}/{key}"])
            return self.store.get(f"{self.prefix}/{key}").decode() if there else None
        except RuntimeError as error:
            raise TrainingError(f"{self.where} is gone, and with it whoever started the processes: {error}") from error


class _Files:
    """The folder of the run, for processes of `srun`, which have no store yet."""

    hint = ". Do all machines share that folder?"

    def __init__(self, run_dir: Path, attempt: str):
        self.where, self.folder = str(run_dir), run_dir / FOLDER / attempt
        if rank() == 0:
            for left in self.folder.parent.glob("*"):
                if left != self.folder:  # of an earlier start
                    remove_folder(left)
            self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, text: str):
        write_json(self.folder / f"{key}.json", {"text": text})

    def get(self, key: str) -> str | None:
        return read_json(self.folder / f"{key}.json").get("text")


def _board(run_dir: Path) -> _Board:
    """Under a name of this start of the job: what an earlier one left there is not taken for an answer."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _Store(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
    return _Files(run_dir, "-".join(os.environ.get(name, "0") for name in names))


@contextlib.contextmanager
def _alive(board: _Board, key: str) -> Iterator[None]:
    """Shows that this process is alive, while it lasts."""
    done = threading.Event()

    def beat():
        count = 0
        while not done.wait(BEAT if count else 0):
            count += 1
            with contextlib.suppress(OSError, RuntimeError):  # the end of it is noticed elsewhere
                board.put(f"{key}.alive", str(count))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _wait(board: _Board, key: str, name: str) -> str:
    """The text that process 0 puts there under a key."""
    sign, heard = None, time.monotonic()
    while (text := board.get(key)) is None:
        if (new := board.get(f"{key}.alive")) != sign:
            sign, heard = new, time.monotonic()
        if time.monotonic() - heard > PATIENCE:
            raise TrainingError(
                f"process {rank()} waits for what process 0 makes ({name}), and has had no sign of it at "
                f"{board.where} for {PATIENCE:.0f} s: it has ended, or hangs{board.hint if sign is None else ''}"
            )
        time.sleep(POLL)
    return text


def _everywhere(error: TrainingError) -> TrainingError:
    error.is_everywhere = True
    return error
