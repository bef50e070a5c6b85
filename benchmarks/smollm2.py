"""What was found of SmolLM2-135M: python -m benchmarks.smollm2 [FOLDER ...] [--hardware TEXT]

Reads folders of train.py and evaluate.py (of experiment=smollm2_32k, smollm2_32k_cpu, and of the stages smollm2-* of
benchmarks.gpu: outputs/gpu/run-smollm2-*), adds what they measured to docs/smollm2.json, and writes the tables of
docs/SMOLLM2.md and its figure from that file. No number is typed by hand. Without a folder they are written anew.
"""

import argparse
import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pose.files import REPOSITORY, load_json, read_json, write_json

DOC, FOUND = REPOSITORY / "docs" / "SMOLLM2.md", REPOSITORY / "docs" / "smollm2.json"
PICTURE = "images/smollm2.png"  # from the document's folder
BEGIN, END = "<!-- from python -m benchmarks.smollm2 -->", "<!-- until here -->"
UNTRAINED = ("untuned", "scaled")  # of the latter several, by their scaling
SAMPLERS = ("PoSE", "ShortPI", "Full")  # what is compared at equal tokens
USUAL = ("LanguageModel", "Yarn")  # of the experiments, and not said
# What else tells trainings apart: those that differ in one of these are rows of their own
SETUP = ("finetune.lr", "pose.train_len", "trainer.global_batch", "finetune.lora.rank", "seed")
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
        folders: of train.py or evaluate.py. An evaluation of a training's model belongs to that training, if that is
            among them.
        hardware: what a CPU is called; a GPU names itself.

    Returns:
        Rows: model, hardware, on_gpu, target, commit, versions; of a training tokens, steps, seconds; by folder
        measuring (seconds) and commands; metrics, [value, low, high, num] by name; where perplexity is among these,
        measured_on, the tokens.

    Raises:
        SystemExit: a folder is neither; names it.
    """
    from pose.app import report
    from pose.errors import PoseError

    try:
        sources = {Path(source.folder): source for folder in folders for source in report.read(folder)}
    except PoseError as error:
        raise SystemExit(str(error)) from error
    trainings = {folder.resolve(): source for folder, source in sources.items() if source.kind == "training"}
    label = {folder.resolve(): _label(folder, sources) for folder in sources}
    trained = {folder: _trained(label[folder], source, _logged(folder)) for folder, source in trainings.items()}
    machine_of = {folder: _machine(folder, source, hardware) for folder, source in trainings.items()}
    rows: list[dict[str, Any]] = []
    for folder, source in sources.items():
        common = _machine(folder, source, hardware) | {
            "commit": source.facts.get("Commit", ""),
            "versions": source.facts.get("Versions", ""),
        }
        measuring = read_json(folder / "metrics.json")
        checkpoints = read_json(folder / "results.json").get("checkpoints", {})
        for name, metrics in source.models.items():
            if source.kind == "training":
                own = trained[folder.resolve()] if name not in UNTRAINED else {}
                target, took = source.target, measuring.get(f"measuring/{name}_seconds")
            else:
                place = _training_of(Path(checkpoints[name]["path"]), trained)
                own = {} if place is None else trained[place]
                if place is not None and machine_of[place] != _machine(folder, source, hardware):
                    own = {key: own[key] for key in ("model", "setup", "commands")}  # its seconds are another machine's
                took = source.cost[f"measuring {name}"].get("seconds")
                target = checkpoints[name].get("target") if name != "untuned" else None
            row = {"model": own.get("model", name), "target": target if name != "untuned" else None, **common}
            if name == "scaled":
                is_of_a_run = source.kind == "training"
                scaling = _scaling(source) if is_of_a_run else _scaling_of(Path(checkpoints[name]["path"]), folder)
                row["model"] = ", ".join([name, *scaling])
            row |= {
                **own,
                "commands": own.get("commands", {}) | {label[folder.resolve()]: _command(source)},
            }
            row |= {"measuring": {} if took is None else {label[folder.resolve()]: took}}
            row |= {"metrics": {key: list(found) for key, found in metrics.items()}}
            tokens = _measured_on(source, metrics)
            row |= {"setup": own.get("setup") or tokens} | ({"measured_on": tokens} if tokens else {})
            rows.append(row)
    return rows


def _label(folder: Path, folders: Iterable[Path]) -> str:
    """The name of a folder, and that of the one above it where several have that name."""
    is_alone = sum(other.name == folder.name for other in folders) == 1
    return folder.name if is_alone else "/".join(folder.resolve().parts[-2:])


def _training_of(checkpoint: Path, trained: Iterable[Path]) -> Path | None:
    """The training that a checkpoint is of; by its name alone where it was evaluated on another machine."""
    place = (checkpoint.parent if checkpoint.name in ("model", "model.rejected") else checkpoint).resolve()
    named = [folder for folder in trained if folder.name == place.name]
    return place if place in named else named[0] if len(named) == 1 else None


def _command(source) -> str:
    """That left a folder, without the places of one machine, and what earlier starts had in place of its settings."""
    from pose.reporting.lines import EARLIER

    command, earlier = FOLDERS.sub("", source.facts.get("Command", "")), source.facts.get(EARLIER)
    return f"{command} # before: {earlier}" if earlier else command


def _machine(folder: Path, source, hardware: str | None) -> dict[str, Any]:
    gpu = read_json(folder / "provenance.json").get("gpu")
    return {"hardware": gpu or hardware or source.facts.get("Machine", ""), "on_gpu": bool(gpu)}


def _measured_on(source, metrics: Mapping[str, Any]) -> str:
    """What tells measurements of one untrained model apart: their perplexities are of other tokens."""
    lengths = [int(name.partition("@")[2]) for name in metrics if name.startswith(("ppl@", "tail_ppl@"))]
    if not lengths:
        return ""
    keys = ("eval.max_documents", "eval.windows", "eval.documents")
    of = [f"{key.rpartition('.')[2]}={source.config.get(key, '')}" for key in keys]
    return ", ".join([f"up to {max(lengths):,}", *of])


def _trained(name: str, source, logged: Mapping[str, float]) -> dict[str, Any]:
    """What a training was, and what it cost; of one that did not come to its end, what it had logged."""
    cost, config = logged | source.cost.get("training", {}), source.config
    found = {name: cost[name] for name in ("tokens", "steps", "seconds", "mfu", "peak_memory_gib") if name in cost}
    parts = [config.get(f"{group}._target_", "").rpartition(".")[2] for group in ("pose", "objective", "rope")]
    parts += [key.rpartition(".")[2] for key in OPTIONS if config.get(key, "null") not in ("null", "false", "[]")]
    parts = [part for part in parts if part and part not in USUAL]
    parts += _scaling(source)
    parts += [f"{found['tokens'] / 1e6:.3g} M tokens"] if "tokens" in found else []
    setup = ", ".join(f"{key}={config[key]}" for key in SETUP if key in config)
    return {"model": ", ".join(parts), "setup": setup, "commands": {name: _command(source)}, **found}


def _scaling(source) -> list[str]:
    """What `_numbers` says of a training."""
    rope = {key.removeprefix("rope."): value for key, value in source.config.items() if key.startswith("rope.")}
    is_known = rope.get("_target_", "").endswith(".Yarn") and source.target and source.window
    return _numbers(rope, source.target / source.window) if is_known else []


def _numbers(rope: Mapping[str, Any], factor: float) -> list[str]:
    """What a YaRN says otherwise than by default.

    Args:
        rope: its arguments, as a config has them; what is null or absent is the default.
        factor: target / window, the default.
    """
    given = {key: float(rope[key]) for key in ("factor", "beta_slow", "attention_factor")
             if rope.get(key) not in (None, "null")}  # fmt: skip
    usual = {"beta_slow": 1.0, "factor": factor, "attention_factor": 0.1 * math.log(given.get("factor", factor)) + 1}
    return [f"{key} {value:g}" for key, value in given.items() if not math.isclose(value, usual[key], rel_tol=1e-6)]


def _scaling_of(model: Path, evaluation: Path) -> list[str]:
    """What `_numbers` says of a model whose RoPE is rescaled and nothing trained; of another method its name.

    Args:
        model: its folder; where that is on another machine, the folder of its name beside the evaluation is read.
        evaluation: the folder of its evaluation.

    Raises:
        SystemExit: neither is there: it would be taken for a model with another scaling.
    """
    config = read_json(model / "config.json") or read_json(evaluation.resolve().parent / model.name / "config.json")
    if not config:
        raise SystemExit(f"{evaluation}: the config.json of {model} is needed, there or beside the evaluation")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "yarn":
        return [str((config.get("pose") or {}).get("rope") or rope.get("rope_type"))]
    return _numbers(rope, config["max_position_embeddings"] / rope["original_max_position_embeddings"])


def _logged(folder: Path) -> dict[str, float]:
    """What a training had cost when it last wrote a row, which may be before its end."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return {}
    with open(file, encoding="utf-8", newline="") as table:
        rows = [row for row in csv.DictReader(table) if row.get("cost/tokens")]
    if not rows:
        return {}
    names = {"tokens": "cost/tokens", "seconds": "cost/seconds", "peak_memory_gib": "cost/peak_memory_gib"}
    found = {key: float(rows[-1][name]) for key, name in names.items() if rows[-1].get(name)}
    return found | {"steps": int(rows[-1]["step"]) + 1}


def merge(rows: Sequence[dict[str, Any]], more: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what was found since: of one model on one hardware, metric by metric the newest, and all commits.

    An untrained model has a row for each set of tokens that it was measured on; what has no perplexity goes with any.
    """
    merged = list(rows)
    for row in more:
        alike = [i for i, before in enumerate(merged) if _is_same(before, row)]
        if alike:
            before = merged[alike[0]]
            both = {key: before[key] | row[key] for key in ("measuring", "commands", "metrics")}
            commits = dict.fromkeys([*before["commit"].split(", "), row["commit"]])
            both |= {"setup": row["setup"] or before["setup"], "commit": ", ".join(commits)}
            merged[alike[0]] = before | row | both
        else:
            merged.append(row)
    return merged


def _is_same(before: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    is_one = all(before[key] == row[key] for key in ("hardware", "target", "model"))
    return is_one and ("" in (before["setup"], row["setup"]) or before["setup"] == row["setup"])


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
    rows = _told_apart(rows)
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
    return [*lines, *verdicts(rows), _commands(rows)]


def _told_apart(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """With their set-up beside the names that several have."""
    names = [_name(row) for row in rows]
    return [row | {"told": f"{name} ({row['setup']})"} if names.count(name) > 1 else row
            for row, name in zip(rows, names, strict=True)]  # fmt: skip


def draw(rows: Sequence[Mapping[str, Any]], png: Path):
    """Perplexity by position, of one hardware: a GPU where there is one.

    Without the intervals, which the tables have: over documents that differ much they would cover each other.

    Args:
        rows: of the tables.
        png: file to write; nothing where no row has been measured by position.
    """
    from pose.evaluation.task import Estimate
    from pose.reporting.plots import plot_results

    measured = [row for row in rows if any(name.startswith("position_ppl@") for name in row["metrics"])]
    if not measured:
        return
    hardware = max(measured, key=lambda row: row["on_gpu"])["hardware"]
    measured = _told_apart([row for row in measured if row["hardware"] == hardware])
    results = {_name(row): {name: Estimate(found[0]) for name, found in row["metrics"].items()} for row in measured}
    windows = [n for row in measured if row["model"] == "untuned" for n in _lengths(row, "tail_ppl")]
    target = max((row["target"] or 0 for row in measured), default=0)
    plot_results(results, png, min(windows, default=None), ("position",), target or None)


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
    lines = [f"- {folder}: `{command}`" for folder, command in sorted(by_folder.items())]
    return "\n".join(["**Commands**, by the folder that they left", "", *lines])


def _table(title: str, head: Sequence[str], rows, cells: Iterable[Sequence[str]], missing: Sequence[str]) -> str:
    lines = [f"**{title}**", "", f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    lines += [f"| {_name(row)} | {' | '.join(each)} |" for row, each in zip(rows, cells, strict=True)]
    lines += [f"| {name} | {NOT_YET} {'| ' * len(head)}".rstrip() for name in missing]
    return "\n".join(lines)


def _name(row: Mapping[str, Any]) -> str:
    """With what tells it from another of the same name, where there is one."""
    return row.get("told") or row["model"] + (f", to {row['target']:,}" if row["target"] is not None else "")


def _lengths(row: Mapping[str, Any], family: str) -> list[int]:
    names = [name.rpartition("@") for name in row["metrics"]]
    return [int(length) for before, _, length in names if before == family and length.isdecimal()]


def _bin(name: str) -> tuple[int, int]:
    first, last = name.partition("@")[2].split("-")
    return int(first), int(last)


def _cell(row: Mapping[str, Any], name: str, form: str, interval: bool = True) -> str:
    found = row["metrics"].get(name)
    if found is None or found[0] is None or found[0] != found[0]:
        return "–"
    value, low, high = found[:3]
    shown = f"{value:{form}}" if abs(value) < 1e4 else f"{value:.1e}"
    return f"{shown} ({low:{form}} to {high:{form}})" if interval and low is not None and high is not None else shown


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was to be shown, by the numbers above, of each training."""
    lines = []
    for row in rows:
        target = row["target"]
        if target is None:
            continue
        untuned = _untuned(rows, row)
        window = None if untuned is None else min(_lengths(untuned, "tail_ppl"), default=None)
        if untuned is None or window is None:
            continue

        def value(of, name):
            return of["metrics"].get(name, [None])[0]

        tail, untuned_tail = value(row, f"tail_ppl@{target}"), value(untuned, f"tail_ppl@{target}")
        inside, key = value(untuned, f"tail_ppl@{window}"), value(row, f"passkey@{target}")
        short, untuned_short = value(row, f"ppl@{window}"), value(untuned, f"ppl@{window}")
        parts = []
        if tail and inside:
            parts.append(
                f"perplexity of the last tokens at {target:,} is {abs(tail / inside - 1):.1%} "
                f"{'below' if tail < inside else 'above'} the untuned model's at {window:,} (at most 5 % above: "
                f"{_yes(tail / inside <= 1.05)})"
            )
        if untuned_tail and inside:
            times = untuned_tail / inside
            parts.append(
                f"the untuned model's at {target:,} is {times:.3g} times its own at {window:,} (above 20: "
                f"{_yes(times > 20)})"
            )
        if key is not None:
            num = row["metrics"][f"passkey@{target}"][3]
            parts.append(f"passkeys at {target:,} {key:.0%} of {num} prompts (at least 90 %: {_yes(key >= 0.9)})")
        else:
            parts.append(f"passkeys at {target:,} were not measured")
        if short and untuned_short:
            change = short / untuned_short - 1
            parts.append(
                f"perplexity inside {window:,} {abs(change):.1%} {'lower' if change < 0 else 'higher'} (at most 3 % "
                f"higher: {_yes(change <= 0.03)})"
            )
        if parts:
            lines.append(f"- **{_name(row)}**: {'; '.join(parts)}.")
    return ["\n".join(lines)] if lines else []


def _untuned(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The untuned model measured up to the same length, on the same tokens; on the same machine where it was on two."""
    longest = max(_lengths(row, "tail_ppl"), default=None)
    found = [
        one
        for one in rows
        if one["model"] == "untuned"
        and max(_lengths(one, "tail_ppl"), default=None) == longest
        and one.get("measured_on") == row.get("measured_on")
    ]
    return min(found, key=lambda one: one["hardware"] != row["hardware"], default=None)


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
    rows = load_json(args.found, required={"rows": list})["rows"] if args.found.exists() else []
    if args.folders:
        rows = merge(rows, read(args.folders, args.hardware))
        write_json(args.found, {"rows": rows})
    write(rows, args.doc)
    draw(rows, args.doc.parent / PICTURE)
    print(f"{args.doc}: {len(rows)} models")


if __name__ == "__main__":
    main()
