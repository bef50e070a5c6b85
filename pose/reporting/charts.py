"""Charts of a page as Vega-Lite specifications: a panel each, with a line for each model that is compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pose.evaluation.task import Estimate, describe, shown
from pose.reporting import plots
from pose.reporting.lines import Line, Source
from pose.reporting.tables import common_tasks

MAX_POINTS = 400  # of a line
MAX_MARKS = 4  # of windows and targets

Rows = list[dict[str, Any]]
Spec = dict[str, Any]

NOT_HIDDEN = {"filter": "indexof(hidden, datum.line) < 0"}
OPACITY = {"condition": {"test": "focus == '' || datum.line == focus", "value": 1}, "value": 0.15}
UNDER_THE_POINTER = {"type": "point", "filled": True, "size": 60, "opacity": 0.001}  # where a value can be read
FEW_POINTS = 30  # of a line, that are seen themselves
LOG = {
    "scale": {"type": "log", "nice": False, "padding": 8},  # pixels
    "axis": {"format": ",.4~r", "tickCount": 5, "labelOverlap": True},
}


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
    spec: Spec
    line: str | None = None


def by_length(lines: Sequence[Line], sources: Sequence[Source]) -> list[Panel]:
    """What was measured over the length, a panel for each family."""
    found = (_measured(lines, panel, sources) for panel in plots.PANELS if panel != "position")
    return [panel for panel in found if panel is not None]


def by_position(lines: Sequence[Line], sources: Sequence[Source]) -> list[Panel]:
    """Perplexity over the position in the window."""
    panel = _measured(lines, "position", sources)
    return [] if panel is None else [panel]


def _measured(lines: Sequence[Line], panel: str, sources: Sequence[Source]) -> Panel | None:
    """A panel of plots.PANELS: a line for each model, its bounds as a band, window and target as upright lines."""
    family, across = "position_ppl" if panel == "position" else panel, plots.PANELS[panel]
    metric = describe(family)
    rows: Rows = []
    spreads: dict[str, None] = {}
    tasks = common_tasks(line.estimates for line in lines)
    for line in lines:
        for at, value in plots.points_of(line.estimates, panel, tasks).items():
            estimate = estimate_of(value)
            row = {"line": line.name, "x": at, "y": finite(estimate.value), "value": shown(family, estimate.value)}
            if bounds := bounds_of(family, estimate):
                row |= {"low": finite(estimate.low), "high": finite(estimate.high)}
                row["range"] = f"{bounds} ({line.spread})"
                spreads[line.spread] = None
            rows.append(row | ({"num": estimate.num} if estimate.num else {}))
    if not rows:
        return None
    x = _x(across, from_zero=panel == "position")
    if panel != "position":
        x["scale"] = {"type": "log", "base": 2, "nice": False}
        x["axis"] = x["axis"] | {"values": sorted({row["x"] for row in rows})}
    y = _y([row.get(key) for row in rows for key in ("y", "low", "high")], panel)
    color = _by_line(lines, "color")
    tooltip = [_tip("line", "model"), _tip("x", across, ",d"), _tip("value", metric.title)]
    layers, note = [], better(metric.higher_is_better)
    if spreads:
        is_band = len({row["x"] for row in rows}) > 1
        band = {"type": "area", "opacity": 0.13} if is_band else {"type": "rule", "opacity": 0.7}
        has_bounds = {"filter": "isValid(datum.low) && isValid(datum.high)"}
        encoding = {"x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": color}
        layers.append({"mark": band, "encoding": encoding, "transform": [has_bounds]})
        tooltip.append(_tip("range", "range"))
        note += f"; {'band' if is_band else 'bar'}: {' or '.join(list(spreads)[:3])}"
    if any("num" in row for row in rows):
        tooltip.append(_tip("num", "documents or prompts"))
    base = {"x": x, "y": y, "color": color, "opacity": OPACITY}
    layers += [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": base | {"strokeDash": _by_line(lines, "dash")}},
        {
            "mark": {"type": "point", "filled": True, "size": 55},
            "encoding": base | {"shape": _by_line(lines, "shape"), "tooltip": tooltip},
        },
    ]
    places = [row["x"] for row in rows]
    if panel == "position":  # points are at the middle of a bin: the target is where the last one ends
        places = [0, max(plots.last_position(line.estimates) for line in lines)]
    marks = _marks([("window", s.window) for s in sources] + [("target", s.target) for s in sources], places)
    return Panel(capital(plots.title_of(panel)), note, _chart(rows, [*marks, *layers]))


def heatmaps(lines: Sequence[Line], family: str, down: str) -> list[Panel]:
    """Cells by length and by depth or task, a panel for each line that has any; all of one colour scale.

    Args:
        lines: of the page.
        family: needle, needle_gain or ruler.
        down: what the rows are.
    """
    found = [(line, cells) for line in lines if (cells := plots.cells_of(line.estimates, family))]
    metric = describe(family)
    top = plots.top_of(family, (plots.value_of(value) for _, cells in found for value in cells.values()))
    order = [_row_label(row) for row in plots.rows_of(cells for _, cells in found)]
    axis = {"labelAngle": 0, "format": ",d", "labelOverlap": "greedy"}
    legend = {"format": "%" if metric.is_share else ",.3~r", "gradientLength": 120, "gradientThickness": 10}
    scale = {"scheme": plots.HEATMAP, "domain": [0, top], "clamp": True}
    color = {"field": "y", "type": "quantitative", "title": None, "scale": scale, "legend": legend}
    panels = []
    for line, cells in found:
        rows: Rows = []
        for (row, length), value in cells.items():
            estimate = estimate_of(value)
            rows.append(
                {
                    "x": length,
                    "row": _row_label(row),
                    "y": finite(estimate.value),
                    "value": shown(family, estimate.value),
                    "bounds": bounds_of(family, estimate) or "not known",
                    "num": estimate.num or "not known",
                    "ink": "#000000" if estimate.value > top / 2 else "#ffffff",  # cividis is dark up to its middle
                }
            )
        tooltip = [_tip("x", "prompt (tokens)", ",d"), _tip("row", down), _tip("value", metric.title)]
        tooltip += [_tip("bounds", line.spread), _tip("num", "prompts")]
        text = {"type": "text", "fontSize": 11, "color": {"expr": "datum.ink"}}
        spec = _sized(rows, {"step": 24}) | {
            "encoding": {
                "x": {"field": "x", "type": "ordinal", "title": "prompt (tokens)", "axis": axis},
                "y": {"field": "row", "type": "ordinal", "title": down, "sort": order, "axis": {"labelLimit": 160}},
            },
            "layer": [
                {"mark": {"type": "rect"}, "encoding": {"color": color, "tooltip": tooltip}},
                {"mark": text, "encoding": {"text": {"field": "value"}, "tooltip": tooltip}},
            ],
        }
        note = f"{'RULER score' if family == 'ruler' else plots.title_of(family)}; {better(metric.higher_is_better)}"
        panels.append(Panel(line.name, note, spec, line=line.name))
    return panels


def training(sources: Sequence[Source], lines: Sequence[Line], name_of: Mapping[str, str]) -> list[Panel]:
    """Over the optimizer steps: losses, what was measured while training, learning rate, gradients.

    Args:
        sources: those that logged anything have a line each, in the colour of its model; noisy metrics are smoothed.
        lines: of the page.
        name_of: of the line that stands for a source, by its name.
    """
    logged: dict[str, Rows] = {}
    smooth: dict[str, Rows] = {}
    watched: dict[str, Rows] = {}
    trained = [source for source in sources if source.logged]
    is_alone = len(trained) == 1
    for source in trained:
        who = {"line": name_of[source.name], "run": source.name}
        curves, families = plots.training_curves(source.logged)
        for name, points in curves.items():
            logged.setdefault(name, []).extend(
                who | {"x": step, "y": finite(value), "value": f"{value:.4g}"} for step, value in _thinned(points)
            )
            valid = np.array([point for point in points if math.isfinite(point[1])])
            if name in plots.NOISY and len(valid) >= 5:
                smooth.setdefault(name, []).extend(
                    who | {"x": round(float(step), 1), "y": finite(value), "value": f"{value:.4g}"}
                    for step, value in zip(*plots.smoothed(*valid.T), strict=True)
                )
        for family, by_length in families.items():
            lengths = list(by_length) if is_alone else [max(by_length, key=lambda length: length or 0)]
            watched.setdefault(family, []).extend(
                who
                | {"x": step, "y": finite(value), "value": shown(family, value)}
                | {"length": "" if length is None else f"{length:,} tokens"}
                for length in lengths
                for step, value in _thinned(by_length[length])
            )
    for name, rows in smooth.items():  # beside others, a run that has just begun is shown as it was logged
        runs = {row["run"] for row in rows}
        rows += [] if is_alone else [row for row in logged[name] if row["run"] not in runs]
    panels = {name: _curve(name, rows, smooth.get(name), lines, is_alone) for name, rows in logged.items()}
    losses = [panel for name, panel in panels.items() if name.startswith("train/loss")]
    others = [panel for name, panel in panels.items() if not name.startswith("train/loss")]
    return losses + [_watched(family, rows, lines, is_alone) for family, rows in watched.items()] + others


def _curve(name: str, logged: Rows, smooth: Rows | None, lines: Sequence[Line], is_alone: bool) -> Panel:
    """What was logged; smoothed where it is noisy, over what was logged if it is of one run."""
    rows = logged if smooth is None or is_alone else smooth
    title = plots.TRAINING[name]
    base = {"x": _x("optimizer step"), "y": _y([row["y"] for row in rows], name), "detail": {"field": "run"}}
    base |= {"color": _by_line(lines, "color")}
    over = base | {"strokeDash": _by_line(lines, "dash"), "opacity": OPACITY}
    tooltip = [_tip("run", "run"), _tip("x", "optimizer step", ",.0f"), _tip("value", title)]
    is_dense = len(rows) >= FEW_POINTS * len({row["run"] for row in rows})
    point = UNDER_THE_POINTER if is_dense else {"type": "point", "filled": True, "size": 20}
    layers: list[Spec] = [{"mark": point, "encoding": base | {"tooltip": tooltip}}]
    if smooth is not None and is_alone:
        line = {"data": {"values": smooth}, "transform": [NOT_HIDDEN], "mark": {"type": "line", "strokeWidth": 2}}
        layers = [{"mark": {"type": "line", "strokeWidth": 1, "opacity": 0.35}, "encoding": base}, *layers]
        layers.append(line | {"encoding": over})
        note = "faint: as logged; strong: smoothed"
    else:
        layers = [{"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": over}, *layers]
        note = "as logged" if smooth is None else "smoothed"
    return Panel(capital(title), note, _chart(rows, layers))


def _watched(family: str, rows: Rows, lines: Sequence[Line], is_alone: bool) -> Panel:
    """What was measured while the model trained: of one run at every length, of several at the longest."""
    metric = describe(family)
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    color = _by_line(lines, "color")
    if is_alone and len(lengths) > 1:
        scale = {"scheme": {"name": "viridis", "extent": [0, 0.85]}}
        color = {"field": "length", "type": "ordinal", "sort": lengths, "scale": scale}
        color |= {"title": None, "legend": {"orient": "top"}}
    base = {"x": _x("optimizer step"), "y": _y([row["y"] for row in rows], family), "color": color}
    base |= {"detail": {"field": "run"}}
    tooltip = [_tip("run", "run"), _tip("length", "at"), _tip("x", "optimizer step", ",d"), _tip("value", metric.title)]
    layers = [
        {"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": base},
        {"mark": {"type": "point", "filled": True, "size": 40}, "encoding": base | {"tooltip": tooltip}},
    ]
    notes = [better(metric.higher_is_better), "" if is_alone else "at the longest length of each run"]
    title = f"{capital(plots.title_of(family))}, while training"
    return Panel(title, "; ".join(filter(None, notes)), _chart(rows, layers))


def coverage(sources: Sequence[Source], lines: Sequence[Line], name_of: Mapping[str, str]) -> list[Panel]:
    """Probability of each distance, and its pairs relative to an even spread; once for each line.

    Args:
        sources: of the page.
        lines: of the page.
        name_of: of the line that stands for a source, by its name.
    """
    covered = {name_of[source.name]: source.coverage for source in sources if source.coverage is not None}
    num_points = max(100, MAX_POINTS // max(1, len(covered) // 4))
    rows: Rows = [
        {"line": name, "x": round(x), "probability": finite(y), "pairs": finite(z * len(distance)) if z > 0 else None}
        for name, (distance, probability, pairs) in covered.items()
        for x, y, z in zip(*(_binned(each, num_points) for each in (distance, probability, pairs)), strict=True)
    ]
    if not rows:
        return []
    share = {"scale": {"domain": [0, 1]}, "axis": {"format": ".1f", "tickCount": 5}}
    panels = []
    for name, title, note, form in (
        ("probability", "Probability of a distance", "that an example contains it", share),
        ("pairs", "Pairs of tokens at a distance", "relative to an even spread, which is 1", LOG),
    ):
        y = {"field": name, "type": "quantitative", "title": None} | form
        base = {"x": _x("distance (tokens)", from_zero=True), "y": y, "color": _by_line(lines, "color")}
        over = base | {"strokeDash": _by_line(lines, "dash"), "opacity": OPACITY}
        tooltip = [_tip("line", "model"), _tip("x", "distance (tokens)", ",d"), _tip(name, title, ".3~g")]
        layers = [
            *_marks([("window", source.window) for source in sources], [row["x"] for row in rows]),
            {"mark": {"type": "line", "strokeWidth": 1.5}, "encoding": over},
            {"mark": UNDER_THE_POINTER, "encoding": base | {"tooltip": tooltip}},
        ]
        panels.append(Panel(title, note, _chart(rows, layers)))
    return panels


# Parts of specifications


def _sized(rows: Rows, height: Any) -> Spec:
    """As wide as its place on the page."""
    autosize = {"type": "fit-x", "contains": "padding"}
    return {"width": "container", "height": height, "autosize": autosize, "data": {"values": rows}}


def _chart(rows: Rows, layers: list[Spec]) -> Spec:
    """A chart of lines; the script of the page sets which are hidden, and the one that is pointed at."""
    params = [{"name": "hidden", "value": []}, {"name": "focus", "value": ""}]
    return _sized(rows, 230) | {"params": params, "transform": [NOT_HIDDEN], "layer": layers}


def _x(title: str, from_zero: bool = False) -> Spec:
    """The horizontal axis: tokens or steps."""
    axis = {"format": ",d", "tickMinStep": 1, "tickCount": 8, "grid": False}
    axis |= {"labelOverlap": "greedy", "labelSeparation": 4, "labelFlush": True}
    scale = {"nice": False, "zero": from_zero}
    return {"field": "x", "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _y(values: Sequence[float | None], name: str) -> Spec:
    """The vertical axis: shares from 0 to 1, perplexities by their logarithm where they are far apart."""
    axis: Spec = {"field": "y", "type": "quantitative", "title": None}
    if describe(name).is_share:
        return axis | {"scale": {"domain": [0, 1]}, "axis": {"format": "%"}}
    if name == "short_ppl_increase":
        return axis | {"axis": {"format": "+.0%"}}
    known = [value for value in values if value is not None and value > 0]
    if known and ("ppl" in name or name == "position") and max(known) > 5 * min(known):
        return axis | LOG
    return axis | {"scale": {"zero": False}, "axis": {"format": ",.4~r", "tickCount": 5}}


def _by_line(lines: Sequence[Line], part: str) -> Spec:
    """What the style of a line says of a part of it: color, dash or shape."""
    scale = {"domain": [line.name for line in lines], "range": [getattr(line.style, part) for line in lines]}
    return {"field": "line", "type": "nominal", "scale": scale, "legend": None}


def _tip(name: str, title: str, form: str | None = None) -> Spec:
    """A line of a tooltip: text, or a number in d3's form."""
    number = {} if form is None else {"type": "quantitative", "format": form}
    return {"field": name, "title": title} | number


def _marks(marked: Sequence[tuple[str, int | None]], places: Sequence[float]) -> list[Spec]:
    """Upright lines, with their labels, inside of what is drawn; none where they would be too many.

    Args:
        marked: labels, and where each is.
        places: on the horizontal axis, of what is drawn.
    """
    label_of: dict[int, str] = {}
    for label, at in marked:
        if at is not None and min(places) <= at <= max(places):
            label_of.setdefault(at, f"{label} {at:,}")
    if not 0 < len(label_of) <= MAX_MARKS:
        return []
    data: Spec = {"values": [{"at": at, "label": label} for at, label in label_of.items()]}
    x, grey = {"field": "at", "type": "quantitative"}, "#888888"
    side = "scale('x', datum.at) > width - 30 ? 'right' : scale('x', datum.at) < 30 ? 'left' : 'center'"
    text = {"type": "text", "color": grey, "fontSize": 10, "baseline": "bottom", "y": -3, "align": {"expr": side}}
    return [
        {"data": data, "mark": {"type": "rule", "color": grey, "strokeDash": [2, 3]}, "encoding": {"x": x}},
        {"data": data, "mark": text, "encoding": {"x": x, "text": {"field": "label"}}},
    ]


# Values as texts and numbers


def estimate_of(value: float | Estimate) -> Estimate:
    """A number is one of which nothing else is known."""
    return value if isinstance(value, Estimate) else Estimate(value, num=0)


def bounds_of(family: str, estimate: Estimate) -> str:
    """As they are shown; empty where there are none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{shown(family, estimate.low)} to {shown(family, estimate.high)}"


def better(is_higher: bool | None) -> str:
    """Which values are better; empty where that is not known."""
    return "" if is_higher is None else "higher is better" if is_higher else "lower is better"


def capital(text: str) -> str:
    """With a capital at its beginning."""
    return text[:1].upper() + text[1:]


def finite(value: float | None) -> float | None:
    """To six digits; None for what JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _row_label(row: float | str) -> str:
    return f"{100 * row:.3g}%" if isinstance(row, float) else row


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """About MAX_POINTS of them at most, evenly taken, the last one among them."""
    stride = math.ceil(len(points) / MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _binned(values: np.ndarray, num: int) -> list[float]:
    """Means of at most num parts of about the same size."""
    return [float(part.mean()) for part in np.array_split(values, min(len(values), num))]
