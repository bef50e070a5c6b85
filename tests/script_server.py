"""Runs Python scripts in processes that are forked from one with the libraries imported: 2 seconds in place of 7.

A fork is what `python script ...` would be: its own arguments, folder, environment, standard streams and seeds, default
signal handlers, one thread, nothing of `pose` imported yet, and the interpreter's own way to end. Two things differ:
libraries are imported already and have filled their caches, and the order of sets of strings is the server's.
`Scripts.run(..., fresh=True)` takes a new interpreter, and so does every script whose environment has something else
that an interpreter reads at its start.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import resource
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# What `pose` imports of libraries, and nothing of `pose`
LIBRARIES = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "lightning.pytorch", "peft", "hydra",
    "matplotlib.pyplot", "rich.table",
)  # fmt: skip
READ_AT_START = ("PYTHON", "LD_", "OMP_", "HF_", "CUDA_VISIBLE_DEVICES", "RANK", "LOCAL_RANK")
NUMBER = struct.Struct("i")


class Process:
    """A script at work, to be waited for and signalled as a `subprocess.Popen`.

    Attributes:
        pid: of the process.
        returncode: None while it works; minus the signal's number if one ended it.
    """

    def __init__(self, report: int):
        self._report = report  # its pid, then its status
        self.pid, self.returncode = self._read(), None

    def _read(self) -> int:
        content = os.read(self._report, NUMBER.size)
        if len(content) < NUMBER.size:
            raise RuntimeError("the server of scripts is gone, or could not fork")
        return NUMBER.unpack(content)[0]

    def wait(self, timeout: float | None = None) -> int:
        """The status, when the process has ended.

        Raises:
            subprocess.TimeoutExpired: it still works after so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = self._read()
            os.close(self._report)
        return self.returncode

    def poll(self) -> int | None:
        """The status, or None while the process works."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int):
        """Signals the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """Ends the process at once."""
        self.send_signal(signal.SIGKILL)


class Scripts:
    """Starts scripts; the server is started with the first."""

    def __init__(self):
        self._server, self._environment, self._started = None, {}, []

    def _connect(self):
        self._environment = _read_at_start()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # it starts its threads when numpy is imported
            )  # fmt: skip
        self._connection = ours

    def start(
        self, *arguments, cwd: Path = REPOSITORY, stdout=None, stderr=None, new_session: bool = False,
        file_limit: int | None = None,
    ) -> Process:  # fmt: skip
        """Starts a script.

        Args:
            arguments: of Python: a file, `-m` and a module, or `-c` and code, then what these are given.
            cwd: the folder to work in.
            stdout, stderr: open files; None: nowhere.
            new_session: whether it leads a process group of its own.
            file_limit: bytes beyond which no file can grow.

        Raises:
            ValueError: the environment has something else that an interpreter reads at its start.
        """
        if self._server is None:
            self._connect()
        if _read_at_start() != self._environment:
            raise ValueError(f"a fork cannot have {_read_at_start()}: the server has {self._environment}")
        request = {
            "arguments": [str(argument) for argument in arguments], "cwd": str(cwd), "environment": dict(os.environ),
            "new_session": new_session, "file_limit": file_limit,
        }  # fmt: skip
        with open(os.devnull, "w") as nowhere:
            receiver, report = os.pipe()
            fds = [(stdout or nowhere).fileno(), (stderr or nowhere).fileno(), report]
            try:
                socket.send_fds(self._connection, [json.dumps(request).encode()], fds)
            finally:
                os.close(report)
        self._started.append(Process(receiver))
        return self._started[-1]

    def run(
        self, *arguments, cwd: Path = REPOSITORY, timeout: float = 600, fresh: bool = False
    ) -> subprocess.CompletedProcess:
        """Runs a script to its end, and returns what it printed.

        Args:
            arguments: as those of `start`.
            cwd: the folder to work in.
            timeout: in seconds.
            fresh: whether the script gets a new interpreter.

        Raises:
            subprocess.TimeoutExpired: after so many seconds it was killed.
        """
        if self._server is None:
            self._connect()
        arguments = [str(argument) for argument in arguments]
        if fresh or _read_at_start() != self._environment:
            return subprocess.run(
                [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
            )
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            process = self.start(*arguments, cwd=cwd, stdout=stdout, stderr=stderr)
            try:
                process.wait(timeout)
            except BaseException:
                process.kill()
                raise
            printed = []
            for file in (stdout, stderr):
                file.seek(0)
                printed.append(file.read())
        return subprocess.CompletedProcess(arguments, process.returncode, *printed)

    def close(self):
        """Ends the server, and what still runs."""
        for process in self._started:
            process.kill()
        if self._server is not None:
            # Closing alone tells the server nothing while a process that was forked here holds the connection too
            self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
            self._server.wait(60)


def _read_at_start() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name.startswith(READ_AT_START)}
    found.pop("PYTHONPATH", None)  # a fork follows it
    return found


def _python_path() -> list[str]:
    return [os.path.abspath(path) for path in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _serve(connection: socket.socket) -> dict | None:
    """Forks for every request; returns the request in the fork, and None in the server once nobody asks any more."""
    before, inherited = dict(os.environ), _python_path()
    sys.path[:] = [path for path in sys.path if path not in inherited]
    for name in LIBRARIES:
        importlib.import_module(name)
    _warm_up()
    set_by_libraries = dict(os.environ.items() - before.items())
    if os.path.isdir("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) == 1, "other threads are at work: a fork would not have them"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who watches a script ends by itself
    while True:
        message, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            return None
        if os.fork() == 0:
            connection.close()
            stdout, stderr, report = descriptors
            _fork_and_report(report, stdout, stderr)
            request = json.loads(message)
            request["environment"] = set_by_libraries | request["environment"]
            _start_clean(request, stdout, stderr)
            return request
        for descriptor in descriptors:
            os.close(descriptor)


def _warm_up():
    """Fills what libraries look up once in a process: fonts, and how transformers renames the weights of each model."""
    from matplotlib.figure import Figure
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    figure = Figure(layout="constrained")
    for scale, axes in zip(("linear", "log"), figure.subplots(1, 2), strict=True):
        axes.set(title="any", xlabel="text", xscale=scale, yscale=scale)
        axes.plot([1, 100], [1, 100], label="of")
        axes.legend(fontsize="small")
    figure.savefig(io.BytesIO(), format="png", dpi=120)
    get_checkpoint_conversion_mapping("LlamaForCausalLM")
    gc.collect()
    gc.freeze()  # what is here stays: collections in a fork need not look at it, which would copy it


def _fork_and_report(report: int, *others: int):
    """Returns in a new process; the one it is called in tells the pid and the status, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        os.close(report)
        return
    for descriptor in others:
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(report, NUMBER.pack(pid))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(report, NUMBER.pack(status))
    os._exit(0)


def _start_clean(request: dict, stdout: int, stderr: int):
    """Makes of a fork what a new interpreter would be."""
    if request["new_session"]:
        os.setsid()
    if request["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    for descriptor, standard in ((stdout, 1), (stderr, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=False)  # the server's may be a terminal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:1] = _python_path()  # after the folder of the script
    for library in ("numpy.random", "torch"):  # the one of the standard library sees to it by itself
        sys.modules[library].seed()


def _run(arguments: list[str]):
    """What `python ARGUMENTS` does, in a module `__main__` of its own."""
    kind, *rest = arguments
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        code = compile(rest[0], "<string>", "exec")
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.realpath(kind))
        main.__file__ = os.path.abspath(kind)
        code = compile(Path(kind).read_bytes(), main.__file__, "exec")
    exec(code, main.__dict__)


class _End:
    """Ends a process after all else at its exit, without the seconds that taking an interpreter apart takes."""

    def __init__(self):
        self.status = 0
        atexit.register(self)  # the first, and so the last to be called

    def __call__(self):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if self.status == -signal.SIGINT:  # as Python ends then
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(self.status)

    def note(self, error: BaseException):
        """Notes the status that an error gives, which the interpreter shows."""
        self.status = 1
        if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
            self.status = (error.code or 0) & 0xFF
        elif isinstance(error, KeyboardInterrupt):
            self.status = -signal.SIGINT


if __name__ == "__main__":
    end = _End()
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        if asked is not None:
            _run(asked["arguments"])
    except BaseException as error:
        end.note(error)
        raise
