"""`make results` in its quick form: training, evaluation, runs.json, pages, going on, checking."""

import re

import pytest

from benchmarks.results import __main__ as results
from benchmarks.results.records import read_runs
from benchmarks.results.runner import Runner

pytestmark = pytest.mark.slow
CHOSEN = ["methods16x/lm.16x", "methods16x/untuned_books.16x", "table4/linear.contiguous.8x"]


@pytest.fixture
def commands(script, monkeypatch):
    """The commands that are run, in forks, so that libraries are not imported for each of them."""
    commands = []

    def run(self, command, output, spent):
        commands.append(command[1:])
        done = script(*command[1:])
        output.write((done.stdout + done.stderr).encode())
        spent["seconds"] += 1.0
        return done.returncode

    monkeypatch.setattr(Runner, "_run", run)
    return commands


def test_the_code_of_today_finds_the_committed_numbers_of_the_untuned_model(commands, tmp_path, capsys):
    """Perplexity of two kinds of text, passkeys and needle gain at four lengths, in full."""
    code = results.main(["--check", "--jobs", "1", "--only", "table1/untuned.8x", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0 and len(commands) == 2, printed
    assert re.search(r"untuned\.8x, seed 0: (\d\d) of \1 numbers within the spread", printed), printed


def test_the_quick_form_goes_from_commands_to_pages(commands, tmp_path, capsys):
    arguments = ["--quick", "--jobs", "1", "--out", str(tmp_path), "--only", *CHOSEN]
    assert results.main(arguments) == 0, capsys.readouterr()
    assert [command[0] for command in commands] == ["train.py", "evaluate.py", "evaluate.py", "train.py"]
    runs = read_runs(tmp_path / "docs" / "results" / "runs.json")
    assert set(runs) == {("lm.16x", 0), ("untuned_books.16x", 0), ("linear.contiguous.8x", 0)}
    lm, contiguous = runs["lm.16x", 0], runs["linear.contiguous.8x", 0]
    assert lm["training"]["steps"] == 2 and lm["training"]["step_seconds"] > 0 and lm["metrics"]["tail_ppl@512"] > 1
    assert contiguous["metrics"]["proofs: tail_ppl@384"] > 1
    assert contiguous["metrics"]["coverage/probability_beyond_window"] > 0
    assert "-m benchmarks.results" not in lm["commands"][0] and "OUT/lm.16x/s0/run" in lm["commands"][0]

    text = (tmp_path / "docs" / "RESULTS.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| contiguous |")]
    value = contiguous["metrics"]["proofs: tail_ppl@384"]
    assert row.endswith(f"| {value:.1f} |" if value < 1000 else f"| {value:,.0f} |")
    assert "Not run yet: `linear.pose.8x`, `linear.aligned.8x`." in text
    methods = (tmp_path / "docs" / "METHODS.md").read_text()
    assert "| `lm` | 1 | 2 | " in methods and "| untuned | 1 | – | – | " in methods

    # What is finished is kept; a number that is not that of the run is found out
    before = len(commands)
    assert results.main(arguments) == 0 and len(commands) == before
    assert (tmp_path / "docs" / "RESULTS.md").read_text() == text
    check = ["--quick", "--jobs", "1", "--out", str(tmp_path), "--only", CHOSEN[1], "--check"]
    assert results.main(check) == 0 and len(commands) == before + 1
    file = tmp_path / "docs" / "results" / "runs.json"
    value = runs["untuned_books.16x", 0]["metrics"]["tail_ppl@512"]
    file.write_text(file.read_text().replace(f'"tail_ppl@512": {value}', '"tail_ppl@512": 1.0'))
    capsys.readouterr()
    assert results.main(check) == 1 and len(commands) == before + 2  # what an earlier check found is no new run
    assert f"tail_ppl@512 is {value:.1f}, and was 1.0 to 1.0" in capsys.readouterr().out
