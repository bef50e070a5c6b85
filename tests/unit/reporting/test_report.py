"""Tables, plots, and the table over a sweep."""

import csv
import json

import numpy as np
import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf
from PIL import Image

import pose.reporting.plots
from pose.app.callbacks import SweepTable
from pose.evaluation.task import Estimate
from pose.reporting.plots import PANELS, plot_needle, plot_results, plot_ruler, plot_training
from pose.reporting.sweep import over_seeds
from pose.reporting.tables import comparison_tables, lengths_of, print_table, results_table

METRICS = {
    "ppl@512": 9.0, "ppl@256": 12.25, "tail_ppl@256": 20.06, "tail_ppl@2048": 5.0, "sliding_ppl@256": 7.0,
    "position_ppl@0-256": 30.0, "position_ppl@256-512": 20.0, "passkey@256": 1.0, "passkey@512": 0.25,
}  # fmt: skip


def cells(table) -> list[list[str]]:
    """Header and rows of a table, as text."""
    columns = [[column.header, *column.cells] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.fixture
def drawn(monkeypatch):
    """Everything that the figures about to be saved show, by file name."""
    shown, save = {}, pose.reporting.plots.save_figure

    def spy(figure, png):
        shown[png.name] = [
            {
                "title": axes.get_title(),
                "lines": {str(line.get_label()): line.get_xydata().tolist() for line in axes.lines},
            }
            for axes in figure.axes
        ]
        save(figure, png)

    monkeypatch.setattr(pose.reporting.plots, "save_figure", spy)
    return shown


def assert_picture(png):
    """A PNG that can be read in full and is not one colour."""
    with Image.open(png) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 200
    assert 0.003 < (pixels < 200).mean() < 0.5


@pytest.mark.parametrize(
    "family, expected",
    [
        ("ppl", [(256, 12.25), (512, 9.0)]),
        ("tail_ppl", [(256, 20.06), (2048, 5.0)]),
        ("sliding_ppl", [(256, 7.0)]),
        ("passkey", [(256, 1.0), (512, 0.25)]),
        ("needle", []),
    ],
)
def test_lengths_of_a_family_in_order(family, expected):
    assert list(lengths_of(METRICS, family).items()) == expected


def test_results_table_has_a_column_for_each_length_of_any_model():
    results = {
        "base": {"ppl@512": 12345.6, "ppl@2048": 9999.94, "ppl@64": 1.24, "passkey@512": 0.0, "tail_ppl@64": 3.0},
        "pose": {"ppl@512": 8.25, "passkey@512": 0.955, "passkey@256": 1.0},
    }
    table = results_table(results, "Results", ("ppl", "passkey"))
    assert cells(table) == [
        ["", "perplexity\n@64", "\n@512", "\n@2048", "passkey\n@256", "\n@512"],
        ["base", "1.2", "1.2e+04", "9999.9", "", "0%"],
        ["pose", "", "8.2", "", "100%", "96%"],
    ]


def test_results_table_of_nothing_measured():
    assert cells(results_table({"base": {}}, "Results", ("ppl", "passkey"))) == [[""], ["base"]]


def test_table_is_printed_whole(capsys):
    """A file or pipe gets 120 columns: nothing of an eight-length table is cut off."""
    results = {"a model": {f"tail_ppl@{2**i}": 10.0 + i for i in range(8, 16)}}
    print_table(results_table(results, "Title of it", ("tail_ppl",)))
    printed = capsys.readouterr().out
    for text in ("Title of it", "a model", "@256", "@32768", "18.0", "25.0"):
        assert text in printed
    assert max(len(line) for line in printed.splitlines()) <= 120


def test_names_in_brackets_are_printed_as_they_are(capsys):
    names = ["eval.tasks=[passkey] rope=yarn", "data.documents=[/data/a]"]
    print_table(results_table({name: {"ppl@8": 1.0} for name in names}, "Sweep", ("ppl",)))
    found = {name: {"ppl@8": Estimate(1.0), "harness/x": Estimate(0.5)} for name in names}
    for table in comparison_tables(found, "Results"):
        print_table(table)
    printed = "".join(capsys.readouterr().out.split())
    assert all(printed.count(name.replace(" ", "")) == 3 for name in names)


def test_a_benchmark_that_is_no_share_is_not_shown_as_one():
    (table,) = comparison_tables({"a": {"harness/wikitext": Estimate(25.34)}}, "Results")
    assert cells(table) == [["", "wikitext"], ["a", "25.3"]]


def test_plot_results_draws_a_line_for_each_model(tmp_path, drawn):
    png = tmp_path / "new" / "folder" / "results.png"
    other = {"tail_ppl@256": 19.0, "tail_ppl@2048": 90.0, "passkey@512": 0.5}
    plot_results({"pose": METRICS, "base": other}, png, window=256)
    assert_picture(png)
    tail, position, passkey = drawn["results.png"]
    assert tail["lines"]["pose"] == [[256, 20.06], [2048, 5.0]]
    assert tail["lines"]["base"] == [[256, 19.0], [2048, 90.0]]
    assert position["lines"]["pose"] == [[128, 30.0], [384, 20.0]]
    assert "base" not in position["lines"]
    assert passkey["lines"]["pose"] == [[256, 1.0], [512, 0.25]]
    for panel in (tail, position, passkey):
        assert [x for x, _ in panel["lines"]["window of 256"]] == [256, 256]


def test_plot_results_leaves_out_what_was_not_measured(tmp_path, drawn):
    plot_results({"pose": {"passkey@256": 1.0, "ppl@256": 3.0}}, tmp_path / "one.png")
    assert_picture(tmp_path / "one.png")
    assert [panel["title"] for panel in drawn["one.png"]] == ["passkey accuracy"]
    plot_results({"pose": {"ppl@256": 3.0}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_plot_training_reads_lightnings_csv(tmp_path, drawn):
    """Rows without a training loss, such as those of the learning rate, are passed over."""
    (tmp_path / "metrics.csv").write_text("epoch,lr,step,train/loss\n0,,0,5.5\n,1e-4,0,\n0,,9,4.25\n")
    plot_training(tmp_path / "metrics.csv", tmp_path / "training.png")
    assert_picture(tmp_path / "training.png")
    (lines,) = [panel["lines"] for panel in drawn["training.png"]]
    assert list(lines.values()) == [[[1, 5.5], [10, 4.25]]]


def test_plot_training_shows_what_was_watched(tmp_path, drawn):
    """A panel for each kind of metric, a line for each length; positions and depths, which are many, are left out."""
    names = "step,train/loss,val/passkey@64,val/passkey@128,val/position_ppl@0-64,val/needle@64/0.5,val/tail_ppl@128"
    rows = ["-1,,0.5,0.25,9,1,30", "4,5.5,,,,,", "4,,1.0,0.75,8,1,20"]
    (tmp_path / "metrics.csv").write_text("\n".join([names, *rows]) + "\n")
    plot_training(tmp_path / "metrics.csv", tmp_path / "training.png")
    assert_picture(tmp_path / "training.png")
    loss, passkey, tail = drawn["training.png"]
    assert list(loss["lines"].values()) == [[[5, 5.5]]]
    assert passkey["title"] == "passkey accuracy"
    assert passkey["lines"] == {"at 64 tokens": [[0, 0.5], [5, 1.0]], "at 128 tokens": [[0, 0.25], [5, 0.75]]}
    assert tail["lines"] == {"at 128 tokens": [[0, 30.0], [5, 20.0]]}


def test_plot_training_of_no_steps_writes_nothing(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,lr,step,train/loss\n,1e-4,0,\n")
    plot_training(tmp_path / "metrics.csv", tmp_path / "training.png")
    assert not (tmp_path / "training.png").exists()


def config(folder, mode=RunMode.MULTIRUN):
    return OmegaConf.create({"hydra": {"mode": mode, "sweep": {"dir": str(folder)}}})


def job(folder, overrides, metrics=None):
    """Leaves what a job of a multirun leaves; without metrics, what one leaves that failed."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))


def test_sweep_table_joins_the_jobs(tmp_path, capsys):
    """In the order of the jobs, 10 after 2; no row for a job that failed, and numbers alone."""
    job(tmp_path / "0", ["rope=linear"], {"tail_ppl@256": 20.5, "passkey@256": 1.0, "model": "a name"})
    job(tmp_path / "2", ["rope=ntk"], {"tail_ppl@256": 19.0})
    job(tmp_path / "10", ["rope=yarn", "seed=${hydra:job.num}"], {"tail_ppl@256": 18, "tail_ppl@512": 17.5})
    job(tmp_path / "3", ["rope=broken"])
    SweepTable().on_multirun_end(config(tmp_path))
    with open(tmp_path / "sweep.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["overrides", "passkey@256", "tail_ppl@256", "tail_ppl@512"],
        ["rope=linear", "1.0", "20.5", ""],
        ["rope=ntk", "", "19.0", ""],
        ["rope=yarn seed=${hydra:job.num}", "", "18", "17.5"],
    ]
    printed = capsys.readouterr().out
    for text in ("rope=linear", "rope=yarn", "20.5", "17.5", "100%"):
        assert text in printed


def test_sweep_table_grows_with_every_job(tmp_path):
    callback = SweepTable()
    callback.on_job_end(config(tmp_path), None)
    assert not (tmp_path / "sweep.csv").exists()
    for i in range(3):
        job(tmp_path / str(i), [f"seed={i}"], {"ppl@256": float(i)})
        callback.on_job_end(config(tmp_path), None)
        with open(tmp_path / "sweep.csv", newline="") as file:
            assert [row["overrides"] for row in csv.DictReader(file)] == [f"seed={j}" for j in range(i + 1)]


def test_single_runs_write_no_sweep(tmp_path):
    job(tmp_path / "0", ["seed=0"], {"ppl@256": 1.0})
    SweepTable().on_job_end(config(tmp_path, RunMode.RUN), None)
    assert not (tmp_path / "sweep.csv").exists()


def test_a_sweep_without_results_says_nothing(tmp_path, capsys):
    SweepTable().on_multirun_end(config(tmp_path))
    assert capsys.readouterr().out == ""


ESTIMATES = {
    "a": {
        "ppl@256": Estimate(12.25, 11.0, 14.04, 5), "ppl@1024": Estimate(9.0, num=1),
        "bits_per_byte@256": Estimate(1.2345),
        "passkey@256": Estimate(0.95, 0.764, 0.991, 20), "needle@256": Estimate(0.5, 0.3, 0.7, 4),
        "needle@256/0.0": Estimate(0.25, num=2), "needle@256/0.5": Estimate(0.75, num=2),
        "ruler/vt@256": Estimate(0.4, 0.2, 0.6, 5), "ruler/cwe@256": Estimate(0.6), "ruler/vt@1024": Estimate(0.0),
        "harness/boolq": Estimate(0.751, 0.74, 0.762, 3270),
    },
    "b/c": {"ppl@256": Estimate(20.0, 19.0, 21.0, 5), "ruler/vt@256": Estimate(1.0)},
}  # fmt: skip


def test_comparison_tables_have_parts_by_family_and_one_of_benchmarks():
    by_length, benchmarks = comparison_tables(ESTIMATES, "Results")
    rows = cells(by_length)
    assert rows[0] == ["", "@256", "@1,024"]
    assert rows[1:4] == [
        ["[bold]perplexity", "", ""], ["a", "12.2\n[dim]11.0-14.0", "9.0"], ["b/c", "20.0\n[dim]19.0-21.0", ""]
    ]  # fmt: skip
    assert ["a", "1.234", ""] in rows or ["a", "1.235", ""] in rows
    assert ["a", "95%\n[dim]76%-99%", ""] in rows and ["[bold]needle", "", ""] in rows
    assert rows[rows.index(["[bold]ruler/vt", "", ""]) + 1] == ["a", "40%\n[dim]20%-60%", "0%"]
    assert not any("0.0" in row[0] or "0.5" in row[0] for row in rows), "depths are for the heatmap"
    assert cells(benchmarks) == [["", "boolq"], ["a", "75.1%\n[dim]74.0%-76.2%"], ["b/c", ""]]


def test_no_table_without_metrics():
    assert comparison_tables({"a": {}}, "Results") == []


def test_the_plot_of_estimates_has_bands_and_the_mean_of_ruler(tmp_path, drawn):
    plot_results(ESTIMATES, tmp_path / "all.png", 256, tuple(PANELS))
    assert_picture(tmp_path / "all.png")
    shown = {axes["title"]: axes["lines"] for axes in drawn["all.png"] if axes["title"]}
    assert set(shown) == {
        "perplexity",
        "bits per byte",
        "passkey accuracy",
        "needle accuracy",
        "RULER, mean of its tasks",
    }
    assert shown["perplexity"]["a"] == [[256, 12.25], [1024, 9.0]]
    assert shown["RULER, mean of its tasks"]["a"] == [[256, 0.5], [1024, 0.0]]


def test_intervals_are_bands_and_a_model_has_one_color(tmp_path, monkeypatch):
    """In a panel too where the first model has no values."""
    figures = []
    monkeypatch.setattr(pose.reporting.plots, "save_figure", lambda figure, png: figures.append(figure))
    first = {"ppl@256": Estimate(9.0, 8.0, 11.0), "ppl@512": Estimate(8.0, 7.0, 9.0), "ppl@1024": Estimate(7.0)}
    second = {"ppl@256": Estimate(5.0), "passkey@256": Estimate(0.5, 0.25, 0.75)}
    plot_results({"a": first, "b": second}, tmp_path / "all.png", None, ("passkey", "ppl"))
    passkey, ppl = figures[0].axes
    (band,) = ppl.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(256, 8), (256, 11), (512, 7), (512, 9)}
    assert [line.get_color() for line in (*ppl.lines, *passkey.lines)] == ["C0", "C1", "C1"]
    assert passkey.get_ylim() == (-0.05, 1.05) and ppl.get_yscale() == "log"
    pose.reporting.plots.plt.close(figures[0])


def test_heatmaps_have_the_cells_of_every_model(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(pose.reporting.plots, "_plot_heatmaps", lambda cells, png, *_: found.update({png.name: cells}))
    plot_needle(ESTIMATES, tmp_path / "needle.png")
    plot_ruler(ESTIMATES, tmp_path / "ruler.png")
    assert found["needle.png"] == {"a": {(0.0, 256): 0.25, (0.5, 256): 0.75}}
    assert found["ruler.png"] == {
        "a": {("vt", 256): 0.4, ("cwe", 256): 0.6, ("vt", 1024): 0.0},
        "b/c": {("vt", 256): 1.0},
    }


def test_a_heatmap_shows_each_cell_in_its_place_on_a_scale_from_0_to_1(tmp_path, monkeypatch):
    """Rows in the order they come in, the least depth at the top; columns by length; what is not measured is empty."""
    figures = []
    monkeypatch.setattr(pose.reporting.plots, "save_figure", lambda figure, png: figures.append(figure))
    cells = {"needle@256/0": 0.25, "needle@256/0.5": 0.75, "needle@1024/0.5": 0.5, "needle@1024/1": 0.625}
    plot_needle({"a": cells, "b": {"needle@64/0": 1.0}}, tmp_path / "needle.png")
    (axes, other, *_) = figures[0].axes
    (image,) = axes.images
    nan = np.nan
    expected = [[nan, 0.25, nan], [nan, 0.75, 0.5], [nan, nan, 0.625]]
    np.testing.assert_array_equal(image.get_array().filled(nan), expected)
    np.testing.assert_array_equal(other.images[0].get_array().filled(nan)[0], [1.0, nan, nan])
    assert image.get_clim() == (0, 1) and image.origin == "upper"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "256", "1,024"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "50%", "100%"]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(1, 0): "25%", (1, 1): "75%", (2, 1): "50%", (2, 2): "62%"}
    assert axes.get_title() == "a" and other.get_title() == "b"
    pose.reporting.plots.plt.close(figures[0])


def test_jobs_that_differ_in_their_seed_are_one_row():
    jobs = [("seed=0", {"ppl@8": 1.0}), ("seed=1", {"ppl@8": 3.0}), ("data.seed=1 seed=2", {"ppl@8": 5.0})]
    assert over_seeds(jobs) == {
        "default": [{"ppl@8": 1.0}, {"ppl@8": 3.0}], "data.seed=1": [{"ppl@8": 5.0}]
    }  # fmt: skip


def test_heatmaps_are_pictures_and_none_without_cells(tmp_path):
    plot_needle(ESTIMATES, tmp_path / "needle.png")
    plot_ruler(ESTIMATES, tmp_path / "ruler.png")
    plot_needle({"a": {"ppl@8": 3.0}}, tmp_path / "none.png")
    for name in ("needle.png", "ruler.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 200
    assert not (tmp_path / "none.png").exists()
