"""An override that is refused: which one was meant."""

import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import run_and_report
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from pose.app import schema
from pose.app.hints import WITHOUT, check_choices, hint, naming_near_keys, near
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
    error = ConfigCompositionException("Could not override 'trainer.max_step'.")
    assert "trainer.max_steps" in hint(error, "train", ["rope=none_such"])


@pytest.mark.parametrize(
    ("config_name", "override", "answer"),
    [
        ("train", "model.path=~/model", "'model.path=\"~/model\"'"),
        ("train", "data.documents=/data/a=b(1).jsonl", "'data.documents=\"/data/a=b(1).jsonl\"'"),
        ("train", "data.documents=[~/a,b]", "quotes around each part"),
        ("train", "eval.lengths=512", "'eval.lengths=[512]'"),
        ("train", "eval.tasks=perplexity", "'eval.tasks=[perplexity]'"),
        ("evaluate", "outputs/run", "ckpt=outputs/run"),
        ("train", "resume", "key=value, such as"),
    ],
)
def test_an_override_that_cannot_be_read_is_answered_with_one_that_can(
    config_name, override, answer, capsys, monkeypatch
):
    """And what is shown is accepted, once a shell has taken its quotes."""
    monkeypatch.setattr("sys.argv", ["train.py", override])
    with pytest.raises(SystemExit), naming_near_keys(config_name):
        failing(config_name, [override])
    told = capsys.readouterr().err.splitlines()[-1]
    assert answer in told
    if (shown := told.rpartition(" ")[2]).startswith("'"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(config_name, shlex.split(shown))
        key, _, value = override.partition("=")
        found = OmegaConf.select(cfg, key)
        assert f"{found[0] if OmegaConf.is_list(found) else found}" == value


@pytest.mark.parametrize("override", ["logger=null", "rope=null", "+rope=None", "eval=", "strategy=false"])
def test_no_choice_of_a_group(override, monkeypatch):
    """Hydra would end in a traceback."""
    monkeypatch.setattr("sys.argv", ["train.py", override])
    with pytest.raises(SystemExit, match="is no choice of the group") as ending, naming_near_keys("train"):
        raise AssertionError("not reached")
    for group, instead in WITHOUT.items():
        if f"{group}=" in override:
            assert instead in str(ending.value) and (CONF / f"{instead.replace('=', '/')}.yaml").is_file()
    with pytest.raises(ConfigError, match="is no choice"):
        compose_config([override])


def test_choices_that_are_called_none_are_choices():
    check_choices(["rope=none", "eval=none", "resume=null", "eval.documents=null", "hydra/launcher=null"])


def test_the_plan_says_it_too():
    with pytest.raises(ConfigError, match=r"Did you mean pose\.target_len"):
        compose_config(["pose.target_length=512"])
    with pytest.raises(ConfigError, match=r"could not be converted to Integer"):
        compose_config(["trainer.max_steps=many"])
    with pytest.raises(ConfigError, match=r"'eval\.lengths=\[512\]'"):
        compose_config(["eval.lengths=512"])
