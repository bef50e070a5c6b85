"""One HTML page of runs and evaluations that needs no network: tables to sort and filter, charts by Vega-Lite.

`page` is a function of its data alone. The template, its style sheet and the script that draws, sorts and filters are
in assets/, where Vega is too.
"""

import gzip
import json
import math
import re
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2

from pose.errors import one_line
from pose.evaluation.task import FAMILIES, Estimate, describe, shown
from pose.reporting import charts, plots
from pose.reporting.charts import better, bounds_of, capital, estimate_of, finite
from pose.reporting.lines import (
    BENCHMARKS,
    DOCUMENTS,
    INTERVAL,
    LONGEST,
    PROMPTED,
    STRIDES,
    TOKENS,
    Line,
    Source,
    lines_of,
    longest_of_text,
)
from pose.reporting.tables import common_tasks, main_families, series

ASSETS = Path(__file__).parent / "assets"
LIBRARIES = ("vega-6.4.0", "vega-lite-6.5.0", "vega-embed-7.3.0")
NOTES = {  # below headings
    "position": "Perplexity of the tokens at each part of the longest window: a break cannot hide in an average.",
    "needle_gain": "What the needle's value saves of the answer: 0 where nothing comes from the needle.",
}
COSTS = {  # columns: label, and how a number is shown
    "seconds": ("Seconds", ",.1f"),
    "steps": ("Optimizer steps", ",.0f"),
    "tokens": ("Tokens", ",.0f"),
    "tokens_per_second": ("Tokens/s", ",.0f"),
    "step_seconds": ("Seconds/step", ".3g"),
    "peak_memory_gib": ("Peak memory (GiB)", ".2f"),
    "flops": ("FLOPs", ".3g"),
    "mfu": ("MFU", ".1%"),
}


def page(sources: Sequence[Source], title: str, generated: str = "") -> str:
    """The HTML text.

    Args:
        sources: at least one; their order is that of tables and legends.
        title: of the page.
        generated: a line for its foot.
    """
    lines, name_of = lines_of(sources)
    sections = [
        ("length", "By length", charts.by_length(lines, sources)),
        ("position", "By position", charts.by_position(lines, sources)),
        ("needle", "Needle", charts.heatmaps(lines, "needle", "depth of the needle")),
        ("needle_gain", "Needle gain", charts.heatmaps(lines, "needle_gain", "depth of the needle")),
        ("ruler", "RULER", charts.heatmaps(lines, "ruler", "task")),
        ("training", "Training", charts.training(sources, lines, name_of)),
        ("coverage", "Coverage of distances", charts.coverage(sources, lines, name_of)),
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
        lines=lines,
        columns=_table(lines),
        interval=INTERVAL,
        has_intervals=any(each.low is not None for line in lines for each in line.estimates.values()),
        has_stages=any({"untuned", "scaled"} & source.models.keys() for source in sources),
        has_seeds=any(line.spread != INTERVAL for line in lines),
        sections=drawn,
        notes=NOTES,
        remarks=_remarks(sources),
        cost=_cost(sources),
        differences=[found for kind in ("training", "evaluation") if (found := _differences(sources, kind))],
        sources=sources,
        specs=_json(specs),
        hidden=_json([line.name for line in lines if not line.is_shown]),
        libraries=_libraries(),
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
        script=(ASSETS / "page.js").read_text(encoding="utf-8"),
    )


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


def _remarks(sources: Sequence[Source]) -> list[str]:
    """Notes on numbers that cannot be compared."""
    remarks = [_on_perplexity(sources)]
    by_tokenizer = [source.tokenizers for source in sources if _has(source, "ppl", "tail_ppl", "sliding_ppl")]
    if len(frozenset().union(*by_tokenizer)) > 1:
        remarks.append("The tokenizers differ: compare bits per byte, not perplexity, which is by token.")
    for what, keys, families in (
        ("Sliding windows scored other tokens", STRIDES, ("sliding_ppl",)),
        ("Prompts have their needles at other places", ("eval.depths",), PROMPTED),
        ("Needles lie in other texts", ("eval.haystack",), ("needle", "needle_gain", "ruler")),
        ("Benchmarks were asked in another way", BENCHMARKS, ("harness",)),
    ):
        alike = ([source for source in sources if _has(source, family)] for family in families)
        if found := "; ".join(dict.fromkeys(said for of in alike if (said := _differing_in(keys, of)))):
            remarks.append(f"{what} ({found}): compare these within a run or an evaluation, not between them.")
    return [remark for remark in remarks if remark]


def _has(source: Source, *families: str) -> bool:
    """Whether any of its models has a metric of the families."""
    names = chain.from_iterable(source.models.values())
    return any(re.split("[@/]", name)[0] in families for name in names)


def _differing_in(keys: Sequence[str], sources: Sequence[Source]) -> str:
    """Those settings that are not the same in all sources, with their values; "" for none."""
    found = {key: list(dict.fromkeys(source.config[key] for source in sources if key in source.config)) for key in keys}
    return "; ".join(one_line(f"{key} {' and '.join(of[:3])}") for key, of in found.items() if len(of) > 1)


def _on_perplexity(sources: Sequence[Source]) -> str:
    """A note on perplexities that cannot be compared; "" where they can."""
    longest = {one.name: longest_of_text(chain.from_iterable(one.models.values())) for one in sources}
    measured = [source for source in sources if longest[source.name]]
    if len({source.facts.get(DOCUMENTS) for source in measured}) > 1:
        return "Perplexity was measured on different documents (What was run): compare it within one of them."
    settings = {LONGEST: [f"{longest[source.name]:,}" for source in measured]}
    are_drawn = any(source.config.get("eval.draw_documents") == "true" for source in measured)
    keys = (*TOKENS, "eval.seed") if are_drawn else TOKENS
    settings |= {key: [source.config.get(key, "") for source in measured] for key in keys}
    differing = [f"{key} {' and '.join(dict.fromkeys(of))}" for key, of in settings.items() if len(set(of)) > 1]
    if not differing:
        return ""
    return (
        f"Perplexity was measured on different tokens ({'; '.join(differing)}): compare it within a run or an "
        "evaluation, not between them."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _table(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Columns by family, each with the cells of every line."""
    results = {line.name: line.estimates for line in lines}
    names = list(dict.fromkeys(chain.from_iterable(results.values())))
    tasks = dict.fromkeys(name.split("@")[0] for name in names if name.startswith(("ruler/", "harness/")))
    families = [family for family in FAMILIES if family != "position_ppl"] + list(tasks)
    main, of_ruler = main_families(results), common_tasks(results.values())
    columns = []
    for family in families:
        found = {line.name: series(line.estimates, family, of_ruler) for line in lines}
        if lengths := sorted({n for row in found.values() for n in row}):
            metric = describe(family)
            columns.append(
                {
                    "family": family,
                    "title": _heading("ruler" if family == "ruler" else family),
                    "better": better(metric.higher_is_better),
                    "best_first": "descending" if metric.higher_is_better else "ascending",
                    "is_main": family in main,
                    "lengths": lengths,
                    "cells": {name: [_cell(family, row.get(n)) for n in lengths] for name, row in found.items()},
                }
            )
    return columns


def _cell(family: str, value: float | Estimate | None) -> tuple[float | None, str, str]:
    """The number to sort by, the text, and the bounds."""
    if value is None:
        return None, "", ""
    estimate = estimate_of(value)
    return finite(estimate.value), shown(family, estimate.value), bounds_of(family, estimate)


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


def _heading(family: str) -> str:
    return capital(plots.TITLES.get(family) or describe(family).title)


def _json(content: Any) -> str:
    """JSON that can stand in a script element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _libraries() -> list[str]:
    """Vega, Vega-Lite and Vega-Embed; the maps that they name for debuggers are not there."""
    texts = (gzip.decompress((ASSETS / f"{name}.min.js.gz").read_bytes()).decode() for name in LIBRARIES)
    return [re.sub(r"//# sourceMappingURL=\S+", "", text) for text in texts]
