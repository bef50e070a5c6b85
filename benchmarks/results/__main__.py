"""Runs what is missing of the claims' runs, and writes docs/RESULTS.md and the tables of docs/METHODS.md, docs/TINY.md
and README.md.

python -m benchmarks.results --dry-run                     what is missing, its commands, and how long it may take
python -m benchmarks.results                               all of it: many hours; what is finished is kept
python -m benchmarks.results --only table4 methods16x/lm*  some claims, or some arms of one
python -m benchmarks.results --only '*/*/0'                seed 0 of every arm that has one (the page lists seeds)
python -m benchmarks.results --pages                       the pages alone, from docs/results/runs.json
python -m benchmarks.results --check --only table4         runs them anew: do the numbers lie within the spread?
"""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks import exit_on_sigterm
from pose.errors import PoseError
from pose.files import REPOSITORY, remove_folder

log = logging.getLogger("pose.results")
DOCS = REPOSITORY / "docs"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="CLAIM, CLAIM/ARM or CLAIM/ARM/SEED; * is any text"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at one time, one core each (default: all)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="list the runs and their commands, and do nothing")
    mode.add_argument("--pages", action="store_true", help="run nothing, write the pages")
    mode.add_argument(
        "--check", action="store_true", help="run again what is chosen, and compare it with the runs that are known"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps and tokens: figures mean nothing")
    parser.add_argument("--no-compile", action="store_true", help="training steps are not compiled")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the runs (default: outputs/results)")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} is not accepted: give a whole number of at least 1")
    args.out = (args.out or REPOSITORY / "outputs" / ("results-quick" if args.quick else "results")).resolve()
    args.docs = args.out / "docs" if args.quick else DOCS
    return args


def chosen(patterns: Sequence[str], claims: Mapping[str, Sequence[str]], arms: Mapping) -> list[tuple[str, int]]:
    """The runs that patterns choose, each once.

    Args:
        patterns: of --only.
        claims: the names of the arms of each.
        arms: by name.

    Raises:
        SystemExit: a pattern chooses none; names it.
    """
    labels = {
        f"{claim}/{name}/{seed}": (name, seed)
        for claim, names in claims.items() for name in names for seed in arms[name].seeds
    }  # fmt: skip
    found: dict[tuple[str, int], None] = {}
    for pattern in patterns:
        whole = pattern + "/*" * (2 - pattern.count("/"))
        runs = [run for label, run in labels.items() if fnmatchcase(label, whole)]
        if not runs:
            raise SystemExit(
                f"--only {pattern} is none of the runs: give CLAIM, CLAIM/ARM or CLAIM/ARM/SEED, with one of "
                f"{', '.join(claims)} and an arm that --dry-run lists"
            )
        found |= dict.fromkeys(runs)
    return list(found)


def main(arguments: list[str] | None = None) -> int:
    """Runs and writes; the status of the process."""
    args = options(arguments)
    from benchmarks.results.arms import Scale, arms, arms_of_methods, arms_of_tiny
    from benchmarks.results.claims import claims
    from benchmarks.results.pages import draw, pages, write
    from benchmarks.results.records import current, read_runs, write_runs
    from benchmarks.results.runner import Failed, Runner, compiler
    from pose.app.console import log_to_terminal

    log_to_terminal()
    scale = Scale(is_quick=args.quick, seeds=(0,) if args.quick else (0, 1, 2))
    every = arms(scale)
    names = {name: claim.arms for name, claim in claims(scale).items()} | arms_of_methods(scale)
    names["tiny"] = arms_of_tiny(scale)
    wanted = chosen(args.only, names, every)
    file = args.docs / "results" / "runs.json"
    known = read_runs(file)

    def tell(runs):
        if stale := len(runs) - len(current(runs, every)):
            log.warning(f"{stale} of {len(runs)} runs in {file} are of other settings than now, and not shown")
        made = pages(runs, every, scale, texts(args.docs))
        write(args.docs, made)
        draw(runs, every, scale, args.docs.parent)
        log.info(f"Written     {', '.join(str((args.docs / name).resolve()) for name in made)}")

    if args.pages:
        tell(known)
        return 0
    out = args.out / "check" if args.check else args.out
    if args.check:
        remove_folder(out)
    runner = Runner(every, out, {} if args.check else dict(known), not (args.no_compile or args.quick) and compiler())
    runner.min_steps = 1 if args.quick else runner.min_steps
    runner.collect()
    if not args.check:
        runner.save = lambda: write_runs(file, runner.runs.values())
    todo = runner.missing(wanted)
    log.info(
        f"{len(wanted)} runs, of which {sum(runner.is_done(*run) for run in wanted)} are finished; {len(todo)} to do, "
        f"about {sum(runner.estimate(name) for name, _ in todo) / 3600:.1f} hours of one core"
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
    try:
        with exit_on_sigterm():
            runner.run(todo, args.jobs)
    finally:
        runner.collect()
        if not args.check:
            runner.save()
            tell(runner.runs)
    is_within = not args.check or compare(wanted, runner.runs, known, every)
    for (name, seed), reason in runner.failures.items():
        log.error(f"{name}, seed {seed} failed: {reason}")
    return 1 if runner.failures or not is_within else 0


def compare(wanted: Sequence[tuple[str, int]], new: Mapping, known: Mapping, arms: Mapping) -> bool:
    """Says of each number of new runs whether it lies within the spread of the known ones; whether all do.

    Of a training that is known once, or of other processors alone, the spread is at least what another processor's
    rounding was measured to change.

    Args:
        wanted: arm and seed of each.
        new, known: runs.
        arms: by name.
    """
    from benchmarks.results.arms import TRAIN
    from benchmarks.results.pages import half_digit, number, rounding, values
    from benchmarks.results.records import current

    known, is_within = current(known, arms), True
    for name, seed in wanted:
        if (name, seed) not in new:
            continue
        outside, told = [], 0
        processors = {run["processor"] for (arm, _), run in known.items() if arm == name}
        is_elsewhere = new[name, seed]["processor"] not in processors
        found = new[name, seed]["metrics"]
        before = [run["metrics"] for (arm, _), run in known.items() if arm == name]
        absent = sorted(set.intersection(*map(set, before)) - set(found)) if before else []
        for metric, value in found.items():
            spread = values(known, arms[name], metric)
            told += bool(spread)
            slack = half_digit(value, metric)
            if spread and arms[name].script == TRAIN and (len(spread) == 1 or is_elsewhere):
                slack = max(slack, rounding(max(spread), metric))
            if spread and not min(spread) - slack <= value <= max(spread) + slack:
                low, high = (number(one(spread), metric) for one in (min, max))
                outside.append(f"{metric} is {number(value, metric)}, and was {low} to {high}")
        outside += [f"{metric} is not there" for metric in absent]
        total = told + len(absent)
        log.info(
            f"{name}, seed {seed}: {total - len(outside)} of {total} numbers within the spread"
            + "".join(f"\n  {line}" for line in outside)
            + " (no run of it is known)" * (not before)
            + " (it measures nothing, other runs begin with its model)" * (bool(before) and not total)
        )
        is_within &= bool(before) and not outside
    return is_within


def texts(docs: Path) -> dict[str, str]:
    """The pages that have tables, of a folder; the repository's where it has none yet."""
    from benchmarks.results.pages import TABLES

    files = {name: docs / name if (docs / name).is_file() else DOCS / name for name in TABLES}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items()}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PoseError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell has it
