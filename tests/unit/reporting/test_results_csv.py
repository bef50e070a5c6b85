"""Estimates come back from results.csv as they went in, and damaged rows do not."""

from pose.evaluation.task import Estimate
from pose.reporting.results_csv import read_results, write_results

RESULTS = {
    "un,tuned\r\n": {"ppl@8": Estimate(3.123456789012345, 2.5, 3.5, 4), "needle@8/0.5": Estimate(1.0)},
    "extended": {"ppl@8": Estimate(float("inf"), None, None, 1)},
}


def test_estimates_come_back_as_they_were(tmp_path):
    write_results(tmp_path / "results.csv", RESULTS)
    assert read_results(tmp_path / "results.csv") == RESULTS


def test_no_file_and_no_results_are_none(tmp_path):
    assert read_results(tmp_path / "results.csv") == {}
    write_results(tmp_path / "results.csv", {})
    assert read_results(tmp_path / "results.csv") == {}


def test_rows_that_cannot_be_read_are_left_out(tmp_path):
    write_results(tmp_path / "results.csv", {"a": {"ppl@8": Estimate(2.0)}})
    with open(tmp_path / "results.csv", "ab") as file:
        file.write(b"a,ppl@16,x,,,1\na,ppl@32\n\xff\xfe\na,ppl@64,3.0,,,1\n")
    assert list(read_results(tmp_path / "results.csv")["a"]) == ["ppl@8", "ppl@64"]
