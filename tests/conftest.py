"""Fixtures shared by all tests. Nothing here needs network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from pose.app.console import log_to_terminal

REPOSITORY = Path(__file__).resolve().parent.parent


def run_script(*arguments: str, cwd: Path = REPOSITORY, timeout: int = 600) -> subprocess.CompletedProcess:
    """Runs a script of the repository as a user would, and returns what it printed."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(autouse=True)
def messages():
    """Messages of `pose` go to the terminal, as they do in a run: `capsys` sees them."""
    log_to_terminal()
    yield
    logging.getLogger("pose").setLevel(logging.INFO)


@pytest.fixture(scope="session")
def script():
    """`run_script`, as a fixture: test modules cannot import from here."""
    return run_script


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Path:
    """The run folder of `experiment=smoke`, made once for all tests of a process."""
    folder = tmp_path_factory.mktemp("smoke")
    result = run_script("train.py", "experiment=smoke", f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def load_json():
    """Reads a JSON file."""
    return lambda path: json.loads(Path(path).read_text())
