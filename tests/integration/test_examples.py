"""The example: transformers' own Trainer, with the samplers, guards and export of this package."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest

from pose.errors import GuardError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "transformers_trainer.py"

PLAIN = """
import sys
sys.modules["pose"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
assert model.config.max_position_embeddings == tokenizer.model_max_length == 2048
assert model.config.rope_parameters["rope_type"] == "yarn" and model.config.rope_parameters["factor"] == 8
assert model(torch.arange(300)[None]).logits.isfinite().all()
"""


@pytest.fixture
def example():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("transformers_trainer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_it_is_short_and_knows_no_hydra():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 62
    assert not re.search(r"^\s*(from|import) (hydra|omegaconf|lightning|pose\.(app|training))", text, re.M)


@pytest.mark.slow
@pytest.mark.nightly
def test_it_extends_the_tiny_model(script, tmp_path):
    """From another folder; the loss falls, perplexity at the target too, and the folder is plain transformers'."""
    result = script(EXAMPLE, "--steps", 8, "--out", tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    output = result.stdout
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+|nan|inf)", output)]
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert output.index("Before:") < output.index("Guards passed") < output.index("'loss'") < output.index("After:")
    before, after = (float(value) for value in re.findall(r"'tail_ppl@2048': ([\d.]+)", output))
    assert after < 0.9 * before
    loaded = script("-c", PLAIN, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.slow
def test_its_guards_look_at_the_model_that_the_trainer_trains(example, monkeypatch, tmp_path):
    """With transformers' own attention, which takes skips for the borders of documents, nothing is trained."""

    def build_with_stock_attention(*arguments):
        model = build_model(*arguments)
        model.set_attn_implementation("sdpa")
        return model

    build_model = example.build_model
    monkeypatch.setattr(example, "build_model", build_with_stock_attention)
    monkeypatch.setattr(example.Perplexity, "measure", lambda *_: {})
    monkeypatch.setattr(example.Trainer, "training_step", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(GuardError, match="changing the first chunk changes nothing in the last"):
        example.main(steps=1, out=str(tmp_path))
    assert not (tmp_path / "model").exists()
