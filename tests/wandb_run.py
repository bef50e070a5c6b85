"""What an offline run of W&B holds, read back from its .wandb file.

The file is a LevelDB log (github.com/google/leveldb, doc/log_format.md) with a header of its own: blocks of 32 KiB, in
them fragments of records; each record is a message of `wandb.proto.wandb_internal_pb2`.
"""

import json
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER = b":W&B\xe1\xbe\x00"
BLOCK, FULL, LAST = 2**15, 1, 4


@dataclass
class WandbRun:
    """A run as it was stored.

    Attributes:
        folder: of the run, which holds `files/`.
        run: its last message of the run itself: run_group, job_type, display_name ...
        history: rows of metrics, in order.
        summary, config: by key; what lies deeper is nested.
        artifacts: messages, in order.
        metrics: definitions of metrics by name.
    """

    folder: Path
    run: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the table that the summary names."""
        content = json.loads((self.folder / "files" / self.summary[key]["path"]).read_text())
        return content["columns"], content["data"]


def read_run(folder: Path) -> WandbRun:
    """The only run that is in FOLDER/wandb."""
    (found,) = read_runs(folder)
    return found


def read_runs(folder: Path) -> list[WandbRun]:
    """All runs that are in FOLDER/wandb, by their names."""
    runs = map(_read, folder.glob("wandb/offline-run-*/run-*.wandb"))
    return sorted(runs, key=lambda run: run.run.display_name)


def _read(file: Path) -> WandbRun:
    found = WandbRun(file.parent)
    for record in _records(file):
        if record.HasField("run"):
            found.run = record.run
            _update(found.config, record.run.config.update)
        elif record.HasField("config"):
            _update(found.config, record.config.update)
        elif record.HasField("history"):
            found.history.append({item.key or item.nested_key[0]: _value(item) for item in record.history.item})
        elif record.HasField("summary"):
            _update(found.summary, record.summary.update)
        elif record.HasField("artifact"):
            found.artifacts.append(record.artifact)
        elif record.HasField("metric"):
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
    return found


def _records(file: Path) -> list[Record]:
    """All of a finished run: W&B's own process may still be writing when `finish` returns."""
    for _ in range(100):
        records = [Record.FromString(message) for message in _messages(file.read_bytes())]
        if any(record.HasField("exit") for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def _update(target: dict[str, Any], items):
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = target
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = _value(item)


def _value(item) -> Any:
    return json.loads(item.value_json)


def _messages(data: bytes):
    assert data.startswith(HEADER), "another form of file"
    at, message = len(HEADER), b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little for a fragment's head
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):  # not whole yet
            return
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield message
            message = b""
