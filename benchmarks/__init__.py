"""Measurements, one command each: python -m benchmarks.NAME [--quick] [--json FILE]

Each prints a table, and as its last line one JSON object: what was measured (medians, ranges, repeats), the options,
versions and hardware. --json writes the same object to a file. Options are read before torch is imported, so that
--help and mistakes are answered at once; nothing heavy is imported here.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pose.files import REPOSITORY, atomic_file, write_json

PACKAGES = ("torch", "transformers", "lightning", "tokenizers", "numpy", "peft", "bitsandbytes", "deepspeed")


class Options(argparse.ArgumentParser):
    """Options of a benchmark: its own, --quick and --json.

    Args:
        name: of the benchmark.
        doc: its module's docstring.
        quick: what --quick sets, by the names of options; an option that is given keeps its value.
    """

    def __init__(self, name: str, doc: str | None, quick: Mapping[str, Any]):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(f"python -m benchmarks.{name}", description=doc, formatter_class=formatter)
        self.quick = quick
        smaller = ", ".join(f"{option} {_in_words(value)}" for option, value in quick.items())
        self.add_argument("--quick", action="store_true", help=f"some minutes at most: {smaller}")
        self.add_argument("--json", type=output, metavar="FILE", help="the last line goes into this file too")

    def read(self) -> argparse.Namespace:
        """The command line's options; a mistake ends the program, with a message that names it."""
        args = self.parse_args()
        if args.quick:
            self.set_defaults(**self.quick)
            args = self.parse_args()
        return args


def _in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def whole(at_least: int) -> Callable[[str], int]:
    """The type of an option: a whole number, not below another."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = at_least - 1
        if number < at_least:
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give a whole number of at least {at_least}")
        return number

    return read


def output(text: str) -> Path:
    """A file to write, of a command line, checked before anything is measured."""
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: give a file in a folder that exists")
    return file


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest and number of repeated measurements."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


def words(values: Mapping[str, float], form: str = ".2f") -> str:
    """Median and range of a `spread`, as text."""
    return f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"


def timed(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """The same, which returns the seconds that it takes."""

    def measure() -> float:
        start = clock()
        run()
        return clock() - start

    return measure


def in_turn(
    ways: Mapping[str, Callable[[], float]],
    repeats: int,
    after: Callable[[dict[str, list[float]]], None] | None = None,
) -> dict[str, list[float]]:
    """Measures several ways side by side.

    Args:
        ways: by name, what takes one measurement.
        repeats: of each way. In each, all are measured, another first than in the one before: a drift cancels.
        after: called at the end of each repeat, with what has been measured so far.

    Returns:
        The measurements by name, in order of the repeats.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(ways[name]())
        if after is not None:
            after(found)
    return found


def ratio(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Spread of values over those of the same repeats."""
    return spread([value / other for value, other in zip(values, others, strict=True)])


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A title over columns: the first of names, the others of figures."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([title, *text])


def versions() -> dict[str, str | None]:
    """Of Python, packages and CUDA; None of what is not installed."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """What a measurement depends on besides the code and the versions."""
    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    name, cores = cpu()
    return {
        "cpu": name,
        "cores": cores,
        "threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": None if gpu is None else gpu.name,
        "gpu_memory_gib": None if gpu is None else gpu.total_memory / 2**30,
    }


def cpu() -> tuple[str, int | None]:
    """Model and number of cores, of which each may run several threads."""
    try:
        blocks = Path("/proc/cpuinfo").read_text().strip().split("\n\n")
    except OSError:
        blocks = []
    lines = [dict(map(str.strip, line.split(":", 1)) for line in block.splitlines() if ":" in line) for block in blocks]
    model = next((cpu["model name"] for cpu in lines if "model name" in cpu), platform.processor())
    cores = {(cpu.get("physical id"), cpu["core id"]) for cpu in lines if "core id" in cpu}
    return model or platform.machine(), len(cores) or os.cpu_count()


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt: what is at work is ended on the way out."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def put_between(doc: Path, begin: str, end: str, text: str):
    """Puts text between two marks of a document, in place of what stands there.

    Raises:
        SystemExit: the document has no marks.
    """
    whole = doc.read_text()
    if begin not in whole or end not in whole:
        raise SystemExit(f"{doc} has no place for it: put {begin} and {end} there")
    before, rest = whole.split(begin, 1)
    after = rest.split(end, 1)[1]
    with atomic_file(doc) as file:
        file.write(f"{before}{begin}\n{text}\n{end}{after}")


def commit() -> str | None:
    """The commit of the working tree, with a + where files have changed; None where there is no git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=REPOSITORY, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    except OSError:
        return None
    return found.stdout.strip() or None


def report(text: str, name: str, args: argparse.Namespace, results: Mapping[str, Any]):
    """Prints what is to be read, and a last line of JSON, which goes into the file of --json too.

    Args:
        text: to be read.
        name: of the benchmark.
        args: its options.
        results: what was measured.
    """
    content = _content(name, args, results, is_complete=True)
    if args.json is not None:
        write_json(args.json, content)
    print(text)
    print(json.dumps(content), flush=True)


def save_part(name: str, args: argparse.Namespace, results: Mapping[str, Any]):
    """Writes what has been measured so far into the file of --json, for whoever is ended before `report`."""
    if args.json is not None:
        write_json(args.json, _content(name, args, results, is_complete=False))


def _content(name: str, args: argparse.Namespace, results: Mapping[str, Any], is_complete: bool) -> dict[str, Any]:
    options = {option: str(value) if isinstance(value, Path) else value for option, value in vars(args).items()}
    return {
        "benchmark": name,
        "complete": is_complete,
        "options": options,
        **results,
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
        "date": date.today().isoformat(),
    }
