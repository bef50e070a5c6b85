"""Runs that are asked to stop, and runs that something stops: what they say, and that the command they name goes on."""

import csv
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from hydra.experimental.callback import Callback
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
# A model from random weights, with dropout, that trains long enough to be met at it.
SMALL = (
    "experiment=pretrain_tiny", "eval=none", "trainer.max_steps=40", "trainer.checkpoint_every_n_steps=10",
    "trainer.log_every_n_steps=2", "trainer.global_batch=4", "trainer.micro_batch=2", "trainer.precision=32-true",
    "pose.target_len=64", "data.documents=assets/corpora/reports.train.jsonl.gz",
    "data.synthetic={passkey: 0, copy: 0.2, key_value: 0.2}", "data.curriculum=[]", "model.tokenizer=assets/tiny",
    "model.init.max_position_embeddings=64", "model.init.hidden_size=32", "model.init.intermediate_size=64",
    "model.init.num_hidden_layers=2", "model.init.num_attention_heads=2", "model.init.num_key_value_heads=2",
    "+model.init.attention_dropout=0.1", "num_threads=1",
)  # fmt: skip
TWO = ("trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_steps=20")


class Run:
    """A run at work, and what it has printed."""

    def __init__(self, process, log: Path):
        self.process, self.log, self.pid = process, log, process.pid

    def said(self) -> str:
        return self.log.read_text()

    def is_at_work(self) -> bool:
        return self.process.poll() is None

    def until(self, condition, patience: float = 240):
        """Waits until something holds while the run is at work."""
        deadline = time.monotonic() + patience
        while not condition():
            assert self.is_at_work() and time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.01)

    def end(self, patience: float = 300) -> int:
        """The status."""
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it goes on: {self.said()[-3000:]}") from None

    def command(self) -> list[str]:
        """What it says to go on with, as a shell reads it."""
        (line,) = {line.split("To go on: ")[1] for line in self.said().splitlines() if "To go on: " in line}
        python, script, *arguments = shlex.split(line)
        assert (python, Path(script).name) == ("python", "train.py")
        return arguments


@pytest.fixture(scope="module")
def start(scripts, tmp_path_factory):
    """Starts train.py in a process group of its own; what it prints is in a file."""
    logs, started = tmp_path_factory.mktemp("logs"), []

    def start_(*arguments, cwd=REPOSITORY, script=(REPOSITORY / "train.py",)):
        log = logs / f"{len(started)}.log"
        with open(log, "w") as printed:
            process = scripts.start(*script, *arguments, cwd=cwd, stdout=printed, stderr=printed, new_session=True)
        started.append(Run(process, log))
        return started[-1]

    def small(*overrides, **options):
        """A run of the small model."""
        flags = [override for override in overrides if override.startswith("-")]  # Hydra wants them first
        return start_(*flags, *SMALL, *overrides[len(flags) :], **options)

    start_.small = small
    yield start_
    for one in started:
        one.process.kill()


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """A run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start.small(f"hydra.run.dir={folder}")
    assert process.end() == 0, process.said()[-3000:]
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def logged(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock tells."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows]


def assert_same_end(run: Path, other: Path):
    got, wanted = weights(run), weights(other)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert logged(run) == logged(other)


def test_an_interrupted_run_goes_on_by_the_command_that_it_names(start, whole, tmp_path):
    """The default's folder is new at every start. Its readers get the terminal's Ctrl-C, too."""
    process = start.small("data.num_workers=2", cwd=tmp_path)
    process.until(lambda: list(tmp_path.glob("outputs/*/*/metrics.csv")))
    os.killpg(process.pid, signal.SIGINT)
    assert process.end() == 130, process.said()[-3000:]
    (run,) = tmp_path.glob("outputs/*/*")
    (step,) = steps(run)[-1:]
    said = process.said()
    assert "Ctrl-C: stopping after this step, with a checkpoint (Ctrl-C once more: at once, without one)" in said
    assert f"Interrupted: asked to stop at step {step}: the state is in " in said and "Traceback" not in said
    assert 0 < step < 40 and not (run / "model").exists()

    again = start(*process.command(), cwd=tmp_path)
    assert again.end() == 0, again.said()[-3000:]
    assert list(tmp_path.glob("outputs/*/*")) == [run]
    assert f"Going on from step {step}" in again.said()
    assert_same_end(run, whole)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["train/steps"] == 40 and metrics["train/lr"] > 0 and metrics["train/loss_retrieval"] > 0


def test_interrupted_twice_it_ends_at_once(start, tmp_path):
    run = tmp_path / "run"
    process = start.small(f"hydra.run.dir={run}", "trainer.max_steps=100000", "trainer.micro_batch=1",
                          "trainer.global_batch=1024")  # fmt: skip
    process.until(lambda: "Checked" in process.said())
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    process.until(lambda: "stopping after this step" in process.said())
    time.sleep(1.2)
    assert process.is_at_work(), "a step of 1,024 batches"
    os.kill(process.pid, signal.SIGINT)
    assert process.end(20) == 130
    said = process.said()
    assert "Stopped at once, with no checkpoint in" in said and "Traceback" not in said and steps(run) == []
    assert f"hydra.run.dir={run}" in process.command() and process.command()[-1] == "resume=auto"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.nightly
def test_while_it_measures_it_ends_at_once_and_goes_on_measuring(start, whole, tmp_path, number):
    if signal.getsignal(number) is signal.SIG_IGN and number == signal.SIGHUP:
        pytest.skip("started by nohup, which has every process ignore it")
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "model")
    slow = ("eval=passkey", "eval.lengths=[256]", "eval.trials=5000", "resume=auto", f"hydra.run.dir={run}")
    process = start.small(*slow)
    process.until(lambda: "Measuring the extended model" in process.said())
    os.kill(process.pid, number)
    assert process.end(60) == (130 if number == signal.SIGINT else 143)
    said = process.said()
    assert "Stopped by" in said and "Traceback" not in said and not (run / "metrics.json").exists()
    command = [o for o in process.command() if not o.startswith("eval.trials")]
    again = start(*command, "eval.trials=2")
    assert again.end() == 0, again.said()[-3000:]
    assert "passkey@256" in json.loads((run / "metrics.json").read_text())


def test_an_evaluation_ends_at_once_and_says_how_it_goes_on(start, tmp_path):
    process = start(
        "ckpt=assets/tiny", "eval=passkey", "eval.lengths=[256]", "eval.trials=5000", "num_threads=1",
        f"cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run", script=(REPOSITORY / "evaluate.py",),
    )  # fmt: skip
    process.until(lambda: "Measuring assets/tiny" in process.said())
    os.kill(process.pid, signal.SIGINT)
    assert process.end(60) == 130
    said = process.said()
    assert "Stopped by Ctrl-C. Given again, the same command goes on where it was" in said
    assert "Traceback" not in said and not (tmp_path / "run" / "metrics.json").exists()


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children() if "train.py" in " ".join(child.cmdline())]


@pytest.mark.nightly
def test_a_job_of_two_processes_is_interrupted_once(start, tmp_path):
    """By a terminal, which signals all of them, and the process that waits passes it on.

    Under FSDP, whose checkpoints are unpickled: a run's own need no leave.
    """
    run = tmp_path / "run"
    process = start.small(*TWO, "strategy=fsdp", "trainer.checkpoint_every_n_steps=null", f"hydra.run.dir={run}")
    process.until(lambda: (run / "metrics.csv").exists())
    ours = children(process.pid)
    assert len(ours) == 2
    for pid in (process.pid, *ours):
        os.kill(pid, signal.SIGINT)
    assert process.end(120) == 130, process.said()[-3000:]
    said = process.said()
    assert "Interrupted: asked to stop at step" in said and "Interrupted: stopped by Ctrl-C" in said
    assert "Traceback" not in said, said
    (kept,) = steps(run)
    assert not any(psutil.pid_exists(pid) for pid in ours)
    again = start(*process.command())
    assert again.end() == 0, again.said()[-3000:]
    assert f"Going on from step {kept} of 20" in again.said() and (run / "model").is_dir()
    # And from elsewhere it is another's, however it is spelt
    (tmp_path / "new").mkdir()
    os.symlink(run, tmp_path / "new" / "link")
    spelt = tmp_path / "new" / "link" / "checkpoints"
    process = start.small(*TWO, "strategy=fsdp", f"hydra.run.dir={tmp_path}/new", f"resume={spelt}")
    assert process.end() == 1 and "trust_pickle=true" in process.said()


@pytest.mark.nightly
def test_an_interrupted_sweep_goes_on_with_all_its_jobs(start, tmp_path):
    sweep = tmp_path / "sweep"
    process = start.small("-m", "seed=0,1", "trainer.max_steps=16", f"hydra.sweep.dir={sweep}")
    process.until(lambda: (sweep / "0" / "metrics.csv").exists())
    os.kill(process.pid, signal.SIGINT)
    assert process.end(120) == 130, process.said()[-3000:]
    assert not (sweep / "1").exists() and "Traceback" not in process.said()
    assert {"-m", "seed=0,1", f"hydra.sweep.dir={sweep}", "resume=auto"} <= set(process.command())
    again = start(*process.command())
    assert again.end() == 0, again.said()[-3000:]
    assert (
        f"Going on from step {json.loads((sweep / '0' / 'provenance.json').read_text())['from_step']}" in again.said()
    )
    assert all((sweep / job / "model").is_dir() for job in "01")


@pytest.mark.nightly
def test_jobs_side_by_side_are_interrupted_each_with_a_checkpoint(start, tmp_path):
    sweep = tmp_path / "sweep"
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={sweep}")
    process = start.small("-m", *joblib, "seed=0,1,2", "trainer.max_steps=60")
    process.until(lambda: all((sweep / job / "metrics.csv").exists() for job in "01"))
    os.killpg(process.pid, signal.SIGINT)
    assert process.end(120) == 130, process.said()[-3000:]
    said = process.said()
    assert said.count("Interrupted: asked to stop at step") == 2 and "Traceback" not in said
    assert all(len(steps(sweep / job)) >= 1 for job in "01") and not (sweep / "2" / "metrics.csv").exists()
    assert f"hydra.sweep.dir={sweep} resume=auto" in said.splitlines()[-1]


@pytest.mark.nightly
def test_a_killed_reader_is_named_with_what_is_kept(start, tmp_path):
    run = tmp_path / "run"
    process = start.small("data.num_workers=2", "trainer.max_steps=100000", f"hydra.run.dir={run}")
    process.until(lambda: steps(run))
    readers = psutil.Process(process.pid).children(recursive=True)
    os.kill(readers[-1].pid, signal.SIGKILL)
    assert process.end(120) == 1
    said = process.said()
    assert "TrainingError: a process that reads the data has ended" in said and "Traceback" not in said
    assert f"in {run}/checkpoints" in said and "resume=auto" in process.command()


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_run_folder_that_goes_is_named(start, tmp_path, how):
    run = tmp_path / "run"
    process = start.small("trainer.max_steps=100000", f"hydra.run.dir={run}")
    process.until(lambda: (run / "metrics.csv").exists())
    run.rename(tmp_path / "other")
    if how == "removed":
        shutil.rmtree(tmp_path / "other")
    assert process.end(120) == 1
    said = process.said()
    assert "TrainingError: " in said and "Traceback" not in said and "To go on: " in said
    assert "cannot be used any more" in said or "folder is gone" in said


def test_a_training_that_diverges_is_named_for_what_it_is(start, tmp_path):
    """Not for the check of the export that would fail."""
    run = tmp_path / "run"
    process = start.small("finetune.lr=10", "finetune.warmup_steps=0", "trainer.max_steps=12", f"hydra.run.dir={run}")
    assert process.end() == 1
    said = process.said()
    assert "TrainingError: the training has diverged: at step 12" in said and "Traceback" not in said
    assert "Start anew with a lower finetune.lr (it is 10)" in said and "To start anew: python" in said
    assert not (run / "model").exists() and steps(run) == [10]


# train.py, which finds this module
WITH_THIS_FOLDER = (
    f"import sys, runpy; sys.path[:0] = [{str(REPOSITORY)!r}, {str(Path(__file__).parent)!r}]; "
    f"sys.argv[0] = 'train.py'; sys.argv[1:1] = ['--config-path', {str(REPOSITORY / 'conf')!r}]; "
    f"runpy.run_path({str(REPOSITORY / 'train.py')!r}, run_name='__main__')"
)


class Look(Callback):
    """A Hydra callback: what of a job is alive when it has ended, before any collection, and the memory it leaves."""

    def on_job_start(self, config, **kwargs):
        gc.disable()

    def on_job_end(self, config, job_return, **kwargs):
        from lightning import Trainer
        from transformers import PreTrainedModel

        from pose.data.datamodule import PoseDataModule

        kinds = (PreTrainedModel, Trainer, PoseDataModule, torch.optim.Optimizer)
        found = {kind.__name__: sum(issubclass(type(one), kind) for one in gc.get_objects()) for kind in kinds}
        line = {"alive": found, "mib": psutil.Process().memory_info().rss >> 20, "status": job_return.status.name}
        with open(Path(config.hydra.sweep.dir) / "alive.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


@pytest.mark.nightly
def test_nothing_of_a_job_lives_on_into_the_next(start, tmp_path):
    """Whether it is done or has failed, with its W&B run in its own folder."""
    sweep = tmp_path / "sweep"
    process = start.small(
        "-m", "finetune.lr=1e30,1e-3,1e29,1e-4,1e28,1e-5", "finetune.warmup_steps=0", "trainer.max_steps=6",
        "logger=wandb", "logger.offline=true", f"hydra.sweep.dir={sweep}",
        f"+hydra.callbacks.look._target_={Path(__file__).stem}.Look", script=("-c", WITH_THIS_FOLDER),
    )  # fmt: skip
    assert process.end() == 1, process.said()[-3000:]
    jobs = [json.loads(line) for line in (sweep / "alive.jsonl").read_text().splitlines()]
    assert [job["status"] for job in jobs] == ["FAILED", "COMPLETED"] * 3, process.said()[-3000:]
    assert all(not any(job["alive"].values()) for job in jobs), jobs
    assert jobs[-1]["mib"] - jobs[1]["mib"] < 60, jobs
    ids = [(sweep / str(job) / ".wandb_id").read_text() for job in range(6)]
    for job in range(6):
        (logs,) = (sweep / str(job) / "wandb").glob("offline-run-*")
        assert logs.name.endswith(ids[job])
    assert len(set(ids)) == 6 and "anonymous" not in process.said()
