"""Plots: what they draw, where, and that what they write is a picture."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

import pose.reporting.plots
from pose.evaluation.task import Estimate
from pose.reporting.plots import (
    COLORS,
    PANELS,
    label_of,
    plot_measured,
    plot_needle,
    plot_results,
    plot_ruler,
    plot_training,
    top_of,
    training_curves,
)

METRICS = {
    "ppl@512": 9.0, "ppl@256": 12.25, "tail_ppl@256": 20.06, "tail_ppl@2048": 5.0, "sliding_ppl@256": 7.0,
    "position_ppl@0-256": 30.0, "position_ppl@256-512": 20.0, "passkey@256": 1.0, "passkey@512": 0.25,
}  # fmt: skip
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
        assert [x for x, _ in panel["lines"]["window of 256 tokens"]] == [256, 256]


def test_plot_results_leaves_out_what_was_not_measured(tmp_path, drawn):
    plot_results({"pose": {"passkey@256": 1.0, "ppl@256": 3.0}}, tmp_path / "one.png")
    assert_picture(tmp_path / "one.png")
    assert [panel["title"] for panel in drawn["one.png"]] == ["passkey accuracy"]
    plot_results({"pose": {"ppl@256": 3.0}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_all_plots_of_what_was_measured(tmp_path, drawn):
    """Those that a training always has, those of its tasks, and heatmaps where there are any."""
    plot_measured({"a": {"passkey@256": 1.0, "ppl@256": 3.0}}, tmp_path / "default")
    assert [panel["title"] for panel in drawn["evaluation.png"]] == ["passkey accuracy"]
    assert [file.name for file in (tmp_path / "default").iterdir()] == ["evaluation.png"]
    other = {"ppl@256": 3.0, "needle@256": 0.5, "needle@256/0.5": 0.5, "ruler/vt@256": 0.25}
    plot_measured({"a": other}, tmp_path / "other")
    assert [panel["title"] for panel in drawn["evaluation.png"]] == [
        "perplexity", "needle accuracy", "RULER, mean of its tasks"
    ]  # fmt: skip
    assert {file.name for file in (tmp_path / "other").iterdir()} == {"evaluation.png", "needle.png", "ruler.png"}
    gain = {"ppl@256": 3.0, "needle_gain@256": 1.5, "needle_gain_kept@256": np.nan, "needle_gain@256/0.125": 1.5}
    plot_measured({"a": gain, "b": {"needle_gain@256/0.125": 0.5}}, tmp_path / "gain")
    titles = [panel["title"] for panel in drawn["evaluation.png"]]
    assert titles == ["needle gain (nats per token)", "needle gain kept"]
    assert {file.name for file in (tmp_path / "gain").iterdir()} == {"evaluation.png", "needle_gain.png"}
    plot_measured({"a": {}}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_plot_training_reads_lightnings_csv(tmp_path, drawn):
    """Rows without a training loss, such as those of the learning rate, are passed over."""
    (tmp_path / "metrics.csv").write_text("epoch,lr,step,train/loss\n0,,0,5.5\n,1e-4,0,\n0,,9,4.25\n")
    plot_training(tmp_path / "metrics.csv", tmp_path / "training.png")
    assert_picture(tmp_path / "training.png")
    (lines,) = [panel["lines"] for panel in drawn["training.png"]]
    assert list(lines.values()) == [[[1, 5.5], [10, 4.25]]]


def test_plot_training_shows_what_was_watched(tmp_path, drawn):
    """A panel for each kind of metric, a line for each length, by number and not by letter; no positions and depths."""
    names = (
        "step,train/loss,val/passkey@1024,val/passkey@128,val/passkey@64,val/position_ppl@0-64,val/needle@64/0.5,"
        "val/tail_ppl@128,val/short_ppl_increase"
    )
    rows = ["-1,,0.2,0.25,0.5,9,1,30,0.4", "4,5.5,,,,,,,", "4,,0.5,0.75,1.0,8,1,20,0.1"]
    (tmp_path / "metrics.csv").write_text("\n".join([names, *rows]) + "\n")
    plot_training(tmp_path / "metrics.csv", tmp_path / "training.png")
    assert_picture(tmp_path / "training.png")
    loss, tail, passkey, increase = drawn["training.png"]
    assert list(loss["lines"].values()) == [[[5, 5.5]]]
    assert passkey["title"] == "passkey accuracy" and increase["title"] == "increase of perplexity at short lengths"
    assert list(passkey["lines"].items()) == [
        ("at 64 tokens", [[0, 0.5], [5, 1.0]]),
        ("at 128 tokens", [[0, 0.25], [5, 0.75]]),
        ("at 1,024 tokens", [[0, 0.2], [5, 0.5]]),
    ]
    assert tail["lines"] == {"at 128 tokens": [[0, 30.0], [5, 20.0]]}


def training_csv(folder, columns, num=60):
    """A metrics.csv with noisy values that fall from 4 to 2; some cells empty where `columns` says so."""
    noise = np.random.default_rng(0).normal(0, 0.3, num)
    lines = [",".join(["step", *columns])]
    for i in range(num):
        lines.append(
            ",".join(
                [str(i), *(str(4 - 2 * i / num + noise[i]) if i % every == 0 else "" for every in columns.values())]
            )
        )
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder / "metrics.csv"


def test_a_noisy_loss_is_drawn_smoothed_over_what_was_logged(tmp_path, drawn):
    """The smoothed line falls, where the logged one goes up and down."""
    plot_training(training_csv(tmp_path, {"train/loss": 1}), tmp_path / "training.png")
    (panel,) = drawn["training.png"]
    logged, smoothed = (np.array(panel["lines"][name]) for name in ("as logged", "smoothed"))
    assert len(logged) == 60 and logged[:, 0].tolist() == list(range(1, 61))
    assert (np.diff(logged[:, 1]) > 0).mean() > 0.3 > 0.1 > (np.diff(smoothed[:, 1]) > 0).mean()
    assert np.abs(smoothed[:, 1] - (4 - 2 * (smoothed[:, 0] - 1) / 60)).mean() < 0.15, "where the noise has 0.3"


CROSS_ENTROPY, OBJECTIVE = "cross-entropy loss (nats per token)", "training objective (what is minimised)"
BY_KIND = [
    CROSS_ENTROPY, "cross-entropy loss of text (nats per token)", "cross-entropy loss of retrieval (nats per token)"
]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "titles"),
    [
        ({"train/loss": 1}, [CROSS_ENTROPY]),
        ({"train/loss": 1, "train/loss_text": 1, "train/loss_retrieval": 3, "cost/step_seconds": 1}, BY_KIND),
        ({"train/loss": 1, "train/loss_text": 1, "train/loss_retrieval": 99}, BY_KIND),
        ({"train/loss": 1, "train/loss_text": 1}, [CROSS_ENTROPY]),
        (
            {"train/grad_norm": 1, "train/loss": 1, "train/lr": 1},
            [CROSS_ENTROPY, "learning rate", "norm of the gradient"],
        ),
        ({"train/loss_text": 1}, ["cross-entropy loss of text (nats per token)"]),
        (
            {"train/loss": 1, "train/loss_lm": 1, "train/loss_kl": 1},
            [CROSS_ENTROPY, "KL at skipped positions (nats per token)", OBJECTIVE],
        ),
        (
            {f"train/{name}": 1 for name in ("loss", "loss_lm", "loss_short", "loss_skipped", "loss_text")}
            | {"train/loss_retrieval": 3},
            [
                CROSS_ENTROPY,
                "distance to the original, plain positions",
                "distance to the original, skipped positions",
                OBJECTIVE,
                "training objective of text",
                "training objective of retrieval",
            ],
        ),
    ],
)
def test_what_was_logged_of_a_training_has_a_panel_each(tmp_path, drawn, columns, titles):
    """The cross-entropy, the other parts of an objective, and what is minimised; text and retrieval where both are."""
    plot_training(training_csv(tmp_path, columns), tmp_path / "training.png")
    assert_picture(tmp_path / "training.png")
    assert [panel["title"] for panel in drawn["training.png"]] == titles


def test_objectives_are_compared_by_the_loss_of_the_language_model():
    """And an objective's parts, or the sum of them, with no cross-entropy."""
    lm = {"step": "0", "train/loss": "2.0", "train/loss_text": "1.5", "train/loss_retrieval": "2.5"}
    long_short = {name: value.replace(".", "3.") for name, value in lm.items()} | {"train/loss_lm": "2.25"}
    (plain, _), (kept, _) = (training_curves([row]) for row in (lm, long_short))
    assert plain.keys() & kept.keys() == {"train/loss_lm"}
    assert (plain["train/loss_lm"], kept["train/loss_lm"]) == ([(1, 2.0)], [(1, 2.25)])
    assert kept["train/loss"] == [(1, 23.0)]
    mixed, _ = training_curves([lm, long_short | {"step": "1"}])
    assert mixed["train/loss_lm"] == [(1, 2.0), (2, 2.25)], "of a run that goes on with another objective"


@pytest.mark.parametrize(
    "damage", ["4,5.5", "5,x,1,2,3", "\x00\x00\x00\x00\x00", '6,"4.0', "7,1e,0.5", "²,4.0,0.5", "", "8,4"]
)
def test_a_damaged_row_does_not_break_the_training_plot(tmp_path, drawn, capsys, damage):
    rows = ["step,train/loss,val/passkey@64", "0,5.5,0.5", damage, "9,4.25,1.0", "10,3.0"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))  # and the last one is cut off
    plot_training(tmp_path / "metrics.csv", tmp_path / "training.png")
    loss, passkey = drawn["training.png"]
    assert list(loss["lines"].values()) == [[[1, 5.5], [10, 4.25]]]
    assert passkey["lines"] == {"at 64 tokens": [[1, 0.5], [10, 1.0]]}
    assert f"2 rows of {tmp_path}/metrics.csv are damaged, and left out" in capsys.readouterr().out


def test_plots_that_a_report_has_no_data_for_do_not_stay(tmp_path):
    """As those of a run that goes on with other tasks: the old ones would be taken for what came of it."""
    gain = {"needle@256": 0.5, "needle@256/0.5": 0.5, "needle_gain@256/0.5": 1.5, "ruler/vt@256": 0.25}
    plot_measured({"a": METRICS | gain}, tmp_path)
    names = {"evaluation.png", "needle.png", "needle_gain.png", "ruler.png"}
    assert {file.name for file in tmp_path.iterdir()} == names
    plot_measured({"a": METRICS}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.png"]
    plot_measured({}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_plot_training_of_no_steps_writes_nothing(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,lr,step,train/loss\n,1e-4,0,\n")
    (tmp_path / "training.png").write_text("of a run before")
    plot_training(tmp_path / "metrics.csv", tmp_path / "training.png")
    assert not (tmp_path / "training.png").exists()


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
    assert shown["RULER, mean of its tasks"]["a"] == [[256, 0.4], [1024, 0.0]], "of vt alone"


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be saved."""
    found = []
    monkeypatch.setattr(pose.reporting.plots, "save_figure", lambda figure, png: found.append(figure))
    return found


def test_intervals_are_bands_and_a_model_has_one_color(tmp_path, figures):
    """In a panel too where the first model has no values; a single interval, which has no width, is a bar."""
    first = {"ppl@256": Estimate(9.0, 8.0, 11.0), "ppl@512": Estimate(8.0, 7.0, 9.0), "ppl@1024": Estimate(7.0)}
    second = {"ppl@256": Estimate(5.0), "passkey@256": Estimate(0.5, 0.25, 0.75)}
    plot_results({"a": first, "b": second}, tmp_path / "all.png", None, ("passkey", "ppl"))
    passkey, ppl = figures[0].axes
    (band,) = ppl.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(256, 8), (256, 11), (512, 7), (512, 9)}
    (bar,) = passkey.collections
    assert bar.get_segments()[0].tolist() == [[256, 0.25], [256, 0.75]]
    assert [line.get_color() for line in (*ppl.lines, *passkey.lines)] == [COLORS[0], COLORS[1], COLORS[1]]
    assert len({line.get_marker() for line in ppl.lines}) == 2
    assert passkey.get_ylim() == (-0.05, 1.05) and ppl.get_yscale() == "log"


def test_the_target_is_marked_beside_the_window(tmp_path, figures):
    for target in (2048, 256, None):
        plot_results({"a": METRICS}, tmp_path / "all.png", 256, ("tail_ppl", "passkey"), target=target)
        for axes in figures[-1].axes:
            marks = {line.get_label(): line.get_xdata() for line in axes.lines if line.get_label() != "a"}
            wanted = {"window of 256 tokens": [256, 256]}
            wanted |= {"target of 2,048 tokens": [2048, 2048]} if target == 2048 else {}
            assert marks == wanted
        legend = [text.get_text() for text in figures[-1].legends[0].get_texts()]
        assert legend == ["a", *wanted]


@pytest.mark.parametrize(
    "lengths", [[2**i for i in range(8, 18)], [1000, 1024, 2000, 2048, 4096], [4096], [8192, 8193]]
)
def test_labels_of_ticks_do_not_overlap(tmp_path, figures, lengths):
    """In the picture itself; every length keeps its tick, and the ends their labels."""
    metrics = {
        f"{family}@{n}": 1000.0 / n for n in lengths for family in ("ppl", "tail_ppl", "bits_per_byte", "passkey")
    }
    metrics |= {f"position_ppl@{i * lengths[-1] // 8}-{(i + 1) * lengths[-1] // 8}": 10.0**i for i in range(8)}
    plot_results({"a": metrics}, tmp_path / "all.png", None, tuple(PANELS))
    (figure,) = figures
    figure.savefig(tmp_path / "all.png")
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            labels = [t.label1 for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]
            boxes = [label.get_window_extent() for label in labels]
            overlapping = [a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]]
            assert not any(overlapping), (axes.get_title(), [label.get_text() for label in labels])
            assert labels
        if axes.get_title() != "perplexity by position":
            assert axes.get_xticks().tolist() == lengths
            shown = [label.get_text() for label in axes.get_xticklabels()]
            assert (shown[0], shown[-1]) == (f"{lengths[0]:,}", f"{lengths[-1]:,}")


# What is drawn, by name.
NAMES = {
    "$x^{$": "$x^{$", "_hidden": "_hidden", "a$b$c": "a$b$c", "<script>": "<script>", "new\nline": "new line",
    "\x1b[2J": "[2J", "\udcff": "", "x" * 300: "..." + "x" * 37, "[b]": "[b]", "\u202etxet": "txet", "\u6f22": "\u6f22",
}  # fmt: skip


def test_names_of_models_are_drawn_as_they_are(tmp_path, figures, recwarn):
    """No mathematics, nothing left out of the legend, no control characters; and the picture can be written."""
    results = {name: {"ppl@8": 1.0 + i, "ppl@16": 2.0, "needle@8/0.5": 0.5} for i, name in enumerate(NAMES)}
    plot_results(results, tmp_path / "all.png", None, ("ppl",))
    plot_needle(results, tmp_path / "needle.png")
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    titles = [axes.get_title() for axes in figures[1].axes[: len(NAMES)]]
    for texts in (legend, titles):
        assert [text.replace(r"\$", "$").strip() for text in texts] == list(NAMES.values())
    for figure in figures:
        SAVE(figure, tmp_path / "written.png")
        assert (tmp_path / "written.png").stat().st_size > 1000
    assert not [str(warning.message) for warning in recwarn]
    assert label_of("_hidden") == " _hidden", "which matplotlib leaves out of the legends that it makes itself"


SAVE = pose.reporting.plots.save_figure


def test_heatmaps_have_the_cells_of_every_model_with_their_number(tmp_path, figures):
    plot_needle(ESTIMATES, tmp_path / "needle.png")
    plot_ruler(ESTIMATES, tmp_path / "ruler.png")
    needle, ruler = ([axes for axes in figure.axes if axes.get_title()] for figure in figures)
    shown = [{text.get_position(): text.get_text() for text in axes.texts} for axes in (*needle, *ruler)]
    assert shown == [
        {(0, 0): "25%\nn=2", (0, 1): "75%\nn=2"},
        {(0, 0): "40%\nn=5", (1, 0): "0%\nn=1", (0, 1): "60%\nn=1"},
        {(0, 0): "100%\nn=1"},
    ]
    assert [axes.get_title() for axes in (*needle, *ruler)] == ["a", "a", "b/c"]
    assert [label.get_text() for label in ruler[0].get_yticklabels()] == ["vt", "cwe"]


def luminance(color):
    """WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_a_heatmap_can_be_read_by_the_colour_blind_and_on_every_colour(tmp_path, figures):
    """Brighter is more, all along, and each number stands out from its cell: a contrast of at least 3 (WCAG)."""
    shares = [i / 40 for i in range(41)]
    plot_needle({"a": {f"needle@{n + 1}/0": Estimate(share) for n, share in enumerate(shares)}}, tmp_path / "x.png")
    axes = figures[0].axes[0]
    (image,) = axes.images
    cells = [luminance(image.cmap(image.norm(share))[:3]) for share in shares]
    assert all(np.diff(cells) > 0)
    for text, cell in zip(sorted(axes.texts, key=lambda text: text.get_position()), cells, strict=True):
        bright, dark = sorted([luminance(text.get_color()), cell], reverse=True)
        assert (bright + 0.05) / (dark + 0.05) > 3, text.get_text()


def test_a_heatmap_shows_each_cell_in_its_place_on_a_scale_from_0_to_1(tmp_path, figures):
    """Rows in the order they come in, the least depth at the top; columns by length; what is not measured is empty."""
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


def test_a_heatmap_of_gains_goes_from_0_to_the_largest(tmp_path, figures):
    """Below 0 and not a number too; on one scale for all models, and apart from the needles that are found."""
    cells = {"needle_gain@256/0.125": 1.25, "needle_gain@512/0.125": Estimate(-0.0123, num=4), "needle@256/0.125": 0.5}
    plot_needle(
        {"a": cells, "b": {"needle_gain@256/0.125": 2.5, "needle_gain@512/0.125": np.nan}}, tmp_path, "needle_gain"
    )
    plot_needle({"a": {"needle_gain@256/0": -1.0}}, tmp_path, "needle_gain")
    (axes, other, colors), (only, *_) = (figure.axes for figure in figures)
    assert [axes.images[0].get_clim(), other.images[0].get_clim()] == [(0, 2.5)] * 2
    shown = [{text.get_position(): text.get_text() for text in each.texts} for each in (axes, other, only)]
    assert shown == [{(0, 0): "1.250", (1, 0): "-0.012\nn=4"}, {(0, 0): "2.500"}, {(0, 0): "-1.000"}]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["12.5%"]
    figures[0].canvas.draw()
    assert [label.get_text() for label in colors.get_yticklabels()][:2] == ["0", "0.5"]
    assert only.images[0].get_clim()[0] == 0 < only.images[0].get_clim()[1]


def test_heatmaps_are_pictures_and_none_without_cells(tmp_path):
    plot_needle(ESTIMATES, tmp_path / "needle.png")
    plot_ruler(ESTIMATES, tmp_path / "ruler.png")
    plot_needle({"a": {"ppl@8": 3.0}}, tmp_path / "none.png")
    for name in ("needle.png", "ruler.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 200
    assert not (tmp_path / "none.png").exists()


def test_the_colours_of_a_heatmap_end_at_the_largest_finite_value():
    """One infinite cell would leave all others one colour."""
    assert top_of("needle_gain", [0.5, math.inf, 2.0, -1.0]) == 2.0
    assert top_of("needle_gain", [-0.2, 0.0]) == 1e-3 and top_of("needle_gain", []) == 1e-3
    assert top_of("passkey", [0.2]) == 1.0
