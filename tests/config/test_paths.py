"""A path that is empty, as of a shell variable that is not set, is refused: it would be the current folder."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pose.app import schema
from pose.app.callbacks import Folder
from pose.app.compare import plan_evaluation
from pose.app.preflight import plan_training
from pose.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
PATHS = {
    "path", "tokenizer", "documents", "heldout", "leave_out", "haystack", "include_path", "resume", "cache_dir", "ckpt",
}  # fmt: skip
# Keys whose type would allow for a path, and which are none
OTHERS = {
    "offline", "revision", "attention", "export_dtype", "engine", "text_field", "on_broken", "schedule",
    "target_modules", "eval_dtype",
    "accelerator", "devices", "precision", "on_nonfinite", "prefix", "tasks", "best", "dtype", "device", "init",
    "curriculum", "pose", "rope", "objective", "strategy", "logger", "optimizer", "weights_dtype", "frozen_dtype",
    "gradient_checkpointing", "compile", "micro_batch",
}  # fmt: skip
DATASET = "{path: %s, split: train, text_field: text}"
# So little that a plan of it takes no time
TRAIN = (
    "pose.target_len=300", "pose.train_len=32", "data.documents=assets/corpora/reports.train.jsonl.gz",
    "watch.every_n_steps=1", "trainer.max_steps=1", "trainer.global_batch=1", "trainer.micro_batch=1",
    "trainer.accelerator=cpu",
)  # fmt: skip


def may_be_a_path(kind) -> bool:
    if get_origin(kind) in (Union, UnionType, list):
        return any(map(may_be_a_path, get_args(kind)))
    return kind in (str, Any) or get_origin(kind) is dict


def keys(config: type, prefix: str = "") -> list[str]:
    """All keys of a schema that may hold a path by their type."""
    kinds, found = get_type_hints(config), []
    for field in fields(config):
        kind = kinds[field.name]
        if is_dataclass(kind):
            found += keys(kind, f"{prefix}{field.name}.")
        elif may_be_a_path(kind):
            found.append(prefix + field.name)
    return found


def is_path(key: str) -> bool:
    return key.rsplit(".")[-1] in PATHS


SCHEMAS = {"train": keys(schema.TrainConfig), "evaluate": keys(schema.EvaluateConfig)}
CASES = [(name, key, f"{key}=") for name in SCHEMAS for key in SCHEMAS[name] if is_path(key)]
for name, key in [("evaluate", "ckpt"), ("train", "data.documents"), ("evaluate", "eval.documents")]:
    CASES.append((name, key, f"{key}=[assets/tiny,'']"))
for name, key in [("train", "data.documents"), ("train", "data.heldout"), ("evaluate", "eval.documents")]:
    CASES.append((name, f"{key}.path", f"{key}={DATASET % repr('')}"))


@pytest.fixture(autouse=True)
def hydra():
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def plan(name: str, overrides: list[str], folder: Path):
    if name == "train":
        return plan_training(compose("train", [*TRAIN, *overrides]), folder)
    return plan_evaluation(compose("evaluate", ["ckpt=assets/tiny", *overrides]))


def test_every_key_is_a_path_or_is_none():
    """So that a new key is not forgotten here."""
    found = [key for schema_keys in SCHEMAS.values() for key in schema_keys]
    assert {key.rsplit(".")[-1] for key in found} == PATHS | OTHERS
    assert {key for key in found if is_path(key)} == {
        "model.path", "model.tokenizer", "data.documents", "data.heldout", "data.leave_out", "eval.documents",
        "eval.haystack", "eval.include_path", "watch.documents", "watch.haystack", "watch.include_path",
        "resume", "cache_dir", "ckpt",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "key", "override"), CASES, ids=lambda value: str(value))
def test_an_empty_path_is_refused(tmp_path, monkeypatch, name, key, override):
    monkeypatch.chdir(tmp_path)  # where nothing is, and nothing is left
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}\b"):
        plan(name, [override], tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train", "evaluate", "coverage"])
@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("''", " is empty: give a folder"),  # it would be the current folder, whatever lies there
        ("' '", " is empty: give a folder"),
        ("/dev/null/x", "=/dev/null/x cannot be written to .*: give another folder"),
        ("/proc/x", "=/proc/x cannot be written to .*: give another folder"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, name, key, value, message):
    """Before Hydra makes it."""
    monkeypatch.chdir(tmp_path)
    config = compose(name, [f"{key}={value}"], return_hydra_config=True)
    callback = instantiate(config.hydra.callbacks.folder)
    start = callback.on_run_start if "run" in key else callback.on_multirun_start
    with pytest.raises(SystemExit, match=f"^ConfigError: {re.escape(key)}{message}"):
        start(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "environment", "said"),
    [
        ({}, {}, "Folder      outputs/x"),
        ({"runtime": {"cwd": "/elsewhere"}}, {}, "Folder      /here/outputs/x"),
        ({"output_subdir": None}, {}, None),  # a process that another has started, which has said so
        ({}, {"RANK": "1"}, None),
        ({}, {"SLURM_PROCID": "1"}, None),
    ],
)
def test_a_job_begins_with_its_folder(monkeypatch, caplog, given, environment, said):
    """Before torch is imported, and once for all processes."""
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hydra = {"runtime": {"output_dir": "/here/outputs/x", "cwd": "/here"}, "output_subdir": ".hydra"}
    config = OmegaConf.merge({"hydra": hydra}, {"hydra": given})
    with caplog.at_level("INFO"):
        Folder().on_job_start(config)
        Folder(is_named=False).on_job_start(config)
    assert caplog.messages == ([said] if said else [])


@pytest.mark.parametrize(("flags", "key"), [((), "hydra.run.dir"), (("-m",), "hydra.sweep.dir")])
def test_a_folder_that_cannot_be_written_to_is_one_line(script, tmp_path, flags, key):
    result = script(CONF.parent / "train.py", *flags, f"{key}=/dev/null/x", cwd=tmp_path, timeout=60)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"ConfigError: {key}=/dev/null/x cannot be written to")
    assert not list(tmp_path.iterdir())
