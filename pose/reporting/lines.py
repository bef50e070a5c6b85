"""What a page compares: runs and evaluations as their folders have them, and a line for each of their models."""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pose.errors import one_line
from pose.evaluation.task import Estimate
from pose.files import short_name
from pose.reporting.plots import COLORS as PLOT_COLORS
from pose.reporting.plots import MARKERS

# Those of the plots, but for black, which a dark page swallows
COLORS = (*PLOT_COLORS[:-1], "#767676")
DASHES = ((1, 0), (5, 3))  # whole, dashed
SHAPES = {  # of MARKERS: as Vega calls them, and as a character of the legend
    "o": ("circle", "●"),
    "s": ("square", "■"),
    "^": ("triangle-up", "▲"),
    "D": ("diamond", "◆"),
    "v": ("triangle-down", "▼"),
    "p": ("cross", "✚"),
    "*": ("triangle-right", "▶"),
}
MAX_SHOWN = len(COLORS) * len(DASHES)  # lines that differ in colour or dash; others are shown when asked for
INTERVAL = "95 % interval"
STATE, DOCUMENTS = "State", "Measured on"  # labels of facts; the state of what is finished is ""
EARLIER = "Earlier starts"  # of a training, with other settings than the last one
LONGEST = "longest length"  # at which perplexity was measured
TOKENS = (  # say which tokens are scored
    "eval.windows", "eval.max_documents", "eval.draw_documents", "eval.tail", "eval.min_tokens", "eval.text_field",
    "eval.add_bos",
)  # fmt: skip
PROMPTS = ("eval.seed", "eval.trials", "eval.depths", "eval.haystack", "eval.add_bos")  # say which prompts are drawn
STRIDES = ("eval.stride", "eval.sliding_tokens")  # and which tokens sliding windows score
PROMPTED = ("passkey", "needle", "needle_gain", "ruler")  # families of metrics that are of drawn prompts
BENCHMARKS = ("eval.num_fewshot", "eval.limit")  # say which questions are asked, and after how many examples
# Settings that seeds may differ in. A run that was resumed learns what one learns that was not, but for EARLIER.
WITHOUT_EFFECT = ("seed", "resume", "trust_pickle", "num_threads", "cache_dir", "reuse", "data.num_workers", "logger")


T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A run of train.py or evaluate.py, as its folder has it. What is not known is empty.

    Attributes:
        name: short, and of no other source of the page.
        folder: where it was found.
        kind: training or evaluation.
        facts: what was run, label: text.
        config: settings by dotted key; a value is text.
        models: estimates by model; of a training untuned, scaled, extended.
        identities: of the models of an evaluation: what tells the weights of one from those of any other.
        tokenizers: of its models, digests; those of older trainings are not known.
        window: of the model before it was extended, in tokens.
        target: that was trained for, in tokens.
        logged: rows of metrics.csv.
        coverage: distance, probability, and share of pairs of the sampler, an array each.
        cost: numbers by what was done (training, or measuring a model): see COSTS.
    """

    name: str
    folder: str
    kind: str
    facts: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    _: KW_ONLY
    identities: Mapping[str, str] = field(default_factory=dict)
    tokenizers: frozenset[str] = frozenset()
    window: int | None = None
    target: int | None = None
    logged: Sequence[Mapping[str, str]] = ()
    coverage: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def unfinished(metrics: Mapping[str, Any], max_steps: int | None) -> str:
    """Why a training is not at its end; "" where it is.

    Args:
        metrics: its metrics.json; empty without one.
        max_steps: that its config asks for, which are more than it has where it was begun again to go on.
    """
    if not metrics:
        return "not finished: it has no metrics.json"
    done = metrics.get("train/steps")
    if max_steps is None or not isinstance(done, int | float) or done >= max_steps:
        return ""
    return f"not finished: what was measured is of {done:,.0f} of {max_steps:,} steps"


@dataclass(frozen=True)
class Style:
    """How a line is drawn: colour, dash, shape of its points, and that shape as a character of the legend."""

    color: str
    dash: tuple[int, ...]
    shape: str
    character: str


@dataclass(frozen=True)
class Line:
    """What has a row in the table and a line in each chart: a model, or the mean of one over seeds.

    Attributes:
        name: in table, legend and charts, of no other line.
        estimates: metrics by name.
        spread: what the bounds of the estimates are.
        about: further words that the filter finds it by.
        is_shown: in the charts, until the reader chooses otherwise.
        style: the same in all charts.
    """

    name: str
    estimates: Mapping[str, Estimate]
    spread: str = INTERVAL
    about: str = ""
    is_shown: bool = True
    style: Style = Style(COLORS[0], DASHES[0], *SHAPES["o"])


def lines_of(sources: Sequence[Source]) -> tuple[list[Line], dict[str, str]]:
    """The lines of the page; and by source the name of the line that stands for its training.

    A training alone has a line for each of its models. Of several, the extended models are compared, seeds of one
    recipe by their mean; untuned and scaled models are shown where they are the same for all. What
    else there is, is shown when it is asked for. A model that several evaluations measured is one line.
    """
    names: set[str] = set()
    name_of: dict[str, str] = {}

    def line(name: str, *arguments: Any, **options: Any) -> Line:
        name = one_line(name)
        free = next(each for i in range(len(names) + 1) if (each := f"{name} ({i + 1})" if i else name) not in names)
        names.add(free)
        return Line(free, *arguments, **options)

    differing = _differing(sources)

    def about(of: Sequence[Source]) -> str:
        """Not the command, which is the same for all jobs of a sweep and names the settings of each."""
        facts = [one_line(fact) for one in of for label, fact in one.facts.items() if label != "Command"]
        keys = dict.fromkeys(["seed", *differing])
        settings = [one_line(f"{key}={one.config[key]}") for one in of for key in keys if key in one.config]
        return " ".join(dict.fromkeys([*facts, *settings]))

    if len(sources) == 1:
        (source,) = sources
        models = source.models or {source.name: {}}
        only = [line(model, estimates, about=about(sources)) for model, estimates in models.items()]
        return _styled(only), {source.name: only[-1].name}
    first: list[Line] = []
    others: list[Line] = []
    references: list[Line] = []
    stages: list[Line] = []  # untuned and scaled models, where they are not the same for all
    trained = [source for source in sources if source.kind == "training"]
    for model in ("untuned", "scaled"):
        having = [source for source in trained if model in source.models]
        found = [source.models[model] for source in having]
        if len(having) > 1 and all(_are_equal(each, found[0]) for each in found):
            of = dict.fromkeys(
                one_line(one.facts.get("Model", "")) for one in having
            )  # not methods, which it has none of
            references.append(line(model, found[0], about=" ".join(of)))
        else:
            stages += [line(f"{each.name}: {model}", each.models[model], is_shown=False) for each in having]
    evaluated: dict[tuple[str, str], list[tuple[dict[str, str], dict[str, Estimate]]]] = {}

    for group in _over_seeds(sources):
        whole = [source for source in group if not source.facts.get(STATE)]
        extended = [source.models["extended"] for source in whole if "extended" in source.models]
        if len(group) > 1:
            several = f"{len(extended)} of " * (len(extended) < len(group)) + _how_many(group)
            name = f"{_group_name(group, sources)} ({several})"
            mean = line(name, _mean(extended), f"lowest to highest of {several}", about(group))
            first.append(mean)
            name_of |= {source.name: mean.name for source in group}
        for source in group:
            if source.kind == "evaluation":
                for model, estimates in source.models.items():
                    before = evaluated.setdefault((model, source.identities.get(model, source.name)), [])
                    conditions = _conditions(source, estimates)
                    for known, same in before:
                        if _agree(known, conditions) and _agree(same, estimates):
                            known.update(conditions)
                            same.update(estimates)  # another evaluation of it measured something else
                            break
                    else:
                        before.append((conditions, dict(estimates)))
                        name = f"{source.name}: {model}" if one_line(model) in names else model
                        first.append(line(name, before[-1][1], about=about([source])))
                continue
            estimates = source.models.get("extended", {})
            is_shown = len(group) == 1 and bool(estimates or source.logged)
            own = line(source.name, estimates, about=about([source]), is_shown=is_shown)
            (first if len(group) == 1 else others).append(own)
            name_of.setdefault(source.name, own.name)
    return _styled([*references, *first, *others, *stages]), name_of


def _how_many(group: Sequence[Source]) -> str:
    """Of one recipe; a seed that was run twice is no two seeds."""
    num = len({one.config.get("seed") for one in group})
    return f"{len(group)} seeds" if num == len(group) else f"{len(group)} runs" + f" of {num} seeds" * (num > 1)


def _group_name(group: Sequence[Source], sources: Sequence[Source]) -> str:
    """What the runs of one recipe are called together: by what they share, their sweep's folder, or each by its own."""
    names = list(dict.fromkeys(re.sub(r"(?<!\S)seed=\S+\s*", "", one.name).strip() for one in group))
    if len(group) == len(sources) and names == [""]:
        return "all"
    if len(names) == 1 and names[0]:
        return names[0]
    folders = [Path(one.folder).resolve().parent for one in sources]
    of_group = {Path(one.folder).resolve().parent for one in group}
    if len(of_group) == 1 and sum(folder in of_group for folder in folders) == len(group) < len(sources):
        return short_name(of_group.pop())
    names = [one.name for one in group]
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _differing(sources: Sequence[Source]) -> list[str]:
    """The settings that are not the same in all, where they are there."""
    keys = dict.fromkeys(key for source in sources for key in source.config)
    return [key for key in keys if len({one.config[key] for one in sources if key in one.config}) > 1]


def _are_equal(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """A number that is none (nan) counts as equal to another one."""
    return some.keys() == others.keys() and _agree(some, others)


def _agree(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two have nothing that they tell differently."""
    return all(repr(some[key]) == repr(others[key]) for key in some.keys() & others.keys())


def _conditions(source: Source, estimates: Mapping[str, Estimate]) -> dict[str, str]:
    """Settings of an evaluation that a number depends on beside the model: of two that differ none are one line."""
    of_text = any(name.partition("@")[0] in ("ppl", "tail_ppl") for name in estimates)
    of_prompts = any(name.startswith(PROMPTED) for name in estimates)
    of_strides = any(name.startswith("sliding_ppl") for name in estimates)
    of_benchmarks = any(name.startswith("harness/") for name in estimates)
    keys = ("dtype", *TOKENS * of_text, *PROMPTS * of_prompts, *STRIDES * of_strides, *BENCHMARKS * of_benchmarks)
    found = {key: source.config[key] for key in keys if key in source.config}
    if of_text:
        found |= {LONGEST: str(longest_of_text(estimates))}
    return found | ({DOCUMENTS: source.facts[DOCUMENTS]} if of_text and DOCUMENTS in source.facts else {})


def longest_of_text(names: Iterable[str]) -> int:
    """The longest length of perplexities, on which the scored tokens depend; 0 where there are none.

    Args:
        names: of metrics.
    """
    parts = [name.partition("@") for name in names]
    return max((int(n) for family, _, n in parts if family in ("ppl", "tail_ppl") and n.isdecimal()), default=0)


def _over_seeds(sources: Sequence[Source]) -> list[list[Source]]:
    """Trainings that are seeds of one recipe together, each evaluation alone."""

    def recipe_of(source: Source):
        if source.kind != "training" or not source.config:
            return source.name
        settings = (item for item in source.config.items() if not is_without_effect(item[0]))
        return source.facts.get(EARLIER, ""), *settings

    def all_of(source: Source):
        settings = (item for item in source.config.items() if item[0] != "seed")
        return source.facts.get("Commit", ""), str(Path(source.folder).resolve().parent), *settings

    return over_seeds(sources, recipe_of, all_of, lambda source: source.config.get("seed"))


def over_seeds(
    runs: Iterable[T],
    recipe_of: Callable[[T], Hashable],
    all_of: Callable[[T], Hashable],
    seed_of: Callable[[T], Hashable],
) -> list[list[T]]:
    """Runs of one recipe together.

    Where two of them have one seed, as a run and its copy that was resumed elsewhere have, those alone that differ in
    nothing but their seed.

    Args:
        runs: in an order that their groups keep.
        recipe_of: all that seeds may not differ in.
        all_of: all settings but the seed.
        seed_of: the seed.
    """
    groups = []
    for group in _grouped(runs, recipe_of):
        are_different = len({seed_of(run) for run in group}) == len(group)
        groups += [group] if are_different else _grouped(group, all_of)
    return groups


def _grouped(runs: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def is_without_effect(key: str) -> bool:
    """Whether two trainings that differ in a setting are of one recipe."""
    return any(key == one or key.startswith(f"{one}.") for one in WITHOUT_EFFECT)


def recipe(overrides: Iterable[str]) -> list[str]:
    """Overrides of a job but for those that seeds may differ in, in their order."""
    return [each for each in overrides if not is_without_effect(each.lstrip("+~").partition("=")[0])]


def _mean(runs: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Of what all of them have, with the lowest and the highest."""
    found = {}
    for name in runs[0] if runs else ():
        values = [run[name].value for run in runs if name in run]
        if len(values) == len(runs) and any(map(math.isnan, values)):
            found[name] = Estimate(math.nan, num=runs[0][name].num)  # nor are there a lowest and a highest
        elif len(values) == len(runs):
            found[name] = Estimate(sum(values) / len(values), min(values), max(values), runs[0][name].num)
    return found


def _styled(lines: Sequence[Line]) -> list[Line]:
    """Lines that are shown first, in styles that differ in colour, then in dash too; and no more shown than styles."""
    styled = []
    for i, line in enumerate(sorted(lines, key=lambda line: not line.is_shown)):
        shape = SHAPES[MARKERS[i % len(MARKERS)]]
        style = Style(COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)], *shape)
        styled.append(replace(line, style=style, is_shown=line.is_shown and i < MAX_SHOWN))
    return styled
