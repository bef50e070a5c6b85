"""What a finished run leaves: a line of runs.json, with what tells it from every other run."""

import csv
import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks import cpu
from benchmarks.results.arms import EVALUATE, SEARCH, TINY, TRAIN, Arm
from pose.files import CONF, REPOSITORY, atomic_file, load_json, read_json, sha256

KEPT = re.compile(
    r"(ppl|tail_ppl|passkey|needle_gain|needle_gain_kept)@\d+|coverage/\w+"  # not by position, depth or byte
)
GROUPS = {
    TRAIN: ("model", "pose", "rope", "objective", "data", "finetune", "trainer", "eval"),
    EVALUATE: ("eval",),
    SEARCH: ("model", "pose", "rope"),
}  # whose values decide a number
DIGITS = 6  # of a number that is kept
Record = dict[str, Any]
Runs = dict[tuple[str, int], Record]  # by arm and seed


# ----- the fingerprint -----


class Fingerprints:
    """Of runs: the same as long as nothing has changed that their numbers come from, but the code.

    It is made of the overrides, the values of the YAML files that they and the defaults choose (without those that are
    null) and of those that these are made of, the files of the base model, the texts, and the fingerprints of runs that
    it needs.

    Args:
        arms: by name.
    """

    def __init__(self, arms: Mapping[str, Arm]):
        self.arms = arms
        self._known: dict[tuple[str, int], str] = {}

    def of(self, arm: Arm, seed: int) -> str:
        """Of a run, 16 hexadecimal digits."""
        key = (arm.name, seed)
        if key not in self._known:
            content = [
                arm.script, arm.overrides, sorted(arm.also.items()), seed, repr(arm.as_long), _chosen(arm),
                _shipped(),
                [self.of(self.arms[name], seed_of(self.arms[name], seed)) for name in sorted(arm.needs())],
            ]  # fmt: skip
            self._known[key] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        return self._known[key]


def seed_of(needed: Arm, seed: int) -> int:
    """The run of an arm that a run with some seed needs: of the same seed, where there is one."""
    return seed if seed in needed.seeds else needed.seeds[0]


def _chosen(arm: Arm) -> list:
    """The values of the YAML files that a command is composed of, each with its name."""
    given = dict(o.split("=", 1) for o in arm.overrides if "=" in o)
    experiments, choices = _experiment(given["experiment"]) if "experiment" in given else ([], {})
    defaults = _defaults({TRAIN: "train", EVALUATE: "evaluate", SEARCH: "search"}[arm.script])
    choices = defaults | choices | given
    names = [("experiment", name) for name in experiments]
    names += [one for group in GROUPS[arm.script] if group in choices for one in _made_of(group, choices[group])]
    for key, choice in given.items():
        group, at, _ = key.partition("@")
        names += _made_of(group, choice) if at else []
    for more in arm.also.values():  # further evaluations of the model
        chosen = _defaults("evaluate") | dict(o.split("=", 1) for o in more)
        names += [one for group in GROUPS[EVALUATE] if group in chosen for one in _made_of(group, chosen[group])]
    if any(key.startswith("watch.") for key in given):
        names += _made_of("watch", choices["watch"])
    return [[group, choice, _values(f"{group}/{choice}")] for group, choice in dict.fromkeys(names)]


def _made_of(group: str, choice: str) -> list[tuple[str, str]]:
    """A choice, and those that its own defaults name."""
    found = [(group, choice)]
    for one in (_values(f"{group}/{choice}") or {}).get("defaults", []):
        if isinstance(one, dict):
            found += [each for key, name in one.items() for each in _made_of(key.partition("@")[0].lstrip("/"), name)]
        elif one != "_self_":
            found += _made_of(group, one)
    return found


def _experiment(name: str) -> tuple[list[str], dict[str, str]]:
    """An experiment and those that it is made of, and the choices of groups that they make."""
    names, choices = [name], {}
    for one in (_values(f"experiment/{name}") or {}).get("defaults", []):
        if isinstance(one, dict):
            choices |= {group.removeprefix("override /"): choice for group, choice in one.items()}
        elif one != "_self_":
            inner, chosen = _experiment(one)
            names, choices = names + inner, choices | chosen
    return names, choices


@cache
def _defaults(config: str) -> dict[str, str]:
    content = yaml.safe_load((CONF / f"{config}.yaml").read_text())
    return {k: v for one in content["defaults"] if isinstance(one, dict) for k, v in one.items()}


@cache
def _values(name: str) -> Any:
    def without_null(value):
        if isinstance(value, dict):
            return {k: without_null(v) for k, v in value.items() if v is not None}
        return value

    file = CONF / f"{name}.yaml"
    return without_null(yaml.safe_load(file.read_text())) if file.is_file() else None


@cache
def _shipped() -> list[str]:
    """Digests of the base model's three files, and of the shipped texts."""
    files = [TINY / name for name in ("config.json", "tokenizer.json", "model.safetensors")]
    return [sha256(file) for file in (*files, *sorted((REPOSITORY / "assets" / "corpora").glob("*.gz")))]


def base_model() -> str:
    """The beginning of the SHA-256 of the shipped base model's weights."""
    return _shipped()[2][:12]


# ----- what is read of a run -----


def measured(arm: Arm, folder: Path) -> dict[str, float]:
    """The numbers of a finished run: those that are shown or that verdicts go by.

    Args:
        arm: of the run.
        folder: with `run`, and a folder for each further evaluation.

    Raises:
        DataError: a file is not there, or not as it must be.
    """
    if arm.script == SEARCH:
        found = yaml.safe_load((folder / "run" / "factors.yaml").read_text())
        rows = found["needle_answers"].items()
        numbers = {f"{name}: {key}": value for name, row in rows for key, value in row.items()}
        return {"candidates": found["candidates"], **_rounded(numbers)}
    found = load_json(folder / "run" / "metrics.json")
    metrics = _kept(found)
    for model in ("untuned", "scaled"):  # where train.py has measured them too
        metrics |= {f"{model}: {key}": value for key, value in _kept(found.get(model, {})).items()}
    for name in arm.also:
        metrics |= {f"{name}: {key}": value for key, value in _kept(load_json(folder / name / "metrics.json")).items()}
    for row in _logged(folder / "run" / "metrics.csv"):
        step = int(row["step"]) + 1
        seen = {k.removeprefix("val/"): float(v) for k, v in row.items() if k.startswith("val/") and v}
        metrics |= {f"after {step}: {key}": value for key, value in _kept(seen).items()}
    return metrics


def training(folder: Path) -> dict[str, float]:
    """What a training took: seconds, steps, tokens, and the median seconds of a step."""
    metrics = read_json(folder / "run" / "metrics.json")
    names = {"seconds": "cost/seconds", "steps": "train/steps", "tokens": "cost/tokens"}
    found = {key: metrics[name] for key, name in names.items() if name in metrics}
    rows = [float(row["cost/step_seconds"]) for row in _logged(folder / "run" / "metrics.csv")
            if row.get("cost/step_seconds")]  # fmt: skip
    return _rounded(found | ({"step_seconds": statistics.median(rows)} if rows else {}))


def _kept(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What is a number: JSON has null for one that is none, a CSV nan."""
    kept = {key: value for key, value in metrics.items() if KEPT.fullmatch(key)}
    return _rounded({key: value for key, value in kept.items() if value is not None and math.isfinite(value)})


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.{DIGITS}g}") for key, value in numbers.items()}


def _logged(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with open(file, encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def record(arm: Arm, seed: int, fingerprint: str, folder: Path, **how) -> Record:
    """The line of a finished run.

    Args:
        arm, seed: of the run.
        fingerprint: of it.
        folder: that it has left.
        how: else there is to say: commands, commit, seconds, peak_mib, is_compiled.
    """
    provenance = read_json(folder / "run" / "provenance.json")
    return {
        "arm": arm.name,
        "seed": seed,
        "fingerprint": fingerprint,
        "metrics": measured(arm, folder),
        "training": training(folder),
        **how,
        "torch": provenance.get("packages", {}).get("torch"),
        "processor": provenance.get("gpu") or cpu()[0],
        "base_model": base_model(),
        "date": date.today().isoformat(),
    }


# ----- runs.json -----


def read_runs(file: Path) -> Runs:
    """The lines of a file; none where there is no file.

    Raises:
        DataError: it is damaged.
    """
    if not file.is_file():
        return {}
    return {(one["arm"], one["seed"]): one for one in load_json(file, required={"runs": list})["runs"]}


def write_runs(file: Path, runs: Iterable[Record]):
    """Writes the lines, a run in each."""
    lines = [json.dumps(one) for one in sorted(runs, key=lambda one: (one["arm"], one["seed"]))]
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as out:
        out.write('{"runs": [\n' + ",\n".join(lines) + "\n]}\n")


def current(runs: Runs, arms: Mapping[str, Arm]) -> Runs:
    """Those whose arm, seed and fingerprint are still what is asked for."""
    fingerprints = Fingerprints(arms)
    return {
        (name, seed): one
        for (name, seed), one in runs.items()
        if name in arms and seed in arms[name].seeds and one["fingerprint"] == fingerprints.of(arms[name], seed)
    }
