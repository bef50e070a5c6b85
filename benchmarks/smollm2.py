"""What was found of SmolLM2-135M: python -m benchmarks.smollm2 [FOLDER ...] [--hardware TEXT]

Reads folders of train.py and evaluate.py (of experiment=smollm2_32k, smollm2_32k_cpu, and of the stages smollm2-* of
benchmarks.gpu: outputs/gpu/run-smollm2-*), adds what they measured to docs/smollm2.json, and writes the tables of
docs/SMOLLM2.md from that file. No number is typed by hand. Without a folder the tables are written anew.
"""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pose.files import REPOSITORY, read_json, write_json

DOC, FOUND = REPOSITORY / "docs" / "SMOLLM2.md", REPOSITORY / "docs" / "smollm2.json"
BEGIN, END = "<!-- from python -m benchmarks.smollm2 -->", "<!-- until here -->"
UNTRAINED = ("untuned", "scaled")
SAMPLERS = ("PoSE", "ShortPI", "Full")  # what is compared at equal tokens
USUAL = ("LanguageModel", "Yarn")  # of the experiments, and not said
OPTIONS = ("rope.rcd_shift", "pose.curriculum")  # said where they are on
FAMILIES = {  # of metrics, in order: title, format
    "ppl": ("Perplexity of the first N tokens", ".2f"),
    "tail_ppl": ("Perplexity of the last 128 of N tokens, the same tokens for every N", ".2f"),
    "passkey": ("Passkeys found", ".0%"),
    "needle_gain": ("Needle gain, nats per token", ".2f"),
    "needle_gain_kept": ("Needle gain as a share of that at the model's own window", ".2f"),
    "ruler/niah_single_2": ("RULER, one needle (`niah_single_2`)", ".0%"),
    "ruler/niah_multikey_1": ("RULER, one of four needles (`niah_multikey_1`)", ".0%"),
}
BINS = 8  # of perplexity by position that a table shows
NOT_YET = "not run yet"
FOLDERS = re.compile(r"(?<![\w.])/[^\s,:}\]']*/")  # of one machine, in a command


def read(folders: Iterable[Path], hardware: str | None = None) -> list[dict[str, Any]]:
    """What some folders measured: a row for each model of each.

    Args:
        folders: of train.py or evaluate.py. An evaluation of a training's model belongs to that training, by the name
            of its folder, if that is among them.
        hardware: what a CPU is called; a GPU names itself.

    Returns:
        Rows: model, hardware, on_gpu, target, commit, versions; of a training tokens, steps, seconds; by folder
        measuring (seconds) and commands; metrics, [value, low, high, num] by name.

    Raises:
        SystemExit: a folder is neither; names it.
    """
    from pose.app import report
    from pose.errors import PoseError

    try:
        sources = {Path(source.folder): source for folder in folders for source in report.read(folder)}
    except PoseError as error:
        raise SystemExit(str(error)) from error
    trainings = {folder.name: source for folder, source in sources.items() if source.kind == "training"}
    trained = {name: _trained(name, source) for name, source in trainings.items()}
    rows: list[dict[str, Any]] = []
    for folder, source in sources.items():
        provenance = read_json(folder / "provenance.json")
        common = {
            "hardware": provenance.get("gpu") or hardware or source.facts.get("Machine", ""),
            "on_gpu": bool(provenance.get("gpu")),
            "commit": source.facts.get("Commit", ""),
            "versions": source.facts.get("Versions", ""),
        }
        measuring = read_json(folder / "metrics.json")
        checkpoints = read_json(folder / "results.json").get("checkpoints", {})
        for name, metrics in source.models.items():
            if source.kind == "training":
                own = trained[folder.name] if name not in UNTRAINED else {}
                target, took = source.target, measuring.get(f"measuring/{name}_seconds")
            else:
                path = Path(checkpoints[name]["path"])
                own = trained.get((path.parent if path.name == "model" else path).name, {})
                took = source.cost[f"measuring {name}"].get("seconds")
                target = checkpoints[name].get("target") if name != "untuned" else None
            row = {"model": own.get("model", name), "target": target if name != "untuned" else None, **common}
            row |= {**own, "commands": own.get("commands", {}) | {folder.name: source.facts.get("Command", "")}}
            row |= {"measuring": {} if took is None else {folder.name: took}}
            row |= {"metrics": {key: list(found) for key, found in metrics.items()}}
            rows.append(row)
    return rows


def _trained(name: str, source) -> dict[str, Any]:
    """What a training was, and what it cost."""
    cost, config = source.cost.get("training", {}), source.config
    found = {name: cost[name] for name in ("tokens", "steps", "seconds", "mfu", "peak_memory_gib") if name in cost}
    parts = [config.get(f"{group}._target_", "").rpartition(".")[2] for group in ("pose", "objective", "rope")]
    parts += [key.rpartition(".")[2] for key in OPTIONS if config.get(key, "null") not in ("null", "false", "[]")]
    parts = [part for part in parts if part and part not in USUAL]
    parts += [f"{found['tokens'] / 1e6:.3g} M tokens"] if "tokens" in found else []
    return {"model": ", ".join(parts), "commands": {name: source.facts.get("Command", "")}, **found}


def merge(rows: Sequence[dict[str, Any]], more: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what was found since: of one model on one hardware, metric by metric the newest."""
    merged = {_key(row): row for row in rows}
    for row in more:
        before = merged.get(_key(row))
        if before is not None:
            row = before | row | {key: before[key] | row[key] for key in ("measuring", "commands", "metrics")}
        merged[_key(row)] = row
    return list(merged.values())


def _key(row: Mapping[str, Any]) -> tuple:
    return row["hardware"], row["target"], row["model"]


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """All tables of the document."""
    parts = []
    for title, on_gpu in (("On a GPU", True), ("On two cores", False)):
        of_kind = [row for row in rows if row["on_gpu"] == on_gpu]
        parts.append(f"## {title}")
        if not of_kind:
            parts.append(NOT_YET.capitalize() + ".")
        for hardware in dict.fromkeys(row["hardware"] for row in of_kind):
            parts += _section([row for row in of_kind if row["hardware"] == hardware])
    return "\n\n".join(parts)


def _section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of one hardware."""
    present = " ".join(row["model"] for row in rows)
    missing = [name for name in (*UNTRAINED, *SAMPLERS) if name not in present]
    order = {name: i for i, name in enumerate((*UNTRAINED, *SAMPLERS))}
    rows = sorted(rows, key=lambda row: (order.get(row["model"].split(",")[0], 9), row["target"] or 0, row["model"]))
    lines = [f"{rows[0]['hardware']}; {'; '.join(sorted({row['versions'] for row in rows}))}.", _costs(rows, missing)]
    for family, (title, form) in FAMILIES.items():
        lengths = sorted({n for row in rows for n in _lengths(row, family)})
        if not lengths:
            continue
        cells = [[_cell(row, f"{family}@{n}", form) for n in lengths] for row in rows]
        lines.append(_table(title, [f"N = {n:,}" for n in lengths], rows, cells, missing))
    bins = sorted({_bin(name) for row in rows for name in row["metrics"] if name.startswith("position_ppl@")})
    if bins:
        shown = [bins[i * (len(bins) - 1) // (BINS - 1)] for i in range(BINS)] if len(bins) > BINS else bins
        cells = [[_cell(row, f"position_ppl@{a}-{b}", ".1f", interval=False) for a, b in shown] for row in rows]
        title = "Perplexity by position in the longest window"
        lines.append(_table(title, [f"{a:,} to {b:,}" for a, b in shown], rows, cells, missing))
    return [*lines, *_verdicts(rows), _commands(rows)]


def _costs(rows: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> str:
    head = ["tokens", "steps", "training, s", "measuring, s", "MFU", "GiB", "commit"]
    forms = {"tokens": ",.0f", "steps": ",.0f", "seconds": ",.0f", "measuring": ",.0f", "mfu": ".0%",
             "peak_memory_gib": ".1f"}  # fmt: skip
    costs = [row | {"measuring": sum(row["measuring"].values()) or None} for row in rows]
    cells = [
        [*(f"{cost[key]:{form}}" if cost.get(key) is not None else "–" for key, form in forms.items()), cost["commit"]]
        for cost in costs
    ]
    return _table("What it took", head, rows, cells, missing)


def _commands(rows: Sequence[Mapping[str, Any]]) -> str:
    by_folder = {folder: command for row in rows for folder, command in row["commands"].items() if command}
    lines = [f"- {folder}: `{FOLDERS.sub('', command)}`" for folder, command in sorted(by_folder.items())]
    return "\n".join(["**Commands**, by the folder that they left", "", *lines])


def _table(title: str, head: Sequence[str], rows, cells: Iterable[Sequence[str]], missing: Sequence[str]) -> str:
    lines = [f"**{title}**", "", f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    lines += [f"| {_name(row)} | {' | '.join(each)} |" for row, each in zip(rows, cells, strict=True)]
    lines += [f"| {name} | {NOT_YET} {'| ' * len(head)}".rstrip() for name in missing]
    return "\n".join(lines)


def _name(row: Mapping[str, Any]) -> str:
    return row["model"] if row["target"] is None else f"{row['model']}, to {row['target']:,}"


def _lengths(row: Mapping[str, Any], family: str) -> list[int]:
    names = [name.rpartition("@") for name in row["metrics"]]
    return [int(length) for before, _, length in names if before == family and length.isdecimal()]


def _bin(name: str) -> tuple[int, int]:
    first, last = name.partition("@")[2].split("-")
    return int(first), int(last)


def _cell(row: Mapping[str, Any], name: str, form: str, interval: bool = True) -> str:
    found = row["metrics"].get(name)
    if found is None or found[0] != found[0]:
        return "–"
    value, low, high = found[:3]
    shown = f"{value:{form}}" if abs(value) < 1e4 else f"{value:.1e}"
    return f"{shown} ({low:{form}} to {high:{form}})" if interval and low is not None and high is not None else shown


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was to be shown, by the numbers above, of each training."""
    untuned = next((row for row in rows if row["model"] == "untuned"), None)
    if untuned is None:
        return []
    lines = []
    for row in rows:
        target, window = row["target"], min(_lengths(untuned, "tail_ppl"), default=None)
        if row["model"] in UNTRAINED or target is None or window is None:
            continue

        def value(of, name):
            return of["metrics"].get(name, [None])[0]

        tail, untuned_tail = value(row, f"tail_ppl@{target}"), value(untuned, f"tail_ppl@{target}")
        inside, key = value(untuned, f"tail_ppl@{window}"), value(row, f"passkey@{target}")
        short, untuned_short = value(row, f"ppl@{window}"), value(untuned, f"ppl@{window}")
        parts = []
        if tail and inside:
            parts.append(
                f"perplexity of the last tokens at {target:,} is {tail / inside - 1:+.1%} of the untuned model's at "
                f"{window:,} (at most +5 %: {_yes(tail / inside <= 1.05)})"
            )
        if untuned_tail and inside:
            times = untuned_tail / inside
            parts.append(f"the untuned model's is {times:.3g} times that (above 20: {_yes(times > 20)})")
        if key is not None:
            parts.append(f"passkeys at {target:,} {key:.0%} (at least 90 %: {_yes(key >= 0.9)})")
        if short and untuned_short:
            change = short / untuned_short - 1
            parts.append(f"perplexity inside {window:,} {change:+.1%} (at most +3 %: {_yes(change <= 0.03)})")
        if parts:
            lines.append(f"- **{_name(row)}**: {'; '.join(parts)}.")
    return ["\n".join(lines)] if lines else []


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def write(rows: Sequence[Mapping[str, Any]], doc: Path = DOC):
    """Puts the tables between the marks of the document."""
    from benchmarks import put_between

    put_between(doc, BEGIN, END, tables(rows))


def main(arguments: list[str] | None = None):
    """Reads folders, and writes file and document.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks.smollm2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of train.py or evaluate.py")
    parser.add_argument("--hardware", metavar="TEXT", help="what a CPU is called: 2 cores of an Intel Xeon with AMX")
    parser.add_argument("--found", type=Path, default=FOUND, metavar="FILE", help="the numbers (docs/smollm2.json)")
    parser.add_argument("--doc", type=Path, default=DOC, metavar="FILE", help="the document (docs/SMOLLM2.md)")
    args = parser.parse_args(arguments)
    rows = read_json(args.found).get("rows", [])
    if args.folders:
        rows = merge(rows, read(args.folders, args.hardware))
        write_json(args.found, {"rows": rows})
    write(rows, args.doc)
    print(f"{args.doc}: {len(rows)} models")


if __name__ == "__main__":
    main()
