"""The process around a run: readable errors, quiet libraries, seeds, shipped files, provenance."""

import contextlib
import json
import logging
import os
import platform
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from transformers import logging as transformers_logging

from pose.errors import PoseError

PACKAGE = Path(__file__).resolve().parent
REPOSITORY = PACKAGE.parent
# The configs: in the package where it is installed, beside it in the repository.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else REPOSITORY / "conf"
PACKAGES = (
    "torch", "transformers", "lightning", "hydra-core", "deepspeed", "tokenizers", "numpy", "safetensors", "peft"
)  # fmt: skip


@contextlib.contextmanager
def readable_errors():
    """Ends the process with the message alone, and status 1, for errors that a user can mend.

    In a sweep the error goes to Hydra, which runs the other jobs and fails at the end.
    """
    try:
        yield
    except PoseError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        raise SystemExit(1) from None


def locate(path: str) -> str:
    """A path as given, or inside the repository when it is found only there (shipped files).

    Hub ids, and paths that are nowhere, come back unchanged for their reader to judge.
    """
    path = os.path.expanduser(path)
    shipped = REPOSITORY / path
    return str(shipped) if not os.path.exists(path) and shipped.exists() else path


def quiet_libraries():
    """Silences messages of libraries that a user can do nothing about."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        ".*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message)


def set_up(cfg: DictConfig):
    """Seeds, threads, and quiet libraries."""
    quiet_libraries()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    L.seed_everything(cfg.get("seed", 0), workers=True, verbose=False)


def provenance() -> dict:
    """What is needed to repeat a run: command, commit, versions, machine."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "overrides": list(HydraConfig.get().overrides.task),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_json(path: Path, content: dict):
    """Writes a JSON file in one step, so that a killed run leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


@rank_zero_only
def save_config(cfg: DictConfig, run_dir: Path):
    """config.yaml and provenance.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    write_json(run_dir / "provenance.json", provenance())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    result = subprocess.run(["git", *arguments], check=False, cwd=REPOSITORY, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None
