"""The structure of the page, without a browser; in one: tests/integration/test_report.py."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest

from pose.evaluation.task import Estimate
from pose.reporting import page as page_module
from pose.reporting.charts import MAX_POINTS
from pose.reporting.lines import Source
from pose.reporting.page import page

HOSTILE = "</script><script>alert(1)</script><b onclick='x'>&amp; {{ 7*7 }}\u2028"
SEEN = "</script><script>alert(1)</script><b onclick='x'>&amp; {{ 7*7 }}"  # in one line


class Reader(HTMLParser):
    """Elements, texts of scripts, and rows of tables."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.rows, self.ids = [], {}, [], set()
        self.script = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self.ids.add(attributes.get("id"))
        self.script = attributes.get("id", "") if tag == "script" else None
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append((attributes, ""))

    def handle_endtag(self, tag):
        self.script = None
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data):
        if self.script is not None:
            self.scripts[self.script] = self.scripts.get(self.script, "") + data
        elif self.rows and self.rows[-1]:
            attributes, text = self.rows[-1][-1]
            self.rows[-1][-1] = attributes, text + data


def run(name="mine", estimates=None, **options):
    found = {"tail_ppl@256": Estimate(40.0, 38.0, 43.0, 8), "tail_ppl@512": Estimate(41.5)} | (estimates or {})
    options = {"window": 256, "target": 512, "config": {"rope": name}, "models": {"extended": found}} | options
    return Source(name, f"runs/{name}", "training", {"Model": name}, **options)


def read(*sources, title="A title"):
    reader = Reader(page(sources, title))
    return reader, json.loads(reader.scripts["specs"])


def cells(reader, name):
    """Texts of the first row of a name, without it; None where there is no such row."""
    rows = ([text.strip() for _, text in row] for row in reader.rows if len(row) > 1)
    return next((row[1:] for row in rows if row[0].endswith(name)), None)


def test_a_page_has_what_was_run_and_found():
    reader, specs = read(run(), run("other", {"tail_ppl@1024": Estimate(1.23456, num=3)}))
    assert {"what", "results", "models", "filter", "legend", "length", "differences", "config"} <= reader.ids
    assert cells(reader, "mine") == ["40.038.0 to 43.0", "41.5", ""]
    assert cells(reader, "other") == ["40.038.0 to 43.0", "41.5", "1.23"]
    ((_, attributes),) = [each for each in reader.elements if each[1].get("data-value") == "1.23456"]
    assert attributes["data-family"] == "tail_ppl", "sorted by all digits"
    (spec,) = specs
    values = spec["data"]["values"]
    assert {"line": "mine", "x": 256, "y": 40.0, "low": 38.0, "high": 43.0}.items() <= values[0].items()
    assert values[0]["range"] == "38.0 to 43.0 (95 % interval)" and values[0]["num"] == 8
    assert "low" not in values[1], "without an interval none is drawn"
    text = page([run()], "x")
    assert "lower is better" in text and "higher is better" not in text


def test_nothing_is_fetched_and_everything_is_inside():
    text = page([run()], "A title")
    reader = Reader(text)
    assert not [
        each
        for each in reader.elements
        if {"src", "href"} & set(each[1]) and not each[1].get("href", "").startswith("#")
    ]
    assert {"link", "img", "iframe"}.isdisjoint(tag for tag, _ in reader.elements)
    (policy,) = [each["content"] for tag, each in reader.elements if each.get("http-equiv")]
    assert policy.startswith("default-src 'none';") and not set(policy) & set("*/."), "neither a place nor all of them"
    assert "sourceMappingURL" not in text and len(text) < 2e6


def test_names_and_texts_are_only_texts():
    """In every place that a name, a setting, a path or a document can get to."""
    hostile = run(
        HOSTILE,
        {f"harness/{HOSTILE}": Estimate(0.5), f"ruler/{HOSTILE}@256": Estimate(0.5)},
        config={HOSTILE: HOSTILE, "seed": "0"},
        logged=[{"step": str(i), "train/loss": "3"} for i in range(6)],
        cost={HOSTILE: {"seconds": 1.0}},
    )
    other = Source(
        HOSTILE + "2", HOSTILE, "evaluation", {HOSTILE: HOSTILE}, {"a": "b"}, {HOSTILE: {"ppl@8": Estimate(1)}}
    )
    harmless = Reader(page([run(), run("other")], "x"))
    reader, specs = read(hostile, other, run("third", config={"c": HOSTILE}), title=HOSTILE)
    scripts = [each for each in reader.elements if each[0] == "script"]
    assert len(scripts) == len([each for each in harmless.elements if each[0] == "script"]) == 6
    assert not [each for each in reader.elements if "onclick" in each[1] or each[0] == "b"]
    assert any(attributes.get("data-line") == SEEN for _, attributes in reader.elements)
    assert any(row["line"] == SEEN for spec in specs for row in spec["data"]["values"] if "line" in row)
    assert (
        not set("<>&") & set(reader.scripts["specs"] + reader.scripts["hidden"])
        and "49" not in reader.scripts["hidden"]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_not_are_left_out_of_the_charts(value):
    reader, specs = read(
        run(estimates={"tail_ppl@256": Estimate(value, value, value, 2), "passkey@8": Estimate(value)})
    )
    assert specs[0]["data"]["values"][0]["y"] is None and "NaN" not in reader.scripts["specs"]
    assert cells(reader, "extended")[1] == "41.5"


def test_heatmaps_have_one_scale_and_their_cells():
    gains = {"needle_gain@256/0.5": Estimate(2.5, 2.0, 3.0, 4), "needle_gain@256/0.0": Estimate(-0.1, num=4)}
    scores = {"ruler/vt@512": Estimate(0.25, 0.1, 0.4, 10)}
    reader, specs = read(run("a", gains | scores), run("b", {"needle_gain@256/0.5": Estimate(0.5)}))
    maps = [spec for spec in specs if "encoding" in spec]
    assert [spec["layer"][0]["encoding"]["color"]["scale"]["domain"] for spec in maps] == [[0, 2.5], [0, 2.5], [0, 1.0]]
    first = maps[0]["data"]["values"]
    assert [(cell["row"], cell["x"], cell["value"], cell["num"]) for cell in first] == [
        ("50%", 256, "2.500", 4),
        ("0%", 256, "-0.100", 4),
    ]
    assert first[0]["ink"] == "#000000" and first[1]["ink"] == "#ffffff"
    assert maps[2]["data"]["values"][0]["row"] == "vt" and maps[2]["data"]["values"][0]["bounds"] == "10% to 40%"
    figures = [each.get("data-line") for tag, each in reader.elements if tag == "figure" and each.get("data-line")]
    assert figures == ["a", "b", "a"], "each is hidden with its model"


def test_perplexities_far_apart_are_drawn_by_their_logarithm():
    _, (near,) = read(run())
    _, (far,) = read(run(estimates={"tail_ppl@512": Estimate(4000.0)}))
    scales = [
        [layer["encoding"]["y"]["scale"] for layer in spec["layer"] if "y" in layer["encoding"]] for spec in (near, far)
    ]
    assert all(scale == {"zero": False} for scale in scales[0]) and all(scale["type"] == "log" for scale in scales[1])


def test_training_and_coverage_are_thinned():
    """Of a long training and a long window too the page stays small; the last step is there."""
    rows = [{"step": str(i), "train/loss": f"{3 - i / 1e5}", "val/passkey@256": "0.5"} for i in range(20_000)]
    distance = np.arange(1, 100_000)
    covered = (distance, np.full(len(distance), 0.5), np.where(distance < 90_000, 1 / 90_000, 0.0))
    _, specs = read(run(logged=rows, coverage=covered))
    loss, watched, probability, pairs = specs[1:]
    steps = [row["x"] for row in loss["data"]["values"]]
    assert len(steps) <= MAX_POINTS + 1 and steps[0] == 1 and steps[-1] == 20_000
    assert watched["data"]["values"][0]["length"] == "256 tokens"
    found = probability["data"]["values"]
    assert len(found) == MAX_POINTS and {row["probability"] for row in found} == {0.5}
    assert found[0]["pairs"] == pytest.approx(10 / 9, rel=1e-2) and found[-1]["pairs"] is None
    assert pairs["layer"][-1]["encoding"]["y"]["scale"]["type"] == "log"


def test_a_run_that_has_just_begun_is_beside_a_longer_one():
    """It has too few steps to smooth."""
    longer, begun = ([{"step": str(i), "train/loss": "3.0"} for i in range(n)] for n in (25, 4))
    _, specs = read(run(logged=longer), run("b", logged=begun))
    (loss,) = [spec for spec in specs if any("run" in row for row in spec["data"]["values"])]
    assert {row["run"] for row in loss["data"]["values"]} == {"mine", "b"}


def test_window_and_target_are_marked_by_position_too():
    """The last point is at the middle of its bin, below the target."""
    ppl = {f"position_ppl@{i}-{i + 128}": Estimate(40.0) for i in range(0, 512, 128)}
    _, specs = read(run(estimates=ppl))
    (position,) = [spec for spec in specs if "position in the window" in json.dumps(spec)]
    marks = [layer["data"]["values"] for layer in position["layer"] if "data" in layer]
    assert marks[0] == [{"at": 256, "label": "window 256"}, {"at": 512, "label": "target 512"}]


def test_cost_is_what_is_known():
    reader, _ = read(run(cost={"training": {"seconds": 90.5, "tokens": 1_000_000}}), run("b", cost={"training": {}}))
    assert cells(reader, "What") == ["Seconds", "Tokens"], "a column for each thing that is known"
    assert cells(reader, "mine: training") == ["90.5", "1,000,000"]


def test_settings_that_differ_are_beside_each_other():
    one, other = ({"rope": rope, "lr": lr, "seed": "0"} for rope, lr in (("yarn", "1"), ("ntk", "2")))
    reader, _ = read(run(config=one), run("b", config=other))
    assert cells(reader, "rope") == ["yarn", "ntk"] and cells(reader, "lr") == ["1", "2"]
    assert cells(reader, "seed") is None
    reader, _ = read(*(run(name, config={"rope": name}) for name in "abc"))
    assert cells(reader, "rope") is None and [row[1][1].strip() for row in reader.rows if len(row) == 2][-3:] == [
        "a",
        "b",
        "c",
    ]
    assert "differences" not in read(run())[0].ids
    evaluation = Source("e", "e", "evaluation", config={"rope": "other"}, models={"m": {}})
    assert "differences" not in read(run(), evaluation)[0].ids, "of an evaluation and a training nothing is the same"


def test_perplexities_of_different_documents_are_remarked_on():
    def on(name, documents):
        models = {name: {"ppl@8": Estimate(3.0)}}
        return Source(name, name, "evaluation", {page_module.DOCUMENTS: documents}, models=models)

    assert "different documents" in page([on("a", "books"), on("b", "proofs")], "x")
    assert "different documents" not in page([on("a", "books"), on("b", "books")], "x")


@pytest.mark.parametrize(
    ("lengths", "settings", "said"),
    [
        (("8", "8"), ({}, {}), None),
        (("8", "16"), ({}, {}), "longest length 8 and 16"),
        (("8", "8"), ({"eval.windows": "4"}, {"eval.windows": "8"}), "eval.windows 4 and 8"),
        (("8", "8"), ({"eval.trials": "4"}, {"eval.trials": "8"}), None),
        (("8", "8"), ({"eval.add_bos": "true"}, {"eval.add_bos": "false"}), "eval.add_bos true and false"),
        (("8", "8"), ({"eval.seed": "0"}, {"eval.seed": "1"}), None),  # of prompts alone
        (("8", "8"), [{"eval.draw_documents": "true", "eval.seed": seed} for seed in "01"], "eval.seed 0 and 1"),
    ],
)
def test_perplexities_of_different_tokens_are_remarked_on(lengths, settings, said):
    """Which tokens are scored depends on the longest length: the same model has another perplexity at 4."""
    sources = [
        Source(
            name,
            name,
            "training",
            config=config,
            models={"extended": {"ppl@4": Estimate(3), f"tail_ppl@{n}": Estimate(3)}},
        )
        for name, n, config in zip("ab", lengths, settings, strict=True)
    ]
    text = page(sources, "x")
    assert ("different tokens" in text) == (said is not None)
    assert said is None or said in text
    assert "different tokens" not in page(sources[:1], "x")


def measured(name, metrics, **config):
    settings = {f"eval.{key}": value for key, value in config.items()}
    found = {metric: Estimate(3.0) for metric in metrics}
    return Source(name, name, "evaluation", config=settings, models={name: found}, tokenizers=frozenset({name}))


@pytest.mark.parametrize(
    ("metrics", "settings", "said"),
    [
        (["ppl@4"], [{}, {}], "The tokenizers differ"),
        (["passkey@4"], [{}, {}], None),
        (["sliding_ppl@4"], [{"stride": "2"}, {"stride": "4"}], "(eval.stride 2 and 4)"),
        (["passkey@4"], [{"stride": "2"}, {"stride": "4"}], None),
        (["needle_gain@4"], [{"depths": "null"}, {"depths": "[0, 1]"}], "(eval.depths null and [0, 1])"),
        (["needle@4"], [{"haystack": "a.txt"}, {"haystack": "b.txt"}], "(eval.haystack a.txt and b.txt)"),
        (["passkey@4"], [{"haystack": "a.txt"}, {"haystack": "b.txt"}], None),
        (["harness/boolq"], [{"limit": "null"}, {"limit": "100"}], "(eval.limit null and 100)"),
        (["harness/boolq"], [{"num_fewshot": "0"}, {"num_fewshot": "25"}], "(eval.num_fewshot 0 and 25)"),
        (["passkey@4"], [{"limit": "null"}, {"limit": "100"}], None),
        (["needle@4"], [{"haystack": "a.txt"}, {}], None),  # an older one does not tell
    ],
)
def test_what_else_cannot_be_compared_is_remarked_on(metrics, settings, said):
    text = page([measured(name, metrics, **config) for name, config in zip("ab", settings, strict=True)], "x")
    assert (said in text) if said else "<strong>" not in text.partition('id="results"')[2].partition("</section>")[0]


def test_retrieval_of_another_kind_is_not_remarked_on():
    """A passkey's depths beside a needle's: no number of the two is compared."""
    text = page([measured("a", ["passkey@4"], depths="null"), measured("b", ["needle@4"], depths="[0, 1]")], "x")
    assert "(eval.depths" not in text.partition('id="results"')[2].partition("</section>")[0]


def test_depths_of_several_heatmaps_ascend():
    """Whatever the order in which models have them."""
    few = {f"needle@8/{depth}": Estimate(0.5) for depth in (0, 1)}
    many = {f"needle@8/{depth}": Estimate(0.5) for depth in (0, 0.25, 0.5, 0.75, 1)}
    _, specs = read(run("a", few), run("b", many))
    orders = [spec["encoding"]["y"]["sort"] for spec in specs if "encoding" in spec]
    assert orders == [["0%", "25%", "50%", "75%", "100%"]] * 2


def test_a_score_that_may_be_an_error_sorts_the_lowest_first():
    reader, _ = read(run("a", {"harness/wikitext": Estimate(9.0), "harness/boolq": Estimate(0.5)}))
    first = [
        each["data-first"]
        for tag, each in reader.elements
        if "data-first" in each and "harness/" in each["data-family"]
    ]
    assert sorted(first) == ["ascending", "descending"]


def test_a_run_without_results_says_so():
    reader, specs = read(Source("a", "a", "training", logged=[{"step": "0", "train/loss": "3"}]))
    assert "models" not in reader.ids and "training" in reader.ids and len(specs) == 1


def test_the_models_of_a_run_are_explained_where_there_are_any():
    def of(*names):
        return page([Source("a", "a", "training", models={name: {"ppl@4": Estimate(3)} for name in names})], "x")

    assert "nothing trained" in of("untuned", "scaled", "extended") and "nothing trained" not in of("extended")
