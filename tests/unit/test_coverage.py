"""pose.coverage: closed forms against enumeration, samples against closed forms, and the command."""

import csv
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pose.reporting.coverage
from pose.app import schema
from pose.app.run import Run
from pose.coverage import coverage, pairs_by_distance
from pose.errors import ConfigError
from pose.files import REPOSITORY
from pose.positions import (
    Cream,
    EndAnchor,
    EqualChunks,
    Full,
    Layout,
    Mix,
    PoSE,
    PositionSampler,
    RandPos,
    Released,
    SentenceSkip,
    ShortPI,
    SingleShift,
)
from pose.reporting.coverage import coverage_table, plot_coverage

# ----- by enumeration -----


def enumerated(examples, target_len):
    """Probability and share of pairs by distance of (position ids, weight) pairs; weights add up to 1."""
    probability, pairs = np.zeros(target_len), np.zeros(target_len)
    for ids, weight in examples:
        found = Counter(b - a for a, b in combinations(ids, 2))
        for distance, count in found.items():
            probability[distance] += weight
            pairs[distance] += weight * count
    return probability[1:], pairs[1:] / max(pairs.sum(), 1e-300)


def two_chunks(train_len, target_len, longest_first):
    for first in range(1, longest_first + 1):
        for skip in range(target_len - train_len + 1):
            ids = [i if i < first else i + skip for i in range(train_len)]
            yield ids, 1 / (longest_first * (target_len - train_len + 1))


def three_chunks(train_len, target_len):
    high = target_len - train_len
    for a in range(1, train_len - 1):
        for b in range(1, train_len - a):
            for u in range(high + 1):
                for v in range(u, high + 1):
                    ids = [i + (u if i >= a else 0) + (v - u if i >= a + b else 0) for i in range(train_len)]
                    yield ids, 1 / ((train_len - 2) * (train_len - a - 1) * (high + 1) * (high - u + 1))


def contiguous(length):
    yield range(length), 1.0


def end_anchor(train_len, target_len, cue_len):
    yield [*range(train_len - cue_len), *range(target_len - cue_len, target_len)], 1.0


def subsets(train_len, target_len):
    return ((ids, 1 / comb(target_len, train_len)) for ids in combinations(range(target_len), train_len))


SIZES = [(L, T) for L in range(2, 8) for T in range(L, 16)]


@pytest.mark.parametrize(
    ("make", "examples"),
    [
        (PoSE, lambda L, T: two_chunks(L, T, L - 1)),
        (Released, lambda L, T: two_chunks(L, T, (L + 1) // 2)),
        (lambda L, T: PoSE(L, T, num_chunks=1), lambda L, T: contiguous(L)),
        (ShortPI, lambda L, T: contiguous(L)),
        (SingleShift, lambda L, T: contiguous(L)),
        (Full, lambda L, T: contiguous(T)),
        (lambda L, T: PoSE(L, T, curriculum=[[0.5, L]]), lambda L, T: two_chunks(L, T, L - 1)),
    ],
)
def test_closed_forms_are_the_enumeration(make, examples):
    """Every l_0 and every u of every small size."""
    assert_closed_forms(make, examples, SIZES)


@pytest.mark.parametrize("of_example", [2, 3])
def test_closed_forms_of_a_cue_are_the_enumeration(of_example):
    """Of sizes with text before the shortest cue."""

    def cue_len(L):
        return max(L // of_example, 2)

    assert_closed_forms(
        lambda L, T: EndAnchor(L, T, cue_len(L)),
        lambda L, T: end_anchor(L, T, cue_len(L)),
        [(L, T) for L, T in SIZES if L > 2],
    )


def assert_closed_forms(make, examples, sizes):
    for L, T in sizes:
        covered = coverage(make(L, T), num_samples=2)
        probability, pair_share = enumerated(examples(L, T), T)
        assert covered.distance.tolist() == list(range(1, T))
        assert covered.probability == pytest.approx(probability, abs=1e-12), (L, T)
        assert covered.pair_share == pytest.approx(pair_share, abs=1e-12), (L, T)
        assert covered.probability_exact and covered.pair_share_exact and covered.num_samples == 0


def test_pairs_of_randpos_are_the_enumeration():
    for L, T in [(2, 2), (2, 7), (3, 8), (5, 9), (6, 6)]:
        covered = coverage(RandPos(L, T), num_samples=50)
        assert covered.pair_share == pytest.approx(enumerated(subsets(L, T), T)[1], abs=1e-12)
        assert covered.pair_share_exact and not covered.probability_exact and covered.num_samples == 50


@pytest.mark.parametrize("plain_share", [0, 0.25, 1])
def test_a_mix_covers_the_mean_of_what_it_mixes(plain_share):
    examples = [(ids, (1 - plain_share) * weight) for ids, weight in two_chunks(5, 12, 4)]
    probability, pair_share = enumerated([*examples, (range(5), plain_share)], 12)
    covered = coverage(Mix(5, 12, PoSE(5, 12), plain_share))
    assert covered.probability == pytest.approx(probability, abs=1e-12)
    assert covered.pair_share == pytest.approx(pair_share, abs=1e-12)
    assert covered.probability_exact and covered.pair_share_exact


def test_a_mix_has_the_error_of_its_sampled_part():
    alone, mixed = (coverage(s, 100) for s in (Cream(8, 40), Mix(8, 40, Cream(8, 40), plain_share=0.75)))
    assert mixed.probability_error == pytest.approx(alone.probability_error / 4)
    assert mixed.pair_share_error == pytest.approx(alone.pair_share_error / 4)
    assert mixed.num_samples == 100


@pytest.mark.parametrize(
    ("sampler", "examples"),
    [
        (PoSE(5, 12, num_chunks=3), lambda: three_chunks(5, 12)),
        (RandPos(4, 12), lambda: subsets(4, 12)),
        (
            EqualChunks(6, 13, num_chunks=2),
            lambda: (((*range(3), *(i + u for i in (3, 4, 5))), 1 / 8) for u in range(8)),
        ),
    ],
)
def test_samples_are_within_their_error_of_the_enumeration(sampler, examples):
    probability, pair_share = enumerated(examples(), sampler.target_len)
    covered = coverage(sampler, num_samples=4000)
    assert (abs(covered.probability - probability) < 4.5 * covered.probability_error).all()
    assert (abs(covered.pair_share - pair_share) <= 4.5 * covered.pair_share_error + 1e-12).all()
    binomial = np.sqrt(probability * (1 - probability) / 4000)
    assert covered.probability_error == pytest.approx(binomial, abs=2e-3)
    assert covered.pair_share.sum() == pytest.approx(1)


@dataclass(frozen=True)
class Subclass(PoSE):
    """Draws as PoSE does, but might not: its coverage is sampled."""


def test_closed_form_and_samples_agree_at_a_larger_size():
    exact, sampled = (coverage(c(64, 512), 2000) for c in (PoSE, Subclass))
    assert exact.num_samples == 0 and sampled.num_samples == 2000
    assert (abs(sampled.probability - exact.probability) < 5 * sampled.probability_error).all()
    spread = np.array([coverage(Subclass(64, 512), 100, seed).pair_share for seed in range(50)]).std(0)
    error = coverage(Subclass(64, 512), 100).pair_share_error
    assert np.median(error / spread) == pytest.approx(1, abs=0.15)


def test_samples_are_a_function_of_the_seed():
    first, again, other = (coverage(Cream(8, 40), 50, seed).probability for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@settings(deadline=None, max_examples=50)
@given(st.sets(st.integers(0, 120), min_size=1, max_size=60), st.integers(0, 50))
def test_pairs_by_distance_counts_pairs(ids, beyond):
    target_len = max(ids) + 1 + beyond
    expected = np.bincount([b - a for a, b in combinations(sorted(ids), 2)], minlength=target_len)[1:]
    assert pairs_by_distance(np.array(sorted(ids)), target_len).tolist() == expected.tolist()


# ----- at the size of the paper -----


def means(covered):
    bins = [(512, 2048), (2048, 8192), (8192, 14336), (14336, 16128), (16128, 16384)]
    found = [covered.probability[low - 1 : high - 1].mean() for low, high in bins]
    return [*found, covered.pair_share[2047:].sum()]


@pytest.mark.parametrize(
    ("sampler", "measured"),
    [
        (ShortPI(2048, 16384), [1, 0, 0, 0, 0, 0]),
        (PoSE(2048, 16384), [0.71, 0.14, 0.14, 0.08, 0.01, 0.31]),
        (Released(2048, 16384), [0.71, 0.14, 0.14, 0.08, 0.01, 0.31]),
        (EqualChunks(2048, 16384), [0.90, 0.43, 0.31, 0.80, 0.76, 0.53]),
        (Cream(2048, 16384), [0.57, 0.25, 0.25, 0.34, 0.63, 0.35]),
        (SentenceSkip(2048, 16384), [1.00, 0.99, 0.99, 0.92, 0.52, 0.73]),
        (RandPos(2048, 16384), [1.00, 1.00, 1.00, 1.00, 0.75, 0.77]),
    ],
)
def test_coverage_measured_elsewhere_is_reproduced(sampler, measured):
    """Measured with other code at L = 2,048, T = 16,384: to its rounding where exact, and else 0.02 for the draws."""
    covered = coverage(sampler, num_samples=800)
    tolerance = 0.005 if covered.probability_exact else 0.02
    assert means(covered) == pytest.approx(measured, abs=tolerance)


def test_two_chunks_have_a_plateau_and_starve_the_end():
    """Between L and T-L exactly L-1 of the T-L+1 skips give a distance; T-1 needs the last one, and has one pair."""
    L, T = 2048, 16384
    covered = coverage(PoSE(L, T))
    assert covered.probability[L - 1 : T - L] == pytest.approx((L - 1) / (T - L + 1))
    assert covered.probability[-1] == pytest.approx(1 / (T - L + 1))
    assert covered.pair_share[-1] == pytest.approx(1 / (T - L + 1) / (L * (L - 1) / 2))
    assert covered.pair_share.sum() == pytest.approx(1)
    assert covered.summary() == pytest.approx(
        {
            "probability_beyond_window": covered.probability[L - 1 :].mean(),
            "probability_last_window": covered.probability[T - 1 - L :].mean(),
            "pair_share_beyond_window": 1 - covered.pair_share[: L - 1].sum(),
        }
    )


@pytest.mark.parametrize(("target_len", "num_samples"), [(16384, 2000), (131072, 514)])
def test_fewer_samples_where_they_take_longer(monkeypatch, target_len, num_samples):
    drawn = []
    monkeypatch.setattr(pose.coverage, "pairs_by_distance", lambda ids, T: drawn.append(T) or np.zeros(T - 1))
    assert coverage(Cream(512, target_len)).num_samples == len(drawn) == num_samples


# ----- bad input -----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 1}, "num_samples=1 is not accepted: give an integer of at least 2"),
        ({"seed": -1}, "seed=-1 is not accepted: give an integer of at least 0"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(ConfigError) as error:
        coverage(Cream(8, 40), **arguments)
    assert message in str(error.value)


# ----- files, table, plot -----


def test_a_csv_that_cannot_be_finished_leaves_the_one_before(tmp_path, monkeypatch):
    covered = coverage(PoSE(16, 64))
    covered.save_csv(tmp_path / "coverage.csv")
    before = (tmp_path / "coverage.csv").read_text()

    def killed(file, *_, **__):
        file.write("dist")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savetxt", killed)
    with pytest.raises(KeyboardInterrupt):
        covered.save_csv(tmp_path / "coverage.csv")
    assert (tmp_path / "coverage.csv").read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_csv_has_a_row_for_each_distance(tmp_path):
    covered = coverage(PoSE(8, 20))
    covered.save_csv(tmp_path / "coverage.csv")
    with open(tmp_path / "coverage.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["distance", "probability", "pair_share"]
    assert [int(row[0]) for row in rows[1:]] == list(range(1, 20))
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(covered.probability, rel=1e-5)
    assert [float(row[2]) for row in rows[1:]] == pytest.approx(covered.pair_share, rel=1e-5)


def rows(table):
    return [list(row) for row in zip(*([column.header, *column.cells] for column in table.columns), strict=True)]


def test_table_bins_follow_the_lengths():
    covered = {"pose": coverage(PoSE(64, 512)), "cream": coverage(Cream(64, 512), 100), "full": coverage(Full(64, 512))}
    header, *body = rows(coverage_table(covered, "title"))
    assert [cell.replace("\n", " ") for cell in header[1:-1]] == [
        "1 to 15", "16 to 63", "64 to 127", "128 to 255", "256 to 447", "448 to 503", "504 to 511"
    ]  # fmt: skip
    assert [row[0] for row in body] == [
        "[bold]mean probability", *covered, "[bold]lowest probability", *covered, "[bold]share of pairs", *covered
    ]  # fmt: skip
    c, edges = covered["pose"], [1, 16, 64, 128, 256, 448, 504, 512]
    means = [c.probability[low - 1 : high - 1].mean() for low, high in pairwise(edges)]
    assert [float(cell) for cell in body[1][1:-1]] == pytest.approx(means, abs=0.005)
    assert float(body[5][6]) == pytest.approx(c.probability[447:503].min(), abs=0.005)
    assert float(body[9][2]) == pytest.approx(c.pair_share[15:63].sum(), abs=0.005)
    assert [row[-1] for row in body] == [
        "", "exact", "<=5e-02", "exact", "", "exact", "<=5e-02", "exact", "", "exact", body[10][-1], "exact"
    ]  # fmt: skip
    assert float(body[10][-1].removeprefix("<=")) == pytest.approx(covered["cream"].pair_share_error.max(), rel=0.5)


@pytest.mark.parametrize(("L", "T"), [(2, 2), (2, 3), (3, 3), (8, 8), (8, 9), (5, 1000)])
def test_table_bins_cut_all_distances_once(L, T):
    header, *_, shares = rows(coverage_table({"full": coverage(Full(L, T))}, "title"))
    bins = [[int(edge) for edge in cell.split(" to\n")] for cell in header[1:-1]]
    assert [d for low, high in bins for d in range(low, high + 1)] == list(range(1, T))
    assert sum(map(float, shares[1:-1])) == pytest.approx(1, abs=0.005 * len(bins))


def test_plot_shows_every_sampler(tmp_path, monkeypatch):
    shown, save = [], pose.reporting.coverage.save_figure
    monkeypatch.setattr(
        pose.reporting.coverage, "save_figure", lambda figure, png: (shown.extend(figure.axes), save(figure, png))
    )
    covered = {"pose": coverage(PoSE(16, 64)), "short_pi": coverage(ShortPI(16, 64))}
    plot_coverage(covered, tmp_path / "coverage.png")
    probability, pairs = shown
    for line, c in zip(probability.lines, covered.values(), strict=False):
        assert line.get_xydata() == pytest.approx(np.column_stack([c.distance, c.probability]))
    assert pairs.lines[0].get_ydata() == pytest.approx(63 * covered["pose"].pair_share)
    assert len(pairs.lines[1].get_xdata()) == 15  # none beyond, on a logarithmic axis
    with Image.open(tmp_path / "coverage.png") as image:
        assert image.size[0] > 1000


@dataclass(frozen=True)
class Recording(PositionSampler):
    drawn = []  # noqa: RUF012

    def _sample(self, rng, document_len):
        self.drawn.append(document_len)
        return Layout(np.arange(self.train_len), np.arange(self.train_len))


@pytest.mark.parametrize(("target_len", "num_samples"), [(512, 500), (65536, 130)])
def test_a_run_says_what_it_covers(tmp_path, capsys, target_len, num_samples):
    """Of as few samples as take a second; a run that extends nothing has no figures."""
    Recording.drawn.clear()
    run = Run(None, tmp_path)
    run.plan = SimpleNamespace(sampler=Recording(256, target_len))
    run.cover()
    found = run.covered
    assert len(Recording.drawn) == num_samples
    assert set(found) == {"probability_beyond_window", "probability_last_window", "pair_share_beyond_window"}
    assert found["pair_share_beyond_window"] == 0
    assert "Coverage" in capsys.readouterr().out
    assert (tmp_path / "coverage.csv").is_file() and (tmp_path / "plots" / "coverage.png").is_file()
    run.plan = SimpleNamespace(sampler=replace(run.plan.sampler, target_len=256))
    run.cover()
    assert run.covered == {}
    assert capsys.readouterr().out == ""


# ----- the command -----


@pytest.mark.parametrize("override", ["nmu_samples=3", "pose.chunks=3", "num_samples=many", "pose=nope"])
def test_a_misspelt_key_fails_at_composition(override):
    schema.register()
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        assert compose("coverage", ["pose=cream"]).pose.train_len == 2048
        with pytest.raises(Exception, match=override.split("=")[1 if override == "pose=nope" else 0].split(".")[-1]):
            compose("coverage", [override])


@pytest.mark.slow
def test_command(script, tmp_path):
    result = script(
        "-m", "pose.coverage", "pose=pose", "pose.train_len=64", "pose.target_len=512", "pose.content=aligned",
        "beside=[pose_n3,mix]", "num_samples=50", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    table = np.loadtxt(tmp_path / "coverage.csv", delimiter=",", skiprows=1)
    covered = coverage(PoSE(64, 512))
    assert table == pytest.approx(
        np.column_stack([covered.distance, covered.probability, covered.pair_share]), rel=1e-5, abs=1e-12
    )
    assert (tmp_path / "coverage.csv").read_text().startswith("distance,probability,pair_share\n")
    with Image.open(tmp_path / "coverage.png") as image:
        assert image.format == "PNG"
    lines = result.stdout.splitlines()
    for name in ("pose content=aligned", "pose_n3", "mix"):
        assert sum(line.strip().startswith(f"{name} ") for line in lines) == 3, result.stdout
    assert result.stdout.count("exact") == 6 and result.stdout.count("<=") == 3


@pytest.mark.slow
def test_command_names_what_is_wrong(script, tmp_path):
    result = script("-m", "pose.coverage", "beside=[nope]", f"hydra.run.dir={tmp_path}")
    assert result.returncode == 1
    message = "ConfigError: beside has 'nope', which is no choice of the group pose: cream, "
    assert result.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in result.stderr
