"""Where a run's metrics go: metrics.csv always, TensorBoard or W&B beside it."""

import netrc
import os
import uuid
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from pose.errors import ConfigError


def build_loggers(cfg: DictConfig, run_dir: Path, step: int = 0) -> list[Logger]:
    """metrics.csv always, and what the group `logger` adds."""
    loggers: list[Logger] = [CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)]
    options = OmegaConf.to_container(cfg.logger)
    name = options.pop("name")
    if name == "tensorboard":
        loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=step or None))
    elif name == "wandb":
        loggers.append(_wandb(options, run_dir, goes_on=cfg.resume is not None))
    elif name != "csv":
        raise ConfigError(f"logger.name={name!r} is unknown: choose csv, tensorboard or wandb")
    return loggers


def _wandb(options: dict, run_dir: Path, goes_on: bool) -> Logger:
    offline = options.pop("offline")
    if offline is None:
        offline = not _has_wandb_account()
    id_file = run_dir / ".wandb_id"  # under which a run goes on
    if goes_on and id_file.is_file():
        run_id = id_file.read_text()
    else:
        run_id = uuid.uuid4().hex[:8]
        run_dir.mkdir(parents=True, exist_ok=True)
        rank_zero_only(id_file.write_text)(run_id)
    return WandbLogger(save_dir=run_dir, offline=offline, id=run_id, resume="allow", **options)


def _has_wandb_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
