"""Runs what is missing, side by side, each in a folder of its own; a failed run takes no other with it."""

import contextlib
import fcntl
import logging
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import cpu
from benchmarks.results.arms import EVALUATE, EXACT, REFERENCE, SEARCH, TRAIN, Arm
from benchmarks.results.records import Fingerprints, Record, Runs, record, seed_of
from pose.errors import PoseError
from pose.files import REPOSITORY, read_json, remove_folder, write_json

log = logging.getLogger("pose.results")

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}
GRACE = 10  # seconds from the signal that asks a command to end to the one that ends it
GPU = Path("/dev/nvidiactl")  # there with a driver of one
TOKENS_A_SECOND = 7000  # of a training step of the shipped model on one core; for estimates alone
MIN_STEPS = 25  # a tenth of lm's
Run = tuple[str, int]  # arm and seed


class Failed(PoseError):
    """A run that has not come to its end; the message says why."""


def compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def commit() -> str | None:
    """The commit of the working tree, with a + where more than docs has changed; None where there is no git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
        return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(changed.strip())
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass
class Runner:
    """Runs of arms, in a folder.

    Args:
        arms: by name.
        out: OUT/ARM/sSEED holds a run: `run`, a folder for each further evaluation, log.txt, and at the end run.json.
        runs: those that are known, by their lines; what is finished is added.
        is_compiled: whether training steps are compiled.
        save: called whenever a run is added.
        min_steps: that an arm has to have left where its steps are found by time.
    """

    arms: Mapping[str, Arm]
    out: Path
    runs: Runs
    is_compiled: bool = False
    save: Callable[[], None] = lambda: None
    min_steps: int = MIN_STEPS
    failures: dict[Run, str] = field(default_factory=dict)

    def __post_init__(self):
        self.fingerprints = Fingerprints(self.arms)
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        self._is_ending = False

    # ----- what there is to do -----

    def folder(self, name: str, seed: int) -> Path:
        """Of a run."""
        return self.out / name / f"s{seed}"

    def collect(self):
        """Adds the finished runs of the folder, made by other processes too, in place of older ones (by their day)."""
        for name, arm in self.arms.items():
            for seed in arm.seeds:
                found = self._left(arm, seed)
                if found is None or (self.is_done(name, seed) and self.runs[name, seed]["date"] > found["date"]):
                    continue
                self.runs[name, seed] = found

    def _left(self, arm: Arm, seed: int) -> Record | None:
        """The line of a run that is finished in the folder."""
        found = read_json(self.folder(arm.name, seed) / "run.json")
        return found if found.get("fingerprint") == self.fingerprints.of(arm, seed) else None

    def is_done(self, name: str, seed: int) -> bool:
        """Whether a run's numbers are known."""
        found = self.runs.get((name, seed))
        return found is not None and found["fingerprint"] == self.fingerprints.of(self.arms[name], seed)

    def missing(self, wanted: Collection[Run]) -> list[Run]:
        """The runs to do: those of the wanted that are not done, and what they need; in the order to do them in.

        The first seed of every arm comes before the second of any.
        """
        left: set[Run] = set()

        def add(name: str, seed: int):
            arm = self.arms[name]
            for needed in arm.needs():
                run = needed, seed_of(self.arms[needed], seed)
                is_file = needed in _referenced(arm)  # its files are needed, and not its numbers alone
                if not self.is_done(*run) or (is_file and self._left(self.arms[needed], run[1]) is None):
                    add(*run)
            left.add((name, seed))

        for name, seed in wanted:
            if not self.is_done(name, seed):
                add(name, seed)
        order = list(self.arms)
        # What is needed stands before in `arms`, and a seed that is needed is the same, or the first
        return sorted(left, key=lambda run: (self.arms[run[0]].seeds.index(run[1]), order.index(run[0])))

    def commands(self, name: str, seed: int) -> list[tuple[str, list[str]]]:
        """Of a run: the folder within its own and the command line after `python`, one after the other.

        Raises:
            Failed: the number of steps depends on runs that are not done.
        """
        arm, folder = self.arms[name], self.folder(name, seed)

        def filled(override: str) -> str:
            return REFERENCE.sub(
                lambda found: str(self.folder(found[1], seed_of(self.arms[found[1]], seed)) / "run"), override
            )

        overrides = list(map(filled, arm.overrides))
        if arm.script != EVALUATE:
            overrides.append(f"seed={seed}")
        if arm.as_long is not None:
            overrides.append(f"trainer.max_steps={self.steps(arm, seed)}")
        if arm.script == TRAIN:
            overrides += ["trainer.checkpoint_every_n_steps=null"]
            overrides += [f"trainer.compile={str(self.is_compiled).lower()}"]
        if arm.script == EVALUATE:
            overrides.append(EXACT)
        script = ["-m", SEARCH] if arm.script == SEARCH else [arm.script]
        found = [("run", [*script, *overrides])]
        model = folder / "run"
        given = next((o for o in overrides if o.startswith("ckpt=")), f"ckpt={model}")
        found += [(also, [EVALUATE, given, *more, EXACT]) for also, more in arm.also.items()]
        return [(into, [*command, "num_threads=1", f"hydra.run.dir={folder / into}"]) for into, command in found]

    def steps(self, arm: Arm, seed: int) -> int:
        """The steps of an arm that takes as long as another, from what their runs took on one kind of processor.

        By the fastest run of each: other work on a machine slows steps down, by more in one run than in another.

        Raises:
            Failed: these are not done, or not on one kind of processor; the time is up before a training begins.
        """
        assert arm.as_long is not None
        long, step_of = (self._timed(name) for name in (arm.as_long.arm, arm.as_long.step_of))
        searches = {True: self._searches(self.arms[arm.as_long.arm], seed), False: self._searches(arm, seed)}
        processors = {one["processor"] for one in long} & {one["processor"] for one in step_of}
        for one in (*searches[True], *searches[False]):
            processors &= {one["processor"]}
        if not processors:
            found = ", ".join(sorted({one["processor"] for one in (*long, *step_of)}))
            raise Failed(
                f"{arm.name} needs the times of {arm.as_long.arm} and {arm.as_long.step_of}, which were taken on "
                f"different processors ({found}): run one anew"
            )
        processor = max(sorted(processors), key=lambda name: sum(one["processor"] == name for one in long))

        def fastest(runs: Sequence[Record]) -> Record:
            here = (one["training"] for one in runs if one["processor"] == processor)
            return min(here, key=lambda found: found["step_seconds"])

        budget = fastest(long)["steps"] * fastest(long)["step_seconds"]
        for is_given, runs in searches.items():
            budget += sum(one["seconds"] for one in runs) * (1 if is_given else -1)
        steps = round(budget / fastest(step_of)["step_seconds"])
        if steps < self.min_steps:
            raise Failed(f"{arm.name} has {steps} steps left in the time of {arm.as_long.arm}")
        return steps

    def _timed(self, name: str) -> list[Record]:
        """The finished runs of an arm, by which its steps are timed."""
        found = [self.runs[name, seed] for seed in self.arms[name].seeds if self.is_done(name, seed)]
        if not found:
            raise Failed(f"{name} is not done, whose steps are timed")
        return found

    def _searches(self, arm: Arm, seed: int) -> list[Record]:
        needed = [self.arms[name] for name in _referenced(arm) if self.arms[name].script == SEARCH]
        return [self.runs[one.name, seed_of(one, seed)] for one in needed]

    def estimate(self, name: str) -> float:
        """Seconds of a run: what another seed of it took on this kind of processor, or a rough guess."""
        done = [self.runs[name, seed] for seed in self.arms[name].seeds if self.is_done(name, seed)]
        known = [one["all_seconds"] for one in done if _is_here(one["processor"])]
        return statistics.mean(known) if known else guess(self.arms[name])

    # ----- doing it -----

    def run(self, todo: Sequence[Run], jobs: int):
        """Runs of `missing`, so many at one time. What fails is in `failures`."""
        left = sum(self.estimate(name) for name, _ in todo)
        ended = 0
        futures: dict[Run, Future] = {}

        def one(name: str, seed: int):
            nonlocal left, ended
            needed = [(n, seed_of(self.arms[n], seed)) for n in self.arms[name].needs()]
            for run in needed:
                if run in futures:
                    futures[run].result()  # it stands before, so it has been begun
            start = time.monotonic()
            estimate = self.estimate(name)
            try:
                for run in needed:
                    if run in self.failures:
                        raise Failed(f"it needs {run[0]}, seed {run[1]}, which has failed")
                self._one(name, seed)
                ending = f"{(time.monotonic() - start) / 60:.1f} min"
            except Exception as error:  # one run is not to take the others with it
                self.failures[name, seed] = f"{error}" if isinstance(error, PoseError) else repr(error)
                ending = f"FAILED: {self.failures[name, seed]}"
            with self._lock:
                left, ended = left - estimate, ended + 1
                rest = f"; about {max(left, 0) / 60 / jobs:.0f} min to go" if ended < len(todo) else ""
                log.info(f"[{ended}/{len(todo)}] {name}, seed {seed}: {ending}{rest}")

        pool = ThreadPoolExecutor(jobs)
        try:
            for run in todo:  # in order, so that no thread waits for a run that none has begun
                futures[run] = pool.submit(one, *run)
            for future in futures.values():
                future.result()
        finally:
            self.end()
            pool.shutdown(cancel_futures=True)

    def end(self):
        """Ends the commands at work."""
        self._is_ending = True
        with self._lock:
            processes = list(self._processes)
        for process in processes:
            _end(process)

    def _one(self, name: str, seed: int):
        arm, folder = self.arms[name], self.folder(name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            found = self._left(arm, seed)
            if found is None:
                found = self._measured(arm, seed, folder)
        with self._lock:
            self.runs[name, seed] = found
            self.collect()  # of other processes that work in the same folder
            self.save()

    def _measured(self, arm: Arm, seed: int, folder: Path) -> Record:
        """Runs the commands of a run; its line, which is then in its folder too."""
        commands = self.commands(arm.name, seed)
        before = read_json(folder / "spent.json")
        fingerprint = self.fingerprints.of(arm, seed)
        goes_on = arm.script == SEARCH and before.get("fingerprint") == fingerprint
        (folder / "run.json").unlink(missing_ok=True)
        for into, _ in commands:
            if not goes_on:
                remove_folder(folder / into)
        at = commit()
        spent = {"fingerprint": fingerprint, "seconds": 0.0, "cpu_seconds": 0.0, "peak_mib": 0.0}
        spent |= before if goes_on else {}
        first: dict[str, float] = {}
        with open(folder / "log.txt", "ab" if goes_on else "wb") as output:
            for _, command in commands:
                try:
                    status = self._run([sys.executable, *command], output, spent)
                finally:
                    write_json(folder / "spent.json", spent)
                if status != 0:
                    raise Failed(f"status {status}: {_last_line(folder / 'log.txt')} ({folder / 'log.txt'})")
                first = first or dict(spent)  # memory and time of the training, without further evaluations
        found = record(
            arm, seed, fingerprint, folder,
            commands=[relative(command, self.out) for _, command in commands],
            seconds=round(first["seconds"], 1),
            all_seconds=round(spent["seconds"], 1),
            cpu_seconds=round(first["cpu_seconds"], 1),
            peak_mib=round(first["peak_mib"], 1),
            is_compiled=self.is_compiled and arm.script == TRAIN,
            commit=at,
        )  # fmt: skip
        if arm.script == TRAIN and not arm.keep:
            remove_folder(folder / "run" / "model")
        write_json(folder / "run.json", found)
        return found

    def _run(self, command: list[str], output, spent: dict) -> int:
        """Runs one command; its status. What it takes is added to `spent`."""
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        start = time.monotonic()
        with self._lock:
            if self._is_ending:
                raise Failed("stopped")
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0,
            )  # fmt: skip
            self._processes.add(process)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)  # it is waited for: nothing else is to
        finally:
            with self._lock:
                self._processes.discard(process)
            spent["seconds"] += time.monotonic() - start
        spent["cpu_seconds"] += usage.ru_utime + usage.ru_stime
        spent["peak_mib"] = max(spent["peak_mib"], usage.ru_maxrss / 1024)
        return process.returncode


def _referenced(arm: Arm) -> set[str]:
    return {name for override in arm.overrides for name in REFERENCE.findall(override)}


def _end(process: subprocess.Popen):
    """Asks a command and all that it has started to end, and ends it after a while."""
    end = time.monotonic() + GRACE
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        while process.returncode is None and time.monotonic() < end:
            time.sleep(0.1)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Around a run: no other process does the same meanwhile.

    Raises:
        Failed: one does.
    """
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failed(f"another process is at work in {folder}") from None
        yield


def relative(command: Sequence[str], out: Path) -> str:
    """A command as it is told: folders of runs from OUT on."""
    return shlex.join(["python", *command]).replace(f"{out}/", "OUT/")


def _last_line(file: Path) -> str:
    lines = [line for line in file.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output")[:300]


def _is_here(processor: str) -> bool:
    """Whether runs on this machine are on such a processor, by its name; a GPU is used where there is one."""
    return processor.startswith("NVIDIA") if GPU.exists() else processor == cpu()[0]


def guess(arm: Arm) -> float:
    """Seconds of a run on one core, roughly."""
    times = 0.0
    evaluations = [arm.overrides, *(more for more in arm.also.values())]
    if arm.script == SEARCH:
        target = int(arm.value("pose.target_len", "2048"))
        number = int(arm.value("search.population", "64")) * (1 + int(arm.value("search.num_generations", "10")))
        return 20 + number * int(arm.value("search.trials", "10")) * target / _reading(target)
    if arm.script == TRAIN:
        window = arm.value("pose.target_len", "2048") if arm.value("pose", "pose") == "full" else "256"
        steps, batch = arm.value("trainer.max_steps", "250"), arm.value("trainer.global_batch", "16")
        tokens = int(steps) * int(batch) * int(window)
        times += 30 + arm.cost * tokens / TOKENS_A_SECOND
        times += 20 if any(o.startswith("watch.") for o in arm.overrides) else 0
    for overrides in evaluations:
        one = Arm("", overrides)
        lengths = one.value("eval.lengths", "")
        if not lengths or one.value("eval", "") == "none":
            continue
        tasks = one.value("eval.tasks", "perplexity" if one.value("eval", "") == "perplexity" else "all")
        texts = int(one.value("eval.windows", "8")) * min(int(one.value("eval.max_documents", "2")), 3)
        each = 2 * texts + (60 if "all" in tasks or "needle" in tasks else 20 if "passkey" in tasks else 0)
        times += 10 + sum(each * int(n) / _reading(int(n)) for n in lengths.strip("[]").split(","))
    return times


def _reading(length: int) -> float:
    """Tokens a second of an evaluation on one core."""
    return 9000 / (1 + length / 4096)
