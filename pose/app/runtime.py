"""The process around a run: readable errors, quiet libraries, seeds, shipped files, provenance."""

import contextlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from transformers import logging as transformers_logging

from pose.app.targets import make
from pose.errors import Interrupted, PoseError, TrainingError, first_line
from pose.files import REPOSITORY, atomic_file, read_json, write_json
from pose.modeling.compat import is_out_of_memory
from pose.training import faults, launch, signals
from pose.training.compat import rank
from pose.training.objectives import Objective

log = logging.getLogger(__name__)

PACKAGES = (
    "torch", "transformers", "lightning", "hydra-core", "deepspeed", "tokenizers", "numpy", "safetensors", "peft",
    "lm-eval", "wonderwords",
)  # fmt: skip

LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer")  # what gloo says of it


@contextlib.contextmanager
def readable_errors():
    """Ends the process with the message alone, and status 1, for errors that a user can mend.

    In a sweep the error goes to Hydra, which runs the other jobs and fails at the end; a request to stop
    ends the sweep; where its jobs run side by side, each ends its own.
    """
    try:
        yield
    except PoseError as error:
        process = os.environ.get("RANK", "0")
        if process == "0" or not error.is_everywhere:
            where = "" if process == "0" else f"[process {process}] "
            log.error(f"{where}{type(error).__name__}: {error}")
        in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
        if in_sweep and not isinstance(error, Interrupted):
            raise
        if launch.is_beside_others():  # whose jobs have to come to their end
            return
        raise SystemExit(error.status) from None
    except SystemExit as end:
        if end.code not in signals.STATUSES or not launch.is_beside_others():
            raise
    except (OSError, SafetensorError) as error:
        if not faults.is_full(error):
            raise
        log.error(f"{faults.disk_full(error)}; nothing that was complete is lost")
        raise SystemExit(1) from None
    except RuntimeError as error:
        if "RANK" not in os.environ or not any(sign in str(error) for sign in LOST_PROCESS):
            raise
        log.error(f"[process {os.environ['RANK']}] another process of the job has ended")
        raise SystemExit(1) from None


@contextlib.contextmanager
def explained_memory_errors(cfg: DictConfig, measuring: Sequence[str] = ()):
    """Turns an out-of-memory error into one that names what to lower.

    Args:
        cfg: of the command.
        measuring: of train.py, what helps where something is measured, as overrides, the cheapest first; none while it
            trains, and of evaluate.py.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice: Sequence[str]
        if measuring:
            in_half = ("eval_dtype=bfloat16",) if cfg.eval_dtype == "float32" else ()
            advice, changes = (*in_half, *measuring), (*in_half, *measuring)[:1]
        else:
            advice, changes = _memory_advice(cfg), _memory_change(cfg)
        doing = " while measuring" if measuring else ""
        message = f"out of memory{doing} ({first_line(error)}). What helps, the cheapest first: {'; '.join(advice)}"
        raise TrainingError(message, changes=changes) from error


def _memory_change(cfg: DictConfig) -> tuple[str, ...]:
    """The cheapest help that a run can go on with, as overrides: the next smaller micro-batch divides the batch too."""
    if "trainer" not in cfg:
        return ()
    batch, views = _micro_batch(cfg), _num_views(cfg)
    if batch > 1:
        return (f"trainer.micro_batch={views * next(n for n in range(batch // 2, 0, -1) if batch % n == 0)}",)
    return () if cfg.model.gradient_checkpointing else ("model.gradient_checkpointing=true",)


def _micro_batch(cfg: DictConfig) -> int:
    """Examples that memory ran out with: 1 as long as more are looked for, whose failing is no error."""
    number = cfg.trainer.micro_batch
    return 1 if number == "auto" else max(number // _num_views(cfg), 1)


def _num_views(cfg: DictConfig) -> int:
    """How many times the objective sees each example, which trainer.micro_batch counts."""
    return make(cfg.objective, Objective, "objective").num_views


def _memory_advice(cfg: DictConfig) -> list[str]:
    if "trainer" not in cfg:
        tokens = cfg.eval.batch_tokens or "null, which is 1024 on a CPU and else 4096"
        advice = [f"a smaller eval.batch_tokens (it is {tokens}; a single window is the least)"]
        return [*advice, "dtype=bfloat16", f"shorter eval.lengths (they are {list(cfg.eval.lengths)})"]
    batch, length = _micro_batch(cfg), cfg.pose.train_len
    number = f"it is {_num_views(cfg) * batch}"
    advice = [f"a smaller trainer.micro_batch ({number}; the global batch stays)"] if batch > 1 else []
    advice += [] if cfg.model.gradient_checkpointing else ["model.gradient_checkpointing=true"]
    advice += [] if cfg.finetune.lora.rank else ["in a new run folder finetune=lora"]
    advice += ["in a new run folder strategy=fsdp, zero3 or zero3_offload"]
    advice += [f"in a new run folder a smaller pose.train_len (it is {length})"]
    if cfg.watch.every_n_steps is not None:
        advice.append("if watch was measuring, a smaller watch.batch_tokens")
    return advice


def quiet_libraries():
    """Silences messages of libraries that a user can do nothing about."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators.cuda",  # which GPU each process has, said twice
        "compilers.C.base",  # DeepSpeed looks for its libraries
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it would like a kernel of the hub
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        ".*exists and is not empty.*",
        ".*`torch.distributed.* is deprecated.*",  # which DeepSpeed calls
        ".*ended before the epoch ended.*",  # here the data begins at the step
        ".*smaller than the logging interval.*",
        ".*Be aware that when using `ckpt_path`.*",  # of a run that goes on without the watch it had
        ".*across ranks is zero.*",  # of a run that goes on from its last step
    ):
        warnings.filterwarnings("ignore", message)


def run_folder() -> Path:
    """The folder that Hydra has made for this job, which `pose.app.callbacks.Folder` has looked at before."""
    return Path(HydraConfig.get().runtime.output_dir)


def set_up(cfg: DictConfig):
    """Seeds, threads, and quiet libraries, by a config that `check_config` has accepted."""
    quiet_libraries()
    if rank():  # one process speaks for all
        logging.getLogger("pose").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    L.seed_everything(cfg.get("seed", 0), workers=True, verbose=False)


def provenance() -> dict:
    """What is needed to repeat a run: command, commit, versions, machine."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "overrides": OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    """The model of the CPU, which decides how fast bf16 is; where the system does not say, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


@rank_zero_only
def write_config(cfg: DictConfig, run_dir: Path):
    """config.yaml of a run, as it was worked out so far."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(run_dir / "config.yaml") as file:
        file.write(OmegaConf.to_yaml(cfg, resolve=True))


@rank_zero_only
def save_config(
    cfg: DictConfig,
    run_dir: Path,
    settings: dict | None = None,
    step: int = 0,
    tokenizer: str | None = None,
    goes_on_from: Path | None = None,
):
    """config.yaml and provenance.json, which keeps what it was at earlier starts with `resume`.

    Args:
        cfg: as it was worked out.
        run_dir: to write to.
        settings: that decide the weights.
        step: from which training goes on.
        tokenizer: digest of that of a training.
        goes_on_from: folder of the run whose checkpoint is resumed; None: the run's own.
    """
    write_config(cfg, run_dir)
    path, content = run_dir / "provenance.json", provenance() | {"settings": settings, "from_step": step}
    if tokenizer is not None:
        content["tokenizer"] = tokenizer
    if cfg.get("resume") is not None and (before := read_json((goes_on_from or run_dir) / path.name)):
        content["earlier"] = [*before.pop("earlier", []), before]
    write_json(path, content)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git prints; None where it fails, or is not there."""
    try:
        result = subprocess.run(["git", *arguments], check=False, cwd=REPOSITORY, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
