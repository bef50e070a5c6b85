"""One HTML page of runs and evaluations that needs no network: tables to sort and filter, charts by Vega-Lite.

`page` is a function of its data alone. The charts are Vega-Lite specifications; the template, its style sheet and the
script that draws, sorts and filters are in assets/, where Vega is too.
"""

import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pose.errors import one_line
from pose.evaluation.task import FAMILIES, Estimate, describe, shown
from pose.reporting import plots
from pose.reporting.tables import main_families, series

ASSETS = Path(__file__).parent / "assets"
LIBRARIES = ("vega-6.4.0", "vega-lite-6.5.0", "vega-embed-7.3.0")
# plots.COLORS, but for black, which a dark page swallows
COLORS = (*plots.COLORS[:-1], "#767676")
DASHES = ([], [5, 3])
SHAPES = {  # of plots.MARKERS: as Vega calls them, and as a character of the legend
    "o": ("circle", "●"),
    "s": ("square", "■"),
    "^": ("triangle-up", "▲"),
    "D": ("diamond", "◆"),
    "v": ("triangle-down", "▼"),
    "p": ("cross", "✚"),
    "*": ("triangle-right", "▶"),
}
NOTES = {  # below headings
    "position": "Perplexity of the tokens at each part of the longest window: a break cannot hide in an average.",
    "needle_gain": "What the needle's value saves of the answer: 0 where nothing comes from the needle.",
}
MAX_SHOWN = len(COLORS) * len(DASHES)  # lines that differ in colour or dash; others are shown when asked for
MAX_POINTS = 400  # of a line
DOCUMENTS = "Measured on"  # the label of a fact
INTERVAL = "95 % interval"


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
    identities: Mapping[str, str] = field(default_factory=dict)
    window: int | None = None
    target: int | None = None
    logged: Sequence[Mapping[str, str]] = ()
    coverage: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


COSTS = {  # columns: label, and how a number is shown
    "seconds": ("Seconds", ",.1f"),
    "steps": ("Optimizer steps", ",.0f"),
    "tokens": ("Tokens", ",.0f"),
    "tokens_per_second": ("Tokens/s", ",.0f"),
    "step_seconds": ("Seconds/step", ".3g"),
    "peak_memory_gib": ("Peak memory (GiB)", ".2f"),
    "mfu": ("MFU", ".1%"),
}


@dataclass(frozen=True)
class Line:
    """What has a row in the table and a line in each chart: a model, or the mean of one over seeds.

    Attributes:
        name: in table, legend and charts, of no other line.
        estimates: metrics by name.
        spread: what the bounds of the estimates are.
        about: further words that the filter finds it by.
        is_shown: in the charts, until the reader chooses otherwise.
    """

    name: str
    estimates: Mapping[str, Estimate]
    spread: str = INTERVAL
    about: str = ""
    is_shown: bool = True


@dataclass(frozen=True)
class Panel:
    """A chart with what is said about it.

    Attributes:
        title, note: above it.
        spec: of Vega-Lite.
        line: that it is of alone, and is hidden with; None for a chart of all lines.
    """

    title: str
    note: str
    spec: dict[str, Any]
    line: str | None = None


def page(sources: Sequence[Source], title: str, generated: str = "") -> str:
    """The HTML text.

    Args:
        sources: at least one; their order is that of tables and legends.
        title: of the page.
        generated: a line for its foot.
    """
    lines, label_of = _lines(sources)
    sections = [
        ("length", "By length", _by_length(lines, sources)),
        ("position", "By position", _by_position(lines, sources)),
        ("needle", "Needle", _heatmaps(lines, "needle", "depth of the needle")),
        ("needle_gain", "Needle gain", _heatmaps(lines, "needle_gain", "depth of the needle")),
        ("ruler", "RULER", _heatmaps(lines, "ruler", "task")),
        ("training", "Training", _training(sources, lines, label_of)),
        ("coverage", "Coverage of distances", _coverage(sources, lines, label_of)),
    ]
    specs: list[dict[str, Any]] = []
    drawn = []
    for name, heading, panels in sections:
        if panels:
            drawn.append((name, heading, [(len(specs) + i, panel) for i, panel in enumerate(panels)]))
            specs += [panel.spec for panel in panels]
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html")
    return template.render(
        title=one_line(title),
        generated=generated,
        facts=_facts(sources),
        lines=[(line, *style) for line, style in zip(lines, map(_style, range(len(lines))), strict=True)],
        table=_table(lines),
        interval=INTERVAL,
        has_intervals=any(each.low is not None for line in lines for each in line.estimates.values()),
        has_seeds=any(line.spread != INTERVAL for line in lines),
        sections=drawn,
        notes=NOTES | _remark(sources),
        cost=_cost(sources),
        differences=[found for kind in ("training", "evaluation") if (found := _differences(sources, kind))],
        sources=sources,
        specs=_json(specs),
        hidden=_json([line.name for line in lines if not line.is_shown]),
        libraries=_libraries(),
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        script=(ASSETS / "page.js").read_text(encoding="utf-8"),
    )


# What is compared


def _lines(sources: Sequence[Source]) -> tuple[list[Line], dict[str, str]]:
    """The lines of the page; and by source the name of the line that stands for its training.

    A training alone has a line for each of its models. Of several, the extended models are compared, those that differ
    in nothing but their seed by their mean too; the other models are there when they are asked for, but for the
    untuned one, where it is the same for all.
    """
    names: set[str] = set()
    label_of: dict[str, str] = {}

    def line(name: str, *arguments: Any, **options: Any) -> Line:
        name = one_line(name)
        free = next(each for i in range(len(names) + 1) if (each := f"{name} ({i + 1})" if i else name) not in names)
        names.add(free)
        return Line(free, *arguments, **options)

    if len(sources) == 1:
        (source,) = sources
        models = source.models or {source.name: {}}
        found = [line(model, estimates) for model, estimates in models.items()]
        label_of[source.name] = found[-1].name
        return _not_too_many(found), label_of
    first, others, references = [], [], []
    evaluated: dict[tuple[str, str | None], dict[str, Estimate]] = {}
    for group in _over_seeds(sources):
        extended = [source.models["extended"] for source in group if "extended" in source.models]
        about = " ".join({one_line(fact) for source in group for fact in source.facts.values()})
        if len(group) > 1:
            name = re.sub(r"\bseed=\S+\s*", "", group[0].name).strip() or "all"
            mean = line(f"{name} ({len(group)} seeds)", _mean(extended), f"lowest to highest of {len(group)} seeds", about)
            first.append(mean)
            label_of |= {source.name: mean.name for source in group}
        for source in group:
            about = " ".join(map(one_line, source.facts.values()))
            if source.kind == "evaluation":
                for model, estimates in source.models.items():
                    if same := evaluated.get((model, source.identities.get(model))):  # measured by something else too
                        same.update({name: value for name, value in estimates.items() if name not in same})
                        continue
                    merged = evaluated[model, source.identities.get(model)] = dict(estimates)
                    name = f"{source.name}: {model}" if one_line(model) in names else model
                    first.append(line(name, merged, about=about))
                continue
            own = line(source.name, source.models.get("extended", {}), about=about, is_shown=len(group) == 1)
            (first if len(group) == 1 else others).append(own)
            label_of.setdefault(source.name, own.name)
    trained = [source for source in sources if source.kind == "training"]
    for model in ("untuned", "scaled"):
        found = {source.name: source.models[model] for source in trained if model in source.models}
        if len(found) > 1 and all(estimates == next(iter(found.values())) for estimates in found.values()):
            references.append(line(model, next(iter(found.values()))))
        else:
            others += [line(f"{name}: {model}", each, is_shown=False) for name, each in found.items()]
    return _not_too_many([*references, *first, *others]), label_of


def _over_seeds(sources: Sequence[Source]) -> list[list[Source]]:
    """Trainings that differ in nothing but their seed together, each evaluation alone."""
    groups: dict[Any, list[Source]] = {}
    for source in sources:
        settings = tuple((key, value) for key, value in source.config.items() if key != "seed")
        is_one = source.kind == "training" and settings
        groups.setdefault(settings if is_one else source.name, []).append(source)
    return list(groups.values())


def _mean(runs: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """Of what all of them have, with the lowest and the highest."""
    found = {}
    for name in runs[0] if runs else ():
        values = [run[name].value for run in runs if name in run]
        if len(values) == len(runs):
            found[name] = Estimate(sum(values) / len(values), min(values), max(values), runs[0][name].num)
    return found


def _not_too_many(lines: list[Line]) -> list[Line]:
    """Lines that are shown first: theirs are the colours that differ."""
    lines = sorted(lines, key=lambda line: not line.is_shown)
    return [
        line if i < MAX_SHOWN or not line.is_shown else Line(line.name, line.estimates, line.spread, line.about, False)
        for i, line in enumerate(lines)
    ]


def _style(i: int) -> tuple[str, list[int], str, str]:
    """Colour, dash, shape and character of a line."""
    shape, character = SHAPES[plots.MARKERS[i % len(plots.MARKERS)]]
    return COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)], shape, character


# Tables


def _facts(sources: Sequence[Source]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Label, and each text with the sources it holds for; "" stands for all of them."""
    facts = []
    for label in dict.fromkeys(chain.from_iterable(source.facts for source in sources)):
        by_text: dict[str, list[str]] = {}
        for source in sources:
            if text := one_line(source.facts.get(label, "")):
                by_text.setdefault(text, []).append(source.name)
        if len(by_text) == 1 and len(next(iter(by_text.values()))) == len(sources):
            facts.append((label, [("", next(iter(by_text)))]))
        elif by_text:
            facts.append((label, [(_some(names), text) for text, names in by_text.items()]))
    return facts


def _remark(sources: Sequence[Source]) -> dict[str, str]:
    """A note on perplexities that cannot be compared."""
    measured = [source for source in sources if any("ppl@" in name for each in source.models.values() for name in each)]
    if len({source.facts.get(DOCUMENTS) for source in measured}) < 2:
        return {}
    return {"length": "Perplexity was measured on different documents (What was run): compare it within one of them."}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _table(lines: Sequence[Line]) -> dict[str, Any]:
    """Columns by family, and a row for each line."""
    results = {line.name: line.estimates for line in lines}
    names = list(dict.fromkeys(chain.from_iterable(results.values())))
    tasks = dict.fromkeys(name.split("@")[0] for name in names if name.startswith(("ruler/", "harness/")))
    families = [family for family in FAMILIES if family != "position_ppl"] + list(tasks)
    main = main_families(results)
    columns = []
    for family in families:
        found = {line.name: series(line.estimates, family) for line in lines}
        if lengths := sorted({n for row in found.values() for n in row}):
            metric = describe(family)
            columns.append(
                {
                    "family": family,
                    "title": _heading("ruler" if family == "ruler" else family),
                    "better": _better(metric.higher_is_better),
                    "best_first": "descending" if metric.higher_is_better is not False else "ascending",
                    "is_main": family in main,
                    "lengths": lengths,
                    "cells": {
                        name: [_cell(family, row.get(n)) for n in lengths] for name, row in found.items()
                    },
                }
            )
    if not any(column["is_main"] for column in columns):
        columns = [column | {"is_main": True} for column in columns]
    return {"columns": columns}


def _cell(family: str, value: float | Estimate | None) -> tuple[float | None, str, str]:
    """The number to sort by, the text, and the bounds."""
    if value is None:
        return None, "", ""
    estimate = value if isinstance(value, Estimate) else Estimate(value, num=0)
    return _finite(estimate.value), shown(family, estimate.value), _bounds(family, estimate)


def _bounds(family: str, estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{shown(family, estimate.low)} to {shown(family, estimate.high)}"


def _cost(sources: Sequence[Source]) -> dict[str, Any]:
    """A row for each thing that was done; columns of which nothing is known are left out."""
    rows = []
    for source in sources:
        for what, numbers in source.cost.items():
            name = f"{source.name}: {what}" if len(sources) > 1 else what
            rows.append((one_line(name), {key: value for key, value in numbers.items() if math.isfinite(value)}))
    columns = [key for key in COSTS if any(key in numbers for _, numbers in rows)]
    return {
        "columns": [COSTS[key][0] for key in columns],
        "rows": [
            (name, [(numbers.get(key), f"{numbers[key]:{COSTS[key][1]}}" if key in numbers else "") for key in columns])
            for name, numbers in rows
            if numbers
        ],
    }


def _differences(sources: Sequence[Source], kind: str) -> dict[str, Any]:
    """Settings that are not the same in all of a kind: the longer of keys and sources goes down."""
    having = [source for source in sources if source.config and source.kind == kind]
    keys = list(dict.fromkeys(chain.from_iterable(source.config for source in having)))
    differing = [key for key in keys if len({source.config.get(key) for source in having}) > 1]
    if not differing:
        return {}
    cells = {(source.name, key): source.config.get(key, "") for source in having for key in differing}
    names = [source.name for source in having]
    if len(names) > len(differing):
        return {"head": differing, "rows": [(name, [cells[name, key] for key in differing]) for name in names]}
    return {"head": names, "rows": [(key, [cells[name, key] for name in names]) for key in differing]}


# Charts


def _by_length(lines: Sequence[Line], sources: Sequence[Source]) -> list[Panel]:
    return [_estimates(lines, panel, sources) for panel in plots.PANELS if panel != "position" and _any(lines, panel)]


def _by_position(lines: Sequence[Line], sources: Sequence[Source]) -> list[Panel]:
    return [_estimates(lines, "position", sources)] if _any(lines, "position") else []


def _any(lines: Sequence[Line], panel: str) -> bool:
    return any(plots.points_of(line.estimates, panel) for line in lines)


def _estimates(lines: Sequence[Line], panel: str, sources: Sequence[Source]) -> Panel:
    """A panel of plots.PANELS: a line for each model, its bounds as a band, window and target as upright lines."""
    family = "position_ppl" if panel == "position" else panel
    rows = []
    for line in lines:
        for at, value in plots.points_of(line.estimates, panel).items():
            estimate = value if isinstance(value, Estimate) else Estimate(value, num=0)
            row = {"line": line.name, "x": at, "y": _finite(estimate.value), "value": shown(family, estimate.value)}
            if bounds := _bounds(family, estimate):
                row |= {"low": _finite(estimate.low), "high": _finite(estimate.high), "bounds": bounds}
                row["spread"] = line.spread
            if estimate.num:
                row["num"] = estimate.num
            rows.append(row)
    metric = describe(family)
    by_position = panel == "position"
    x = {
        "field": "x",
        "type": "quantitative",
        "title": plots.PANELS[panel],
        "scale": {"nice": False} | ({"zero": True} if by_position else {"type": "log", "base": 2}),
        "axis": {"format": ",d", "grid": False, "labelOverlap": "greedy", "labelFlush": True}
        | ({} if by_position else {"values": sorted({row["x"] for row in rows})}),
    }
    y = _value_axis([row[key] for row in rows for key in ("y", "low", "high") if key in row], panel)
    tooltip = [
        {"field": "line", "title": "model"},
        {"field": "x", "title": plots.PANELS[panel], "type": "quantitative", "format": ",d"},
        {"field": "value", "title": metric.title},
    ]
    if any("bounds" in row for row in rows):
        tooltip += [{"field": "bounds", "title": "from, to"}, {"field": "spread", "title": "which is the"}]
    if any("num" in row for row in rows):
        tooltip += [{"field": "num", "title": "documents or prompts"}]
    base = {"x": x, "y": y, "color": _color(lines)}
    has_band = any(len([row for row in rows if row["line"] == line.name]) > 1 for line in lines)
    bounds = {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": _color(lines)}
    band = {"type": "area", "opacity": 0.13} if has_band else {"type": "rule", "opacity": 0.7}
    valid = [{"filter": "isValid(datum.low) && isValid(datum.high)"}]
    layers = [
        *([{"mark": band, "encoding": bounds, "transform": valid}] if any("low" in row for row in rows) else []),
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": base | {"strokeDash": _dash(lines)} | _opacity()},
        {
            "mark": {"type": "point", "filled": True, "size": 55},
            "encoding": base | {"shape": _shape(lines), "tooltip": tooltip} | _opacity(),
        },
    ]
    marks = _marks(sources, [row["x"] for row in rows])
    note = _better(metric.higher_is_better)
    if any("bounds" in row for row in rows):
        spreads = list(dict.fromkeys(row["spread"] for row in rows if "spread" in row))
        note += f"; {'band' if has_band else 'bar'}: {' or '.join(spreads if len(spreads) < 4 else spreads[:1])}"
    return Panel(_capital(plots.title_of(panel)), note, _chart(rows, [*marks, *layers]))


def _heatmaps(lines: Sequence[Line], family: str, ylabel: str) -> list[Panel]:
    """Cells by length and by depth or task, a panel for each line that has any; all of one colour scale."""
    found = {line.name: cells for line in lines if (cells := plots.cells_of(line.estimates, family))}
    if not found:
        return []
    metric = describe(family)
    values = [plots.value_of(value) for cells in found.values() for value in cells.values()]
    top = 1.0 if metric.is_share else max((value for value in values if 1e-3 < value < math.inf), default=1e-3)
    down = list(dict.fromkeys(_row_label(row) for cells in found.values() for row, _ in cells))
    panels = []
    spread = {line.name: line.spread for line in lines}
    for name, cells in found.items():
        rows = []
        for (row, length), value in cells.items():
            estimate = value if isinstance(value, Estimate) else Estimate(value, num=0)
            rows.append(
                {
                    "x": length,
                    "row": _row_label(row),
                    "y": _finite(estimate.value),
                    "value": shown(family, estimate.value),
                    "bounds": _bounds(family, estimate) or "not known",
                    "num": estimate.num or "not known",
                    # cividis is dark up to its middle
                    "ink": "#ffffff" if not estimate.value > 0.5 * top else "#000000",
                }
            )
        x = {
            "field": "x",
            "type": "ordinal",
            "title": "prompt (tokens)",
            "axis": {"labelAngle": 0, "format": ",d", "labelOverlap": "greedy"},
        }
        y = {"field": "row", "type": "ordinal", "sort": down, "title": ylabel, "axis": {"labelLimit": 160}}
        color = {
            "field": "y",
            "type": "quantitative",
            "title": None,
            "scale": {"scheme": plots.HEATMAP, "domain": [0, top], "clamp": True},
            "legend": {"format": "%" if metric.is_share else ",.3~r", "gradientLength": 120, "gradientThickness": 10},
        }
        tooltip = [
            {"field": "x", "title": "prompt (tokens)", "format": ",d"},
            {"field": "row", "title": ylabel},
            {"field": "value", "title": metric.title},
            {"field": "bounds", "title": spread[name]},
            {"field": "num", "title": "prompts"},
        ]
        layers = [
            {"mark": {"type": "rect"}, "encoding": {"color": color, "tooltip": tooltip}},
            {
                "mark": {"type": "text", "fontSize": 11, "color": {"expr": "datum.ink"}},
                "encoding": {"text": {"field": "value"}, "tooltip": tooltip},
            },
        ]
        spec = _chart(rows, layers, height={"step": 24}, is_of_lines=False) | {"encoding": {"x": x, "y": y}}
        panels.append(Panel(name, f"{metric.title}; {_better(metric.higher_is_better)}", spec, line=name))
    return panels


def _training(sources: Sequence[Source], lines: Sequence[Line], label_of: Mapping[str, str]) -> list[Panel]:
    """Curves over the optimizer steps: a line for each run, in the colour of its model."""
    raw: dict[str, list[dict]] = {}
    smooth: dict[str, list[dict]] = {}
    watched: dict[str, list[dict]] = {}
    trained = [source for source in sources if source.logged]
    for source in trained:
        who = {"line": label_of[source.name], "run": source.name}
        train, found = plots.training_curves(source.logged)
        for name, points in train.items():
            rows = [who | {"x": step, "y": _finite(value), "value": f"{value:.4g}"} for step, value in _thinned(points)]
            raw.setdefault(name, []).extend(rows)
            steps, values = np.array([point for point in points if math.isfinite(point[1])]).reshape(-1, 2).T
            if name in plots.NOISY and len(steps) >= 5:
                at, means = plots.smoothed(steps, values)
                smooth.setdefault(name, []).extend(
                    who | {"x": round(float(step), 2), "y": float(f"{mean:.5g}")}
                    for step, mean in zip(at, means, strict=True)
                )
        for family, by_length in found.items():
            lengths = list(by_length) if len(trained) == 1 else [max(by_length, key=lambda n: n or 0)]
            watched.setdefault(family, []).extend(
                who
                | {"x": step, "y": _finite(value), "value": shown(family, value)}
                | {"length": "" if n is None else f"{n:,} tokens"}
                for n in lengths
                for step, value in _thinned(by_length[n])
            )
    losses = [name for name in raw if name.startswith("train/loss")]
    panels = [_curve(plots.TRAINING[name], raw[name], smooth.get(name), lines, name) for name in losses]
    panels += [_watched(family, rows, lines, len(trained) == 1) for family, rows in watched.items()]
    others = [name for name in raw if name not in losses]
    return panels + [_curve(plots.TRAINING[name], raw[name], smooth.get(name), lines, name) for name in others]


def _curve(title: str, raw: list[dict], smooth: list[dict] | None, lines: Sequence[Line], name: str) -> Panel:
    """What was logged, faintly where it is smoothed."""
    x = {"field": "x", "type": "quantitative", "title": "optimizer step", "scale": {"nice": False}}
    x["axis"] = {"format": ",d", "tickMinStep": 1, "grid": False, "labelFlush": True}
    y = _value_axis([row["y"] for row in raw], name)
    base = {"x": x, "y": y, "color": _color(lines), "detail": {"field": "run"}}
    tooltip = [
        {"field": "run", "title": "run"},
        {"field": "x", "title": "optimizer step", "type": "quantitative", "format": ",d"},
        {"field": "value", "title": title},
    ]
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "line", "strokeWidth": 1 if smooth else 2, "opacity": 0.3 if smooth else 1}, "encoding": base},
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 0.001},  # under the pointer alone
            "encoding": base | {"tooltip": tooltip},
        },
    ]
    if smooth:
        over = {"data": {"values": smooth}, "mark": {"type": "line", "strokeWidth": 2}}
        layers.insert(1, over | {"encoding": base | {"strokeDash": _dash(lines)}, "transform": [NOT_HIDDEN]})
    note = "faint: as logged; strong: smoothed" if smooth else "as logged"
    return Panel(_capital(title), note, _chart(raw, layers))


def _watched(family: str, rows: list[dict], lines: Sequence[Line], is_alone: bool) -> Panel:
    """What was measured while the model trained: of one run at every length, of several at the longest."""
    metric = describe(family)
    x = {"field": "x", "type": "quantitative", "title": "optimizer step", "scale": {"nice": False}}
    x["axis"] = {"format": ",d", "tickMinStep": 1, "grid": False, "labelFlush": True}
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    color = _color(lines)
    if is_alone and len(lengths) > 1:
        scheme = {"scheme": "viridis", "extent": [0, 0.85]}
        color = {"field": "length", "type": "ordinal", "sort": lengths, "scale": scheme, "title": "at"}
    base = {"x": x, "y": _value_axis([row["y"] for row in rows], family), "color": color}
    base["detail"] = [{"field": "run"}, {"field": "length"}]
    tooltip = [
        {"field": "run", "title": "run"},
        {"field": "length", "title": "at"},
        {"field": "x", "title": "optimizer step", "type": "quantitative", "format": ",d"},
        {"field": "value", "title": metric.title},
    ]
    layers = [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": base},
        {"mark": {"type": "point", "filled": True, "size": 40}, "encoding": base | {"tooltip": tooltip}},
    ]
    note = _better(metric.higher_is_better) + ("" if is_alone else "; at the longest that each run was measured at")
    return Panel(f"{_capital(plots.title_of(family))}, while training", note, _chart(rows, layers))


def _coverage(sources: Sequence[Source], lines: Sequence[Line], label_of: Mapping[str, str]) -> list[Panel]:
    """Probability of each distance, and its pairs relative to an even spread; once for each line."""
    rows: dict[str, list[dict]] = {}
    for source in sources:
        if source.coverage is None or label_of[source.name] in rows:
            continue
        rows[label_of[source.name]] = [
            {"line": label_of[source.name], "x": x, "y": y, "pairs": z if z > 0 else None}
            for x, y, z in zip(*map(_binned, source.coverage), strict=True)
        ]
        scale = len(source.coverage[0])
        for row in rows[label_of[source.name]]:
            row["pairs"] = None if row["pairs"] is None else float(f"{row['pairs'] * scale:.4g}")
            row["y"] = float(f"{row['y']:.4g}")
    found = list(chain.from_iterable(rows.values()))
    if not found:
        return []
    x = {"field": "x", "type": "quantitative", "title": "distance (tokens)", "scale": {"nice": False, "zero": True}}
    x["axis"] = {"format": ",d", "grid": False, "labelFlush": True}
    panels = []
    for name, title, note, y in (
        (
            "y",
            "Probability that an example contains a distance",
            "of two tokens that attention sees",
            _value_axis([row["y"] for row in found], "probability") | {"scale": {"domain": [0, 1]}},
        ),
        (
            "pairs",
            "Pairs of tokens at a distance",
            "relative to an even spread, which is 1",
            {"type": "quantitative", "title": None, "scale": LOG_SCALE, "axis": LOG_AXIS},
        ),
    ):
        encoding = {"x": x, "y": y | {"field": name}, "color": _color(lines)}
        tooltip = [
            {"field": "line", "title": "model"},
            {"field": "x", "title": "distance (tokens)", "type": "quantitative", "format": ",d"},
            {"field": name, "title": title, "type": "quantitative", "format": ".3~g"},
        ]
        layers = [
            {"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": encoding | {"strokeDash": _dash(lines)}},
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 0.001},
                "encoding": encoding | {"tooltip": tooltip},
            },
        ]
        marks = _marks(sources, [row["x"] for row in found], is_target_shown=False)
        panels.append(Panel(title, note, _chart(found, [*marks, *layers])))
    return panels


# Parts of Vega-Lite specifications

NOT_HIDDEN = {"filter": "indexof(hidden, datum.line) < 0"}
LOG_SCALE = {"type": "log", "nice": False, "padding": 8}  # pixels
LOG_AXIS = {"format": ",.4~r", "tickCount": 5, "labelOverlap": True}


def _chart(rows: Sequence[dict], layers: Sequence[dict], height: Any = 230, is_of_lines: bool = True) -> dict[str, Any]:
    """As wide as its place on the page. The script sets which lines are hidden, and the one that is pointed at."""
    spec: dict[str, Any] = {
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": list(rows)},
        "layer": list(layers),
    }
    if is_of_lines:
        spec["params"] = [{"name": "hidden", "value": []}, {"name": "focus", "value": ""}]
        spec["transform"] = [NOT_HIDDEN]
    return spec


def _color(lines: Sequence[Line]) -> dict[str, Any]:
    scale = {"domain": [line.name for line in lines], "range": [_style(i)[0] for i in range(len(lines))]}
    return {"field": "line", "type": "nominal", "scale": scale, "legend": None}


def _dash(lines: Sequence[Line]) -> dict[str, Any]:
    scale = {"domain": [line.name for line in lines], "range": [_style(i)[1] or [1, 0] for i in range(len(lines))]}
    return {"field": "line", "type": "nominal", "scale": scale, "legend": None}


def _shape(lines: Sequence[Line]) -> dict[str, Any]:
    scale = {"domain": [line.name for line in lines], "range": [_style(i)[2] for i in range(len(lines))]}
    return {"field": "line", "type": "nominal", "scale": scale, "legend": None}


def _opacity() -> dict[str, Any]:
    return {"opacity": {"condition": {"test": "focus == '' || datum.line == focus", "value": 1}, "value": 0.15}}


def _value_axis(values: Sequence[float | None], name: str) -> dict[str, Any]:
    """Shares from 0 to 1; perplexities by their logarithm where they are far apart."""
    axis: dict[str, Any] = {"field": "y", "type": "quantitative", "title": None}
    if describe(name).is_share:
        return axis | {"scale": {"domain": [0, 1]}, "axis": {"format": "%"}}
    if name == "short_ppl_increase":
        return axis | {"axis": {"format": "+.0%"}}
    finite = [value for value in values if value is not None and value > 0]
    if finite and ("ppl" in name or name == "position") and max(finite) > 5 * min(finite):
        return axis | {"scale": LOG_SCALE, "axis": LOG_AXIS}
    return axis | {"scale": {"zero": False}, "axis": {"format": ",.4~r", "tickCount": 5}}


def _marks(sources: Sequence[Source], places: Sequence[float], is_target_shown: bool = True) -> list[dict[str, Any]]:
    """Upright lines at the window, and at the target, of all sources."""
    found: dict[tuple[str, int], None] = {}
    for source in sources:
        for label, at in (("window", source.window), ("target", source.target if is_target_shown else None)):
            if at and min(places) <= at <= max(places) and ("window", at) not in found:
                found[label, at] = None
    if not found or len(found) > 4:
        return []
    rows = [{"at": at, "label": f"{label} {at:,}"} for label, at in found]
    x = {"field": "at", "type": "quantitative"}
    rule = {"type": "rule", "color": "#888888", "strokeDash": [2, 3]}
    text = {"type": "text", "color": "#888888", "fontSize": 10, "baseline": "bottom", "y": -3, "align": {"expr": ALIGN}}
    return [
        {"data": {"values": rows}, "mark": rule, "encoding": {"x": x}},
        {"data": {"values": rows}, "mark": text, "encoding": {"x": x, "text": {"field": "label"}}},
    ]


ALIGN = "scale('x', datum.at) > width - 30 ? 'right' : scale('x', datum.at) < 30 ? 'left' : 'center'"


# Small things


def _better(is_higher: bool | None) -> str:
    return "" if is_higher is None else "higher is better" if is_higher else "lower is better"


def _heading(family: str) -> str:
    return _capital(plots.TITLES.get(family) or describe(family).title)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _row_label(row: float | str) -> str:
    return f"{100 * row:.3g}%" if isinstance(row, float) else row


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """At most about MAX_POINTS of them, evenly taken, the last one among them."""
    stride = math.ceil(len(points) / MAX_POINTS)
    return points if stride <= 1 else [*points[: -1 : stride], points[-1]]


def _binned(values: np.ndarray) -> list[float]:
    """Means of at most MAX_POINTS parts of equal size."""
    return [float(part.mean()) for part in np.array_split(values, min(len(values), MAX_POINTS))]


def _json(content: Any) -> str:
    """JSON that can stand in a script element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _libraries() -> list[str]:
    """Vega, Vega-Lite and Vega-Embed; the maps that they name for debuggers are not there."""
    texts = (gzip.decompress((ASSETS / f"{name}.min.js.gz").read_bytes()).decode() for name in LIBRARIES)
    return [re.sub(r"//# sourceMappingURL=\S+", "", text) for text in texts]
