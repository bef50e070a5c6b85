"""The page in a browser: it is opened, sorted, filtered and read. Skips itself where no Chromium is installed."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from pose.evaluation.task import Estimate
from pose.reporting.lines import Source
from pose.reporting.page import LIBRARIES, page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--virtual-time-budget=20000", "--window-size=1300,1500",
)  # fmt: skip
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">&amp;{{ 7*7 }}"

# What a reader does, between HELPERS and what is seen
HELPERS = """
const names = () => [...document.querySelectorAll("#models tbody tr:not([hidden])")].map((row) => row.dataset.line);
const head = (family, i) => document.querySelectorAll(`#models th.number[data-family="${family}"]`)[i];
const lines = (chart) => document.querySelectorAll(`#${chart} .mark-line path`).length;
const chart = (title) => [...document.querySelectorAll("figure")]
  .find((figure) => figure.querySelector("figcaption").firstChild.data === title).querySelector(".chart").id;
const rest = () => new Promise((done) => setTimeout(done, 300));
const seen = {};
async function go() { ACTIONS }
(async () => {
  for (let i = 0; i < 100 && !document.documentElement.dataset.drawn; i++) await rest();
  try { await go(); } catch (error) { seen.error = String(error); }
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = btoa(JSON.stringify(seen));
  document.body.append(result);
})();
"""


def estimates(shift=0.0):
    found = {f"tail_ppl@{n}": Estimate(40 + shift + n / 100, 38 + shift, 60 + shift, 8) for n in (256, 512, 1024)}
    found |= {f"passkey@{n}": Estimate(0.5 + shift / 100, 0.3, 0.9, 20) for n in (256, 1024)}
    found |= {f"position_ppl@{n}-{n + 256}": Estimate(41 + shift) for n in (0, 256, 512, 768)}
    found |= {
        f"needle_gain@{n}/{d}": Estimate(d + shift / 10, d - 0.1, d + 3, 4) for n in (256, 1024) for d in (0.0, 0.5)
    }
    return found | {f"ruler/vt@{n}": Estimate(0.25, 0.1, 0.4, 10) for n in (256, 1024)}


@pytest.fixture(scope="module")
def html():
    """Two runs with all that a run can have; of the first the name is hostile."""
    rows = [
        {"step": str(i), "train/loss": str(3 - i / 50), "train/lr": "0.001", "val/passkey@256": str(i / 50)}
        for i in range(0, 40, 2)
    ]
    distance = np.arange(1, 1024)
    covered = (distance, np.full(1023, 0.5), np.full(1023, 1 / 1023))
    runs = [
        Source(
            name=name, folder="runs/x", kind="training", facts={"Model": name, "RoPE": rope},
            config={"rope.factor": rope, "seed": "0"}, models={"untuned": estimates(30), "extended": estimates(shift)},
            window=256, target=1024, logged=rows, coverage=covered,
            cost={"training": {"seconds": 12.5, "tokens": 40960, "tokens_per_second": 3276.8}},
        )
        for name, rope, shift in ((HOSTILE, "yarn", 20), ("plain", "linear", 0))
    ]  # fmt: skip
    return page(runs, f"Two runs {HOSTILE}")


@pytest.fixture
def visit(html, tmp_path):
    """Opens the page, does what is asked, and gives what the script put into `seen`; no message in the console."""

    def visit_(actions, *options):
        file = tmp_path / "page.html"
        before, body, after = html.rpartition("</body>")
        script = f"<script>{HELPERS.replace('ACTIONS', actions)}</script>"
        file.write_text(before + script + body + after, encoding="utf-8")
        command = [BROWSER, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", *options, "--dump-dom", file.as_uri()]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert not re.findall(r".*:CONSOLE.*", ended.stderr), ended.stderr[-2000:]
        (coded,) = re.findall(r'<pre id="seen">(.*?)</pre>', ended.stdout) or [""]
        seen = json.loads(base64.b64decode(coded))
        assert "error" not in seen, seen
        return seen

    return visit_


def test_it_opens_and_every_chart_is_drawn(visit):
    seen = visit(
        """seen.title = document.title; seen.heading = document.querySelector("h1").textContent;
        seen.versions = [`vega-${vega.version}`, `vega-embed-${vegaEmbed.version}`];
        seen.images = document.images.length;
        seen.charts = document.querySelectorAll(".chart").length;
        seen.drawn = document.querySelectorAll(".chart svg.marks").length;
        seen.fetched = performance.getEntriesByType("resource").map((each) => each.name);
        seen.lines = lines(chart("Perplexity of the last tokens"));
        seen.cells = document.querySelectorAll("#ruler .mark-rect.role-mark path").length;"""
    )
    assert seen["title"] == seen["heading"] == f"Two runs {HOSTILE}" and seen["images"] == 0 and seen["fetched"] == []
    assert seen["versions"] == [LIBRARIES[0], LIBRARIES[2]]  # Vega-Lite 6.5.0 calls itself 6.4.3
    assert seen["charts"] == seen["drawn"] == 15
    assert seen["lines"] == 3  # untuned of both, and the two runs
    assert seen["cells"] == 6


def test_it_is_sorted_the_best_first(visit):
    seen = visit(
        """const button = head("tail_ppl", 0).querySelector("button");
        button.click(); seen.best = names(); seen.order = head("tail_ppl", 0).getAttribute("aria-sort");
        button.click(); seen.worst = names();
        head("passkey", 1).querySelector("button").click(); seen.passkey = names();
        const of = () => [...document.querySelectorAll("#models tbody .name")];
        of().find((each) => each.textContent.includes("script")).textContent = "zzz";
        document.querySelector("#models thead button").click(); seen.alphabet = of().map((each) => each.textContent);"""
    )
    assert seen["alphabet"] == ["plain", "untuned", "zzz"], "not by the marks before the names"
    assert seen["best"] == ["plain", HOSTILE, "untuned"] and seen["order"] == "ascending"
    assert seen["worst"] == seen["passkey"] == seen["best"][::-1]


def test_the_filter_is_of_table_and_charts(visit):
    seen = visit(
        """const field = document.getElementById("filter");
        field.value = "YARN script"; field.dispatchEvent(new Event("input")); await rest();
        seen.rows = names(); seen.count = document.getElementById("count").textContent;
        seen.lines = lines(chart("Perplexity of the last tokens"));
        field.value = ""; field.dispatchEvent(new Event("input")); await rest();
        seen.all = lines(chart("Perplexity of the last tokens"));
        document.querySelector("#models .toggle").click(); await rest();
        seen.without = lines(chart("Perplexity of the last tokens")); seen.still = names().length;"""
    )
    assert seen["rows"] == [HOSTILE] and seen["count"] == "1 of 3" and seen["lines"] == 1
    assert (seen["all"], seen["without"], seen["still"]) == (3, 2, 3)


def test_columns_of_other_metrics_are_shown_when_asked_for(visit):
    seen = visit(
        """const shown = () => [...document.querySelectorAll("#models thead [data-main]:not([hidden])")]
          .map((head) => head.dataset.family);
        const choose = (value) => { families.value = value; families.dispatchEvent(new Event("change")); };
        const families = document.getElementById("families");
        seen.first = shown(); choose("ruler/vt"); seen.one = shown(); choose("all"); seen.all = shown();"""
    )
    assert seen["first"] == ["tail_ppl", "passkey"] and seen["one"] == ["ruler/vt"]
    assert set(seen["all"]) == {"tail_ppl", "passkey", "ruler", "ruler/vt"}


def test_a_value_is_read_from_a_chart(visit):
    seen = visit(
        """const read = async (element) => {
          const box = element.getBoundingClientRect();
          const at = { bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
          for (const kind of ["pointerover", "pointermove"]) element.dispatchEvent(new PointerEvent(kind, at));
          await rest();
          return [...document.querySelectorAll("#vg-tooltip-element tr")].map((row) => row.innerText.trim());
        };
        const ppl = document.getElementById(chart("Perplexity of the last tokens"));
        seen.point = await read(ppl.querySelectorAll(".mark-symbol path")[3]);
        seen.cell = await read(document.querySelector("#needle_gain .mark-rect.role-mark path"));"""
    )
    point = dict(re.split(r":?\s*\t\s*", row) for row in seen["point"])
    assert point["model"] == HOSTILE
    assert point["window (tokens)"] == "256" and point["perplexity of the last tokens"] == "62.6"
    assert point["range"] == "58.0 to 80.0 (95 % interval)" and point["documents or prompts"] == "8"
    cell = dict(re.split(r":?\s*\t\s*", row) for row in seen["cell"])
    assert cell["prompt (tokens)"] == "256" and cell["depth of the needle"] == "0%" and "nats" in " ".join(cell)


@pytest.mark.parametrize(("scheme", "paper"), [("0", "rgb(21, 24, 27)"), ("1", "rgb(255, 255, 255)")])
def test_light_and_dark(visit, scheme, paper):
    """Text of the charts is of the page's colours, too."""
    seen = visit(
        """seen.paper = getComputedStyle(document.body).backgroundColor;
        seen.muted = getComputedStyle(document.querySelector(".note")).color;
        seen.label = getComputedStyle(document.querySelector(".chart .role-axis-label text")).fill;""",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    assert seen["paper"] == paper and seen["label"] == seen["muted"]


def test_it_prints(html, tmp_path):
    """On a few pages; where a PDF can be read here, without what only a screen has."""
    file, pdf = tmp_path / "page.html", tmp_path / "page.pdf"
    file.write_text(html, encoding="utf-8")
    options = [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}", "--no-pdf-header-footer"]
    subprocess.run([BROWSER, *OPTIONS, *options, file.as_uri()], capture_output=True, timeout=120, check=True)
    assert 3 <= len(re.findall(rb"/Type /Page\b", pdf.read_bytes())) <= 12
    if (reader := shutil.which("pdftotext")) is not None:
        text = subprocess.run([reader, "-layout", pdf, "-"], capture_output=True, text=True, check=True).stdout
        assert "Perplexity of the last tokens" in text and "Filter" not in text
