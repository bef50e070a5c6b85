"""Requests to stop, outside of a training: one line, a status, no traceback. In one: test_checkpoints.py."""

import contextlib
import os
import signal
import threading
import time

import pytest

from pose.training import signals

NUMBERS = signals.STOP_SIGNALS


@pytest.fixture(autouse=True)
def terminal():
    """The handlers of a process in a terminal, whatever started the tests; each test leaves them as they were."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    expected = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    found = {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == expected


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "status", "name"),
    [
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGHUP, 143, "SIGHUP"),
        (signal.SIGUSR1, 143, "SIGUSR1"),
    ],
)
def test_a_process_ends_with_one_line_that_says_how_to_go_on(capsys, number, status, name):
    with pytest.raises(SystemExit) as caught, signals.ending(lambda: "To go on: this"):
        send(number)
    assert caught.value.code == status
    assert capsys.readouterr().err == f"Stopped by {name}. To go on: this\n"


def test_the_advice_is_that_of_the_innermost_and_of_the_moment(capsys):
    step = 0
    with signals.ending(lambda: "outer"):
        with pytest.raises(SystemExit), signals.ending(lambda: f"inner {step}"):
            step = 7
            send(signal.SIGTERM)
        with pytest.raises(SystemExit):
            send(signal.SIGTERM)
    assert capsys.readouterr().err == "Stopped by SIGTERM. inner 7\nStopped by SIGTERM. outer\n"


def test_while_it_ends_a_second_interrupt_kills_and_a_repeated_signal_does_not(monkeypatch, capsys):
    killed = []
    monkeypatch.setattr(signals.os, "kill", lambda *arguments: killed.append(arguments))
    kill = signal.raise_signal
    with pytest.raises(SystemExit), signals.ending(str):
        try:
            kill(signal.SIGINT)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
                kill(number)  # a scheduler sends to all, and a parent passes on
            assert not killed
            monkeypatch.setattr(signals, "AGAIN", 0.0)
            kill(signal.SIGTERM)
            assert not killed
            kill(signal.SIGINT)
            assert killed == [(os.getpid(), signal.SIGINT)] and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert capsys.readouterr().err.count("Stopped by") == 1


def test_a_signal_that_arrives_in_a_finalizer_is_not_lost(capsys):
    """Python prints what is raised there, and goes on."""

    class Fails:
        def __del__(self):
            send(signal.SIGTERM)
            time.sleep(0.01)

    with pytest.raises(SystemExit) as caught, signals.ending(lambda: "To go on: this"):
        thing = Fails()
        del thing
        time.sleep(10)
    assert caught.value.code == 143
    assert capsys.readouterr().err == "Stopped by SIGTERM. To go on: this\n"


def test_a_second_interrupt_of_a_training_is_not_lost_in_a_finalizer_either(monkeypatch, capsys):
    monkeypatch.setattr(signals, "AGAIN", 0.0)
    requests = signals.Requests(again=lambda: signals.end_now(signal.SIGINT, "Stopped at once"))

    class Fails:
        def __del__(self):
            send(signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(SystemExit) as caught, signals.ending(lambda: "To go on: this"):
        before = signals.install(requests)
        try:
            send(signal.SIGINT)
            thing = Fails()
            del thing
            time.sleep(10)
        finally:
            signals.restore(before)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "Stopped at once by Ctrl-C. To go on: this\n"


@pytest.mark.parametrize(
    ("is_child", "is_asked", "ignores"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_child_that_was_asked_to_stop_ignores_what_its_parent_passes_on(is_child, is_asked, ignores):
    """While Python takes the process apart, when it would be a KeyboardInterrupt in a finalizer."""
    before = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(SystemExit), signals.ending(str, is_child):
        if is_asked:
            send(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT) is signal.SIG_IGN) == ignores
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_a_training_has_noted_is_not_another_when_it_is_passed_on():
    requests = signals.Requests()
    with signals.ending(str):
        before = signals.install(requests)
        send(signal.SIGINT)
        signals.end_again(before)
        send(signal.SIGINT)
    assert requests.received == [signal.SIGINT]


def test_ignored_signals_and_those_of_a_launcher_around_are_left_alone():
    """`nohup` has SIGHUP ignored, a shell's background SIGINT; submitit has a handler of SIGTERM."""

    def theirs(number, frame):
        heard.append(number)

    heard = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, theirs)
    try:
        with signals.ending(str):
            send(signal.SIGHUP)
            send(signal.SIGTERM)
        assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_in_another_thread_nothing_is_set():
    """Python gives signals to the main thread alone, and refuses handlers elsewhere."""

    def work():
        with signals.ending(str):
            found.append(signals.install(lambda *_: None))
            found.append(signal.getsignal(signal.SIGTERM))

    found = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [{}, signal.SIG_DFL]


def test_only_one_process_speaks(monkeypatch, capsys):
    monkeypatch.setattr("pose.training.compat.rank", lambda: 1)
    with pytest.raises(SystemExit), signals.ending(lambda: "To go on: this"):
        send(signal.SIGTERM)
    assert capsys.readouterr().err == ""


def test_requests_are_noted_in_order_and_an_interrupt_at_the_same_moment_once(monkeypatch):
    noted, again = [], []
    requests = signals.Requests(noted.append, lambda: again.append(True))
    before = signals.install(requests)
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            send(number)
        assert requests.received == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
        assert requests.first == signal.SIGTERM and noted == [signal.SIGTERM] and not again
        monkeypatch.setattr(signals, "AGAIN", 0.0)
        send(signal.SIGINT)
        assert requests.received[-1] == signal.SIGINT and again == [True]
    finally:
        signals.restore(before)
