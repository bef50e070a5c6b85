"""A forked script is what a new interpreter would be."""

import json
import os
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
from script_server import Scripts

pytestmark = pytest.mark.slow

STATE = """
import json, logging, os, random, signal, sys, threading
import __main__
NOT_OURS = ("PYTEST_CURRENT_TEST", "COLUMNS", "LINES")  # the last two: readline's, which pytest imports
state = {
    "arguments": [sys.argv, sys.path, os.getcwd(), vars(__main__).get("__file__"), __name__],
    "signals": {int(n): str(signal.getsignal(n)).split(" at ")[0] for n in signal.valid_signals()},
    "threads": [threading.active_count(), threading.current_thread().name, len(os.listdir("/proc/self/task"))],
    "streams": [sys.stdin.read(), sys.stdout.line_buffering, sys.stderr.line_buffering, sys.stdout.isatty()],
    "ours": [name for name in sys.modules if name.split(".")[0] in ("pose", "train", "evaluate", "script_server")],
}
"""
PRINT = """
state["environment"] = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
print(json.dumps(state))
"""
OF_LIBRARIES = """
import warnings
import torch, transformers, lightning.pytorch, peft, hydra, matplotlib.pyplot, rich.table
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
state |= {
    "hydra": [GlobalHydra.instance().is_initialized(), HydraConfig.instance().cfg, OmegaConf.has_resolver("hydra")],
    "logging": [logging.getLogger(name).level for name in ("", "pose", "lightning", "transformers")]
    + [str(logging.getLogger(name).handlers) for name in ("", "pose", "lightning.pytorch")],
    "torch": [torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_dtype()),
              torch.are_deterministic_algorithms_enabled()],
    "warnings": len(warnings.filters),
}
"""
RANDOM = (
    "import random, numpy, torch, uuid; print(random.random(), numpy.random.rand(), torch.rand(1).item(), uuid.uuid4())"
)


@pytest.mark.parametrize("kind", ["code", "file", "module"])
@pytest.mark.nightly
def test_its_state_is_that_of_a_new_interpreter(script, tmp_path, monkeypatch, kind):
    script("-c", "")  # the server is there before what it does not know of
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it, and a new one with it
    monkeypatch.setenv("OF_THIS_TEST", "here")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("PYTHONPATH", f"folder{os.pathsep}{tmp_path}/b")
    (tmp_path / "folder").mkdir()
    code = STATE + (OF_LIBRARIES if kind == "file" else "") + PRINT
    (tmp_path / "folder" / "state.py").write_text(code)
    command = {"code": ("-c", code), "file": ("folder/state.py",), "module": ("-m", "folder.state")}[kind]
    seen = []
    for fresh in (False, True):
        result = script(*command, "an argument", "--b=ü", cwd=tmp_path, fresh=fresh)
        assert result.returncode == 0, result.stderr
        seen.append(json.loads(result.stdout))
    forked, fresh = seen
    for part, value in fresh.items():
        # Libraries that are not imported there have not yet set what they set
        assert forked[part] == value or (part == "environment" and kind != "file"), part
    assert forked["environment"]["OF_THIS_TEST"] == "here" and "WANDB_MODE" not in forked["environment"]
    assert fresh["ours"] == [] and f"{tmp_path}/folder" in fresh["arguments"][1]
    assert fresh["arguments"][0][1:] == ["an argument", "--b=ü"] and fresh["arguments"][2] == str(tmp_path)


def test_every_fork_has_seeds_of_its_own(script):
    one, two = (script("-c", RANDOM).stdout.split() for _ in range(2))
    assert len(one) == 4 and not set(one) & set(two)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('out'); raise SystemExit", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('a message')", 1),
        ("import atexit; atexit.register(print, 'at exit'); 1 / 0", 1),
        ("import os; os._exit(300)", 44),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import threading, time\nthreading.Timer(0.2, lambda: print('after main')).start()", 0),
        ("import multiprocessing as m\np = m.Process(target=print, args=('child',)); p.start(); p.join()", 0),
    ],
)
def test_it_ends_as_a_new_interpreter_does(script, code, status):
    forked, fresh = script("-c", code), script("-c", code, fresh=True)
    assert forked.returncode == fresh.returncode == status
    assert forked.stdout == fresh.stdout
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_what_libraries_set_in_the_tests_own_process_takes_no_new_interpreter(script, monkeypatch):
    parent = "import os; print(os.getppid())"
    before = script("-c", parent).stdout
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/elsewhere")
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert str(os.getpid()) + "\n" not in (before, script("-c", parent).stdout)
    assert script("-c", parent, fresh=True).stdout == f"{os.getpid()}\n"


def test_what_only_a_new_interpreter_can_have_gives_one(scripts, script, monkeypatch):
    code = "import sys; print(sys.flags.optimize)"
    assert script("-c", code).stdout == "0\n"
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    assert script("-c", code).stdout == "1\n"
    with pytest.raises(ValueError, match="PYTHONOPTIMIZE"):
        scripts.start("-c", code)


def test_it_is_signalled_waited_for_and_limited(scripts, script, tmp_path):
    with open(tmp_path / "out", "w") as out:
        process = scripts.start("-c", "import os; os.write(1, b'begun'); os.read(os.pipe()[0], 1)", stdout=out)
        while (tmp_path / "out").read_text() != "begun":
            assert process.poll() is None
            time.sleep(0.001)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == process.poll() == -signal.SIGTERM
        process.kill()  # it is gone
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        script("-c", "import time; time.sleep(600)", timeout=0.2)
    assert time.monotonic() - begin < 60

    code = "import os; print(os.getpgid(0) == os.getpid()); f = open('file', 'w'); f.write('a' * 2000); f.flush()"
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        process = scripts.start("-c", code, cwd=tmp_path, stdout=out, stderr=err, new_session=True, file_limit=1000)
        assert process.wait(60) == 1
    assert (tmp_path / "out").read_text() == "True\n" and "File too large" in (tmp_path / "err").read_text()
    assert os.path.getsize(tmp_path / "file") == 1000


def test_the_server_ends_though_a_fork_holds_its_connection():
    """As a process that reads data, which multiprocessing ends later."""
    scripts = Scripts()
    scripts._connection, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    scripts._server = SimpleNamespace(wait=lambda timeout: None)
    with scripts._connection.dup(), server:
        scripts.close()
        server.settimeout(5)
        assert server.recv(1) == b""
