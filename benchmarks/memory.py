"""Resident memory of this process, from Linux's /proc."""

import sys
from collections.abc import Callable
from pathlib import Path


def is_known() -> bool:
    """Whether the system tells it."""
    return sys.platform == "linux"


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since `forget_peak`, RssAnon now without files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def forget_peak():
    """VmHWM begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_above(run: Callable[[], object]) -> int:
    """Bytes that a call takes at its peak above what the process holds before it."""
    forget_peak()
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before
