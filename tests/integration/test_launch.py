"""Several processes for a job, and several jobs: sweeps, launchers, torchrun, pre-emption. On two CPU processes."""

import csv
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
SHORT = (  # of a model so small that starting the processes is what takes time
    "experiment=pretrain_tiny", "eval=none", "trainer.max_steps=2", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "trainer.global_batch=4", "trainer.micro_batch=2", "pose.target_len=64",
    "data.documents=assets/corpora/reports.train.jsonl.gz", "data.synthetic={passkey: 0, copy: 0.2, key_value: 0.2}",
    "data.curriculum=[]", "model.tokenizer=assets/tiny", "model.init.max_position_embeddings=64",
    "model.init.hidden_size=32", "model.init.intermediate_size=64", "model.init.num_hidden_layers=2",
    "model.init.num_attention_heads=2", "model.init.num_key_value_heads=2",
)  # fmt: skip
TWO = ("strategy=ddp", "trainer.devices=2")


def weights(folder):
    """Every weight in one vector."""
    found = load_file(folder / "model" / "model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


def seeds_of(sweep):
    """The seed of every job that is in sweep.csv."""
    with open(sweep / "sweep.csv", newline="") as file:
        return [row["overrides"].split("seed=")[1].split()[0] for row in csv.DictReader(file)]


@pytest.mark.nightly
def test_jobs_of_two_processes_one_after_the_other_two_at_once_and_by_torchrun(script, tmp_path):
    """The same weights, to the bit: no group has anything of another."""
    elsewhere = tmp_path / "a b=c,d"
    elsewhere.mkdir()
    train = REPOSITORY / "train.py"
    result = script(train, "-m", *SHORT, *TWO, "seed=0,1", "hydra.sweep.dir=in turn", cwd=elsewhere)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Sweep (in turn/sweep.csv)" in result.stdout
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    result = script(train, "-m", *joblib, *SHORT, *TWO, "seed=0,1", "hydra.sweep.dir=at once", cwd=elsewhere)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Sweep (at once/sweep.csv)" in result.stdout
    # Without a folder: its name has the second at which a process starts, and the processes agree on one.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = script(*torchrun, train, *SHORT, *TWO, "seed=1", cwd=elsewhere)
    assert result.returncode == 0, result.stderr[-3000:]
    (alone,) = (model.parent for model in elsewhere.glob("outputs/*/*/model"))

    jobs = {seed: weights(elsewhere / "in turn" / seed) for seed in ("0", "1")}
    assert not torch.equal(jobs["0"], jobs["1"]) and torch.equal(jobs["1"], weights(alone))
    for seed in ("0", "1"):
        assert torch.equal(weights(elsewhere / "at once" / seed), jobs[seed])
    for sweep in ("in turn", "at once"):
        assert seeds_of(elsewhere / sweep) == ["0", "1"]
        for seed in ("0", "1"):
            overrides = (elsewhere / sweep / seed / ".hydra" / "overrides.yaml").read_text()
            assert f"- seed={seed}\n" in overrides and "hydra" not in overrides
            logs = [file.name for file in (elsewhere / sweep / seed).glob("*.log")]
            assert logs == ["train.log"]


@pytest.mark.nightly
def test_a_sweep_by_submitit(script, tmp_path):
    """From any folder; a job that fails is named, and the others are done."""
    local = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")
    result = script(
        REPOSITORY / "train.py", "-m", *local, *SHORT, "finetune.lr=1e-4,nan", "seed=3",
        "hydra.sweep.dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode != 0 and "finetune.lr=nan" in result.stderr
    assert seeds_of(tmp_path / "sweep") == ["3"] and (tmp_path / "sweep" / "0" / "model").is_dir()
    assert not (tmp_path / "sweep" / "1" / "model").exists()


def children_of(pid):
    """The processes that `pose.training.launch` has started for a process, by their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if state != "Z" and f"POSE_PARENT={pid}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # ended, or another user's
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_two_processes_end_with_a_parent_that_is_killed(scripts, tmp_path):
    """Of a parent that is asked to stop: test_stopping.py."""
    run, log = tmp_path / "run", tmp_path / "log"
    with open(log, "w") as printed:
        process = scripts.start(
            "train.py", *SHORT, *TWO, "trainer.max_steps=100000", "trainer.checkpoint_every_n_steps=1",
            f"hydra.run.dir={run}", stdout=printed, stderr=printed,
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    assert len(children_of(process.pid)) == 2
    process.kill()
    process.wait(60)
    deadline = time.monotonic() + 10
    while children_of(process.pid):
        assert time.monotonic() < deadline, "processes without a parent go on"
        time.sleep(0.1)
    assert list(run.glob("checkpoints/step-*"))
