"""The one memory of what was measured: what its keys depend on, and what is done about damage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pose.evaluation import memo as module
from pose.evaluation.memo import Kept, Outcomes, Took, code_fingerprint, identity, is_whole
from pose.evaluation.needle import Needle
from pose.evaluation.options import EvalOptions
from pose.evaluation.passkey import Passkey
from pose.evaluation.perplexity import Perplexity
from pose.evaluation.ruler import Ruler
from pose.evaluation.suite import Suite
from pose.files import Memo
from pose.modeling.load import build_model, load_config, scale_config
from pose.rope import Linear
from pose.tasks.passkey import PasskeyPrompts

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"
RUN = {"dtype": torch.float32, "attention": "pose_sdpa", "device": torch.device("cpu")}


def test_a_model_is_told_by_all_that_decides_what_it_computes(monkeypatch):
    config, scaled = load_config(str(TINY)), load_config(str(TINY))
    scale_config(scaled, Linear(), 1024)

    def one(checkpoint=("w", 1), config=config, **run):
        return identity(list(checkpoint), config, **(RUN | run))

    base = one()
    assert json.loads(json.dumps(base)) == base == one()
    others = [
        one(checkpoint=("w", 2)), one(config=scaled), one(dtype=torch.bfloat16), one(attention="pose_eager"),
        one(device=torch.device("cuda:1")),
    ]  # fmt: skip
    for name in module.PACKAGES:
        with monkeypatch.context() as patch:
            patch.setattr(module, "version", lambda package, name=name: "0.1" if package == name else "1.0")
            others.append(one())
    monkeypatch.setattr(module, "code_fingerprint", lambda: "other")
    others.append(one())
    assert len({json.dumps(each) for each in [base, *others]}) == 1 + len(others)
    assert one(device=torch.device("cuda:0")) == one(device=torch.device("cuda:1"))


@pytest.mark.parametrize("task", ["passkey", "needle", "ruler"])
def test_what_is_written_depends_on_where_it_ends(task):
    """Tokenizers of the same tokens, of which one has no EOS."""

    def depends(has_end):
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        tokenizer.eos_token = tokenizer.eos_token if has_end else None
        options = {"lengths": [200], "trials": 1, "seed": 0}
        if task == "passkey":
            return Passkey(PasskeyPrompts(tokenizer), **options).depends()
        if task == "needle":
            return Needle(tokenizer, "A text. Another one.", depths=[0.5], **options).depends()
        return Ruler("niah_single_2", tokenizer, "A text. Another one.", **options).depends()

    usual, other = depends(True), depends(False)
    assert usual == depends(True) and usual["tokenizer"] == other["tokenizer"] and usual != other


def test_where_a_model_was_read_from_and_that_it_was_built_change_nothing(tmp_path):
    config = load_config(str(TINY))
    before = identity("w", config, **RUN)
    build_model(config, str(TINY), "sdpa", torch.bfloat16)
    assert identity("w", config, **RUN) == before
    config.save_pretrained(tmp_path)
    assert identity("w", load_config(str(tmp_path)), **RUN) == before
    changed = json.loads((tmp_path / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert identity("w", load_config(str(tmp_path)), **RUN) != before


def test_outcomes_belong_to_the_code_that_measured(tmp_path, monkeypatch):
    for name in ("evaluation/task.py", "modeling/load.py", "data/cache.py", "tasks/ruler.py", "rope.py", "module.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a = 1")
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    seen = [code_fingerprint()]
    for name in ("evaluation/task.py", "modeling/load.py", "data/cache.py", "tasks/ruler.py", "rope.py"):
        (tmp_path / name).write_text("a = 2")
        seen.append(code_fingerprint())
    assert len(set(seen)) == 6
    (tmp_path / "module.py").write_text("a = 2")  # trains, and measures nothing
    assert code_fingerprint() == seen[-1]


@pytest.fixture
def suite(tmp_path):
    suite = Suite(EvalOptions(lengths=[8, 16], add_bos=False), None, None, tmp_path)
    documents = [np.arange(20), np.arange(1, 21)]
    suite.tasks = [Perplexity(documents, ["a", "b"], [8, 16], token_bytes=np.ones(32, int), tail=4)]
    return suite


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_what_one_has_measured_another_finds(suite, model, tmp_path):
    """As the untuned model of train.py is that of evaluate.py, and of the next job of a sweep."""
    first = suite.run(model, outcomes=Outcomes(tmp_path), under={"model": 1}, progress=False)
    loads = lambda: pytest.fail("it was measured before")  # noqa: E731
    again = suite.run(load=loads, outcomes=Outcomes(str(tmp_path)), under={"model": 1}, progress=False)
    assert again == first
    with pytest.raises(pytest.fail.Exception):
        suite.run(load=loads, outcomes=Outcomes(tmp_path), under={"model": 2}, progress=False)
    with pytest.raises(pytest.fail.Exception):
        suite.run(load=loads, outcomes=Outcomes(tmp_path, reuse=False), under={"model": 1}, progress=False)


@pytest.mark.parametrize(
    "value",
    [
        None, 7, "x", [], {}, {"outcome": {}}, {"outcome": {"ppl@8": [1]}, "took": [1, 1]},
        {"outcome": None, "took": [1.0, 1.0]}, {"outcome": {}, "took": "soon"},
    ],
)  # fmt: skip
def test_a_kept_outcome_of_another_shape_is_measured_again_with_a_warning(suite, model, tmp_path, capsys, value):
    outcomes, under = Outcomes(tmp_path), {"model": 1}
    first = suite.run(model, outcomes=outcomes, under=under, progress=False)
    task = suite.tasks[0]
    units = task.units()
    Memo(outcomes.folder).set([under, task.name, units["0:a"]], value)
    capsys.readouterr()
    assert list(outcomes.find(under, task, units)) == ["1:b"]
    printed = capsys.readouterr().out
    warning = "Warning: the kept outcome of perplexity (0:a) is damaged: it is measured again"
    assert warning in printed
    assert suite.run(model, outcomes=outcomes, under=under, progress=False) == first
    assert list(outcomes.find(under, task, units)) == ["0:a", "1:b"]


@pytest.mark.parametrize("content", ['{"key": [', "", "[]", "\x00"])
def test_a_kept_outcome_that_is_cut_is_said_too(suite, model, tmp_path, capsys, content):
    outcomes, under = Outcomes(tmp_path), {"model": 1}
    task = suite.tasks[0]
    assert outcomes.find(under, task, task.units()) == {} and "damaged" not in capsys.readouterr().out
    first = suite.run(model, outcomes=outcomes, under=under, progress=False)
    for file in outcomes.folder.iterdir():
        file.write_text(content)
    assert suite.run(model, outcomes=outcomes, under=under, progress=False) == first
    assert "Warning: the kept outcome of perplexity (0:a) is damaged: it is measured again" in capsys.readouterr().out


def test_an_outcome_without_what_it_took_is_no_outcome(suite, tmp_path):
    task = suite.tasks[0]
    outcome = {name: [1.0, 2, 3][: 3 if name.startswith("ppl") else 2] for name in task.metrics() if "bits" not in name}
    assert is_whole(task, "0:a", {"outcome": outcome, "took": [1.0, 2.0]})
    for took in (None, 7, [1.0], [1.0, "x"], {"seconds": 1.0}):
        assert not is_whole(task, "0:a", {"outcome": outcome, "took": took})
    assert not is_whole(task, "0:a", {"outcome": outcome})


def test_what_it_took_is_kept_too(suite, tmp_path):
    outcomes, task = Outcomes(tmp_path), suite.tasks[0]
    units = task.units()
    outcome = {name: [1.0, 2, 3][: 3 if name.startswith("ppl") else 2] for name in task.metrics() if "bits" not in name}
    outcomes.keep("m", task, units["0:a"], Kept(outcome, Took(1.5, 0.25)))
    assert outcomes.find("m", task, units) == {"0:a": Kept(outcome, Took(1.5, 0.25))}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    from pose.errors import ConfigError

    Outcomes(tmp_path).require_writable()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"cache_dir={tmp_path}/file cannot be written to \(Not a directory\)"):
        Outcomes(tmp_path / "file").require_writable()
