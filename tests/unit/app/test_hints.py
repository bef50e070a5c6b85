"""A key that a configuration does not have: which one was meant."""

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import run_and_report

from pose.app import schema
from pose.app.hints import hint, naming_near_keys, near
from pose.app.plan import compose_config
from pose.errors import ConfigError
from pose.files import CONF

NAMES = ["rope", "pose", "pose.target_len", "trainer.max_steps", "search.max_steps", "finetune.lr", "eval.lengths"]


@pytest.fixture(autouse=True)
def registered():
    schema.register()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("pose.target_length", ["pose.target_len"]),
        ("max_steps", ["trainer.max_steps", "search.max_steps"]),  # the right name in the wrong place
        ("model.lr", ["finetune.lr"]),
        ("rop", ["rope"]),
        ("eval.something_else", []),
    ],
)
def test_the_names_that_a_key_may_stand_for(key, expected):
    assert near(key, NAMES)[: len(expected)] == expected and (expected or not near(key, NAMES))


def failing(config_name: str, overrides: list[str]):
    """Ends as Hydra does when a configuration cannot be composed."""

    def composed():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose(config_name, overrides)

    run_and_report(composed)


@pytest.mark.parametrize(
    ("config_name", "overrides", "meant"),
    [
        ("train", ["pose.target_length=512"], "pose.target_len"),
        ("train", ["rop=yarn"], "rope"),
        ("train", ["rope=yarn", "rope.beta_slw=3"], "rope.beta_slow"),  # a key of the choice that was made
        ("evaluate", ["ckpt=x", "eval.length=[512]"], "eval.lengths"),
        ("search", ["search.populaton=3"], "search.population"),
        ("coverage", ["pose.num_chunk=3"], "pose.num_chunks"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest(config_name, overrides, meant, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", *overrides])
    with pytest.raises(SystemExit) as ending, naming_near_keys(config_name):
        failing(config_name, overrides)
    assert ending.value.code == 1
    said = capsys.readouterr().err
    assert f"Could not override '{overrides[-1].partition('=')[0]}'" in said
    assert said.splitlines()[-1].startswith(f"Did you mean {meant}")


def test_other_endings_are_left_alone(capsys):
    for code in (0, 1, "text"):
        with pytest.raises(SystemExit), naming_near_keys("train"):
            raise SystemExit(code)
    with pytest.raises(SystemExit), naming_near_keys("train"):
        failing("train", ["rope=yaarn"])
    assert "Did you mean" not in (said := capsys.readouterr().err) and "Available options in 'rope'" in said


def test_a_choice_that_there_is_not_does_not_hide_the_hint():
    assert "trainer.max_steps" in hint("Could not override 'trainer.max_step'.", "train", ["rope=none_such"])


def test_the_plan_says_it_too():
    with pytest.raises(ConfigError, match=r"Did you mean pose\.target_len"):
        compose_config(["pose.target_length=512"])
