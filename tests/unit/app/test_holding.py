"""What is held in how many bits: what cannot be is refused before anything long, and what is open is worked out."""

import importlib.util
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoConfig, AutoModelForCausalLM

from pose.app import schema
from pose.app.build import build_trainer
from pose.app.holding import check_holding, check_teacher, layout_of, trained_dtype
from pose.app.models import model_config
from pose.app.schema import FinetuneConfig
from pose.errors import ConfigError
from pose.files import CONF
from pose.modeling.held import Held
from pose.training.objectives import LongShort, SelfDistill
from pose.training.strategies import DeepSpeed

schema.register()
EMBEDDINGS = "finetune.lora.train_embeddings_and_norms=true"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Config, model's config and trainer of overrides; bitsandbytes counts as installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "bitsandbytes" or find(name))

    def parts_(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", ["trainer.accelerator=cpu", "trainer.devices=1", *overrides])
        return cfg, model_config(cfg), build_trainer(cfg, tmp_path)

    return parts_


@pytest.fixture
def experts(tmp_path):
    """The folder of a model whose experts are merged when they are read."""
    config = AutoConfig.for_model(
        "mixtral", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["finetune=qlora", "strategy=fsdp"], ["finetune=qlora", "FSDP", "strategy=auto or ddp"]),
        (["finetune.optimizer=adamw8bit", "strategy=fsdp"], ["adamw8bit", "FSDP", "finetune.optimizer=adamw,"]),
        (
            [
                "finetune.optimizer=adamw8bit", "finetune.weights_dtype=bfloat16", "strategy=ddp", "trainer.devices=2",
            ],
            ["finetune.weights_dtype=bfloat16", "there are 2"],
        ),
        (
            ["finetune.optimizer=adamw8bit", "finetune.weights_dtype=bfloat16", "strategy=ddp", "trainer.devices=1"],
            ["finetune.weights_dtype=bfloat16", "without ddp", "strategy=auto"],
        ),
        (["experiment=pretrain_tiny", "finetune=qlora"], ["finetune=qlora", "model.path"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(parts, overrides, words):
    with pytest.raises(ConfigError) as error:
        check_holding(*parts(*overrides))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("objective", [LongShort(), SelfDistill()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=pretrain_tiny"], ["objective=long_short", "model.path is null"]),
        (["strategy=zero3"], ["objective=long_short", "finetune=lora", "strategy=fsdp"]),
        (["strategy=zero3", "finetune=lora", EMBEDDINGS], ["train_embeddings_and_norms=false"]),
        (["strategy=fsdp", "finetune=lora", EMBEDDINGS], ["FSDP", "train_embeddings_and_norms=false"]),
        (["strategy=zero3", "finetune=lora"], None),
        (["strategy=fsdp", "finetune=lora"], None),
        (["strategy=fsdp"], None),
        (["strategy=zero2"], None),
        (["finetune=lora", EMBEDDINGS], None),
        ([], None),
    ],
    ids=str,
)
def test_where_the_original_cannot_stay_beside_is_named(parts, monkeypatch, objective, overrides, words):
    """For objectives with a teacher alone."""
    monkeypatch.setattr(DeepSpeed, "needs_gpu", False)
    cfg, _, trainer = parts(*overrides)
    if words is None or not objective.has_teacher:
        check_teacher(cfg, objective, trainer)
        return
    with pytest.raises(ConfigError) as error:
        check_teacher(cfg, objective, trainer)
    for word in words:
        assert word in str(error.value)


def test_a_scaler_is_refused(parts):
    cfg, config, trainer = parts("finetune.optimizer=adamw8bit")
    scaled = SimpleNamespace(strategy=trainer.strategy, precision="16-mixed", world_size=1)
    with pytest.raises(ConfigError, match=r"adamw8bit .*16-mixed: take bf16-mixed or 32-true"):
        check_holding(cfg, config, scaled)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("finetune=qlora", "finetune.lora.frozen_dtype=nf4"),
        ("finetune.optimizer=adamw8bit", "finetune.optimizer=adamw8bit"),
    ],
)
def test_a_missing_package_is_named(parts, monkeypatch, override, key):
    made = parts(override)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"{key} needs .* bitsandbytes.*: pip install bitsandbytes"):
        check_holding(*made)


@pytest.mark.parametrize("option", ["bfloat16", "nf4"])
def test_merged_experts_are_refused_where_bits_are_named_and_fp32_where_not(parts, experts, option):
    path = f"model.path={experts}"
    with pytest.raises(ConfigError, match=f"frozen_dtype={option}: .*mixtral.*float32"):
        check_holding(*parts(path, "finetune=lora", f"finetune.lora.frozen_dtype={option}"))
    with pytest.raises(ConfigError, match=r"finetune.weights_dtype.*mixtral"):
        check_holding(*parts(path, "finetune.optimizer=adamw8bit", "finetune.weights_dtype=bfloat16"))
    made = parts(path, "finetune=lora")
    check_holding(*made)
    assert layout_of(*made) is None


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], None),
        (["finetune=lora"], ("auto", torch.float32)),
        (["finetune=lora", "strategy=ddp"], ("auto", torch.float32)),
        (["finetune=lora", "finetune.lora.frozen_dtype=float32"], None),
        (["finetune=lora", "finetune.lora.frozen_dtype=bfloat16"], ("bfloat16", torch.float32)),
        (["finetune=qlora"], ("nf4", torch.float32)),
        (["finetune=qlora", "finetune.optimizer=adamw8bit"], ("nf4", torch.float32)),
        (["finetune.optimizer=adamw8bit", "trainer.precision=bf16-mixed"], ("float32", torch.bfloat16)),
        (["finetune.optimizer=adamw8bit", "trainer.precision=bf16-mixed", "strategy=ddp"], None),
        (["finetune.optimizer=adamw8bit", "trainer.precision=32-true"], None),
        (["finetune.optimizer=adamw8bit", "trainer.precision=bf16-mixed", "finetune.weights_dtype=float32"], None),
        (
            ["finetune.optimizer=adamw8bit", "trainer.precision=32-true", "finetune.weights_dtype=bfloat16"],
            ("float32", torch.bfloat16),
        ),
    ],
)
def test_how_weights_are_held(parts, overrides, wanted):
    made = parts(*overrides)
    check_holding(*made)
    layout = layout_of(*made)
    assert (None if layout is None else (layout.frozen, layout.trained)) == wanted
    assert layout is None or isinstance(layout, Held)


def test_several_processes_hold_fp32(tmp_path):
    trainer = L.Trainer(accelerator="cpu", devices=2, precision="bf16-mixed", logger=False, default_root_dir=tmp_path)
    assert trained_dtype(FinetuneConfig(optimizer="adamw8bit"), trainer) == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam8"}, r"finetune.optimizer='adam8' is unknown: choose adamw or adamw8bit"),
        ({"weights_dtype": "int8"}, r"finetune.weights_dtype='int8' .* auto, float32, bfloat16"),
        ({"weights_dtype": "bfloat16"}, r"finetune.weights_dtype=bfloat16 needs finetune.optimizer=adamw8bit"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**options)
