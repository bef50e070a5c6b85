"""docs/TUTORIAL.md, followed: its commands in their order, with a single step each, and its Python as it stands."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = {
    "train.py": (
        "trainer.max_steps=1", "trainer.global_batch=2", "trainer.micro_batch=2", "eval.tasks=[perplexity]",
        "eval.windows=1",
    ),
    "evaluate.py": ("eval.trials=1",),
}  # fmt: skip
INSTALLS = ("make", "source", "python3.11", ".venv/bin/pip")
pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def test_the_tutorial_can_be_followed(script, tmp_path, monkeypatch):
    text = (REPOSITORY / "docs" / "TUTORIAL.md").read_text()
    shutil.copytree(REPOSITORY / "assets" / "tiny", tmp_path / "assets" / "tiny")  # what it names in the clone

    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # as in the clone, whose package is the current folder's

    def python(*arguments):
        result = script(*arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    followed = []
    for program, *words in filter(None, (shlex.split(line, comments=True) for line in lines)):
        if program in INSTALLS:
            continue
        if program == "cp":
            shutil.copytree(tmp_path / words[1], tmp_path / words[2])
            continue
        assert program == "python"
        followed.append(words[1] if words[0] == "-m" else words[0])
        if words[0] == "-m":
            python(*words)
            continue
        result = script(REPOSITORY / words[0], *words[1:], *SHORT[words[0]], cwd=tmp_path)
        assert result.returncode == 0, f"{words}: {result.stderr[-3000:]}"
    assert followed.count("train.py") == 4 and {"evaluate.py", "pose.plan", "pose.coverage", "pose.report"} < {
        *followed
    }

    outputs = tmp_path / "outputs"
    named = re.findall(r"^\| (`.*?`(?:, `.*?`)*) \|", text[text.index("| file | what |") :], re.MULTILINE)
    for name in re.findall(r"`(.*?)`", " ".join(named)):
        assert (outputs / "first" / name).exists(), f"{name}: the tutorial says that a run has it"
    assert (outputs / "compared.html").stat().st_size > 100_000 and (outputs / "sweep" / "sweep.csv").is_file()
    windows = [json.loads((outputs / run / "model" / "config.json").read_text()) for run in ("first", "second", "mine")]
    assert [config["max_position_embeddings"] for config in windows] == [2048, 2048, 1024]

    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    said = python("-c", code)
    (tokens,) = re.findall(r"It prints ([\d,]+) tokens", text)
    assert said.startswith(f"{tokens.replace(',', '')} tokens:")
