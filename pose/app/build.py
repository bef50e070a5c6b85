"""From a composed config to objects. Checks that join several parts are in `preflight`."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf
from transformers import PretrainedConfig

from pose.app.documents import find_documents
from pose.app.factors import read_factors
from pose.app.method import title_of
from pose.app.schema import DataConfig, TrainerConfig, to_options
from pose.app.targets import make
from pose.data.datamodule import PoseDataModule
from pose.errors import ConfigError
from pose.modeling.load import check_target
from pose.positions import PositionSampler
from pose.rope import RopeScaling
from pose.training import launch
from pose.training.callbacks import ProgressBar, Throughput
from pose.training.checkpoints import CheckpointIO
from pose.training.compat import always_finish, without_broadcasts
from pose.training.loggers import build_loggers
from pose.training.objectives import Objective
from pose.training.strategies import check_strategy, resolve_precision


def build_sampler(node: DictConfig, window: int | None = None) -> PositionSampler:
    """The sampler of the group `pose`; train_len defaults to the model's window, where there is a model."""
    arguments = OmegaConf.to_object(node)
    assert isinstance(arguments, dict)
    target_len = arguments.get("target_len")
    if window is not None and isinstance(target_len, int):
        check_target(target_len, window)
    return make(_with_train_len(arguments, window), PositionSampler, "pose")


def _with_train_len(arguments: dict, window: int | None) -> dict:
    nested = {key: _with_train_len(value, window) for key, value in arguments.items() if isinstance(value, dict)}
    open_len = {"train_len": window} if arguments.get("train_len") is None else {}
    return arguments | open_len | nested


def build_scaling(node: DictConfig, key: str = "rope") -> RopeScaling:
    """The method of the group `rope`; what a search has found is read, and written into it."""
    read_factors(node)
    return make(node, RopeScaling, key)


def build_objective(node: DictConfig, sampler: PositionSampler, config: PretrainedConfig) -> Objective:
    """That of the group `objective`, which can be trained on what the sampler draws by a model of that config."""
    objective = make(node, Objective, "objective")
    objective.check(sampler, config.get_text_config().num_hidden_layers)
    return objective


def build_trainer(cfg: DictConfig, run_dir: Path, step: int = 0) -> L.Trainer:
    """Lightning's Trainer.

    Raises:
        ConfigError: a value that Lightning does not accept; carries its message.
    """
    t = to_options(cfg.trainer, TrainerConfig)
    logger: Any = OmegaConf.to_container(cfg.logger)
    loggers = build_loggers(
        logger.pop("name", None), run_dir, step, goes_on=cfg.resume is not None, options=logger, title=title_of(cfg)
    )
    strategy = make(cfg.strategy, Strategy, "strategy") if "_target_" in cfg.strategy else _strategy_name(cfg.strategy)
    try:
        trainer = L.Trainer(
            max_steps=t.max_steps,
            max_epochs=-1,
            accelerator=t.accelerator,
            devices=t.devices,
            num_nodes=t.num_nodes,
            strategy=strategy,
            precision=resolve_precision(t.precision, t.accelerator),
            gradient_clip_val=t.gradient_clip,
            log_every_n_steps=min(t.log_every_n_steps, t.max_steps),  # a short run logs its end
            logger=loggers,
            callbacks=[ProgressBar(), Throughput()],
            plugins=[CheckpointIO(), *launch.plugins()],
            default_root_dir=run_dir,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        check_strategy(trainer.strategy, trainer.precision, t.on_nonfinite, t.compile)
        always_finish(trainer)
        without_broadcasts(trainer)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        given = [f"trainer.{key}={getattr(t, key)}" for key in ("accelerator", "devices", "num_nodes")]
        given += [f"strategy.name={strategy}"] * isinstance(strategy, str)
        raise ConfigError(f"the trainer cannot be built from {', '.join(given)}: {error}") from error
    return trainer


def _strategy_name(node: DictConfig) -> str:
    name = node.get("name")
    if extra := [key for key in node if key != "name"]:
        raise ConfigError(f"strategy.{extra[0]!s} is not accepted: strategy={name} takes name alone")
    if not isinstance(name, str):
        raise ConfigError(f"strategy.name={name!r} is not accepted: give a strategy of Lightning, such as auto or ddp")
    if any(part in name for part in ("spawn", "fork", "notebook")):
        raise ConfigError(f"strategy.name={name!r} starts processes in a way that is not supported: choose ddp")
    return name


def accumulate(trainer: L.Trainer, micro_batch: int, global_batch: int) -> int:
    """Sets the trainer's gradient accumulation; returns the examples in a batch of one device.

    Raises:
        ConfigError: the global batch cannot be split evenly.
    """
    world = trainer.world_size
    micro_batch = min(micro_batch, max(global_batch // world, 1))
    if global_batch % (micro_batch * world):
        raise ConfigError(
            f"trainer.global_batch={global_batch} is not a multiple of trainer.micro_batch={micro_batch} on "
            f"{world} device(s): give a global batch that {micro_batch * world} divides"
        )
    trainer.accumulate_grad_batches = global_batch // (micro_batch * world)
    return micro_batch


def build_data(
    cfg: DictConfig, tokenizer, sampler: PositionSampler, objective: Objective, micro_batch: int, vocab_size: int
) -> PoseDataModule:
    """The LightningDataModule of the group `data`, not tokenised yet."""
    d, t = to_options(cfg.data, DataConfig), cfg.trainer
    measuring = {"eval": cfg.eval} | ({"watch": cfg.watch} if cfg.watch.every_n_steps is not None else {})
    wanted = [
        (length, f"{name}.{key}")
        for name, group in measuring.items()
        if "perplexity" in group.tasks and group.documents is None
        for key, length in (
            ("lengths", max(group.lengths or [sampler.target_len])),
            ("min_tokens", group.min_tokens or 0),
        )
    ]
    heldout_len, asked_by = max(wanted, key=lambda one: one[0], default=(None, "eval.lengths"))
    documents = find_documents("data.documents", d.documents)
    return PoseDataModule(
        documents,
        tokenizer,
        sampler,
        num_examples=t.max_steps * t.global_batch,
        micro_batch=micro_batch,
        global_batch=t.global_batch,
        seed=cfg.seed,
        cache_dir=cfg.cache_dir,
        text_field=d.text_field,
        min_tokens=d.min_tokens,
        max_documents=d.max_documents,
        on_broken=d.on_broken,
        max_document_chars=d.max_document_chars,
        vocab_size=vocab_size,
        heldout_share=d.heldout_share if wanted else 0.0,
        heldout_len=heldout_len,
        heldout_asked_by=asked_by,
        leave_out=find_documents("data.leave_out", d.leave_out),
        window_len=d.window_len,
        add_bos=d.add_bos,
        synthetic={name: share for name, share in vars(d.synthetic).items() if share},
        curriculum=d.curriculum,
        skip_before_question=d.skip_before_question,
        num_workers=d.num_workers,
        collate=objective.collate,
    )
