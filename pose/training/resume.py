"""Whether a run starts, goes on, or is complete; what it must have in common with before; the command that goes on."""

import hashlib
import json
import logging
import math
import shlex
import time
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf, SCMode
from transformers import PretrainedConfig

from pose.data.cache import same_text
from pose.data.datamodule import PoseDataModule
from pose.errors import CheckpointError, ConfigError
from pose.files import is_inside, locate, read_json, same_path
from pose.training import launch
from pose.training.checkpoints import Checkpoint, find_checkpoint, is_foreign, list_checkpoints, read_checkpoint
from pose.training.folder import check_kind

log = logging.getLogger(__name__)

# What a run that goes on has in common with before, by group, but for these keys.
RESUME_GROUPS: dict[str, tuple[str, ...]] = {
    "pose": (), "rope": ("factors",), "objective": (), "data": ("documents", "heldout", "leave_out", "num_workers"),
    "finetune": (),
}  # fmt: skip
STEPS, ORIGINAL = "trainer.max_steps", "the files of model.path"  # of a curriculum, and of a teacher, alone
TEXT = "data.documents"  # by fingerprint
HELD = "finetune.weights_dtype"
STARTED = time.time()  # of this process: checkpoints from then on are of this start
# Keys of a config that change nothing in the weights that are trained
WITHOUT_EFFECT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def find_resume(cfg: DictConfig, run_dir: Path) -> Checkpoint | None:
    """The checkpoint from which the run goes on, by the key `resume`.

    Raises:
        ConfigError: the run folder holds another run, which a start from the beginning would overwrite.
        CheckpointError: no whole checkpoint where one is named.
    """
    own = run_dir / "checkpoints"
    if (chosen := launch.chosen_checkpoint()) is not None:  # by the process that started this one
        return read_checkpoint(chosen, verify=False) if chosen else None
    check_kind(run_dir, "a training")
    _check_own(own, run_dir)
    is_complete = finished_steps(run_dir) is not None
    if cfg.resume == "auto":
        checkpoint = find_checkpoint(own, run_dir)
        if checkpoint is not None or not is_complete or finished_steps(run_dir) == cfg.trainer.max_steps:
            return checkpoint
    place, named = None, None
    if cfg.resume not in (None, "auto"):
        # Where it leads, not how it is spelt: a link, or RUN/.., may lead to another run
        path = Path(locate(cfg.resume)).resolve()
        named = path if (path / "manifest.json").is_file() else None
        place = path.parent if named is not None else next(
            (folder for folder in (path / "checkpoints", path) if list_checkpoints(folder)), None
        )  # fmt: skip
    holds_a_run = list_checkpoints(own) or any((run_dir / name).exists() for name in ("model", "best"))
    if holds_a_run and (place is None or not same_path(place, own) or (named and is_foreign(named, run_dir))):
        raise ConfigError(
            f"hydra.run.dir={run_dir} holds a run already, which would be overwritten: give another folder"
            + (", or resume=auto to go on with it" if list_checkpoints(own) and cfg.resume != "auto" else "")
        )
    if named is not None:
        return read_checkpoint(named)
    if place is not None:
        return find_checkpoint(place)
    if cfg.resume in (None, "auto"):
        return None
    raise CheckpointError(
        f"resume={cfg.resume} holds no checkpoint: give auto, a run folder (with checkpoints/), or one of its "
        "checkpoints/step-N"
    )


def _check_own(own: Path, run_dir: Path):
    """Whether a run can keep its checkpoints in their folder."""
    if own.exists() and not own.is_dir():
        raise ConfigError(f"{own} is a file, where a run keeps its checkpoints: remove it, or give another folder")
    if not is_inside(own, run_dir) and any(is_foreign(folder, run_dir) for folder in list_checkpoints(own)):
        raise ConfigError(
            f"{own} leads to {own.resolve()}, with the checkpoints of another run: remove the link, or give another "
            f"folder and resume={own.resolve()}"
        )


def finished_steps(run_dir: Path) -> int | None:
    """The optimizer steps of a complete run, which has written its metrics.json last; None without one."""
    steps = read_json(run_dir / "metrics.json").get("train/steps")
    if not isinstance(steps, int | float) or not math.isfinite(steps):
        return None
    return int(steps) if (run_dir / "model" / "config.json").is_file() else None


def resume_settings(
    cfg: DictConfig,
    trainer: L.Trainer,
    data: PoseDataModule,
    base: PretrainedConfig,
    original: list | None = None,
    held: str = "float32",
) -> dict[str, Any]:
    """What decides the weights that come out, by key: a run can only go on under the same.

    Args:
        cfg, trainer, data, base: of the run.
        original: fingerprint of the model that a frozen teacher is read from; None without one.
        held: in which dtype the weights that train are, which by default depends on the number of processes.
    """
    strategy = trainer.strategy
    is_sharded = isinstance(strategy, (DeepSpeedStrategy, ModelParallelStrategy))
    settings = {
        TEXT: data.fingerprint,
        "seed": cfg.seed,
        "trainer.global_batch": cfg.trainer.global_batch,
        "trainer.precision": trainer.precision,
        "trainer.gradient_clip": cfg.trainer.gradient_clip,
        "strategy": type(strategy).__name__ if is_sharded else "any",
    }
    if isinstance(strategy, DeepSpeedStrategy):  # whose checkpoints are of one number of processes
        settings |= {"the number of processes": trainer.world_size, "strategy.stage": cfg.strategy.get("stage")}
    model = {key: value for key, value in base.to_dict().items() if key not in WITHOUT_EFFECT}
    settings |= {f"model's {key}": value for key, value in model.items()}  # wherever it was read from
    for group, left_out in RESUME_GROUPS.items():
        values: Any = OmegaConf.to_container(cfg[group], resolve=True, structured_config_mode=SCMode.DICT)
        settings |= {f"{group}.{key}": value for key, value in values.items() if key not in left_out}
    settings[HELD] = held
    if data.has_phases:  # which are shares of the run
        settings[STEPS] = cfg.trainer.max_steps
    if original is not None:
        settings[ORIGINAL] = hashlib.sha256(json.dumps(original).encode()).hexdigest()[:16]
    return json.loads(json.dumps(settings, default=str))


def check_resume(cfg: DictConfig, checkpoint: Checkpoint, settings: dict[str, Any], run_dir: Path):
    """Whether the run may go on from a checkpoint.

    Raises:
        ConfigError: a setting that decides the weights is another than before, or the run is over, or it would
            unpickle what another run wrote.
    """
    if checkpoint.step > cfg.trainer.max_steps:
        raise ConfigError(
            f"trainer.max_steps={cfg.trainer.max_steps} is fewer than the {checkpoint.step} steps that "
            f"{checkpoint.folder} has done: give at least as many"
        )
    _check_settings(checkpoint.folder, checkpoint.settings, settings)
    if settings["strategy"] != "any" and not checkpoint.is_own(run_dir) and not cfg.trust_pickle:
        raise ConfigError(
            f"resume={cfg.resume}: the checkpoints of this strategy are read by unpickling, which can run code, and "
            f"{checkpoint.folder} is not of the run in {run_dir}. If you trust whoever made it, set trust_pickle=true"
        )


def check_finished(settings: dict[str, Any], run_dir: Path):
    """Whether a complete run, of which no checkpoint is left, is the one that is asked for.

    Raises:
        ConfigError: a setting that decides the weights is another.
    """
    before = read_json(run_dir / "provenance.json").get("settings")
    if isinstance(before, dict):
        _check_settings(run_dir / "model", before, settings)
    elif before is not None:
        log.warning(
            f"{run_dir / 'provenance.json'} does not record the run's settings; they are assumed to be the same"
        )


def _check_settings(folder: Path, before: dict[str, Any], settings: dict[str, Any]):
    def alike(key: str) -> bool:
        now, then = settings.get(key), before.get(key)
        if key == TEXT and isinstance(now, str) and isinstance(then, str):
            return same_text(now) == same_text(then)
        if key == HELD and then == "auto":  # of runs that did not say what it was
            return True
        return now == then

    changed = [
        f"{key}={settings.get(key)!r}, which was {before.get(key)!r}"
        for key in sorted(settings.keys() | before.keys())
        if not alike(key)
    ]
    if changed:
        raise ConfigError(
            f"the run cannot go on from {folder} with {'; '.join(changed)}. Give the earlier values, or "
            "start anew in another folder"
        )


def resume_command(run_dir: Path, *changes: str, anew: bool = False, sweep: bool = False) -> str:
    """The exact command that goes on with a run, for the shell: its own overrides, its folder, resume=auto.

    Args:
        run_dir: of the run.
        changes: further overrides, such as trainer.on_nonfinite=skip, in place of those of the same key.
        anew: the command that starts again instead, in a new folder.
        sweep: for a job of a sweep, the command that goes on with all of it, if there is one.
    """
    if not HydraConfig.initialized():
        return shlex.join(["python", "train.py", f"hydra.run.dir={run_dir}", "resume=auto", *changes])
    given = next((o for o in launch.overrides() if launch.key_of(o) == "resume"), "resume=auto")
    elsewhere = given.partition("=")[2] not in ("auto", "null")
    if anew:
        return launch.shell_command(None, changes, without=() if elsewhere else ("resume",))
    if sweep and (command := launch.sweep_command(["resume=auto", *changes])) is not None:
        return command
    # Until this start has written a checkpoint, it goes on from where it was told to.
    from_there = elsewhere and not _has_written(run_dir)
    return launch.shell_command(run_dir, [given if from_there else "resume=auto", *changes])


def _has_written(run_dir: Path) -> bool:
    times = [read_json(folder / "manifest.json").get("time") for folder in list_checkpoints(run_dir / "checkpoints")]
    return any(isinstance(when, int | float) and when >= STARTED for when in times)
