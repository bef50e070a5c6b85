"""Fixtures shared by all tests. Nothing here needs network, or sees the home folder of who runs it."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# One home for all processes of the suite: each text is tokenised once, and nobody's caches decide. Before any import,
# since libraries look for it then; pytest-xdist's processes have that of the process which started them.
if "POSE_TESTS_HOME" not in os.environ:
    os.environ["POSE_TESTS_HOME"] = os.environ["HOME"] = tempfile.mkdtemp(prefix="pose-tests-")
    atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)

import json
import logging
import signal
from pathlib import Path

import pytest
from filelock import FileLock
from script_server import Scripts

from pose.app.console import log_to_terminal
from pose.training.signals import STOP_SIGNALS


@pytest.fixture(autouse=True)
def messages():
    """Messages of `pose` go to the terminal, as they do in a run: `capsys` sees them."""
    log_to_terminal()
    yield
    logging.getLogger("pose").setLevel(logging.INFO)


@pytest.fixture(autouse=True)
def handlers():
    """A test leaves the handlers of signals as they were: later tests, and pytest, would be stopped by others."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    found = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    usual = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)  # asyncio, of notebooks, puts these back
    assert not {number: one for number, one in found.items() if one not in (before[number], *usual)}


@pytest.fixture(scope="session")
def scripts():
    """Starts scripts in processes that are forked from one with the libraries imported."""
    scripts = Scripts()
    yield scripts
    scripts.close()


@pytest.fixture(scope="session")
def script(scripts):
    """Runs a script of the repository as a user would, and returns what it printed: `Scripts.run`."""
    return scripts.run


@pytest.fixture(scope="session")
def smoke_run(script) -> Path:
    """The run folder of `experiment=smoke`, made once for all tests, by a new interpreter as a user's is."""
    folder = Path.home() / "smoke"
    with FileLock(f"{folder}.lock"):
        if not (folder / "metrics.json").exists():
            result = script("train.py", "experiment=smoke", f"hydra.run.dir={folder}", fresh=True)
            assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def load_json():
    """Reads a JSON file."""
    return lambda path: json.loads(Path(path).read_text())
