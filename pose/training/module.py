"""The LightningModule: one step, one optimizer, one schedule."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, get_scheduler

from pose.data.cache import same_text
from pose.data.examples import IGNORE
from pose.errors import TrainingError
from pose.modeling.guards import run_guards
from pose.modeling.held import add_quantised, drop_quantised
from pose.modeling.shard import full_shape, with_root
from pose.modeling.teacher import Teacher
from pose.rope import Frequencies
from pose.training.compat import deepspeed_gradient_norm, forget_logged, loops_at
from pose.training.objectives import LanguageModel, Losses, Objective
from pose.training.optimizers import make_optimizer
from pose.training.processes import gather

log = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 10
KINDS = ("text", "retrieval")
SOMETIMES = (*(f"train/loss_{kind}" for kind in KINDS), "train/grad_norm")  # logged where there is one
# A training has diverged when its loss is about that of a guess, and was lower by this factor before
GUESSING, BETTER = 0.95, 1.1


class PoseModule(L.LightningModule):
    """Trains a causal language model on batches that bring their own position ids.

    Args:
        load: gives the transformers model (`pose.modeling.load.build_model`), ready to train. Called once by
            each process, with Lightning's strategy, under which large models are built in parts.
        expected: the closed form of its rotary frequencies, for the guards; None where there is none.
        target_len: the window to extend to, in tokens; the guards probe positions up to it.
        objective: what is minimised.
        teach: gives the original model beside the one that trains, for an objective that has a teacher.
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices only.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: a schedule of transformers' `get_scheduler`, such as linear, cosine, constant_with_warmup.
        max_steps: optimizer steps of the whole run.
        optimizer: one of `pose.training.optimizers`.
        on_nonfinite: stop or skip: what to do with an optimizer step in which a loss is infinite or NaN. A
            skipped step changes no weight; ten in a row stop the run.
        seed: of dropout. Each batch sets its own, so that nothing of it has to be saved for a run to go on.
    """

    def __init__(
        self,
        load: Callable[[Strategy], PreTrainedModel],
        *,
        expected: Frequencies | None,
        target_len: int,
        lr: float,
        betas: Sequence[float],
        weight_decay: float,
        warmup_steps: int,
        schedule: str,
        max_steps: int,
        objective: Objective | None = None,
        teach: Callable[[Strategy, PreTrainedModel], Teacher] | None = None,
        optimizer: str = "adamw",
        seed: int = 0,
        on_nonfinite: str = "stop",
    ):
        super().__init__()
        self.load = load
        self.model: Any = None  # a PreTrainedModel, from configure_model on
        self.expected, self.target_len = expected, target_len
        self.objective = LanguageModel() if objective is None else objective
        self.teach = teach
        self.teacher: Teacher | None = None  # no module, so that neither optimizer nor checkpoint sees it
        self.lr, self.betas, self.weight_decay = lr, tuple(betas), weight_decay
        self.warmup_steps, self.schedule, self.max_steps = warmup_steps, schedule, max_steps
        self.optimizer, self.seed = optimizer, seed
        self.on_nonfinite = on_nonfinite
        self.num_skipped = 0
        self._num_skipped_in_a_row = 0
        self._unchecked: dict[int, torch.Tensor] = {}
        self._recent_losses: list[torch.Tensor] = []  # [1 + parts]: the loss, and what it is made of
        self._recent_by_kind: list[torch.Tensor] = []  # [2 KINDS]: sums of example losses, then their numbers
        self._has_retrieval = False
        self._least_loss: torch.Tensor | None = None
        self._has_warned = False
        self._rate: float | None = None  # of the step
        self._gradient_norm: float | None = None
        self._numbers: list[float] | None = None  # of `_reduce_recent`, where the step is logged
        self.shown_loss: float | None = None  # of the last step, of this process
        self._logged_step = 0
        self.stepping_since: float | None = None  # when the optimizer began a step, once its gradients were there

    def configure_model(self):
        if self.model is None:
            self.model = self.load(self.trainer.strategy)
            if self.objective.has_teacher:  # before a checkpoint gives the model other weights than its original's
                assert self.teach is not None
                self.teacher = self.teach(self.trainer.strategy, self.model)

    def on_train_batch_start(self, batch, batch_idx):
        accumulated = batch_idx % self.trainer.accumulate_grad_batches
        source = (self.seed, self.trainer.global_step, accumulated, self.trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(source).generate_state(1)[0]))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss, by_example, parts = self.losses(batch)
        self._unchecked[batch_idx] = by_example
        # The logged losses are means since the last ones logged: examples differ too much for one batch to tell.
        recent = torch.stack([loss.detach(), *parts])
        self._recent_losses.append(torch.where(recent.isfinite(), recent, torch.nan))
        self._recent_by_kind.append(_by_kind(by_example, batch["labels"]))
        latest = self._recent_losses[-1][self._lm]
        self._least_loss = torch.fmin(latest if self._least_loss is None else self._least_loss, latest)
        return loss

    def losses(self, batch: dict[str, torch.Tensor]) -> Losses:
        """Of a batch that the objective has joined."""
        return with_root(self.model, self.objective.losses, self.model, batch, self.teacher)

    @property
    def _lm(self) -> int:
        """Where the language model's own loss stands in the recent ones."""
        return 1 if self.objective.parts else 0

    def on_before_optimizer_step(self, optimizer):
        # The device is waited for once in an optimizer step: here, for all that is checked, shown and logged of it.
        self._rate, self._gradient_norm, self._numbers = optimizer.param_groups[0]["lr"], None, None
        losses, self._unchecked = self._unchecked, {}
        asked = {"losses": torch.cat(list(losses.values()))} if losses else {}
        gradients, is_logged = [p.grad for p in self.parameters() if p.grad is not None], self._is_next_logged
        if gradients and (self._fused or is_logged):
            norm = torch.nn.utils.get_total_norm(gradients)
            asked["norm"] = (norm.full_tensor() if isinstance(norm, DTensor) else norm)[None]
        # With a scaler, infinite gradients are its business
        checked = [asked[name] for name in ("losses", *(("norm",) if self._fused else ())) if name in asked]
        if checked:
            is_broken = ~torch.cat([tensor.float() for tensor in checked]).isfinite().all()
            asked["is_broken"] = self.trainer.strategy.reduce(is_broken.float()[None], reduce_op="max")
        if is_logged and self._recent_losses:
            asked["numbers"] = self._reduce_recent()
        found = _to_host(asked)
        self._numbers = found.get("numbers")
        if found.get("losses"):
            self.shown_loss = sum(found["losses"]) / len(found["losses"])
        if found.get("norm"):
            self._gradient_norm = found["norm"][0]
        if not any(found.get("is_broken", [])):
            self._num_skipped_in_a_row = 0
            self.stepping_since = time.perf_counter()
            return
        step = self.trainer.global_step + 1
        data = getattr(self.trainer, "datamodule", None)
        describe = getattr(data, "describe", lambda batch, row: f"row {row} of batch {batch}")
        which = [
            f"{describe(batch_idx, row)} (loss {by_example[row]:g})"
            for batch_idx, by_example in losses.items()
            for row in range(len(by_example))
            if not by_example[row].isfinite()
        ]
        which = [line for lines in gather(which) for line in lines]
        what = f"the loss of step {step} is not finite: {'; '.join(which)}"
        if not which:
            what = f"the gradient of step {step} is not finite, though its losses are"
        self._num_skipped_in_a_row += 1
        if self.on_nonfinite == "stop" or self._num_skipped_in_a_row == SKIPS_IN_A_ROW:
            skipped = f" (the last {SKIPS_IN_A_ROW - 1} steps were skipped)" if self.on_nonfinite == "skip" else ""
            error = TrainingError(
                f"{what}{skipped}. Go on here without such steps (trainer.on_nonfinite=skip), or start in another "
                "folder with a lower finetune.lr or with trainer.gradient_clip=1",
                changes=("trainer.on_nonfinite=skip",) if self.on_nonfinite == "stop" else (),
            )
            error.is_everywhere = True
            raise error
        self.num_skipped += 1
        log.warning(f"Step {step} is skipped ({self.num_skipped} so far): {what}")
        optimizer.zero_grad()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        step = self.trainer.global_step
        if step == self._logged_step or not self._is_logged(step):
            return
        self._logged_step = step
        self._log_step(step)
        if step % self._log_every == 0:  # the last one may be another, and a longer run goes on from it
            self._recent_losses.clear()
            self._recent_by_kind.clear()

    @property
    def _is_next_logged(self) -> bool:
        return self._is_logged(self.trainer.global_step + 1)

    def _is_logged(self, step: int) -> bool:
        return step > 0 and (step % self._log_every == 0 or step == self.trainer.max_steps)

    @property
    def _log_every(self) -> int:
        return self.trainer.log_every_n_steps  # type: ignore[attr-defined]

    def _log_step(self, step: int):
        """Means over all processes since the last ones logged; of the step its rate and the norm of its gradient."""
        forget_logged(self.trainer, SOMETIMES)
        numbers = self._reduce_recent().tolist() if self._numbers is None else self._numbers
        num_losses = 1 + len(self.objective.parts)
        losses, (least, *by_kind) = numbers[:num_losses], numbers[num_losses:]
        self._check_loss(step, losses[self._lm], least)
        names = ("train/loss", *(f"train/loss_{part}" for part in self.objective.parts))
        metrics: dict[str, float] = dict(zip(names, losses, strict=True))
        sums = dict(zip(KINDS, zip(by_kind[: len(KINDS)], by_kind[len(KINDS) :], strict=True), strict=True))
        self._has_retrieval |= sums["retrieval"][1] > 0
        if self._has_retrieval:  # or the two would be one curve
            metrics |= {f"train/loss_{kind}": total / number for kind, (total, number) in sums.items() if number}
        strategy, norm = self.trainer.strategy, self._gradient_norm
        if isinstance(strategy, DeepSpeedStrategy):
            norm = deepspeed_gradient_norm(strategy)
        if norm is not None and math.isfinite(norm):  # not of a step that a scaler has skipped
            metrics["train/grad_norm"] = float(norm)
        if self._rate is not None:
            metrics["train/lr"] = self._rate
        if self.num_skipped:
            metrics["train/skipped_steps"] = float(self.num_skipped)
        # As tensors of the CPU: of numbers Lightning would make some of the device, and wait for it to read them
        self.log_dict({name: torch.tensor(float(value)) for name, value in metrics.items()})

    def _reduce_recent(self) -> torch.Tensor:
        """Over all processes, since it was logged last: mean losses, the least, and the sums of `_by_kind`."""
        reduce = self.trainer.strategy.reduce
        assert self._least_loss is not None
        losses = reduce(torch.stack(self._recent_losses).nanmean(0), reduce_op="mean")
        least = reduce(self._least_loss.clone(), reduce_op="min")
        by_kind = reduce(torch.stack(self._recent_by_kind).sum(0), reduce_op="sum")
        return torch.cat([losses, least[None], by_kind])

    def _check_loss(self, step: int, loss: float, least: float):
        """Whether the training has diverged: its loss is about that of guessing among all tokens, and was lower before.

        Raises:
            TrainingError: the training is at its end.
        """
        guess = math.log(self.model.config.get_text_config().vocab_size)
        if not (loss >= GUESSING * guess and loss > BETTER * least):
            return
        message = (
            f"the training has diverged: at step {step} the loss is {loss:.4g} nats per token, where guessing gives "
            f"{guess:.4g} and it has been {least:.4g}. Start anew with a lower finetune.lr (it is {self.lr:g}), more "
            f"finetune.warmup_steps (they are {self.warmup_steps}), or trainer.gradient_clip=1"
        )
        if step == self.trainer.max_steps:
            lower = f"finetune.lr={self.lr / 10:g}"
            error = TrainingError(f"{message}. Nothing is exported", changes=(lower,), anew=True)
            error.is_everywhere = True
            raise error
        if not self._has_warned:
            self._has_warned = True
            log.warning(message)

    def on_save_checkpoint(self, checkpoint: dict):
        nothing, size = torch.tensor(torch.nan), 2 * len(KINDS)
        of_this = {
            "recent_losses": torch.stack(self._recent_losses) if self._recent_losses else torch.empty(0, 1),
            "recent_by_kind": torch.stack(self._recent_by_kind) if self._recent_by_kind else torch.empty(0, size),
            "least_loss": nothing if self._least_loss is None else self._least_loss,
        }
        everywhere = gather({name: tensor.detach().cpu() for name, tensor in of_this.items()})
        rows = {name: torch.stack([one[name] for one in everywhere]) for name in of_this}  # a row a process
        checkpoint["pose"] = rows | {"skipped": (self.num_skipped, self._num_skipped_in_a_row)}
        if "state_dict" in checkpoint:  # else the strategy writes the parts of all processes
            checkpoint["pose"]["quantised"] = drop_quantised(checkpoint["state_dict"], self)

    def on_load_checkpoint(self, checkpoint: dict):
        kept = checkpoint["pose"]
        if "state_dict" in checkpoint:
            add_quantised(checkpoint["state_dict"], self, kept.get("quantised", {}))
        device = self.trainer.strategy.root_device  # where the module itself may come only later
        losses = kept["recent_losses"].to(device)
        losses = losses.view(*losses.shape[:2], 1 + len(self.objective.parts))
        by_kind = kept.get("recent_by_kind", losses.new_zeros(len(losses), 0, 2 * len(KINDS))).to(device)
        rank, same_processes = self.trainer.global_rank, len(losses) == self.trainer.world_size
        self._recent_losses = list(losses[rank] if same_processes else losses.mean(0))
        if same_processes:
            self._recent_by_kind = list(by_kind[rank])
        else:  # sums: those of all are with one
            self._recent_by_kind = list(by_kind.sum(0) if rank == 0 else torch.zeros_like(by_kind[0]))
        least = kept.get("least_loss", losses.new_empty(0))
        least = least[least.isfinite()].to(device)
        self._least_loss = least.min() if len(least) else None
        self.num_skipped, self._num_skipped_in_a_row = kept["skipped"]
        self._logged_step = checkpoint["global_step"]
        # The loops begin anew at the step, and the data from there on, so that the number of processes and the
        # micro-batch may be others than before.
        checkpoint["loops"]["fit_loop"] = loops_at(self.trainer, checkpoint["global_step"])

    def on_train_start(self):
        self._check_same_text()
        # Of a run that goes on the schedule may be longer than it was when this learning rate was worked out.
        scheduler: Any = self.lr_schedulers()
        for group, base, rate in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * rate(scheduler.last_epoch)
        # After the strategy has wrapped, cast and restored the model: what trains is what is probed.
        # Uncompiled: their shapes are of no step.
        has_views = self.objective.num_views > 1
        with self.trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
            found = with_root(
                self.model, run_guards, self.model, self.expected, self.target_len, self.device, has_views
            )
        log.info(f"Checked     {found}")

    def _check_same_text(self):
        """Raises a TrainingError where the processes of a job have read other documents, or other tokens of them."""
        fingerprint = getattr(getattr(self.trainer, "datamodule", None), "fingerprint", None) or ""
        everywhere = gather(same_text(fingerprint))
        if others := [rank for rank, one in enumerate(everywhere) if one != everywhere[0]]:
            error = TrainingError(
                f"data.documents are not the same everywhere: process {', '.join(map(str, others[:8]))} has read other "
                "text than process 0. Give all machines the same files (or the same revision of a dataset)"
            )
            error.is_everywhere = True
            raise error

    @property
    def _fused(self) -> bool:
        return self.trainer.precision != "16-mixed"  # there the scaler must see gradients before the step

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        # Lightning refuses to clip for a fused optimizer in mixed precision; without a scaler it is safe.
        # DeepSpeed has the value in its own config, and clips in its step.
        if gradient_clip_val is not None and self._fused and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if len(full_shape(p)) >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if len(full_shape(p)) < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]  # adapters alone are all matrices
        first, second = self.betas
        optimizer = make_optimizer(self.optimizer, groups, self.lr, (first, second), fused=self._fused)
        scheduler = get_scheduler(self.schedule, optimizer, self.warmup_steps, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _to_host(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Vectors of a device as numbers, in one transfer."""
    if not tensors:
        return {}
    numbers = iter(torch.cat([tensor.float() for tensor in tensors.values()]).tolist())
    return {name: [next(numbers) for _ in range(len(tensor))] for name, tensor in tensors.items()}


def _by_kind(by_example: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums of the losses of examples, text before retrieval, then the numbers of both; those not finite count in none.

    Of text every token carries a loss, of a retrieval task the answers alone.

    Args:
        by_example: fp32 [B].
        labels: [B, L].

    Returns:
        fp32 [4]; nothing waits for the device.
    """
    is_retrieval, is_finite = (labels == IGNORE).any(1), by_example.isfinite()
    of_kind = torch.stack([~is_retrieval, is_retrieval]) & is_finite
    sums = (of_kind * torch.where(is_finite, by_example, 0)).sum(1)
    return torch.cat([sums, of_kind.sum(1)]).float()
