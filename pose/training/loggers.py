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

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from pose.errors import ConfigError, first_line, require_choice
from pose.training.compat import without_anonymous

log = logging.getLogger(__name__)

NAMES = ("csv", "tensorboard", "wandb")


def build_loggers(
    name: str, run_dir: Path, step: int = 0, *, goes_on: bool = False, options: Mapping[str, Any] | None = None
) -> list[Logger]:
    """metrics.csv always, and what the group `logger` adds.

    Args:
        name: csv (adds nothing), tensorboard or wandb.
        run_dir: of the run.
        step: from which training goes on; what TensorBoard has beyond it is hidden.
        goes_on: whether the run may have one of W&B already.
        options: of WandbLogger, and `offline`.

    Raises:
        ConfigError: an unknown name, or options of a logger that takes none.
    """
    require_choice("logger.name", name, NAMES)
    if options and name != "wandb":
        raise ConfigError(f"logger.{next(iter(options))} is not accepted: logger={name} takes name alone")
    loggers: list[Logger] = [CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)]
    if name == "tensorboard":
        loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=step or None))
    elif name == "wandb":
        loggers.append(_wandb(dict(options or {}), run_dir, goes_on))
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


def _wandb(options: dict, run_dir: Path, goes_on: bool) -> Logger:
    offline = options.pop("offline", None)
    if offline is None:
        offline = not _has_wandb_account()
    id_file = run_dir / ".wandb_id"  # under which a run goes on
    run_id = _kept_id(id_file) if goes_on else None
    if run_id is None:
        run_id = uuid.uuid4().hex[:8]
        run_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # then the next start is another run of W&B
            rank_zero_only(id_file.write_text)(run_id)
    return without_anonymous(WandbLogger(save_dir=run_dir, offline=offline, id=run_id, resume="allow", **options))


def _kept_id(file: Path) -> str | None:
    if not file.exists():
        return None
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{8}", text := file.read_text(encoding="utf-8").strip()):
            return text
    log.warning(f"{file} does not hold the id of a W&B run: the run gets a new one")
    return None


def _has_wandb_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
