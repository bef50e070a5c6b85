"""Every name of Lightning and DeepSpeed that is not theirs to keep, in one place.

What is relied on of each is said by a test in tests/unit/training/test_compat.py: a new version that breaks it fails
there.
"""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only


class FitLoop(_FitLoop):
    """Comes to its end, which exports, also where a run goes on from its last step and nothing is left to train."""

    @property
    def skip(self) -> bool:
        """Whether `run` returns before it begins; Lightning's says yes when the steps are done."""
        return False


def rank() -> int:
    """Of this process among those of its job, before they are a group: Lightning reads it from the environment."""
    return getattr(rank_zero_only, "rank", None) or 0


def always_finish(trainer: L.Trainer):
    """Has a trainer call on_train_start and on_train_end also where there is no step left."""
    trainer.fit_loop.__class__ = FitLoop


def loops_at(trainer: L.Trainer, step: int) -> dict[str, Any]:
    """The state of a fit loop that has done so many optimizer steps, and begins its data anew.

    Returns:
        What belongs under checkpoint["loops"]["fit_loop"].
    """
    loop = trainer.fit_loop.state_dict()
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    steps["ready"] = steps["completed"] = step
    return loop


def without_broadcasts(trainer: L.Trainer):
    """Has the loop not ask process 0 before every batch whether SIGTERM came, which waits for the device twice.

    `pose.training.checkpoints` takes the signal in its place, in any process, and asks once in a step.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def forget_logged(trainer: L.Trainer, names: Iterable[str]):
    """Has metrics of a step that are not logged again left out of the next row, where the old values would stand."""
    results: Any = trainer._results or {}
    for key in [key for key in results if key.rpartition(".")[2] in names]:
        del results[key]


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int):
    """The processes that share a model's weights: "auto" would be the machines alone."""
    strategy._data_parallel_size = size


def without_anonymous(logger: WandbLogger) -> WandbLogger:
    """A W&B logger that does not pass on a setting of which W&B says that it has no effect."""
    logger._wandb_init.pop("anonymous", None)
    return logger


def deepspeed_config(strategy: DeepSpeedStrategy) -> dict[str, Any]:
    """DeepSpeed's config with the batch size and the precision of the trainer in it."""
    strategy._init_config_if_needed()
    assert strategy.config is not None
    return strategy.config


def deepspeed_gradient_norm(strategy: DeepSpeedStrategy) -> float | None:
    """The norm of the gradients of the last step, before clipping; None where DeepSpeed did not work it out."""
    norm = strategy.deepspeed_engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def undo_deepspeed_patches():
    """Puts torch's linear layer back, which ZeRO-3 replaces for the whole process."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as patches

    torch.nn.functional.linear = getattr(patches, "linear_bk", torch.nn.functional.linear)
