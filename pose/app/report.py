"""The command `python -m pose.report`: what folders of runs, sweeps and evaluations hold, on one page."""

import argparse
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pose.app import command
from pose.errors import DataError, first_line
from pose.files import atomic_file, read_json, short_name

if TYPE_CHECKING:
    from pose.evaluation.task import Estimate
    from pose.reporting.page import Source

log = logging.getLogger("pose.app.report")

USAGE = """\
One HTML file, which needs no network, of what runs, sweeps and evaluations found (docs/REPORTS.md). Each of them writes
its own report.html at its end; several are compared on one page.

  python -m pose.report outputs/RUN
  python -m pose.report outputs/RUN outputs/OTHER outputs/evaluate/X --out compared.html"""
PAGE = "report.html"
OF_A_SEARCH = ("factors.yaml", "search.csv", "needles.csv")
RUN_FILES = ("config.yaml", "metrics.json", "results.json")  # of a run or an evaluation; any of them makes it one
STALE = "not finished: what was measured is of an earlier start in this folder, with other settings"


def main(arguments: list[str] | None = None):
    """Writes the page that the arguments ask for.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m pose.report", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", type=command.path, metavar="FOLDER", help="of a run, a sweep or an evaluation"
    )
    parser.add_argument(
        "--out", type=command.path, metavar="FILE",
        help="the page (default: FOLDER/report.html, of several folders report.html in this one)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    with command.running():
        folders = [Path(folder).expanduser() for folder in given.folders]
        file = Path(given.out or (folders[0] / PAGE if len(folders) == 1 else PAGE)).expanduser()
        if file.is_dir():
            raise DataError(f"--out {file} is a folder: give the file that is to be written, such as {file / PAGE}")
        write_report(folders, file)
        log.info(f"{file}  ({file.stat().st_size / 1e6:.1f} MB; it needs no network)")


def write_beside(folder: Path):
    """FOLDER/report.html of what has just ended, which must not fail for its page: that would be a warning."""
    try:
        write_report([folder], folder / PAGE)
    except Exception as error:
        log.warning(f"{folder / PAGE} was not written ({first_line(error)}). Again: python -m pose.report {folder}")


def write_report(folders: Sequence[Path], file: Path):
    """Writes the page of some folders in one step.

    Raises:
        DataError: a folder is no run, sweep or evaluation, or the file cannot be written; names it.
    """
    from pose.reporting.page import page

    sources = _with_names(read(*folders))
    text = page(sources, _title(folders, sources), f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.")
    try:
        with atomic_file(file) as page_file:
            page_file.write(text.encode(errors="replace").decode())  # names of files may be no text
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror or error}") from error


def read(*folders: Path) -> list["Source"]:
    """The runs and evaluations of some folders, those of sweeps among them. One that is given twice is read once.

    Raises:
        DataError: a folder holds none; names it.
    """
    from pose.reporting.sweep import overrides_of

    given: dict[Path, list[str]] = {}  # overrides of the jobs of sweeps
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder: give that of a run, a sweep or an evaluation")
        if files := [name for name in OF_A_SEARCH if (folder / name).is_file()]:
            raise DataError(f"{folder} is of a search, which has no page: what it found is in {', '.join(files)}")
        if _is_one(folder):
            found.append(folder)
            continue
        if not has_jobs(folder):
            raise DataError(
                f"{folder} is no run, sweep or evaluation: neither it nor a folder in it has {' or '.join(RUN_FILES)}"
            )
        jobs = sorted(_jobs(folder), key=lambda job: (len(job.name), job.name))
        given |= {job.resolve(): overrides_of(job) or [] for job in jobs}
        found += jobs
    names = dict(zip(given, _job_names(list(given.values())), strict=True))
    once: dict[Path, Path] = {}
    for folder in found:
        if (same := once.setdefault(folder.resolve(), folder)) is not folder:
            log.info(f"{folder} is {same}, which the page has once")
    return [_read_one(folder, names.get(resolved, "")) for resolved, folder in once.items()]


def has_jobs(folder: Path) -> bool:
    """Whether a folder in it is of a run or an evaluation, complete or not, or of a job that was refused."""
    return folder.is_dir() and bool(_jobs(folder))


def _jobs(folder: Path) -> list[Path]:
    from pose.reporting.sweep import OVERRIDES

    folders = [each for each in folder.iterdir() if not each.name.startswith(".")]  # .hydra has a config.yaml too
    return [each for each in folders if _is_one(each) or (each / OVERRIDES).is_file()]


def _is_one(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def _read_json(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not content and file.is_file() and file.read_bytes().strip() != b"{}":
        _warn_of_damage(file)
    return content


def _warn_of_damage(file: Path):
    log.warning(f"{file} is damaged: the page is without what it has")


def _read_one(folder: Path, name: str = "") -> "Source":
    """A run of train.py, or an evaluation. A file that is missing leaves its part out, a damaged one with a warning."""
    import yaml

    from pose.reporting.lines import EARLIER, STATE, recipe, unfinished
    from pose.reporting.metrics_csv import logged_rows
    from pose.reporting.page import Source
    from pose.reporting.sweep import overrides_of

    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = None
    except (OSError, ValueError, yaml.YAMLError):
        config = None
        _warn_of_damage(folder / "config.yaml")
    flat, provenance = _flat(_object(config)), _read_json(folder / "provenance.json")
    common: dict[str, Any] = {"name": name, "folder": str(folder), "config": flat}
    overrides = overrides_of(folder) or []
    if not _is_one(folder):
        kind = "evaluation" if any(each.startswith("ckpt=") for each in overrides) else "training"
        return Source(kind=kind, facts={STATE: "not begun: it was refused, or ended before that"}, **common)
    asked = _checkpoints(_object(config).get("ckpt"))
    if asked or (folder / "results.json").is_file():
        results = _read_json(folder / "results.json")
        found = {model: each for model, each in _object(results.get("checkpoints")).items() if isinstance(each, dict)}
        made_with = _object(results.get("provenance"))
        last = provenance.get("overrides")
        is_stale = bool(made_with) and isinstance(last, list) and {*recipe(map(str, last))} != {*recipe(overrides)}
        if is_stale:  # another evaluation has begun in its folder: config.yaml is of that one
            common["config"] = flat = _flat(_object(results.get("eval")), "eval.")
        provenance = made_with or provenance
        return Source(
            kind="evaluation",
            facts={
                STATE: STALE if is_stale else _state(asked, found),
                "Checkpoints": "; ".join(f"{model}: {each.get('path', '')}" for model, each in found.items()),
                "Lengths": _words(flat.get("eval.lengths", "")),
                **_measured_on(flat),
                **_how(folder, provenance),
            },
            models={model: _estimates(each.get("metrics")) for model, each in found.items()},
            identities={
                model: json.dumps(checkpoint)
                for model, each in found.items()
                if (checkpoint := _object(each.get("identity")).get("checkpoint")) is not None
            },
            tokenizers=frozenset(one for each in found.values() if isinstance(one := each.get("tokenizer"), str)),
            window=min((w for each in found.values() if (w := _whole(each.get("window")))), default=None),
            target=max((t for each in found.values() if (t := _whole(each.get("target")))), default=None),
            cost={f"measuring {model}": _numbers(each.get("took")) for model, each in found.items()},
            **common,
        )
    metrics = _read_json(folder / "metrics.json")
    settings = _object(provenance.get("settings"))
    rope = _object(settings.get("model's rope_parameters"))
    window = _whole(
        _object(settings.get("model's pose")).get("window")  # of a model that was extended before
        or rope.get("original_max_position_embeddings")
        or settings.get("model's max_position_embeddings")
    )
    target = int(flat["pose.target_len"]) if flat.get("pose.target_len", "").isdecimal() else None
    steps, tokenizer = flat.get("trainer.max_steps", ""), provenance.get("tokenizer")
    state = unfinished(metrics, int(steps) if steps.isdecimal() else None)
    return Source(
        kind="training",
        facts={STATE: state, EARLIER: _earlier(provenance)}
        | _training_facts(flat, window, target)
        | _measured_on(flat)
        | _how(folder, provenance),
        models=_models(folder, metrics),
        tokenizers=frozenset([tokenizer] if isinstance(tokenizer, str) else []),
        window=window,
        target=target,
        logged=logged_rows(folder / "metrics.csv"),
        coverage=_coverage(folder / "coverage.csv"),
        cost={"training": _training_cost({} if state else metrics, logged_rows(folder / "metrics.csv"))},
        **common,
    )


def _earlier(provenance: Mapping[str, Any]) -> str:
    """What earlier starts of a training were given that the last one was not: the steps of another schedule, say.

    Of one that begins at step 0 nothing: none of them has left a checkpoint.
    """
    from pose.reporting.lines import recipe

    def settings(start: Mapping[str, Any]) -> set[str]:
        given = start.get("overrides")
        overrides = map(str, given) if isinstance(given, list) else []
        return {each for each in recipe(overrides) if not re.match(r"[+~]*(eval|watch)", each)}

    before = provenance.get("earlier") if provenance.get("from_step") else None
    starts = [one for one in before if isinstance(one, dict)] if isinstance(before, list) else []
    now = settings(provenance)
    differing = ["; ".join(sorted(settings(one) - now)) or "fewer settings" for one in starts if settings(one) != now]
    return ", then ".join(dict.fromkeys(differing))


def _checkpoints(ckpt: Any) -> list[str]:
    """The names of those that an evaluation was asked to measure; of a config without the key none."""
    return [str(one) for one in (ckpt if isinstance(ckpt, dict | list) else [ckpt]) if one is not None]


def _state(asked: Sequence[str], found: Mapping[str, Any]) -> str:
    """Of an evaluation; "" where it is finished."""
    done = sum(name in found for name in asked)
    return f"not finished: {done} of {len(asked)} checkpoints" if done < len(asked) else ""


def _training_facts(flat: Mapping[str, str], window: int | None, target: int | None) -> dict[str, str]:
    """What a run trained, from its config; without one, what the model and its run tell."""

    def of(key: str) -> str:
        return flat.get(key, "")

    def method(group: str, without: Sequence[str]) -> str:
        name = of(f"{group}._target_").rpartition(".")[2]
        prefix = f"{group}."
        options = [f"{k.removeprefix(prefix)}={v}" for k, v in flat.items() if k.startswith(prefix) and v != "null"]
        kept = [option for option in options if option.partition("=")[0] not in ("_target_", *without)]
        return f"{name} ({', '.join(kept)})" if kept else name

    lengths = {
        "Window": f"{'?' if window is None else f'{window:,}'} → {'?' if target is None else f'{target:,}'} tokens"
    }
    if not flat:
        return lengths if window else {}
    example_len = of("pose.target_len" if of("pose._target_").endswith(".Full") else "pose.train_len")
    rank = of("finetune.lora.rank")
    trained = "all weights" if rank in ("", "null") else f"LoRA of rank {rank}"
    batch = f"{of('trainer.max_steps')} steps of {of('trainer.global_batch')} examples"
    shares = {k.rpartition(".")[2]: v for k, v in flat.items() if k.startswith("data.synthetic.")}
    retrieval = [f"{float(share):.0%} {name}" for name, share in shares.items() if _number(share)]
    data = _documents(flat, "data.documents") + f"; retrieval examples: {', '.join(retrieval)}" * bool(retrieval)
    return {
        "Model": "random weights" if of("model.path") == "null" else of("model.path"),
        **lengths,
        "Sampler": f"{method('pose', ('target_len', 'train_len'))}, examples of {example_len} tokens",
        "RoPE": method("rope", ()),
        "Objective": method("objective", ()),
        "Training": f"{trained}, {batch}, learning rate {of('finetune.lr')}",
        "Seed": of("seed"),
        "Data": data,
    }


def _measured_on(flat: Mapping[str, str]) -> dict[str, str]:
    """The documents of perplexity, where it is measured."""
    from pose.reporting.lines import DOCUMENTS

    is_measured = "perplexity" in flat.get("eval.tasks", "")
    if not is_measured:
        return {}
    documents = _documents(flat, "eval.documents")
    if documents == "null":  # of one's own data
        documents = f"what is set aside of {_documents(flat, 'data.documents')}"
    return {DOCUMENTS: documents}


def _documents(flat: Mapping[str, str], key: str) -> str:
    """Files or a data set, which has a path, a name and a split of its own."""
    parts = {name.removeprefix(f"{key}."): value for name, value in flat.items() if name.startswith(f"{key}.")}
    fields = [f"{name}={value}" for name, value in parts.items() if name != "path" and value != "null"]
    return " ".join([parts["path"], *fields]) if "path" in parts else _words(flat.get(key, ""))


def _how(folder: Path, provenance: Mapping[str, Any]) -> dict[str, str]:
    """Command, code, versions and machine."""
    packages = _object(provenance.get("packages"))
    versions = [f"{name} {packages[name]}" for name in ("torch", "transformers", "lightning") if packages.get(name)]
    versions += [f"Python {provenance['python']}"] if provenance.get("python") else []
    cpu = provenance.get("processor") and f"{provenance['processor']} CPU"
    threads = provenance.get("cpu_threads") and f"{provenance['cpu_threads']} threads"
    commit = str(provenance.get("commit") or "not known")[:12]
    done = next((folder / name for name in ("metrics.json", "results.json") if (folder / name).is_file()), None)
    when = None if done is None else datetime.fromtimestamp(done.stat().st_mtime, UTC)
    return {
        "Command": str(provenance.get("command") or ""),
        "Commit": commit + " and uncommitted changes" * bool(provenance.get("uncommitted_changes")),
        "Versions": ", ".join(versions),
        "Machine": provenance.get("gpu") or ", ".join(filter(None, [cpu, threads])),
        "Ended": f"{when:%Y-%m-%d %H:%M} UTC" if when else "",
        "Folder": str(folder),
    }


def _models(folder: Path, metrics: Mapping[str, Any]) -> dict[str, dict[str, "Estimate"]]:
    """Estimates of untuned, scaled and extended.

    Those of older runs have no intervals, nor have those that a damaged results.csv lacks.
    """
    from pose.reporting.results_csv import read_results

    if not metrics:
        return {}
    values = {model: _estimates(found) for model, found in metrics.items() if isinstance(found, dict)}
    results = read_results(folder / "results.csv")
    if results and any(values[model].keys() - results.get(model, {}).keys() for model in values):
        log.warning(f"{folder / 'results.csv'} is damaged: what it lacks is of metrics.json, which has no intervals")
    return {model: values.get(model, {}) | results.get(model, {}) for model in values | results}


def _estimates(found: Any) -> dict[str, "Estimate"]:
    """From a number, or an estimate's fields, by metric."""
    from pose.evaluation.task import Estimate

    estimates = {}
    for name, value in _object(found).items():
        fields = dict(value) if isinstance(value, dict) else {"value": value, "num": 0}
        if fields.get("value", 0) is None:  # as JSON has what is not a number
            fields["value"] = math.nan
        fields = {k: v for k, v in fields.items() if k in Estimate._fields and isinstance(v, int | float)}
        if "value" in fields:
            estimates[name] = Estimate(**fields)
    return estimates


def _training_cost(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Of the whole training; of peak memory the highest that was logged, of a step's time and of MFU the median.

    One that is not finished has cost what it logged last. Older runs have them all under train/.
    """
    logged: dict[str, float] = {}
    if not metrics and rows:
        logged = {name: float(value) for row in rows for name, value in row.items()}
        logged["steps"] = logged["step"] + 1  # they are counted from 0
    found = {re.sub("^(train|cost)/", "", name): value for name, value in (logged | _numbers(metrics)).items()}
    keys = ("seconds", "steps", "tokens", "step_seconds", "flops", "mfu")
    cost: dict[str, float] = {key: found[key] for key in keys if key in found}
    for key in ("step_seconds", "mfu"):  # what metrics.json has is of the last interval alone
        if values := [float(row[f"cost/{key}"]) for row in rows if row.get(f"cost/{key}")]:
            cost[key] = median(values)
    if cost.get("seconds") and "tokens" in cost:
        cost["tokens_per_second"] = cost["tokens"] / cost["seconds"]
    elif "tokens_per_second" in found:
        cost["tokens_per_second"] = found["tokens_per_second"]
    peaks = [float(value) for row in rows for name, value in row.items() if name.endswith("/peak_memory_gib")]
    return cost | ({"peak_memory_gib": max(peaks)} if peaks else {})


def _coverage(file: Path):
    """The columns of coverage.csv; None where it cannot be read."""
    import numpy as np

    try:
        _, *lines = file.read_text(encoding="utf-8").splitlines()
        columns = np.array([line.split(",") for line in lines], dtype=np.float64).T
    except (OSError, ValueError):
        return None
    return tuple(columns) if columns.ndim == 2 and len(columns) == 3 and np.isfinite(columns).all() else None


def _job_names(overrides: Sequence[Sequence[str]]) -> list[str]:
    """What each job was given that not all were, and that has an effect; of a long value its beginning."""
    from pose.reporting.lines import recipe

    if not overrides:
        return []
    seeded = [{*recipe(given), *(each for each in given if each.startswith("seed="))} for given in overrides]
    common = set.intersection(*seeded)
    return [
        " ".join(each if len(each) <= 48 else f"{each[:45]}..." for each in given if each in told - common)
        for given, told in zip(overrides, seeded, strict=True)
    ]


def _with_names(sources: Sequence["Source"]) -> list["Source"]:
    """Sources whose names are all different, and in one line: as much of the folder's path as that needs."""
    from dataclasses import replace

    from pose.errors import one_line

    num_of = Counter(source.name for source in sources)
    taken: set[str] = set()
    named = []
    for source in sources:
        folder = Path(source.folder).resolve()
        names = [source.name] if source.name and num_of[source.name] == 1 else []
        least = len(Path(short_name(folder)).parts)
        names += [f"{'/'.join(folder.parts[-n:])} {source.name}".strip() for n in range(least, len(folder.parts))]
        name = next((name for each in names if (name := one_line(each)) and name not in taken), str(folder))
        taken.add(name)
        named.append(replace(source, name=name))
    return named


def _title(folders: Sequence[Path], sources: Sequence["Source"]) -> str:
    """What the page is about, in a line."""
    if len(folders) > 1:
        return f"{', '.join(map(short_name, folders[:3]))}{' ...' * (len(folders) > 3)}, compared"
    if len(sources) > 1 or sources[0].folder != str(folders[0]):
        return f"Sweep {short_name(folders[0])}: {len(sources)} jobs"
    (source,) = sources
    if source.kind == "evaluation":
        return f"Evaluation of {', '.join(source.models) or _words(source.config.get('ckpt', 'several checkpoints'))}"
    if not source.config:
        return f"Training {short_name(folders[0])}"
    method = [source.facts[label].partition(" (")[0].partition(",")[0] for label in ("Sampler", "RoPE")]
    return f"{_model_name(source.facts['Model'])}: {source.facts['Window']}, {' and '.join(filter(None, method))}"


def _model_name(model: str) -> str:
    """The end of an absolute path, with what it lies in where that is called model; a hub id and others as they are."""
    path = Path(model)
    return model if not path.is_absolute() else "/".join(path.parts[-2 if path.name == "model" else -1 :])


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted key; a value is text, and JSON where it is none."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _words(text: str) -> str:
    """A list in JSON as one reads it; any other text as it is."""
    return re.sub(r'[\[\]"]', "", text) if text.startswith("[") and "{" not in text else text


def _number(text: str) -> float:
    """Of a value in a config; 0 where it is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _numbers(found: Any) -> dict[str, float]:
    return {
        key: value
        for key, value in _object(found).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _object(found: Any) -> dict[str, Any]:
    """What a damaged file may have instead of an object is an empty one."""
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


if __name__ == "__main__":
    main()
