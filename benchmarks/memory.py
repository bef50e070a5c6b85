"""Peaks of memory: what torch's allocator gave, and what this process held, from Linux's /proc."""

import gc
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


def cpu_peak(run: Callable[[], object]) -> int:
    """Bytes: the highest sum of all that torch's allocator has given and not got back since the call began.

    What `cuda_peak` tells of a GPU. It is the same in every run, whatever else the machine does; `peak_above` has also
    what libraries take beside torch, and what the C library does not give back.
    """
    import torch

    gc.collect()  # garbage of an earlier measurement, collected during the call, would count against its peak
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def cuda_peak(run: Callable[[], object]) -> int:
    """Bytes: the highest memory that tensors had during a call, above that before it."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
