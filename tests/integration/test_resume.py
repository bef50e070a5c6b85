"""Runs that are killed, stopped, damaged: what they leave, and that they go on to the same end."""

import csv
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]
# A model from random weights, with dropout, that trains fast enough to be killed often.
SMALL = (
    "experiment=pretrain_tiny", "eval=none", "resume=auto", "trainer.max_steps=40",
    "trainer.checkpoint_every_n_steps=3", "trainer.log_every_n_steps=2", "trainer.global_batch=4",
    "trainer.micro_batch=2", "pose.target_len=64", "data.documents=assets/corpora/reports.train.jsonl.gz",
    "data.synthetic={passkey: 0, copy: 0.2, key_value: 0.2}",
    "data.curriculum=[[0.3, 32]]", "model.init.max_position_embeddings=64", "model.init.hidden_size=32",
    "model.init.intermediate_size=64", "model.init.num_hidden_layers=2", "model.init.num_attention_heads=2",
    "model.init.num_key_value_heads=2", "+model.init.attention_dropout=0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(scripts):
    """Starts train.py, in a process group of its own, to be signalled as a whole; what it prints is in FOLDER.log."""

    def start_(folder, *overrides, limit=None, cwd=REPOSITORY):
        with open(f"{folder}.log", "a") as log:
            return scripts.start(
                REPOSITORY / "train.py", *SMALL, *overrides, f"hydra.run.dir={folder}", cwd=cwd, stdout=log, stderr=log,
                new_session=True, file_limit=limit,
            )  # fmt: skip

    return start_


@pytest.fixture(scope="module")
def finish(start):
    """Runs train.py to its end; returns the status."""
    return lambda folder, *overrides, **options: start(folder, *overrides, **options).wait(300)


@pytest.fixture(scope="module")
def uninterrupted(finish, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finish(folder) == 0, Path(f"{folder}.log").read_text()[-3000:]
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def rows(run: Path) -> list[tuple]:
    """What metrics.csv says of each step, but for the speed."""
    with open(run / "metrics.csv", newline="") as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file)]


def assert_same_end(run: Path, whole: Path):
    got, wanted = weights(run), weights(whole)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert rows(run) == rows(whole)
    assert json.loads((run / "metrics.json").read_text())["train/steps"] == 40


@pytest.mark.parametrize(("least", "hits"), [(4, 1), pytest.param(10, 3, marks=pytest.mark.nightly)])
def test_killed_at_any_moment_it_ends_the_same(start, finish, uninterrupted, tmp_path, least, hits):
    """Kills with SIGKILL: half at random moments, half aimed at a checkpoint in the making; more until some hit one."""
    random.seed(0)
    ends = [(uninterrupted / name).stat().st_mtime for name in ("config.yaml", "metrics.json")]
    took = ends[1] - ends[0]  # seconds, after about one of imports
    run, kills, while_writing = tmp_path / "run", 0, 0
    while kills < least or (while_writing < hits and kills < 60):
        process, writing = start(run), kills % 2
        begin, patience = time.monotonic(), random.uniform(0.5, 1 + took)
        seen = set(run.glob("checkpoints/.step-*"))  # of the kill before
        while process.poll() is None:
            partial = set(run.glob("checkpoints/.step-*.partial")) - seen
            if (writing and partial) or (not writing and time.monotonic() - begin > patience):
                break
            time.sleep(0.0005)
        if process.poll() is not None:  # it came to its end first
            assert process.returncode == 0, Path(f"{run}.log").read_text()[-3000:]
            shutil.rmtree(run)
            continue
        time.sleep(random.uniform(0, 0.01) if writing else 0)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        kills += 1
        while_writing += any(run.glob("checkpoints/.step-*.partial"))
    assert while_writing >= hits, "the kills have to hit checkpoints in the making"
    assert finish(run) == 0, Path(f"{run}.log").read_text()[-3000:]
    assert_same_end(run, uninterrupted)
    assert not list(run.glob("checkpoints/.step-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.nightly)])
def test_a_signal_writes_a_checkpoint_and_ends_in_good_order(start, finish, uninterrupted, tmp_path, number):
    run = tmp_path / "run"
    process = start(run, "trainer.checkpoint_every_n_steps=null")
    while not (run / "metrics.csv").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.wait(60)
    assert process.returncode == 143
    log = Path(f"{run}.log").read_text()
    (step,) = steps(run)
    assert 0 < step < 40 and f"asked to stop at step {step}" in log and "Traceback" not in log
    assert not (run / "model").exists() and not (run / "metrics.json").exists()
    assert finish(run) == 0
    assert_same_end(run, uninterrupted)
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["from_step"] == step and len(provenance["earlier"]) == 1


@pytest.mark.nightly
def test_a_signal_to_every_process_of_a_run_with_workers(start, finish, uninterrupted, tmp_path):
    """As SLURM sends it: the processes that read must outlive it."""
    run = tmp_path / "run"
    process = start(run, "data.num_workers=2", "trainer.checkpoint_every_n_steps=null")
    while not (run / "metrics.csv").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)
    assert process.returncode == 143, Path(f"{run}.log").read_text()[-3000:]
    assert len(steps(run)) == 1 and "Traceback" not in Path(f"{run}.log").read_text()
    assert finish(run, "data.num_workers=2") == 0
    assert_same_end(run, uninterrupted)


def test_a_process_that_is_signalled_before_it_trains_ends(start, tmp_path):
    process, log = start(tmp_path / "run"), tmp_path / "run.log"
    while not (log.exists() and "documents of" in log.read_text()):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGUSR1)
    process.wait(60)
    assert process.returncode == 143


@pytest.mark.nightly
def test_two_runs_in_one_folder_do_not_meet(start, finish, uninterrupted, tmp_path):
    run = tmp_path / "run"
    first = start(run)
    while not (run / "metrics.csv").exists():
        time.sleep(0.01)
    assert finish(run) == 1, "while the first is at work"
    assert "another run is at work" in Path(f"{run}.log").read_text()
    first.wait(300)
    assert first.returncode == 0
    assert_same_end(run, uninterrupted)


@pytest.mark.nightly
def test_a_longer_run_goes_on_from_a_shorter_one(finish, uninterrupted, tmp_path):
    """With a schedule that does not depend on the length, raising max_steps is the longer run."""
    constant = ("finetune.schedule=constant_with_warmup", "data.curriculum=[]")
    assert finish(tmp_path / "whole", *constant) == 0
    run = tmp_path / "run"
    assert finish(run, *constant, "trainer.max_steps=20") == 0
    assert steps(run) == [18, 20]
    assert finish(run, *constant) == 0
    assert_same_end(run, tmp_path / "whole")
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    assert finish(run, *constant) == 0, "a finished run is left as it is"
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert "is finished" in Path(f"{run}.log").read_text()


def test_a_run_killed_after_its_training_is_exported_by_the_next_start(finish, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "model")
    (run / "metrics.json").unlink()
    assert finish(run) == 0, Path(f"{run}.log").read_text()[-3000:]
    assert_same_end(run, uninterrupted)


@pytest.mark.nightly
def test_without_checkpoints_a_run_is_complete_or_starts_anew(finish, uninterrupted, tmp_path):
    run, none = tmp_path / "run", "trainer.checkpoint_every_n_steps=null"
    assert finish(run, none) == 0 and steps(run) == []
    assert finish(run, none) == 0
    said = Path(f"{run}.log").read_text()
    assert "is finished" in said and "A larger trainer.max_steps" not in said
    assert finish(run, none, "seed=1") == 1 and "seed=1, which was 0" in Path(f"{run}.log").read_text()
    (run / "metrics.json").unlink()  # as if killed in the last evaluation
    (run / ".model.half").mkdir()  # and before in an export
    assert finish(run, none) == 0
    assert_same_end(run, uninterrupted)
    assert not (run / ".model.half").exists()


@pytest.mark.nightly
def test_the_micro_batch_may_change(finish, tmp_path):
    """The examples of a global batch stay the same, and so, up to rounding, do the weights."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    exact = ("trainer.precision=32-true", "model.init.attention_dropout=0", "finetune.schedule=constant_with_warmup")
    assert finish(whole, *exact) == 0
    assert finish(run, *exact, "trainer.max_steps=13", "data.curriculum=[]") == 0
    assert finish(run, *exact, "data.curriculum=[]", "trainer.micro_batch=1") == 0
    assert finish(whole.with_name("other"), *exact, "data.curriculum=[]") == 0
    got, wanted, other = weights(run), weights(whole.with_name("other")), weights(whole)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=2e-4)
    assert any((got[name] - other[name]).abs().max() > 2e-3 for name in wanted), "other examples give other weights"


@pytest.mark.nightly
def test_a_full_disk_leaves_the_last_good_checkpoint(start, finish, uninterrupted, tmp_path):
    run = tmp_path / "run"
    assert finish(run, "trainer.keep_checkpoints=1", limit=300_000) == 1, "the first checkpoint does not fit"
    log = Path(f"{run}.log").read_text()
    assert "checkpoint of step 3 cannot be written" in log and "none before it" in log and "Traceback" not in log
    process = start(run, "trainer.keep_checkpoints=1")
    while not steps(run):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    before = steps(run)
    assert finish(run, "trainer.keep_checkpoints=1", limit=300_000) == 1
    assert steps(run) == before
    assert f"There is still step-{before[0]}" in Path(f"{run}.log").read_text()
    assert finish(run, "trainer.keep_checkpoints=1") == 0
    assert steps(run) == [40]
    assert_same_end(run, uninterrupted)


def test_a_damaged_checkpoint_is_passed_over(finish, uninterrupted, tmp_path):
    """One byte is another; the run goes on from the checkpoint before, to the same end."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "model")
    (run / "metrics.json").unlink()
    assert steps(run) == [39, 40]
    with open(run / "checkpoints" / "step-40" / "state", "r+b") as file:
        file.seek(50_000)
        byte = file.read(1)
        file.seek(50_000)
        file.write(bytes([byte[0] ^ 1]))
    assert finish(run) == 0
    log = Path(f"{run}.log").read_text()
    assert "step-40 is damaged: state is not the file that was written" in log and "Going on from step 39" in log
    assert_same_end(run, uninterrupted)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=1"], ["seed=1, which was 0"]),
        (["finetune.lr=1e-3"], ["finetune.lr=0.001, which was 0.0015"]),
        (["pose.curriculum=[[0.5,64]]"], ["pose.curriculum=[[0.5, 64]], which was None"]),
        (["data.documents=assets/corpora/proofs.train.jsonl.gz"], ["data.documents="]),
        (["trainer.max_steps=10"], ["trainer.max_steps=10 is fewer than the 40 steps"]),
        (["trainer.max_steps=80"], ["trainer.max_steps=80, which was 40"]),  # a curriculum's phases are shares of it
        (["resume=null"], ["holds a run already", "resume=auto"]),
        (["resume=assets/tiny"], ["holds a run already"]),
        (["+model.init.attention_bias=true"], ["model's attention_bias=True, which was False"]),
        (["trainer.on_nonfinite=ignore"], ["trainer.on_nonfinite='ignore'", "stop or skip"]),
        (["trainer.keep_checkpoints=0"], ["trainer.keep_checkpoints=0"]),
    ],
)
def test_what_a_run_cannot_go_on_with(finish, uninterrupted, tmp_path, overrides, words):
    run = tmp_path / "run"
    run.symlink_to(uninterrupted)
    assert finish(run, *overrides) == 1
    log = Path(f"{run}.log").read_text()
    assert all(word in log for word in words) and "Traceback" not in log


def test_it_goes_on_from_any_folder_and_with_a_damaged_log(finish, uninterrupted, tmp_path):
    """The tokenizer's path is another there, the same file; the log lost the end of a line."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "model")
    (run / "metrics.json").unlink()
    (run / "provenance.json").write_text("[]")
    with open(run / "metrics.csv", "r+") as file:
        file.truncate((run / "metrics.csv").stat().st_size - 5)
    whole = rows(run)[:-1]
    assert finish(run, f"model.tokenizer={REPOSITORY}/assets/tiny", cwd=tmp_path) == 0, Path(f"{run}.log").read_text()[
        -3000:
    ]
    assert "rows of" in Path(f"{run}.log").read_text() and rows(run) == whole
    got, wanted = weights(run), weights(uninterrupted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert json.loads((run / "metrics.json").read_text())["train/loss"] > 0


def test_another_run_in_the_folder_is_not_overwritten(finish, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    assert finish(run, f"resume={uninterrupted}") == 1
    assert "holds a run already" in Path(f"{run}.log").read_text()
    assert finish(run, f"resume={run}/checkpoints/step-39") == 0, "going back inside of it is asked for"
    assert steps(run) == [39, 40]


def test_a_path_without_a_checkpoint_is_named(finish, tmp_path):
    assert finish(tmp_path / "run", "resume=assets/tiny") == 1
    assert "resume=assets/tiny holds no checkpoint" in Path(f"{tmp_path}/run.log").read_text()


@pytest.mark.nightly
def test_another_run_can_be_gone_on_with_elsewhere(finish, uninterrupted, tmp_path):
    for source in (uninterrupted, uninterrupted / "checkpoints" / "step-39"):
        run = tmp_path / source.name
        assert finish(run, f"resume={source}", f"cache_dir={tmp_path}/cache") == 0, Path(f"{run}.log").read_text()[
            -2000:
        ]
        got, wanted = weights(run), weights(uninterrupted)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        provenance = json.loads((run / "provenance.json").read_text())
        assert provenance["earlier"] == [json.loads((uninterrupted / "provenance.json").read_text())]
