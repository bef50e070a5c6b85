"""One process for each device of a job, started and ended together.

Lightning would start them itself, by running the command line once more: in a sweep that is the whole sweep, and
inside the worker of a launcher it is not train.py at all. Here every process runs one job, `python train.py` with the
job's own overrides in the job's own folder, whatever started the job; the process that starts them only waits.

`torchrun` and `srun` start processes themselves, and are left to it.
"""

import contextlib
import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import OmegaConf
from torch.distributed import TCPStore

from pose.errors import ConfigError, Interrupted, PoseError, TrainingError
from pose.files import CONF, REPOSITORY, same_path
from pose.training import signals

SCRIPT = REPOSITORY / "train.py"
PARENT = "POSE_PARENT"  # environment variable of a process started here: the id of the one that did
CHECKPOINT = "POSE_CHECKPOINT"  # and of the checkpoint that it chose
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what torchrun sets, and other launchers after it
# Settings of Hydra that are of the sweep, or that every process gets anew
NOT_PASSED_ON = {"mode", "run", "sweep", "sweeper", "launcher", "output_subdir"}
WAY_ON = "pose/way_on"  # in the store at which they meet: how a run goes on that has ended with an error
GRACE = 15.0  # seconds that the other processes have when one has failed, until SIGTERM, and again until SIGKILL
POLL = 0.2  # seconds
PR_SET_PDEATHSIG = 1  # of Linux' prctl


def is_beside_others() -> bool:
    """Whether this process is a worker of joblib: one that ended with a status would have the others killed."""
    return HydraConfig.initialized() and signals.are_beside_each_other(HydraConfig.get())


def join(run_dir: Path) -> Path:
    """What a process does first: it ends when the one that started it here is killed, and finds the run's folder.

    Args:
        run_dir: as Hydra has it in this process.

    Returns:
        The folder of the run, the same in every process.

    Raises:
        ConfigError: processes that something else has started cannot agree on a folder, or are to do a sweep.
        Interrupted: this process is a worker of joblib that was asked to stop in an earlier job.
    """
    if signals.asked and is_beside_others():
        raise Interrupted("not started: the sweep was asked to stop")
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
            f"{num_started()} processes were started for a sweep (-m): start a single process, "
            "python train.py -m ..., and each job starts its own"
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        key = f"pose/run_dir/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if int(os.environ["RANK"]) == 0:
            store.set(key, str(run_dir))
        return Path(store.get(key).decode())
    pattern = str(_given("run")["dir"])
    if "${now" in pattern:
        raise ConfigError(
            f"hydra.run.dir={pattern} differs between the {num_started()} processes, which start at different seconds: "
            "give a folder, such as hydra.run.dir=outputs/$SLURM_JOB_ID"
        )
    return run_dir


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
                f"{devices * nodes}: start exactly that many (torchrun --nproc_per_node, --nnodes; srun "
                "--ntasks-per-node)"
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

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 are passed on, and waited for: a checkpoint may take minutes. When a process
    fails, the others have a moment to end by themselves, and are then ended.

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
    with _noted_signals() as requests:
        try:
            for rank in range(num_processes):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A session of its own: Ctrl-C in the terminal reaches it once, from here.
                child = subprocess.Popen(
                    command(rank, run_dir), env=environment | ranks, cwd=HydraConfig.get().runtime.cwd,
                    start_new_session=True,
                )  # fmt: skip
                children.append(child)
            first = _wait(children, requests.received)
        finally:
            for child in children:
                child.kill()  # nothing where all have ended
                child.wait()
    codes = [child.returncode for child in children]
    # One that could not write its checkpoint has failed, and one that the signal itself has ended has not.
    stopped = (*signals.STATUSES, *(-number for number in requests.received))
    has_failed = first is not None and codes[first] not in stopped and requests.received.count(signal.SIGINT) < 2
    if requests.first is not None and not has_failed and (any(codes) or HydraConfig.get().mode == RunMode.MULTIRUN):
        raise _with_status(
            Interrupted(
                f"stopped by {signals.name_of(requests.first)}, and so were the {num_processes} processes of {run_dir}"
            ),
            signals.status_of(requests.first),
        )
    if any(codes):
        rank = first if first is not None else next(rank for rank, code in enumerate(codes) if code)
        code = codes[rank]
        if code in signals.STATUSES:
            raise _with_status(Interrupted(f"process {rank} of {num_processes} was asked to stop, and all did"), code)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = " (the system does so when memory runs out)" if code == -signal.SIGKILL else ""
        way_on = json.loads(store.get(WAY_ON)) if store.check([WAY_ON]) else {}
        raise _with_status(
            TrainingError(f"process {rank} of {num_processes} {how}{hint}; the others were ended", **way_on),
            code if code > 0 else 128 - code,
        )


def tell(error: TrainingError):
    """Tells the process that has started this one, by `run`, how a run goes on after an error: it says so for all."""
    with contextlib.suppress(RuntimeError):  # it has ended
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=GRACE))
        store.set(WAY_ON, json.dumps({"changes": error.changes, "anew": error.anew}))


def command(rank: int, run_dir: Path) -> list[str]:
    """The command line of one process of the job that Hydra is at."""
    job = HydraConfig.get()
    left_out = NOT_PASSED_ON | ({"job_logging"} if rank else set())
    arguments = [sys.executable, str(SCRIPT), *_sources(), *overrides(left_out)]
    # .hydra is there already, written by the process that starts this one
    arguments += ["hydra.mode=RUN", f"hydra.run.dir={_quoted(run_dir.absolute())}", "hydra.output_subdir=null"]
    for key in ("num", "id"):  # settings may name them
        if not OmegaConf.is_missing(job.job, key):
            arguments.append(f"hydra.job.{key}={_quoted(getattr(job.job, key))}")
    if rank:
        arguments.append("hydra/job_logging=pose_worker")  # one process writes train.log
    return arguments


def overrides(left_out: frozenset[str] | set[str] = frozenset(NOT_PASSED_ON)) -> list[str]:
    """The overrides of the job that Hydra is at, as they were given, references included.

    Args:
        left_out: settings of Hydra itself that are not handed on, such as launcher.
    """
    given = _given("overrides")
    return [*given["task"], *(override for override in given["hydra"] if _hydra_key(override) not in left_out)]


def shell_command(run_dir: Path | None, changes: Sequence[str] = (), without: Sequence[str] = ()) -> str:
    """A command for the shell in which this job was started, that runs it (again).

    Args:
        run_dir: its folder; None lets it have a new one.
        changes: overrides, which take the place of those of the same key.
        without: keys whose overrides are left out.
    """
    cwd = Path(HydraConfig.get().runtime.cwd)
    names = [f"hydra.job.{key}" for key in ("num", "id")]
    left_out = {*(key_of(change) for change in changes), *without, *names}
    kept = [override for override in overrides() if key_of(override) not in left_out]
    if "hydra:job" in " ".join(kept):  # a job of a sweep, whose settings name it
        kept += [f"{name}={_quoted(OmegaConf.select(_hydra(), name))}" for name in names]
    folder = [] if run_dir is None else [f"hydra.run.dir={_plain(_seen_from(cwd, run_dir.absolute()))}"]
    script = [_seen_from(cwd, SCRIPT), *_sources(but=(CONF, "train"))]
    return shlex.join([*_starter(), *script, *kept, *folder, *changes])


def sweep_command(changes: Sequence[str] = (), hydra: Any = None) -> str | None:
    """A command for the shell in which a sweep was started, that goes through it again in its folder.

    Args:
        changes: overrides, as of `shell_command`.
        hydra: its own config; None takes that of the job it is at.

    Returns:
        None where this process has not the command line of a sweep: it is no job of one, or a launcher's worker.
    """
    job, given = HydraConfig.get() if hydra is None else hydra, sys.argv[1:]
    if job.mode != RunMode.MULTIRUN or not {"-m", "--multirun"} & set(given):
        return None
    cwd = Path(job.runtime.cwd)
    changes = [f"hydra.sweep.dir={_plain(_seen_from(cwd, Path(job.sweep.dir).absolute()))}", *changes]
    keys = {key_of(change) for change in changes}
    kept = [argument for argument in given if argument.startswith("-") or key_of(argument) not in keys]
    return shlex.join(["python", _seen_from(cwd, SCRIPT), *kept, *changes])


def key_of(override: str) -> str | None:
    """`trainer.max_steps` of ++trainer.max_steps=3; None of what is no override."""
    try:
        return OverridesParser.create().parse_override(override).key_or_group
    except HydraException:
        return None


def _wait(children: list[subprocess.Popen], received: list[int]) -> int | None:
    """Waits for the end of all, passes signals on; returns the rank of the first that failed, if one did.

    When one has failed, or at a second Ctrl-C, the others have a moment to end by themselves, and are then ended.
    """
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
            first = next((rank for rank, code in enumerate(codes) if code not in (None, 0, *signals.STATUSES)), None)
        if None not in codes:
            return first
        if deadline is None and (first is not None or received.count(signal.SIGINT) > 1):
            deadline = time.monotonic() + GRACE
        if deadline is not None and means and time.monotonic() > deadline:
            number, deadline = means.pop(0), time.monotonic() + GRACE
            for child in children:
                child.send_signal(number)
        time.sleep(POLL)


@contextlib.contextmanager
def _noted_signals() -> Iterator[signals.Requests]:
    """Notes requests to stop while it lasts; then those who were to know of them do.

    Those are handlers of a program around this one, such as submitit's, which puts a job back into the queue. Its
    SIGUSR2 is noted too.
    """
    requests = signals.Requests()
    theirs = (signal.SIGUSR2,) if callable(signal.getsignal(signal.SIGUSR2)) else ()
    before = signals.install(requests, (*signals.STOP_SIGNALS, *theirs))
    try:
        yield requests
    finally:
        signals.restore(before)
    if requests.first is not None and signals.is_foreign(handler := before[requests.first]):
        handler(requests.first, None)


def _hydra_key(override: str) -> str:
    """`launcher` of hydra/launcher=joblib, ++hydra.launcher.n_jobs=2, ~hydra.launcher ..."""
    return re.split(r"[./@]", key_of(override) or "hydra.")[1]


def _given(key: str) -> Any:
    """A node of Hydra's own config, with references as they were given."""
    return OmegaConf.to_container(OmegaConf.select(_hydra(), f"hydra.{key}"), resolve=False)


def _hydra() -> Any:
    return HydraConfig.instance().cfg


def _sources(but: tuple[Path, str] | None = None) -> list[str]:
    """Where the config is read from, as options of Hydra's command line; the usual place and name can be left out."""
    job = HydraConfig.get()
    found = {source.provider: source.path for source in job.runtime.config_sources if source.schema == "file"}
    main = found.get("main")
    arguments = []
    if main is not None and not (but is not None and same_path(main, but[0])):
        arguments += ["--config-path", main]
    if but is None or job.job.config_name != but[1]:
        arguments += ["--config-name", str(job.job.config_name)]
    if "command-line" in found:
        arguments += ["--config-dir", found["command-line"]]
    return arguments


def _starter() -> list[str]:
    """What has started this job, as far as it can be told: python, torchrun, srun."""
    started = num_started()
    if started is None or PARENT in os.environ:
        return ["python"]
    if all(name in os.environ for name in RANKS):
        here = os.environ.get("LOCAL_WORLD_SIZE", str(started))
        nodes = started // int(here)
        return ["torchrun", *(["--standalone"] if nodes == 1 else [f"--nnodes={nodes}"]), f"--nproc_per_node={here}"]
    return ["srun", "python"]


def _seen_from(folder: Path, path: Path) -> str:
    """A path as it is written in a folder: relative where it is inside."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _plain(value: str) -> str:
    """A value as Hydra reads it back, without quotes where it needs none."""
    try:
        read = OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:
        read = None
    return value if read == value and "$" not in value else _quoted(value)


def _quoted(value: object) -> str:
    """A value as Hydra reads it back, whatever characters it has."""
    return QuotedString(str(value).replace("${", r"\${"), Quote.single).with_quotes()


def _with_status(error: PoseError, status: int) -> PoseError:
    error.status = status
    return error
