"""The worked example of docs/EXTENDING.md, run as it stands there."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_the_worked_example_trains_and_exports(script, tmp_path, monkeypatch):
    text = (REPOSITORY / "docs" / "EXTENDING.md").read_text()
    files = re.findall(r"`(my/\S+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in files] == ["my/extension.py", "my/rope/power.yaml", "my/pose/two_ends.yaml"]
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (command,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    path, python, train, *arguments = shlex.split(command)
    assert (path, python, train) == ("PYTHONPATH=my", "python", "train.py")
    monkeypatch.setenv("PYTHONPATH", "my")

    short = ("experiment=smoke", "eval=none", "trainer.max_steps=2", "rope.exponent=0.5", "hydra.run.dir=run")
    result = script(REPOSITORY / train, *arguments, *short, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]

    composed = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert (composed.rope._target_, composed.pose._target_) == ("extension.Power", "extension.TwoEnds")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    rope = config["rope_parameters"]
    assert (rope["rope_type"], config["max_position_embeddings"]) == ("longrope", 512)
    assert config["pose"] == {"rope": "power", "window": 256, "factor": 2.0}
    shrunk = np.sqrt(1 - np.arange(0, config["head_dim"], 2) / config["head_dim"])
    np.testing.assert_allclose(rope["long_factor"], 1 / shrunk, rtol=1e-9)
    assert rope["short_factor"] == rope["long_factor"]
