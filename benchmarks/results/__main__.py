"""Runs what is missing of the claims' runs, and writes docs/RESULTS.md and the tables of docs/METHODS.md.

python -m benchmarks.results --dry-run                     what is missing, its commands, and how long it may take
python -m benchmarks.results --jobs 2                      all of it: many hours; what is finished is kept
python -m benchmarks.results --only table4 methods16x/lm*  some claims, or some arms of one
python -m benchmarks.results --only '*/*/0'                the first seed of every arm
"""

import argparse
import logging
import os
import shlex
import signal
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from pose.errors import PoseError
from pose.files import REPOSITORY

log = logging.getLogger("pose.results")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="CLAIM, CLAIM/ARM or CLAIM/ARM/SEED; * is any text"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at one time, a core each")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their commands, and do nothing")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps and tokens: figures mean nothing")
    parser.add_argument("--no-compile", action="store_true", help="training steps are not compiled")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the runs (default: outputs/results)")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} is not accepted: give a whole number of at least 1")
    args.out = (args.out or REPOSITORY / "outputs" / ("results-quick" if args.quick else "results")).resolve()
    return args


def chosen(patterns: list[str], claims: dict[str, tuple[str, ...]], arms: dict) -> list[tuple[str, int]]:
    """The runs that patterns choose, each once.

    Raises:
        SystemExit: a pattern chooses none; names it.
    """
    labels = {
        f"{claim}/{name}/{seed}": (name, seed) for claim, names in claims.items() for name in names
        for seed in arms[name].seeds
    }  # fmt: skip
    found: dict[tuple[str, int], None] = {}
    for pattern in patterns:
        whole = pattern + "/*" * (2 - pattern.count("/"))
        runs = [run for label, run in labels.items() if fnmatchcase(label, whole)]
        if not runs:
            raise SystemExit(f"--only {pattern} is none of the runs: give CLAIM, CLAIM/ARM or CLAIM/ARM/SEED of "
                             f"{', '.join(claims)}")  # fmt: skip
        found |= dict.fromkeys(runs)
    return list(found)


def main(arguments: list[str] | None = None) -> int:
    """Runs and writes; the status of the process."""
    args = options(arguments)
    from benchmarks.results.arms import Scale, arms
    from benchmarks.results.claims import arms_of
    from benchmarks.results.records import read_runs, write_runs
    from benchmarks.results.runner import Failed, Runner, compiler
    from pose.app.console import log_to_terminal

    log_to_terminal()
    scale = Scale(is_quick=args.quick, seeds=(0,) if args.quick else (0, 1, 2))
    every = arms(scale)
    wanted = chosen(args.only, arms_of(scale), every)
    file = args.out / "runs.json"
    runner = Runner(every, args.out, read_runs(file), not args.no_compile and compiler())
    runner.min_steps = 0 if args.quick else runner.min_steps
    runner.save = lambda: write_runs(file, runner.runs.values())
    runner.collect()
    todo = runner.missing(wanted)
    seconds = sum(runner.estimate(name) for name, _ in todo)
    log.info(
        f"{len(wanted)} runs, of which {sum(runner.is_done(*run) for run in wanted)} are finished; {len(todo)} to do, "
        f"{seconds / 3600:.1f} hours of one core"
    )
    if args.dry_run:
        for name, seed in todo:
            log.info(f"\n{name}, seed {seed}: about {runner.estimate(name) / 60:.0f} min")
            try:
                for _, command in runner.commands(name, seed):
                    log.info(f"  {shlex.join(['python', *command])}")
            except Failed as later:
                log.info(f"  as many steps as fit: {later}")
        return 0
    # Ended from outside, it ends its runs first
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    runner.run(todo, args.jobs)
    runner.collect()
    runner.save()
    for (name, seed), reason in runner.failures.items():
        log.error(f"{name}, seed {seed} failed: {reason}")
    return 1 if runner.failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PoseError as error:
        sys.exit(str(error))
