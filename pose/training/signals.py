"""Requests to stop: SIGTERM and its kin from schedulers, Ctrl-C and SIGHUP from a terminal.

A training writes a checkpoint first (`pose.training.checkpoints`). Whatever else a process is at ends at once: what is
written in one step is whole or not there. A second Ctrl-C ends a training at once, too.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pose.errors import Interrupted

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STATUS_OF_INTERRUPT = 130  # 128 + SIGINT, as a shell has it
STATUSES = (Interrupted.status, STATUS_OF_INTERRUPT)  # of a process that was asked to stop, and did
# Seconds within which two SIGINT are one Ctrl-C: it may reach a process twice, from the terminal and from its parent.
AGAIN = 1.0
SOON = 0.05  # seconds

Handlers = dict[int, Any]
asked: dict[int, float] = {}  # the signals that have asked this process to stop, and when the last of each came


def status_of(number: int | None) -> int:
    """The status of a process that has stopped at a signal."""
    return STATUS_OF_INTERRUPT if number == signal.SIGINT else Interrupted.status


def name_of(number: int) -> str:
    """A signal for a reader: SIGINT is Ctrl-C."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def are_beside_each_other(hydra: Any) -> bool:
    """Whether the jobs of a sweep run at once, in joblib's workers; a job that ends its own has the others killed.

    Args:
        hydra: its own config.
    """
    return getattr(hydra.mode, "name", None) == "MULTIRUN" and "joblib" in str(hydra.launcher.get("_target_"))


class Requests:
    """A handler that notes requests to stop, for who asks later.

    Args:
        noted: called with a request when it comes first.
        again: called at a second Ctrl-C.

    Attributes:
        received: the signals, in order; an interrupt that comes twice at once is there once.
    """

    def __init__(self, noted: Callable[[int], None] | None = None, again: Callable[[], None] | None = None):
        self.received: list[int] = []
        self.noted, self.again = noted, again
        self._interrupted: float | None = None

    @property
    def first(self) -> int | None:
        """The first signal; None before one has come."""
        return self.received[0] if self.received else None

    def __call__(self, number: int, frame):
        asked[number] = now = time.monotonic()
        is_again = number == signal.SIGINT and self._interrupted is not None
        if number == signal.SIGINT and self._interrupted is not None and now - self._interrupted < AGAIN:
            return
        if number == signal.SIGINT:
            self._interrupted = now
        self.received.append(number)
        if len(self.received) == 1 and self.noted is not None:
            self.noted(number)
        if is_again and self.again is not None:
            self.again()


class _Ending:
    """A handler that ends the process; while it does, a second Ctrl-C kills it."""

    def __init__(self, advice: Callable[[], str]):
        self.advice = advice
        self.end: SystemExit | None = None
        self._since, self._is_dropped = 0.0, False

    def __call__(self, number: int, frame):
        if self._is_dropped and self.end is not None:
            self._is_dropped = False
            raise self.end
        before, now = asked.get(number), time.monotonic()
        asked[number] = now
        if number == signal.SIGINT and before is not None and now - before < AGAIN:
            return  # the same Ctrl-C, which a training may have noted
        if self.end is None:
            self._since = now
            try:
                end_now(number)
            except SystemExit as end:
                self.end = end
                raise
        if number == signal.SIGINT and now - self._since > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def raise_again(self, end: SystemExit):
        """Soon, when whatever Python has dropped it in is over."""
        self.end, self._is_dropped = end, True
        signal.signal(signal.SIGTERM, self)
        timer = threading.Timer(SOON, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()


_active: list[_Ending] = []  # of `ending`, the innermost last


def install(handler: Callable, numbers: Sequence[int] = STOP_SIGNALS) -> Handlers:
    """Sets a handler for signals; those that are ignored stay ignored, as `nohup` and a shell's background want it.

    Returns:
        The handlers of before, for `restore`. Nothing is done outside of the main thread, which gets all signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: found for number, found in before.items() if found is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before


def restore(before: Handlers):
    """Puts handlers back that `install` has replaced."""
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def is_foreign(handler: Any) -> bool:
    """Whether a handler is of a program around this one, such as submitit."""
    return callable(handler) and handler is not signal.default_int_handler and not isinstance(handler, _Ending)


@contextlib.contextmanager
def ending(advice: Callable[[], str], is_child: bool = False) -> Iterator[None]:
    """While it lasts, a request to stop ends the process with its status, and one line in place of a traceback.

    Args:
        advice: what to say then, such as the command that goes on; asked when it is needed.
        is_child: of a process that passes its signals on. A Ctrl-C that it passes on when this one is past its end, and
            takes itself apart, is ignored: the terminal has sent it before.
    """
    handler, show = _Ending(advice), sys.unraisablehook

    def not_dropped(unraisable):
        """Python drops what is raised in a finalizer or in a weak reference's callback: an end is raised once more."""
        if isinstance(unraisable.exc_value, SystemExit) and threading.current_thread() is threading.main_thread():
            handler.raise_again(unraisable.exc_value)
        else:
            show(unraisable)

    before = install(handler, [number for number in STOP_SIGNALS if not is_foreign(signal.getsignal(number))])
    _active.append(handler)
    sys.unraisablehook = not_dropped
    try:
        yield
    finally:
        sys.unraisablehook = show
        _active.remove(handler)
        restore(before)
        if is_child and signal.SIGINT in asked and signal.SIGINT in before:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_again(before: Handlers):
    """Has requests end the process again, after a training that noted them; outside of `ending` as they did before."""
    restore({number: _active[-1] if _active else handler for number, handler in before.items()})


def end_now(number: int, what: str = "Stopped"):
    """Ends the process at a signal, with the advice of `ending`.

    Raises:
        SystemExit: with the status of the signal.
    """
    from pose.training.compat import rank  # nothing heavy before it is needed

    if rank() == 0:
        log.error(f"{what} by {name_of(number)}. {_active[-1].advice() if _active else ''}".strip())
    raise SystemExit(status_of(number))
