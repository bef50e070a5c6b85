"""Scalings compared by needle answers: needles.csv of `python -m pose.search`, and its table in the terminal."""

import csv
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table
from tqdm import tqdm

from pose.errors import DataError
from pose.evaluation.needle_fitness import NeedleAnswer, NeedleFitness
from pose.files import atomic_file
from pose.rope import Frequencies
from pose.tasks.needle_gain import NUM_KEYS

COLUMNS = ("scaling", "text", "trial", "depth", "nll", "frequencies")
NUM_RANGES = 4  # of depths, at most, in the terminal's table


class Measured(NamedTuple):
    """A scaling on a text.

    Attributes:
        scaling: its name.
        text: its key.
        frequencies: a digest of them.
        answers: for each needle of each trial.
    """

    scaling: str
    text: str
    frequencies: str
    answers: list[NeedleAnswer]

    @property
    def nll(self) -> float:
        """Mean over the answers, nats per token."""
        return float(np.mean([answer.nll for answer in self.answers]))


def compare(scalings: Mapping[str, Frequencies], fitness: Mapping[str, NeedleFitness], file: Path) -> list[Measured]:
    """Measures each scaling on each text.

    A text's answers are in the file as soon as all are measured, and what is there is not measured again. Other
    scalings stay there, but for those of another one that now has their name.

    Args:
        scalings: frequencies by name.
        fitness: by which a text is measured, by its key.
        file: needles.csv, as an earlier process with the same texts may have left it.

    Returns:
        By scaling, and by text.

    Raises:
        DataError: a line that is none of such a file.
    """
    left = read(file)
    known = {(one.frequencies, one.text): one.answers for one in left}
    wanted = [(name, key, _digest(frequencies)) for name, frequencies in scalings.items() for key in fitness]
    missing = {
        (digest, key): name for name, key, digest in wanted if len(known.get((digest, key), ())) < _num(fitness[key])
    }
    total = sum(len(fitness[key].texts) for _, key in missing)
    with tqdm(total=total, desc="comparing scalings", unit="text", leave=False) as bar:
        for (digest, key), name in missing.items():
            bar.set_postfix_str(name)
            known[digest, key] = fitness[key].answers(scalings[name], bar.update)
            left.append(Measured(name, key, digest, known[digest, key]))
            _write(file, left)
    found = [Measured(name, key, digest, known[digest, key]) for name, key, digest in wanted]
    named = {(one.scaling, one.text) for one in found}
    _write(file, [*found, *(one for one in left if (one.scaling, one.text) not in named)])
    return found


def _num(fitness: NeedleFitness) -> int:
    return NUM_KEYS * len(fitness.texts)


def _digest(frequencies: Frequencies) -> str:
    numbers = np.append(frequencies.inv_freq.double().cpu().numpy(), frequencies.attention_factor)
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def _write(file: Path, measured: Iterable[Measured]):
    with atomic_file(file, newline="") as new:
        writer = csv.writer(new)
        writer.writerow(COLUMNS)
        for one in measured:
            writer.writerows(
                (one.scaling, one.text, answer.trial, repr(answer.depth), repr(answer.nll), one.frequencies)
                for answer in one.answers
            )


def read(file: Path) -> list[Measured]:
    """What needles.csv has; nothing where there is none.

    Raises:
        DataError: a line that is none of such a file.
    """
    found: dict[tuple[str, str, str], list[NeedleAnswer]] = {}
    if not file.exists():
        return []
    with file.open(newline="", errors="replace") as text:
        lines = csv.DictReader(text)
        if tuple(lines.fieldnames or ()) not in (COLUMNS, ()):
            raise DataError(
                f"{file} is no table of a comparison, which begins with {','.join(COLUMNS)}. Give another hydra.run.dir"
            )
        for row in lines:
            try:
                answer = NeedleAnswer(int(row["trial"]), float(row["depth"]), float(row["nll"]))
                found.setdefault((row["scaling"], row["text"], row["frequencies"]), []).append(answer)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{file} has a line that is none of a comparison: {row}. Give another hydra.run.dir"
                ) from error
    return [Measured(*key, answers) for key, answers in found.items()]


def table(measured: Iterable[Measured], titles: Mapping[str, str]) -> Table:
    """One row a scaling: the mean on each text, and over all texts by ranges of depths.

    Args:
        measured: as `compare` returns it.
        titles: of the texts' columns, by their keys.
    """
    by_scaling: dict[str, dict[str, Measured]] = {}
    for one in measured:
        by_scaling.setdefault(one.scaling, {})[one.text] = one
    depths = sorted({answer.depth for one in measured for answer in one.answers})
    ranges = [group for group in np.array_split(depths, NUM_RANGES) if len(group)]
    made = Table(title="NLL of needle answers at the target, nats per token (lower is better)")
    for column in ("", *titles.values(), *(f"depth {_span(group)}" for group in ranges)):
        made.add_column(column, justify="left" if not column else "right")
    for name, texts in by_scaling.items():
        answers = [answer for one in texts.values() for answer in one.answers]
        means = [np.mean([answer.nll for answer in answers if answer.depth in group]) for group in ranges]
        made.add_row(name, *(f"{texts[key].nll:.4f}" for key in titles), *(f"{mean:.2f}" for mean in means))
    return made


def _span(depths: np.ndarray) -> str:
    return "–".join(f"{depth:.3g}" for depth in dict.fromkeys((depths[0], depths[-1])))
