"""Whether a run starts, goes on, or is complete, and what it must have in common with what was before."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf, SCMode
from transformers import PretrainedConfig

from pose.data.datamodule import PoseDataModule
from pose.errors import CheckpointError, ConfigError
from pose.files import locate, read_json
from pose.training import launch
from pose.training.checkpoints import Checkpoint, find_checkpoint, list_checkpoints, read_checkpoint

# What a run that goes on has in common with before, by group, but for these keys.
RESUME_GROUPS = {"pose": (), "rope": (), "data": ("documents", "heldout", "num_workers"), "finetune": ()}
OF_NO_WEIGHT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def find_resume(cfg: DictConfig, run_dir: Path) -> Checkpoint | None:
    """The checkpoint from which the run goes on, by the key `resume`.

    Raises:
        ConfigError: the run folder holds another run, which a start from the beginning would overwrite.
        CheckpointError: no whole checkpoint where one is named.
    """
    own = run_dir / "checkpoints"
    if (chosen := launch.chosen_checkpoint()) is not None:  # by the process that started this one
        return read_checkpoint(chosen, verify=False) if chosen else None
    is_complete = finished_steps(run_dir) is not None
    if cfg.resume == "auto":
        checkpoint = find_checkpoint(own)
        if checkpoint is not None or not is_complete or finished_steps(run_dir) == cfg.trainer.max_steps:
            return checkpoint
    path = None if cfg.resume in (None, "auto") else Path(locate(cfg.resume)).absolute()
    is_elsewhere = path is None or run_dir.absolute() not in (path, *path.parents)
    if is_elsewhere and (list_checkpoints(own) or (run_dir / "model").exists()):
        raise ConfigError(
            f"hydra.run.dir={run_dir} holds a run already, which would be overwritten: give another folder"
            + (", or resume=auto to go on with it" if list_checkpoints(own) else "")
        )
    if path is None:
        return None
    if (path / "manifest.json").is_file():
        return read_checkpoint(path)
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder):
            return find_checkpoint(folder)
    raise CheckpointError(
        f"resume={cfg.resume} holds no checkpoint: give auto, a run folder (with checkpoints/), or one of its "
        "checkpoints/step-N"
    )


def finished_steps(run_dir: Path) -> int | None:
    """The optimizer steps of a complete run, which has written its metrics.json last; None without one."""
    steps = read_json(run_dir / "metrics.json").get("train/steps")
    return int(steps) if steps is not None and (run_dir / "model" / "config.json").is_file() else None


def resume_settings(
    cfg: DictConfig, trainer: L.Trainer, data: PoseDataModule, base: PretrainedConfig
) -> dict[str, Any]:
    """What decides the weights that come out, by key: a run can only go on under the same."""
    strategy = trainer.strategy
    is_sharded = isinstance(strategy, (DeepSpeedStrategy, ModelParallelStrategy))
    settings = {
        "data.documents": data.fingerprint,
        "seed": cfg.seed,
        "trainer.global_batch": cfg.trainer.global_batch,
        "trainer.precision": trainer.precision,
        "trainer.gradient_clip": cfg.trainer.gradient_clip,
        "strategy": type(strategy).__name__ if is_sharded else "any",
    }
    if isinstance(strategy, DeepSpeedStrategy):  # whose checkpoints are of one number of processes
        settings |= {"the number of processes": trainer.world_size, "strategy.stage": cfg.strategy.get("stage")}
    model = {key: value for key, value in base.to_dict().items() if key not in OF_NO_WEIGHT}
    settings |= {f"model's {key}": value for key, value in model.items()}  # wherever it was read from
    for group, left_out in RESUME_GROUPS.items():
        values = OmegaConf.to_container(cfg[group], resolve=True, structured_config_mode=SCMode.DICT)
        settings |= {f"{group}.{key}": value for key, value in values.items() if key not in left_out}
    return json.loads(json.dumps(settings, default=str))


def check_resume(cfg: DictConfig, checkpoint: Checkpoint, settings: dict[str, Any], run_dir: Path):
    """Whether the run may go on from a checkpoint.

    Raises:
        ConfigError: a setting that decides the weights is another than before, or the run is over, or it would
            unpickle what came from elsewhere.
    """
    changed = [
        f"{key}={settings.get(key)!r}, which was {checkpoint.settings.get(key)!r}"
        for key in sorted(settings.keys() | checkpoint.settings.keys())
        if settings.get(key) != checkpoint.settings.get(key)
    ]
    if changed:
        raise ConfigError(
            f"the run cannot go on from {checkpoint.folder} with {'; '.join(changed)}. Give the values of before, or "
            "start anew in another folder"
        )
    if settings["strategy"] != "any" and run_dir not in checkpoint.folder.parents and not cfg.trust_pickle:
        raise ConfigError(
            f"resume={cfg.resume}: the checkpoints of this strategy are read by unpickling, which can run code, and "
            "this one is of another folder. If you trust whoever made it, set trust_pickle=true"
        )
    if checkpoint.step > cfg.trainer.max_steps:
        raise ConfigError(
            f"trainer.max_steps={cfg.trainer.max_steps} is fewer than the {checkpoint.step} steps that "
            f"{checkpoint.folder} has done: give at least as many"
        )
