"""The fingerprint of a checkpoint changes with everything that is read for it, wherever that lies."""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from pose.errors import CheckpointError
from pose.files import Memo
from pose.modeling.checkpoints import fingerprint as module
from pose.modeling.checkpoints.fingerprint import fingerprint

TINY = Path(__file__).resolve().parents[4] / "assets" / "tiny"


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture
def print_of(tmp_path, model):
    return lambda: fingerprint(str(model), None, Memo(tmp_path / "memo"))


def flip(file):
    """Changes the last byte of a file, and neither its size nor its times."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_every_file_that_is_read_counts(model, print_of):
    seen = [print_of()]
    assert {name for name, _ in seen[0]} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    flip(model / "model.safetensors")
    seen.append(print_of())
    (model / "additional_chat_templates").mkdir()
    for name in (
        "generation_config.json", "tokenizer.model", "merges.txt", "qwen.tiktoken", "chat_template.jinja",
        "added_tokens.json", "additional_chat_templates/tool.jinja",
    ):  # fmt: skip
        (model / name).write_text("{}")
        seen.append(print_of())
    assert len({json.dumps(one) for one in seen}) == 9


def test_what_is_not_read_does_not(model, print_of):
    """Notes, code, the state of an optimizer, and weights beside those that are read."""
    before = print_of()
    for name in ("README.md", "LICENSE", "modeling.py", "optimizer.pt", "pytorch_model.bin", "other.safetensors"):
        (model / name).write_text("{}")
    (model / "checkpoint-5").mkdir()
    assert print_of() == before


def test_weights_replaced_behind_a_link_give_another(tmp_path, model, print_of):
    """Of the file, or of the folder that it lies in."""
    (tmp_path / "store").mkdir()
    (model / "model.safetensors").rename(tmp_path / "store" / "w")
    (model / "model.safetensors").symlink_to("../store/w")
    first = print_of()
    flip(tmp_path / "store" / "w")
    assert print_of() != first
    model.rename(tmp_path / "real")
    model.symlink_to("real")
    second = print_of()
    flip(tmp_path / "store" / "w")
    assert second != print_of() == first


def test_shards_that_an_index_names_count_wherever_they_lie(tmp_path, model, print_of):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"part.safetensors": names[::2], "parts/deep.safetensors": names[1::2]}
    (tmp_path / "elsewhere").mkdir()
    (model / "parts").symlink_to(tmp_path / "elsewhere")
    for shard, inside in shards.items():
        save_file({name: weights[name] for name in inside}, model / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    seen = [print_of()]
    assert {name for name, _ in seen[0]} >= {*shards, "model.safetensors.index.json"}
    for file in (model / "part.safetensors", tmp_path / "elsewhere" / "deep.safetensors"):
        flip(file)
        seen.append(print_of())
    assert len({json.dumps(one) for one in seen}) == 3


def test_a_checkpoint_of_the_hub_is_told_by_its_commit(tmp_path, monkeypatch):
    commits = {None: "c0", "v1": "c1"}
    cached = "/hub/models--a--b/snapshots/{}/config.json"
    monkeypatch.setattr(module, "find_file", lambda path, name, revision, **_: cached.format(commits[revision]))
    prints = [fingerprint("a/b", revision, Memo(tmp_path)) for revision in commits]
    assert prints == [["a/b", "c0"], ["a/b", "c1"]]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no/such/folder"):
        fingerprint("no/such/folder", None, Memo(tmp_path))


def test_a_long_reading_is_announced_once(model, print_of, monkeypatch, capsys):
    """Of files that are remembered nothing is read again."""
    print_of()
    assert capsys.readouterr().out == "", "a small model takes no time"
    monkeypatch.setattr(module, "MANY_BYTES", 1000)
    monkeypatch.setattr("pose.files.BYTES_TO_REMEMBER", 1)
    monkeypatch.setattr("pose.files.time", SimpleNamespace(time=lambda: time.time() + 60))  # the copies are old
    print_of()
    assert f"GB of {model} to identify its weights" in capsys.readouterr().out
    print_of()
    assert capsys.readouterr().out == ""
