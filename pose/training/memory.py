"""What a job leaves behind in the process that runs it: nothing, for the next job of a sweep."""

import contextlib
import ctypes
import gc
import sys
import traceback
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def freed() -> Iterator[None]:
    """Around a job: its model, optimizer and data go when it ends, also when it fails.

    Trainer, module and callbacks hold each other in circles, which Python collects late, since it counts objects and
    not bytes. The error of a job that failed is kept by Hydra until the sweep is over, and its traceback would keep
    every local variable on the way.
    """
    try:
        yield
    except BaseException as error:
        _forget(error)
        raise
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # or freed memory of many small tensors stays with the process


def _forget(error: BaseException):
    """Empties the frames of an error, and of those that it came from; they still say file and line."""
    seen: set[int] = set()
    errors: list[BaseException | None] = [error]
    while errors:
        one = errors.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        errors += [one.__cause__, one.__context__]
