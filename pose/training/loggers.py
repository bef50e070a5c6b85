"""Where a run's metrics go: metrics.csv always, TensorBoard or W&B beside it."""

import contextlib
import logging
import netrc
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from pose.errors import ConfigError, first_line, require_choice
from pose.files import short_name
from pose.training.compat import without_anonymous

log = logging.getLogger(__name__)

NAMES = ("csv", "tensorboard", "wandb")
MAX_NAME = 128  # characters of a name or a group in W&B


def build_loggers(
    name: str,
    run_dir: Path,
    step: int = 0,
    *,
    goes_on: bool = False,
    options: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> list[Logger]:
    """metrics.csv always, and what the group `logger` adds.

    Args:
        name: csv (adds nothing), tensorboard or wandb.
        run_dir: of the run.
        step: from which training goes on; what TensorBoard has beyond it is hidden.
        goes_on: whether the run may have one of W&B already.
        options: of WandbLogger, `offline`, `run_name` and `log_weights`. A job of a sweep is of the group of the sweep.
        title: of a run of W&B that has no `run_name` and is no job of a sweep, which are called by their overrides.

    Raises:
        ConfigError: an unknown name, options of a logger that takes none, or a value that is not accepted.
    """
    require_choice("logger.name", name, NAMES)
    if options and name != "wandb":
        raise ConfigError(f"logger.{next(iter(options))} is not accepted: logger={name} takes name alone")
    loggers: list[Logger] = [CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)]
    if name == "tensorboard":
        loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=step or None))
    elif name == "wandb":
        loggers.append(_wandb(dict(options or {}), run_dir, goes_on, title))
    return loggers


@contextlib.contextmanager
def closing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Around a job: its loggers are finished however it ends, so that the next job of a sweep has its own.

    Lightning's WandbLogger would log into whatever W&B run is open.
    """
    try:
        yield
    except BaseException:
        for logger in loggers:
            try:
                _finish(logger, "failed")
            except Exception as error:  # of a disk or a network that may be what has stopped the job
                log.warning(f"{type(logger).__name__} could not be finished: {first_line(error)}")
        raise
    for logger in loggers:
        _finish(logger, "success")


def _finish(logger: Logger, status: str):
    logger.finalize(status)
    wandb = sys.modules.get("wandb")
    run = None if wandb is None else wandb.run
    if isinstance(logger, WandbLogger) and run is not None and run.id == logger.version:
        run.finish(exit_code=0 if status == "success" else 1)


def _wandb(options: dict, run_dir: Path, goes_on: bool, title: str | None) -> Logger:
    offline = options.pop("offline", None)
    if offline is None:
        offline = not has_wandb_account()
    require_choice("logger.log_weights", options.pop("log_weights", False), (True, False))  # at the end of the run
    group, name = _of_sweep(run_dir)
    options["group"] = options.get("group") or group
    options["job_type"] = options.get("job_type") or "train"
    options["name"] = options.pop("run_name", None)
    id_file = run_dir / ".wandb_id"  # under which a run goes on
    run_id = _kept_id(id_file) if goes_on else None
    if run_id is None:  # one that goes on keeps its name, which may have been changed in W&B
        options["name"] = options["name"] or name or title
        run_id = uuid.uuid4().hex[:8]
        run_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # then the next start is another run of W&B
            rank_zero_only(id_file.write_text)(run_id)
    return without_anonymous(WandbLogger(save_dir=run_dir, offline=offline, id=run_id, resume="allow", **options))


def _of_sweep(run_dir: Path) -> tuple[str | None, str | None]:
    """Group and name of a job of a sweep; None where it is none, and for a name of nothing.

    The sweep's folder is known by the file that Hydra writes into it, also to the processes of a job, and where a job
    goes on alone. The name is what the job was given and not all jobs were.
    """
    sweep, name = run_dir.absolute().parent, None
    if not (sweep / "multirun.yaml").is_file():
        return None, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        of_all = yaml.safe_load((sweep / "multirun.yaml").read_text(encoding="utf-8"))["hydra"]["overrides"]["task"]
        given = yaml.safe_load((run_dir / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
        name = " ".join(override for override in given if override not in of_all)[:MAX_NAME]
    return short_name(sweep).replace("/", " ")[:MAX_NAME], name or None


def _kept_id(file: Path) -> str | None:
    if not file.exists():
        return None
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{8}", text := file.read_text(encoding="utf-8").strip()):
            return text
    log.warning(f"{file} does not hold the id of a W&B run: the run gets a new one")
    return None


def has_wandb_account() -> bool:
    """Whether a key of W&B is in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
