"""The processes that read: what they need, and which signals are not for them."""

import multiprocessing
import os
import resource
import signal
import socket
import sys
from multiprocessing import reduction, resource_sharer
from types import SimpleNamespace

import pytest

from pose.data import datamodule
from pose.errors import ConfigError


@pytest.fixture
def limits(monkeypatch):
    """Limits of open files that a test gives, and what is set."""
    found = {}

    def of(soft, hard):
        found["now"] = (soft, hard)
        monkeypatch.setattr(datamodule.resource, "getrlimit", lambda which: found["now"])
        monkeypatch.setattr(datamodule.resource, "setrlimit", lambda which, both: found.__setitem__("now", both))
        return lambda: found["now"]

    return of


UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "num_workers", "after"),
    [
        (40, 4096, 8, 256),
        (40, UNLIMITED, 8, 256),
        (256, 256, 8, 256),
        (1024, 4096, 8, 1024),
        (UNLIMITED, UNLIMITED, 8, UNLIMITED),
        (40, 40, 0, 40),
    ],
)
def test_the_limit_of_open_files_is_raised_to_what_readers_need(limits, soft, hard, num_workers, after):
    now = limits(soft, hard)
    datamodule.reserve_file_handles(num_workers)
    assert now() == (after, hard)


def test_where_it_cannot_be_raised_the_number_is_refused(limits):
    """They would hang without a word."""
    now = limits(40, 100)
    with pytest.raises(ConfigError, match=r"data.num_workers=8 needs 256 open files, and the limit is 100"):
        datamodule.reserve_file_handles(8)
    assert now() == (40, 100)


def test_requests_to_stop_are_not_for_those_that_read(monkeypatch):
    """A terminal's Ctrl-C goes to all processes in front, a scheduler's signal to all of a job."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before, asked = {number: signal.getsignal(number) for number in numbers}, []
    libc = SimpleNamespace(prctl=lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(datamodule.ctypes, "CDLL", lambda name: libc)  # it is not this process that is to end
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        datamodule._follow_the_trainer(0)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 4
        assert asked == [(datamodule.PR_SET_PDEATHSIG, signal.SIGKILL)]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lends_a_file(pipe):
    """What a reader does: its thread hands open files over to whom they are lent."""
    datamodule._follow_the_trainer(0)
    lent = resource_sharer.DupFd(0)
    pipe.send((resource_sharer._resource_sharer._address, reduction.ForkingPickler.dumps(lent).tobytes()))
    pipe.recv()
    sys.excepthook(ValueError, ValueError("what else happens is said"), None)


def test_a_trainer_that_stops_amid_a_batch_is_no_error_of_a_reader(capfd):
    """One that was told of another reader's death drops the connection it had just opened."""
    here, there = multiprocessing.Pipe()
    reader = multiprocessing.get_context("fork").Process(target=lends_a_file, args=(there,))
    reader.start()
    address, lent = here.recv()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.recv(1)  # the reader's challenge has come, and most of it is not read: closing resets
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)  # and one that closes in order
    os.close(reduction.ForkingPickler.loads(lent).detach())  # the thread goes on
    here.send("end")
    reader.join(30)
    assert reader.exitcode == 0
    assert capfd.readouterr().err == "ValueError: what else happens is said\n"
