"""In how many bits a run holds its weights, and with which optimizer it steps on them: checked, and chosen."""

import importlib.util
import logging

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from omegaconf import DictConfig
from transformers import PretrainedConfig

from pose.app.schema import FinetuneConfig, to_options
from pose.errors import ConfigError
from pose.files import locate
from pose.modeling.held import Held
from pose.modeling.load import is_merged
from pose.modeling.options import NF4
from pose.modeling.shard import FullyShard, Layout
from pose.training.objectives import Objective
from pose.training.strategies import FSDP, DeepSpeed

log = logging.getLogger(__name__)


def check_holding(cfg: DictConfig, config: PretrainedConfig, trainer: L.Trainer):
    """Whether the strategy and the checkpoint can do what `finetune` asks for, before anything long.

    Args:
        cfg: of the run.
        config: of the model.
        trainer: built.

    Raises:
        ConfigError: they cannot, or a package is missing; names key and package.
    """
    tune, strategy = to_options(cfg.finetune, FinetuneConfig), trainer.strategy
    frozen, name = tune.lora.frozen_dtype, cfg.strategy.get("name", type(strategy).__name__)
    for key, value, needs in (
        ("finetune.lora.frozen_dtype", frozen, frozen == NF4),
        ("finetune.optimizer", tune.optimizer, tune.optimizer == "adamw8bit"),
    ):
        if needs and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"{key}={value} needs the package bitsandbytes, which is not installed: pip install bitsandbytes"
            )
    in_parts = hasattr(type(strategy), "layout")
    if tune.optimizer == "adamw8bit" and in_parts:
        raise ConfigError(
            f"finetune.optimizer=adamw8bit is not supported by {name}, which shards the states of the optimizer over "
            "all processes in a form of its own: take finetune.optimizer=adamw, or strategy=auto or ddp"
        )
    if tune.optimizer == "adamw8bit" and trainer.precision == "16-mixed":
        raise ConfigError(
            "finetune.optimizer=adamw8bit is not supported with trainer.precision=16-mixed: take bf16-mixed or 32-true"
        )
    if tune.weights_dtype == "bfloat16" and not _is_alone(trainer):
        raise ConfigError(
            f"finetune.weights_dtype=bfloat16 is for one process without {name} (there are {trainer.world_size}): take "
            "strategy=auto with one device, or float32, or strategy=fsdp with finetune.optimizer=adamw"
        )
    if frozen == NF4 and in_parts:
        raise ConfigError(
            f"finetune.lora.frozen_dtype=nf4 (finetune=qlora) is not supported by {name}, which cannot shard "
            "4-bit weights: take strategy=auto or ddp, or finetune=lora"
        )
    if frozen in ("bfloat16", "float32") and isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"finetune.lora.frozen_dtype={frozen} is not supported by {name}, where all weights are held in the dtype "
            "of trainer.precision: take auto"
        )
    if frozen == NF4 and cfg.model.path is None:
        raise ConfigError(
            "finetune=qlora needs the weights of a checkpoint, into which its adapters are merged, and model.path is "
            "null: take finetune=lora"
        )
    needs_parts = frozen in (NF4, "bfloat16") or trained_dtype(tune, trainer) != torch.float32
    if needs_parts and cfg.model.path is not None and _is_merged(cfg, config):
        key = f"finetune.lora.frozen_dtype={frozen}" if tune.lora.rank else "bf16 weights (finetune.weights_dtype)"
        raise ConfigError(
            f"{key}: not supported for a {config.model_type} model, whose checkpoints hold weights that are merged "
            "when they are read: take float32"
        )


def trained_dtype(tune: FinetuneConfig, trainer: L.Trainer) -> torch.dtype:
    """In which dtype the matrices that train are held: `finetune.weights_dtype`, where it is open by the rest.

    Args:
        tune: the group `finetune`.
        trainer: built.
    """
    if tune.weights_dtype != "auto":
        return torch.bfloat16 if tune.weights_dtype == "bfloat16" else torch.float32
    can_be_narrow = tune.optimizer == "adamw8bit" and tune.lora.rank is None and _is_alone(trainer)
    return torch.bfloat16 if can_be_narrow and trainer.precision == "bf16-mixed" else torch.float32


def _is_alone(trainer: L.Trainer) -> bool:
    """Whether gradients are summed over no processes: DDP, of one process too, takes no fp32 ones of bf16 weights."""
    return trainer.world_size == 1 and not isinstance(trainer.strategy, DDPStrategy)


def layout_of(cfg: DictConfig, config: PretrainedConfig, trainer: L.Trainer) -> Layout | None:
    """How the weights of the model that trains are held; None is in fp32, whole, as from_pretrained loads them.

    Args:
        cfg: of the run, which `check_holding` has passed.
        config: of the model.
        trainer: with its strategy set up.
    """
    tune, strategy = to_options(cfg.finetune, FinetuneConfig), trainer.strategy
    frozen = tune.lora.frozen_dtype if tune.lora.rank else "float32"
    layout: Layout | None = getattr(strategy, "layout", None)
    if layout is not None:
        if isinstance(layout, FullyShard):
            layout.frozen = frozen
        return layout
    trained = trained_dtype(tune, trainer)
    if frozen == "float32" and trained == torch.float32:
        return None
    if frozen == "auto" and (cfg.model.path is None or _is_merged(cfg, config)):
        return None
    if trained != torch.float32:
        log.info("Weights are held in bf16, and every step rounds them stochastically (finetune.weights_dtype)")
    return Held(strategy.root_device, frozen, trained)


def check_teacher(cfg: DictConfig, objective: Objective, trainer: L.Trainer):
    """Whether the original model can stay beside the one that trains, for an objective that keeps to it.

    Raises:
        ConfigError: it cannot; names the keys.
    """
    if not objective.has_teacher:
        return
    key = f"objective={objective.name}"
    if cfg.model.path is None:
        raise ConfigError(
            f"{key} keeps the model close to its original, and model.path is null: random weights have no original"
        )
    lora, strategy = to_options(cfg.finetune, FinetuneConfig).lora, trainer.strategy
    name = cfg.strategy.get("name", type(strategy).__name__)
    in_zero3 = isinstance(strategy, DeepSpeed) and strategy.stage == 3
    if lora.rank is None and in_zero3:
        raise ConfigError(
            f"{key} needs the original model beside the one that trains, and strategy={name} would hold it whole on "
            "every device: take finetune=lora, whose original is the model without its adapters, or strategy=fsdp"
        )
    if lora.rank is not None and lora.train_embeddings_and_norms and (in_zero3 or isinstance(strategy, FSDP)):
        raise ConfigError(
            f"{key} keeps to the model as it was, and under strategy={name} embeddings and norms that train cannot be "
            "put back for it: take finetune.lora.train_embeddings_and_norms=false, or strategy=auto or ddp"
        )


def layout_of_original(cfg: DictConfig, config: PretrainedConfig, strategy: Strategy) -> Layout | None:
    """How a frozen original is held beside the model that trains: sharded like it, or whole, in its checkpoint's bits.

    Args:
        cfg: of the run, which `check_teacher` has passed.
        config: of the original.
        strategy: set up.
    """
    layout = getattr(strategy, "layout", None)
    if isinstance(layout, FullyShard):
        layout.frozen = "auto"
        return layout
    return None if _is_merged(cfg, config) else Held(strategy.root_device, "auto")


def _is_merged(cfg: DictConfig, config: PretrainedConfig) -> bool:
    return is_merged(config, locate(cfg.model.path), cfg.model.revision)
