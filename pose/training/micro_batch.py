"""The largest micro-batch that fits, found on the model as it trains, before step 1."""

import gc
import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.seed import isolate_rng

from pose.errors import ConfigError
from pose.plan import divisors, gib
from pose.training.module import PoseModule
from pose.training.processes import gather

log = logging.getLogger(__name__)

AUTO = "auto"
DEVICES = ("cuda",)  # on which there is something to find
USABLE = 0.9  # of the memory that is free to a run; the rest is for gaps between tensors, and what measures beside it


def is_searched(strategy: Strategy) -> bool:
    """Whether `trainer.micro_batch=auto` is searched for on the device of a strategy, and is not 1.

    Raises:
        ConfigError: the strategy fixes the micro-batch before there is a model to try it on.
    """
    if isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            "trainer.micro_batch=auto is not supported by DeepSpeed, whose engine is built for one micro-batch: give "
            "trainer.micro_batch=N (python -m pose.plan trainer.micro_batch=auto says which fits by its estimate), or "
            "take strategy=fsdp"
        )
    return strategy.root_device.type in DEVICES


class MicroBatch(L.Callback):
    """Sets the micro-batch of trainer and data to the largest that fits, before the data are asked for.

    Nothing else is left of it: weights, optimizer, random numbers and the order of the data are as before, so that a
    run is the same as one that is given the number.

    Args:
        global_batch: examples of an optimizer step, over all processes.
        found: told the number, by every process.
    """

    def __init__(self, global_batch: int, found: Callable[[int], None]):
        self.global_batch, self.found = global_batch, found

    def on_fit_start(self, trainer, pl_module):
        """The model is on its device, wrapped; optimizer states and a checkpoint's come later."""
        data = trainer.datamodule
        share = self.global_batch // trainer.world_size
        # Under FSDP2 a process that ran out of memory would leave the others waiting, and its layers in parts
        careful = isinstance(trainer.strategy, ModelParallelStrategy)

        def peak_of(number: int) -> float:
            batch, can_fail = longest(data, number), number > 1 and not careful
            return _everywhere(_peak(trainer, pl_module, batch, share // number, can_fail))

        with isolate_rng():
            _peak(trainer, pl_module, longest(data, 1), 1, can_fail=False)  # has the optimizer make its states
            at_rest, budget = _everywhere(_allocated(pl_module.device)), -_everywhere(-_budget(pl_module.device))
            number, peak = largest(divisors(share), peak_of, at_rest, budget, careful)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        _free(pl_module)
        data.micro_batch, trainer.accumulate_grad_batches = number, share // number
        self.found(number)
        log.info(
            f"Micro-batch {number}, the largest divisor of {share:,} that fits (trainer.micro_batch=auto): "
            f"{gib(peak)} at the highest point of a step, of {gib(budget)} that may be used"
        )


def largest(
    candidates: Sequence[int],
    peak_of: Callable[[int], float],
    at_rest: float,
    budget: float,
    careful: bool = False,
) -> tuple[int, float]:
    """The largest candidate whose step fits.

    No example adds more to the peak of a step than those tried needed on average, above what there is at rest: so a
    jump goes as far as that allows, and what it added says how far the next one goes. Few are tried, and memory hardly
    ever runs out.

    Args:
        candidates: examples of a micro-batch, ascending, from 1, which has to fit.
        peak_of: bytes at the highest point of a step with so many examples; infinite where memory ran out.
        at_rest: bytes between the steps.
        budget: bytes that may be used.
        careful: never tries what may not fit, for all that is known: it may take fewer than fit.

    Returns:
        The candidate, and its peak in bytes.
    """
    fitting, left = [(0, at_rest), (1, peak_of(1))], list(candidates[1:])
    while left:
        (before, low), (last, high) = fitting[0 if careful else -2], fitting[-1]
        slope = (high - low) / (last - before)
        expected = [one for one in left if high + slope * (one - last) <= budget]
        if not expected and (careful or len(fitting) > 2):
            break
        tried = expected[-1] if expected else left[0]
        found = peak_of(tried)
        if found > budget:
            left = [one for one in left if one < tried]
        else:
            fitting.append((tried, found))
            left = [one for one in left if one > tried]
    return fitting[-1]


def longest(data: Any, number: int) -> dict[str, torch.Tensor]:
    """A batch of so many of the longest examples, all tokens of which are scored, and moved: what needs most memory.

    Args:
        data: the PoseDataModule of the run.
        number: of examples.
    """
    last = data.dataset[len(data.dataset) - 1]  # after the short phases of a curriculum
    last = last | {"labels": last["input_ids"], "position_ids": last["position_ids"] + 1}
    return data.collate([last] * number)


def rehearse(trainer: L.Trainer, module: PoseModule, batch: dict[str, torch.Tensor], passes: int):
    """Passes of a training step, and a step of the optimizer that changes no weight, but makes its states.

    Without what talks to other processes under DDP, which has its buckets already.

    Args:
        trainer, module: of the training.
        batch: on the CPU.
        passes: forward and backward, whose gradients add up.
    """
    for _ in range(passes):
        moved = trainer.strategy.batch_to_device(batch, module.device)
        with trainer.precision_plugin.train_step_context():
            loss = module.losses(moved).loss
        loss.backward()
        del loss, moved
    for optimizer in trainer.optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # by which the weight decay is multiplied, too
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _peak(
    trainer: L.Trainer, module: PoseModule, batch: dict[str, torch.Tensor], accumulated: int, can_fail: bool
) -> float:
    """Bytes at the highest point of a step; infinite where memory ran out, if it `can_fail`."""
    device = module.device
    torch.compiler.reset()  # or another number of examples would be compiled for any number, as no run is
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        rehearse(trainer, module, batch, min(accumulated, 2))
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    except torch.OutOfMemoryError:
        if not can_fail:
            raise
        return math.inf
    finally:
        _free(module)


def _free(module: PoseModule):
    module.zero_grad(set_to_none=True)
    torch.compiler.reset()
    gc.collect()  # an error's frames hold tensors
    if module.device.type == "cuda":
        torch.cuda.empty_cache()


def _allocated(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _budget(device: torch.device) -> float:
    """Bytes that tensors may take."""
    if device.type != "cuda":
        return sys.maxsize
    free, _ = torch.cuda.mem_get_info(device)
    return USABLE * (free + torch.cuda.memory_reserved(device))


def _everywhere(value: float) -> float:
    """The largest of all processes."""
    return max(gather(value))
