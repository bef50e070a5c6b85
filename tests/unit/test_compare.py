"""What evaluate.py plans: checkpoints, their identity, lengths for all, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from pose import compare, schema
from pose.data.memo import Memo
from pose.errors import PoseError

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "assets" / "tiny"
schema.register()


def plan(tmp_path, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compare.plan_evaluation(compose("evaluate", [f"cache_dir={tmp_path}/cache", *overrides]))


@pytest.fixture
def longer(tmp_path):
    """The shipped model, as one of a longer window."""
    folder = tmp_path / "run" / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder.parent


def test_checkpoints_are_measured_at_the_same_lengths(tmp_path, longer):
    candidates = plan(tmp_path, f"ckpt=[assets/tiny,{longer}]", "eval=passkey")
    assert [c.name for c in candidates] == ["assets/tiny", str(longer)]
    assert [c.window for c in candidates] == [256, 1024]
    assert [c.suite.lengths for c in candidates] == [[256, 512, 1024]] * 2
    assert candidates[0].under["checkpoint"] != candidates[1].under["checkpoint"]


def test_a_checkpoint_is_told_by_what_is_in_its_files(tmp_path, longer):
    memo, model = Memo(tmp_path / "memo"), longer / "model"
    before = compare.checkpoint_print(str(model), None, memo)
    assert {name for name, _ in before} >= {"config.json", "model.safetensors", "tokenizer.json"}
    (model / "README.md").write_text("other words")
    assert compare.checkpoint_print(str(model), None, memo) == before
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert compare.checkpoint_print(str(model), None, memo) != before


def test_a_checkpoint_of_the_hub_is_told_by_its_commit(tmp_path, monkeypatch):
    cached = "/hub/models--a--b/snapshots/{}/config.json"
    prints = []
    for commit in ("c0", "c1"):
        monkeypatch.setattr(compare, "find_file", lambda path, name, revision, c=commit: cached.format(c))
        prints.append(compare.checkpoint_print("a/b", None, Memo(tmp_path)))
    assert prints == [["a/b", "c0"], ["a/b", "c1"]]


def test_outcomes_belong_to_the_code_that_measured(tmp_path, monkeypatch):
    for name in ("evaluation/task.py", "modeling/load.py", "data/cache.py", "rope.py", "module.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a = 1")
    monkeypatch.setattr(compare, "PACKAGE", tmp_path)
    seen = [compare._code_print()]
    for name in ("evaluation/task.py", "modeling/load.py", "data/cache.py", "rope.py"):
        (tmp_path / name).write_text("a = 2")
        seen.append(compare._code_print())
    assert len(set(seen)) == 5
    (tmp_path / "module.py").write_text("a = 2")  # trains, and measures nothing
    assert compare._code_print() == seen[-1]


def test_outcomes_belong_to_dtype_and_attention_too(tmp_path):
    common = ("ckpt=assets/tiny", "eval=passkey", "eval.lengths=[256]")
    under = [plan(tmp_path, *common, *o)[0].under for o in ((), ("dtype=bfloat16",), ("attention=eager",), ())]
    assert under[0] == under[3]
    assert under[0] != under[1] != under[2] != under[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["ckpt is not set", "ckpt=[assets/tiny,RUN]"]),
        (["ckpt=[assets/tiny,assets/tiny]"], ["each stands once"]),
        (["ckpt=assets/tiny", "eval.tasks=[perplexty]"], ["perplexty", "needle", "ruler/TASK"]),
        (["ckpt=assets/tiny", "eval=ruler", "eval.tasks=[niah_single_9]"], ["niah_single_9", "niah_single_1"]),
        (["ckpt=assets/tiny", "eval=harness", "eval.tasks=[bolq]"], ["bolq", "boolq"]),
        (["ckpt=assets/tiny", "eval=ruler", "eval.tasks=[vt]", "eval.lengths=[64]"], ["ruler/vt with 64 tokens"]),
        (["ckpt=assets/tiny", "device=abacus"], ["device='abacus'"]),
        (["ckpt=assets/tiny", "dtype=int8"], ["dtype='int8'"]),
        (["ckpt=nowhere/at/all"], ["nowhere/at/all"]),
    ],
)
def test_what_is_refused_says_so_before_any_model_is_loaded(tmp_path, overrides, words):
    with pytest.raises(PoseError) as error:
        plan(tmp_path, *overrides)
    for word in words:
        assert word in str(error.value)
