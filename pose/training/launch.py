"""One process for each device of a job, started and ended together.

Lightning would start them itself, by running the command line once more: in a sweep that is the whole sweep, and
inside the worker of a launcher it is not train.py at all. Here every process runs one job, `python train.py` with the
job's own overrides in the job's own folder, whatever started the job; the process that starts them only waits.

`torchrun` and `srun` start processes themselves, and are left to it.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from torch.distributed import TCPStore

from pose.errors import ConfigError, Interrupted, PoseError, TrainingError
from pose.files import REPOSITORY

SCRIPT = REPOSITORY / "train.py"
PARENT = "POSE_PARENT"  # environment variable of a process started here: the id of the one that did
CHECKPOINT = "POSE_CHECKPOINT"  # and of the checkpoint that it chose
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun sets, and other launchers after it
# Settings of Hydra that are of the sweep, or that every process gets anew
NOT_PASSED_ON = {"mode", "run", "sweep", "sweeper", "launcher", "output_subdir"}
GRACE = 15.0  # seconds that the other processes have when one has failed, until SIGTERM, and again until SIGKILL
POLL = 0.2  # seconds
PR_SET_PDEATHSIG = 1  # of Linux' prctl


class Workers(Callback):
    """A Hydra callback: the workers of a sweep, on other machines too, find this package from any folder."""

    def on_multirun_start(self, config, **kwargs):
        paths = [str(SCRIPT.parent), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def join(run_dir: Path) -> Path:
    """What a process does first: it ends when the one that started it here is killed, and finds the run's folder.

    Args:
        run_dir: as Hydra has it in this process.

    Returns:
        The folder of the run, the same in every process.

    Raises:
        ConfigError: processes that something else has started cannot agree on a folder, or are to do a sweep.
    """
    if PARENT in os.environ:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ[PARENT]):
            raise SystemExit(128 + signal.SIGKILL)
        return run_dir
    if (num_started() or 1) == 1:
        return run_dir
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        if "SUBMITIT_EXECUTOR" in os.environ:  # each of its jobs has processes of its own, and one folder
            return run_dir
        raise ConfigError(
            f"{num_started()} processes were started for a sweep (-m): start it as one, python train.py -m ..., and "
            "each job starts its own"
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        key = f"pose/run_dir/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if int(os.environ["RANK"]) == 0:
            store.set(key, str(run_dir))
        return Path(store.get(key).decode())
    pattern = OmegaConf.to_container(HydraConfig.instance().cfg.hydra.run, resolve=False)["dir"]
    if "${now" in pattern:
        raise ConfigError(
            f"hydra.run.dir={pattern} differs between the {num_started()} processes, which start at different seconds: "
            "give a folder, such as hydra.run.dir=outputs/$SLURM_JOB_ID"
        )
    return run_dir


@contextlib.contextmanager
def alone_in(run_dir: Path):
    """Keeps other runs out of a folder while it lasts; a process that is killed keeps nobody out.

    Raises:
        ConfigError: another run is at work there.
    """
    if PARENT in os.environ or rank_zero_only.rank:  # whoever started this one has seen to it
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the processes that read
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(
                f"another run is at work in hydra.run.dir={run_dir}: give another folder, or wait"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def num_started() -> int | None:
    """The processes that torchrun, srun or `run` have started, this one included; None where this one is alone."""
    if all(name in os.environ for name in RANKS):
        return int(os.environ["WORLD_SIZE"])
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # of srun alone: a batch script has SLURM_NTASKS as well
    return tasks if tasks > 1 else None


def plugins() -> list[ClusterEnvironment]:
    """For Lightning's Trainer: who has started this process. What it finds out by itself takes a batch script for srun.

    Raises:
        RuntimeError: of Lightning, for tasks of srun that it cannot count.
    """
    if all(name in os.environ for name in RANKS):
        return [TorchElasticEnvironment()]
    if num_started():
        return [SLURMEnvironment(auto_requeue=False)]  # its checkpoints on SIGUSR1 are not ours
    return [LightningEnvironment()]


def is_needed(trainer: L.Trainer) -> bool:
    """Whether this process has to start those of the trainer, by `run`, in place of training.

    A job of submitit is always started: submitit's handlers of signals are not for a process that trains.

    Raises:
        ConfigError: the processes that were started are not those that the trainer needs; several machines, and
            nothing has started the processes on them.
    """
    devices, nodes = trainer.num_devices, trainer.num_nodes
    started = num_started()
    if started is not None:
        if started != devices * nodes:
            raise ConfigError(
                f"{started} process(es) were started, but trainer.devices={devices} on trainer.num_nodes={nodes} need "
                f"{devices * nodes}: as many it has to be (torchrun --nproc_per_node, --nnodes; srun --ntasks-per-node)"
            )
        return False
    if nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={nodes}, but nothing has started processes on them: run torchrun --nnodes={nodes} "
            f"--nproc_per_node={devices} ... train.py ... on each machine, or srun in a batch script (docs/CLUSTERS.md)"
        )
    return devices > 1 or "SUBMITIT_EXECUTOR" in os.environ


def chosen_checkpoint() -> str | None:
    """The checkpoint that the process which started this one has found whole: "" for none, None if nobody chose."""
    return os.environ.get(CHECKPOINT) if PARENT in os.environ else None


def run(num_processes: int, run_dir: Path, checkpoint: Path | None = None):
    """Runs this job in processes of its own, and waits for them.

    SIGTERM, SIGINT and SIGUSR1 are passed on, and waited for: a checkpoint may take minutes. When a process fails,
    the others have a moment to end by themselves, and are then ended.

    Args:
        num_processes: one for each device.
        run_dir: of the job.
        checkpoint: from which it goes on.

    Raises:
        TrainingError: a process failed; has the status of the first that did, 128 + n for signal n.
        Interrupted: the processes were asked to stop, and did.
    """
    # The store at which the processes meet is held here, as torchrun holds it: no port is chosen, given up, and
    # perhaps taken by another job before the processes get to it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // num_processes)  # where num_threads does not say
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes), "GROUP_RANK": "0",
        PARENT: str(os.getpid()), CHECKPOINT: str(checkpoint.absolute()) if checkpoint else "",
    }  # fmt: skip
    children: list[subprocess.Popen] = []
    with _noted_signals() as received:
        try:
            for rank in range(num_processes):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A session of its own: Ctrl-C in the terminal reaches it once, from here.
                child = subprocess.Popen(
                    command(rank, run_dir), env=environment | ranks, cwd=HydraConfig.get().runtime.cwd,
                    start_new_session=True,
                )  # fmt: skip
                children.append(child)
            first = _wait(children, received)
        finally:
            for child in children:
                child.kill()  # nothing where all have ended
                child.wait()
    codes = [child.returncode for child in children]
    if received and (any(codes) or HydraConfig.get().mode == RunMode.MULTIRUN):
        name = signal.Signals(received[0]).name
        raise _with_status(
            Interrupted(f"stopped by {name}, and so were the {num_processes} processes of {run_dir}"),
            128 + (signal.SIGINT if received[0] == signal.SIGINT else signal.SIGTERM),
        )
    if any(codes):
        rank = first if first is not None else next(rank for rank, code in enumerate(codes) if code)
        code = codes[rank]
        if code == Interrupted.status:
            raise Interrupted(f"process {rank} of {num_processes} was asked to stop, and all did")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = " (the system does so when memory runs out)" if code == -signal.SIGKILL else ""
        raise _with_status(
            TrainingError(f"process {rank} of {num_processes} {how}{hint}; the others were ended"),
            code if code > 0 else 128 - code,
        )


def command(rank: int, run_dir: Path) -> list[str]:
    """The command line of one process of the job that Hydra is at."""
    job = HydraConfig.get()
    sources = {source.provider: source.path for source in job.runtime.config_sources if source.schema == "file"}
    overrides = OmegaConf.to_container(job.overrides, resolve=False)  # as they were given, references included
    left_out = NOT_PASSED_ON | ({"job_logging"} if rank else set())
    arguments = [sys.executable, str(SCRIPT), "--config-path", sources["main"], "--config-name", job.job.config_name]
    if "command-line" in sources:
        arguments += ["--config-dir", sources["command-line"]]
    arguments += overrides["task"]
    arguments += [override for override in overrides["hydra"] if _hydra_key(override) not in left_out]
    # .hydra is there already, written by the process that starts this one
    arguments += ["hydra.mode=RUN", f"hydra.run.dir={_quoted(run_dir.absolute())}", "hydra.output_subdir=null"]
    for key in ("num", "id"):  # settings may name them
        if not OmegaConf.is_missing(job.job, key):
            arguments.append(f"hydra.job.{key}={_quoted(job.job[key])}")
    if rank:
        arguments.append("hydra/job_logging=pose_worker")  # one process writes train.log
    return arguments


def _wait(children: list[subprocess.Popen], received: list[int]) -> int | None:
    """Waits for the end of all, passes signals on; returns the rank of the first that failed, if one did."""
    first, deadline, passed_on, means = None, None, 0, [signal.SIGTERM, signal.SIGKILL]
    while True:
        while passed_on < len(received):
            # SIGUSR2 is submitit's word for SIGTERM
            number = signal.SIGTERM if received[passed_on] == signal.SIGUSR2 else received[passed_on]
            passed_on += 1
            for child in children:
                child.send_signal(number)
        codes = [child.poll() for child in children]
        if first is None:
            first = next((rank for rank, code in enumerate(codes) if code not in (None, 0, Interrupted.status)), None)
            deadline = time.monotonic() + GRACE
        if None not in codes:
            return first
        if first is not None and means and time.monotonic() > deadline:
            number, deadline = means.pop(0), time.monotonic() + GRACE
            for child in children:
                child.send_signal(number)
        time.sleep(POLL)


@contextlib.contextmanager
def _noted_signals():
    """Notes SIGTERM, SIGINT and SIGUSR1 in a list while it lasts; then those who were to know of them do.

    Those are handlers of a program around this one, such as submitit's, which puts a job back into the queue. Its
    SIGUSR2 is noted too.
    """
    received: list[int] = []
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if callable(signal.getsignal(signal.SIGUSR2)):
        numbers.append(signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    noted = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # as nohup sets it
    for number in noted:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number in noted:
            signal.signal(number, before[number])
    for number in received[:1]:
        if callable(before[number]) and before[number] is not signal.default_int_handler:
            before[number](number, None)


def _hydra_key(override: str) -> str:
    """`launcher` of hydra/launcher=joblib, ++hydra.launcher.n_jobs=2, ~hydra.launcher ..."""
    return re.split(r"[./@]", OverridesParser.create().parse_override(override).key_or_group)[1]


def _quoted(value: object) -> str:
    """A value as Hydra reads it back, whatever characters it has."""
    return QuotedString(str(value).replace("${", r"\${"), Quote.single).with_quotes()


def _with_status(error: PoseError, status: int) -> PoseError:
    error.status = status
    return error
