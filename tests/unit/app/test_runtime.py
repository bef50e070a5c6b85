"""The process around a run: what comes first, what is written, what it needs of the machine."""

import logging
import platform
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pose.app import compare, run, runtime, schema
from pose.errors import TrainingError
from pose.files import CONF

schema.register()


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.mark.parametrize(
    ("start", "name", "override"),
    [
        (run.train, "train", "seed=-1"),
        (run.train, "train", "seed=4294967296"),
        (run.train, "train", "num_threads=0"),
        (compare.evaluate, "evaluate", "num_threads=0"),
        (compare.evaluate, "evaluate", "+zebra=1"),
    ],
)
def test_a_config_is_checked_before_anything_is_set(start, name, override, capsys, monkeypatch):
    """A seed out of range would end in a traceback of the generator that it is given to."""
    monkeypatch.setattr(runtime, "run_folder", lambda: pytest.fail("the config comes first"))
    with pytest.raises(SystemExit) as caught:
        start(composed(name, override))
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert said.startswith(f"ConfigError: {override.lstrip('+').split('=')[0]}") and said.count("\n") == 1


def test_no_git_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert runtime._git("rev-parse", "HEAD") is None


def test_a_config_is_written_in_one_step(tmp_path, monkeypatch):
    """Beside the one before, whose place it takes: a process that is killed leaves that one."""
    monkeypatch.setattr(runtime, "provenance", dict)
    runtime.save_config(OmegaConf.create({"seed": 1}), tmp_path)
    with open(tmp_path / "config.yaml") as before:
        runtime.save_config(OmegaConf.create({"seed": 2}), tmp_path)
        assert before.read() == "seed: 1\n" and (tmp_path / "config.yaml").read_text() == "seed: 2\n"
    assert {file.name for file in tmp_path.iterdir()} == {"config.yaml", "provenance.json"}


@pytest.mark.parametrize(
    ("micro_batch", "change"),
    [
        (16, "trainer.micro_batch=8"),
        (15, "trainer.micro_batch=5"),
        (7, "trainer.micro_batch=1"),
        (1, "model.gradient_checkpointing=true"),
        ("auto", "model.gradient_checkpointing=true"),  # a larger one that does not fit is no error
    ],
)
def test_a_smaller_batch_that_divides_is_suggested(micro_batch, change):
    cfg = composed("train", f"trainer.micro_batch={micro_batch}", "pose.train_len=64")
    with pytest.raises(TrainingError) as caught, runtime.explained_memory_errors(cfg):
        raise torch.OutOfMemoryError("out of memory")
    assert caught.value.changes == (change,)


@pytest.mark.parametrize(
    ("micro_batch", "change"),
    [(16, "trainer.micro_batch=8"), (6, "trainer.micro_batch=2"), (2, "model.gradient_checkpointing=true")],
)
def test_it_counts_the_views_of_an_objective(micro_batch, change):
    """As the key does: what is suggested takes less at a time than what has run."""
    cfg = composed("train", "objective=self_distill", f"trainer.micro_batch={micro_batch}", "pose.train_len=64")
    with pytest.raises(TrainingError) as caught, runtime.explained_memory_errors(cfg):
        raise torch.OutOfMemoryError("out of memory")
    assert caught.value.changes == (change,)
    assert (f"it is {micro_batch};" in str(caught.value)) is (micro_batch > 2)


@pytest.mark.parametrize(
    ("reuse", "words"), [("true", "the same command goes on"), ("false", "with reuse=true it goes")]
)
def test_what_is_said_of_an_evaluation_that_was_stopped(reuse, words):
    assert words in compare._way_on(composed("evaluate", f"reuse={reuse}"))


def test_a_gpu_is_not_announced_twice(monkeypatch, caplog):
    """Lightning's accelerator says which GPU a process has, by its own handler and by ours."""
    log = logging.getLogger("lightning.pytorch.accelerators.cuda")
    monkeypatch.setattr(log, "level", logging.NOTSET)
    monkeypatch.setattr(log, "_cache", {})
    runtime.quiet_libraries()
    with caplog.at_level(logging.INFO):
        log.info("LOCAL_RANK: 0 - CUDA_VISIBLE_DEVICES: [0]")
        log.warning("a fault")
    assert [record.getMessage() for record in caplog.records] == ["a fault"]


def test_the_processor_is_named_by_its_model(monkeypatch):
    """Its architecture does not say whether it has bf16, on which its times depend."""
    found = runtime._processor()
    if Path("/proc/cpuinfo").exists() and "model name" in Path("/proc/cpuinfo").read_text():
        assert found not in ("", "x86_64") and found in Path("/proc/cpuinfo").read_text()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "flags : fpu\n")
    assert runtime._processor() in (platform.processor(), platform.machine())
