"""Speed measurements. Each prints one line to read and one JSON line: python -m benchmarks.NAME"""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from pose.files import write_json

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "numpy")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest and number of repeated measurements."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


def machine() -> dict:
    """What a measurement depends on besides the code."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def report(line: str, name: str, settings: dict, results: dict, file: Path | None = None):
    """Prints what is to be read, and a last line of JSON.

    Args:
        line: to be read.
        name: of the benchmark.
        settings: what was asked for.
        results: what was measured.
        file: that the JSON goes into too.
    """
    content = json.dumps({"benchmark": name, "settings": settings, **results, "machine": machine()})
    if file is not None:
        write_json(file, json.loads(content))
    print(line)
    print(content)
