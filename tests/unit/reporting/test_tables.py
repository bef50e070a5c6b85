"""Tables: what stands in which cell, and how values are shown."""

import math

import pytest

from pose.evaluation.task import Estimate, Metric
from pose.reporting.tables import common_tasks, comparison_tables, lengths_of, print_table, results_table, series

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


def cells(table) -> list[list[str]]:
    """Header and rows of a table, as text."""
    columns = [[column.header, *column.cells] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


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
        ["base", "1.24", "1.2e+04", "9999.9", "", "0%"],
        ["pose", "", "8.25", "", "100%", "96%"],
    ]


def test_results_table_of_nothing_measured():
    assert cells(results_table({"base": {}}, "Results", ("ppl", "passkey"))) == [[""], ["base"]]


@pytest.mark.parametrize(
    ("measured", "header"),
    [
        (
            {"tail_ppl@8": 3.0, "ppl@8": 4.0, "passkey@8": 1.0, "train/loss": 2.0},
            ["perplexity of the last tokens\n@8", "passkey\n@8"],
        ),
        ({"ppl@8": 4.0, "bits_per_byte@8": 1.0, "position_ppl@0-4": 3.0}, ["perplexity\n@8"]),  # eval.tail=null
        ({"needle@8": 0.5, "needle@8/0.5": 0.5, "needle@16": 0.25, "train/loss": 2.0}, ["needle\n@8", "\n@16"]),
        ({"ruler/vt@8": 0.5, "ruler/cwe@8": 1.0}, ["RULER\n@8"]),
        ({"harness/boolq": 0.625, "harness/piqa": 0.5}, ["boolq", "piqa"]),
    ],
)
def test_results_table_shows_what_was_measured(measured, header):
    for results in ({"a": measured}, {"a": [measured, measured]}):
        first, row = cells(results_table(results, "Results"))
        assert first == ["", *header] and len(row) == len(first) and all(row)


def test_results_table_has_the_mean_of_rulers_tasks():
    table = results_table(
        {"a": {"ruler/vt@8": 0.5, "ruler/cwe@8": Estimate(1.0)}, "b": {"ruler/vt@16": 0.0}}, "Results"
    )
    assert cells(table) == [["", "RULER\n@8", "\n@16"], ["a", "50%", ""], ["b", "", "0%"]], "of the tasks of all"
    alone = results_table({"a": {"ruler/vt@8": 0.5, "ruler/cwe@8": Estimate(1.0)}}, "Results")
    assert cells(alone)[1:] == [["a", "75%"]]


def test_the_mean_of_rulers_tasks_is_of_the_same_ones_everywhere():
    """Another task at another length, or in another row, is no fall of the score."""
    of_two = {"ruler/niah@4": 1.0, "ruler/vt@8": 0.2}
    assert series(of_two, "ruler") == {} and common_tasks([of_two]) == set()
    whole = {"ruler/niah@4": 1.0, "ruler/vt@4": 0.2, "ruler/niah@8": 0.8}
    assert series(whole, "ruler") == {4: 1.0, 8: 0.8}
    assert common_tasks([whole, {"ppl@8": 3.0}]) == {"niah"}, "a model without RULER has no say"


def test_tasks_of_ruler_stand_alone_where_they_have_no_mean():
    table = results_table({"a": {"ruler/niah@4": 1.0}, "b": {"ruler/vt@4": 0.2}}, "Results")
    assert [row[1:] for row in cells(table)[1:]] == [["100%", ""], ["", "20%"]]


def test_results_table_takes_estimates_as_numbers():
    found = {"a": {"ppl@8": Estimate(9.0, 8.0, 10.0)}, "b": [{"ppl@8": Estimate(5.0)}, {"ppl@8": 7.0}]}
    assert cells(results_table(found, "Results", ("ppl",)))[1:] == [["a", "9.00"], ["b", "6.00 (5.00-7.00)"]]


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


def test_a_benchmark_is_a_percentage_where_it_is_known_to_be_a_share():
    """By its name, or by what the task says; a perplexity below 1 is none."""
    found = {
        "harness/wikitext": Estimate(25.34),
        "harness/mine": Estimate(0.75),
        "harness/bits": Estimate(0.9, 0.8, 1.0),
    }
    known = {"harness/mine": Metric("mine", True, ".1%"), "harness/bits": Metric("bits", False, ".2f")}
    (table,) = comparison_tables({"a": found}, "Results")
    assert cells(table) == [["", "wikitext", "mine", "bits"], ["a", "25.340", "0.750", "0.900\n[dim]0.800-1.000"]]
    (table,) = comparison_tables({"a": found}, "Results", known)
    assert cells(table)[1] == ["a", "25.340", "75.0%", "0.90\n[dim]0.80-1.00"]


def test_comparison_tables_have_parts_by_family_and_one_of_benchmarks():
    by_length, benchmarks = comparison_tables(ESTIMATES, "Results")
    rows = cells(by_length)
    assert rows[0] == ["", "@256", "@1,024"]
    assert rows[1:4] == [
        ["[bold]perplexity", "", ""], ["a", "12.2\n[dim]11.0-14.0", "9.00"], ["b/c", "20.0\n[dim]19.0-21.0", ""]
    ]  # fmt: skip
    assert ["a", "1.234", ""] in rows or ["a", "1.235", ""] in rows
    assert ["a", "95%\n[dim]76%-99%", ""] in rows and ["[bold]needle", "", ""] in rows
    assert rows[rows.index(["[bold]ruler/vt", "", ""]) + 1] == ["a", "40%\n[dim]20%-60%", "0%"]
    assert not any("0.0" in row[0] or "0.5" in row[0] for row in rows), "depths are for the heatmap"
    assert cells(benchmarks) == [["", "boolq"], ["a", "75.1%\n[dim]74.0%-76.2%"], ["b/c", ""]]


def test_gains_have_rows_of_their_own_and_intervals_that_reach_below_0():
    found = {"needle_gain@256": Estimate(1.25, 1.0, 1.5), "needle_gain@512": Estimate(-0.01, -0.02, 0.004)}
    found |= {"needle_gain_kept@256": Estimate(1.0, 1.0, 1.0), "needle_gain_kept@512": Estimate(math.nan)}
    (table,) = comparison_tables({"a": found}, "Results")
    assert cells(table) == [
        ["", "@256", "@512"],
        ["[bold]needle gain (nats per token)", "", ""],
        ["a", "1.250\n[dim]1.000-1.500", "-0.010\n[dim]-0.020 to 0.004"],
        ["[bold]needle gain kept", "", ""],
        ["a", "1.00\n[dim]1.00-1.00", "nan"],
    ]
    (header, row) = cells(results_table({"a": {"ppl@256": 9.0, "needle@256": 0.5} | found}, "Results"))
    assert header == ["", "perplexity\n@256", "needle gain (nats per token)\n@256", "\n@512"]
    assert row == ["a", "9.00", "1.250", "-0.010"]


def test_no_table_without_metrics():
    assert comparison_tables({"a": {}}, "Results") == []
