"""Every YAML composes, and its keys are those of what it builds."""

import inspect
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import gpu
from pose.app import build, schema
from pose.errors import ConfigError
from pose.positions import Mix, PoSE
from pose.rope import RopeGeometry, Yarn

CONF = Path(__file__).resolve().parents[2] / "conf"
schema.register()


@pytest.fixture(autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


# What comes with a package that has a pin: pyyaml, protobuf, huggingface_hub
WITHOUT_PIN = {"pyyaml", "protobuf", "huggingface-hub"}
CHOICES = [(file.parent.name, file.stem) for file in sorted(CONF.glob("*/*.yaml"))]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_matches_what_it_builds(group, choice):
    cfg = compose("train", [f"{group}={choice}"])
    for node in (cfg.pose, cfg.rope, cfg.objective, cfg.strategy):
        if "_target_" in node:
            keys = set(OmegaConf.to_container(node)) - {"_target_"}
            accepted = inspect.signature(get_class(node._target_)).parameters
            assert keys <= set(accepted), f"{node._target_} does not take {keys - set(accepted)}"
            if node._target_.startswith("pose."):
                assert keys == set(accepted), f"{group}={choice} leaves out {set(accepted) - keys}"


@pytest.mark.parametrize("choice", [file.stem for file in (CONF / "pose").iterdir()])
@pytest.mark.parametrize("command", ["train", "coverage"])
def test_every_sampler_takes_a_curriculum(command, choice):
    overrides = [f"pose={choice}", "pose.train_len=256", "pose.target_len=2048"]
    sampler = build.build_sampler(compose(command, [*overrides, "pose.curriculum=[[0.25,512],[0.5,1024]]"]).pose)
    assert sampler.curriculum == ((0.25, 512), (0.5, 1024))
    assert replace(sampler, curriculum=None) == build.build_sampler(compose(command, overrides).pose)


@pytest.mark.parametrize("choice", [file.stem for file in (CONF / "eval").iterdir()])
def test_every_eval_composes_for_evaluate(choice):
    assert compose("evaluate", [f"eval={choice}", "ckpt=x"]).eval is not None


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_values_are_explained(path):
    """Each group file says what it is, or what its values mean, in a comment."""
    assert "#" in path.read_text()


@pytest.mark.parametrize("path", sorted((CONF / "experiment").iterdir()), ids=lambda path: path.stem)
def test_experiments_are_headed_by_their_command(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert f"python train.py experiment={path.stem}" in lines[1]


@pytest.mark.parametrize("path", sorted((CONF / "experiment").iterdir()), ids=lambda path: path.stem)
@pytest.mark.parametrize(("choice", "tasks"), [("none", []), ("passkey", ["passkey"])])
def test_what_is_measured_can_be_chosen_in_every_experiment(path, choice, tasks):
    assert list(compose("train", [f"experiment={path.stem}", f"eval={choice}"]).eval.tasks) == tasks


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_stepz=3", "max_stepz"),
        ("pose.target_length=4096", "target_length"),
        ("rope.fctor=2", "fctor"),
        ("rope=nope", "nope"),
        ("trainer.max_steps=many", "many"),
        ("finetune.lr=fast", "fast"),
        ("eval.lengths=[long]", "long"),
    ],
)
def test_a_misspelt_key_or_a_wrong_type_fails_at_composition(override, message):
    with pytest.raises(Exception, match=message) as error:  # Hydra has no common base for these
        compose("train", [override])
    assert isinstance(error.value, ConfigCompositionException) or "omegaconf" in type(error.value).__module__


def test_real_models_have_the_papers_hyperparameters():
    cfg = compose("train", ["model=llama7b", "pose.target_len=32768"])
    assert (cfg.finetune.lr, cfg.finetune.schedule, cfg.finetune.warmup_steps) == (2e-5, "linear", 10)
    assert (cfg.trainer.max_steps, cfg.trainer.global_batch) == (1000, 64)
    assert cfg.pose.target_len == 32768 and cfg.pose.num_chunks == 2 and cfg.pose.content == "random"


@pytest.mark.parametrize(("name", "target_len"), [("paper_table1_16k", 16384), ("paper_table1_32k", 32768)])
def test_the_papers_experiments_name_its_method(name, target_len):
    cfg = compose("train", [f"experiment={name}", "data.documents=x.jsonl"])
    assert cfg.rope._target_ == "pose.rope.Linear" and cfg.pose.target_len == target_len
    assert cfg.model.path == "huggyllama/llama-7b" and cfg.finetune.lr == 2e-5


@pytest.mark.parametrize("target_len", [32768, 65536])
def test_the_real_model_has_the_papers_optimiser_and_tokens(target_len):
    """From 8,192 to 32,768, and to 65,536 as the head of the experiment has it: the lengths follow the target."""
    farther = ["pose.target_len=65536", "rope.factor=16"]
    assert " ".join(farther) in (CONF / "experiment" / "smollm2_32k.yaml").read_text()
    cfg = compose("train", ["experiment=smollm2_32k", *(farther if target_len == 65536 else [])])
    assert (cfg.finetune.lr, cfg.finetune.schedule, cfg.finetune.warmup_steps) == (2e-5, "linear", 10)
    assert (cfg.finetune.optimizer, cfg.finetune.weight_decay, list(cfg.finetune.betas)) == ("adamw", 0.0, [0.9, 0.999])
    sampler = build.build_sampler(cfg.pose, 8192)
    assert isinstance(sampler, PoSE) and (sampler.train_len, sampler.target_len) == (2048, target_len)
    assert cfg.trainer.max_steps * cfg.trainer.global_batch * sampler.example_len == 131_072_000
    scaling = build.build_scaling(cfg.rope).resolve(RopeGeometry(100000.0, 64, 8192), target_len)
    assert isinstance(scaling, Yarn) and scaling.factor == 2 * target_len / 8192
    assert (scaling.beta_slow, scaling.attention_factor) == (3, 1.05)
    assert cfg.eval.lengths is None and cfg.watch.lengths is None and cfg.watch.every_n_steps == 250
    kept = {*cfg.data.heldout, cfg.eval.haystack}
    assert kept <= set(cfg.data.leave_out) and not kept & set(cfg.data.documents)
    assert list(cfg.eval.documents) == list(cfg.watch.documents) == list(cfg.data.heldout)


@pytest.mark.parametrize("name", ["smollm2_32k", "smollm2_32k_cpu"])
def test_the_real_models_arms_compose(name):
    """As the heads of the experiments have them; what is measured can be left out of each."""
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    for arm in ("pose=short_pi", "pose=full"):
        line = next(line for line in text.splitlines() if arm in line)
        cfg = compose("train", [f"experiment={name}", "eval=none", *re.findall(r"[\w.]+=[\w\[\],]+", line)])
        sampler = build.build_sampler(cfg.pose, 8192)
        tokens = cfg.trainer.max_steps * cfg.trainer.global_batch * sampler.example_len
        plain = compose("train", [f"experiment={name}"]).trainer
        wanted = plain.max_steps * plain.global_batch * 2048
        assert tokens == pytest.approx(wanted, rel=0.02), "equal tokens, in whole examples of the target"
        assert list(cfg.eval.tasks) == []


def test_the_mixed_windows_are_those_of_the_shifted_yarn():
    """On the shipped model's geometry: base 500, 64 rotary dimensions, window 256, at 8 times."""
    cfg = compose("train", ["experiment=mixed_windows_tiny"])
    geometry = RopeGeometry(500.0, 64, 256)
    sampler = build.build_sampler(cfg.pose, geometry.window)
    assert isinstance(sampler, Mix) and isinstance(sampler.sampler, PoSE) and sampler.plain_share == 0.5
    assert (sampler.train_len, sampler.target_len) == (256, 2048)
    scaling = build.build_scaling(cfg.rope).resolve(geometry, sampler.target_len)
    assert scaling.keeps_short_texts and scaling.attention_factor == 1.0
    wanted = Yarn(rcd_shift=True).resolve(geometry, 2048).inv_freq(geometry)
    assert (scaling.inv_freq(geometry, 257) / wanted).tolist() == pytest.approx([1.0] * 32, rel=1e-6)
    assert (scaling.inv_freq(geometry, 256) / geometry.theta()).tolist() == [1.0] * 32


def test_the_table_of_settings_has_all_groups_and_choices():
    text = (CONF.parent / "docs" / "SETTINGS.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE)
    table = {group: sorted(choices.split(", ")) for group, choices in rows if (CONF / group).is_dir()}
    folders = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra"}
    assert table == {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in folders}


def test_the_versions_that_are_tested_lie_in_the_bounds():
    """Each bounded requirement of pyproject.toml has its pin in requirements.txt."""
    pins = {}
    for file in ("requirements.txt", "requirements-gpu.txt"):
        for line in (CONF.parent / file).read_text().splitlines():
            if "==" in line and not line.startswith("#"):
                name, version = line.split("#")[0].strip().split("==")
                pins[canonicalize_name(name)] = version
    project = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is not None:
            assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"
    named = {canonicalize_name(Requirement(text).name) for group in groups for text in group}
    assert named - pins.keys() <= WITHOUT_PIN


def test_an_experiment_can_still_be_overridden():
    cfg = compose("train", ["experiment=smoke", "trainer.max_steps=7", "rope=ntk"])
    assert cfg.trainer.max_steps == 7 and cfg.rope._target_ == "pose.rope.NTK"


@pytest.mark.parametrize(
    ("window", "target_len", "factor"), [(2048, 32768, 16.0), (4096, 32768, 8.0), (256, 300, 300 / 256)]
)
def test_the_factor_follows_from_the_models_window(window, target_len, factor):
    cfg = compose("train", ["rope=linear", f"pose.target_len={target_len}"])
    geometry = RopeGeometry(10000.0, 128, window)
    assert build.build_scaling(cfg.rope).resolve(geometry, target_len).factor == factor
    sampler = build.build_sampler(cfg.pose, window)
    assert (sampler.train_len, sampler.target_len) == (window, target_len)


@pytest.mark.parametrize("choice", ["pose", "cream", "sentence_skip", "mix"])
def test_a_mix_nests_any_sampler_of_the_same_lengths(choice):
    cfg = compose("train", ["pose=mix", f"pose@pose.sampler={choice}", "pose.target_len=1024", "pose.plain_share=0.25"])
    alone = build.build_sampler(compose("train", [f"pose={choice}", "pose.target_len=1024"]).pose, 256)
    mix = build.build_sampler(cfg.pose, 256)
    assert (mix.train_len, mix.target_len, mix.plain_share) == (256, 1024, 0.25)
    assert mix.sampler == alone


def test_settings_of_a_nested_sampler_reach_it():
    cfg = compose("train", ["pose=mix", "pose.train_len=128", "pose.sampler.num_chunks=5"])
    assert build.build_sampler(cfg.pose, 256) == Mix(128, 2048, PoSE(128, 2048, num_chunks=5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pose=mix", "pose@pose.sampler=full"], "pose.sampler=Full draws examples of 2048 tokens"),
        (["pose=mix", "pose.sampler.target_len=1024"], "pose.sampler.target_len=1024 is not pose.target_len=2048"),
        (["pose=mix", "pose.sampler.num_chunks=0"], "pose.sampler.num_chunks=0 is not accepted"),
        (["pose.curriculum=[[0.5,128]]"], "pose.curriculum has the phase [0.5, 128]: give [end, target]"),
        (["pose.curriculum=0.5"], "pose.curriculum=0.5 is not accepted: give [[end, target], ...]"),
        (["pose.target_len=128"], "pose.target_len=128 is below the model's own window of 256"),
    ],
)
def test_samplers_that_cannot_work_are_named(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build.build_sampler(compose("train", overrides).pose, 256)


def test_without_a_model_the_training_length_has_to_be_given():
    with pytest.raises(ConfigError, match=r"pose.train_len=None is not accepted: give an integer of at least 2"):
        build.build_sampler(compose("train").pose)
    assert build.build_sampler(compose("train", ["pose.train_len=64", "pose.target_len=128"]).pose) == PoSE(64, 128)


@pytest.mark.parametrize("stage", [s for s in gpu.STAGES if s.command[0].endswith(".py")], ids=lambda stage: stage.name)
@pytest.mark.parametrize("rehearse", [False, True])
def test_every_stage_for_a_gpu_composes(stage, rehearse):
    """What is to run on a machine that is there for minutes."""
    script, *overrides = stage.arguments(Path("out"), rehearse, model="assets/tiny")
    cfg = compose(script.removesuffix(".py"), [o for o in overrides if not o.startswith("hydra.")])
    if script == "train.py":
        build.build_scaling(cfg.rope)
        build.build_sampler(cfg.pose, 256)
