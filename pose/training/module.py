"""The LightningModule: one step, one optimizer, one schedule."""

import logging
from collections.abc import Callable, Sequence

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, get_scheduler

from pose.errors import TrainingError
from pose.modeling.guards import run_guards
from pose.modeling.loss import loss_and_example_losses
from pose.modeling.shard import full_shape, with_root
from pose.rope import Frequencies

log = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 10


class PoseModule(L.LightningModule):
    """Trains a causal language model on batches that bring their own position ids.

    Args:
        load: gives the transformers model (`pose.modeling.load.build_model`), ready to train. Called once by
            each process, with Lightning's strategy, under which large models are built in parts.
        expected: the closed form of its rotary frequencies, for the guards; None where there is none.
        target_len: the window to extend to, in tokens; the guards probe positions up to it.
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices only.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: a schedule of transformers' `get_scheduler`, such as linear, cosine, constant_with_warmup.
        max_steps: optimizer steps of the whole run.
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
        seed: int = 0,
        on_nonfinite: str = "stop",
    ):
        super().__init__()
        self.load, self.model = load, None
        self.expected, self.target_len = expected, target_len
        self.lr, self.betas, self.weight_decay = lr, tuple(betas), weight_decay
        self.warmup_steps, self.schedule, self.max_steps = warmup_steps, schedule, max_steps
        self.seed = seed
        self.on_nonfinite = on_nonfinite
        self.num_skipped = 0
        self._num_skipped_in_a_row = 0
        self._unchecked: dict[int, torch.Tensor] = {}
        self._recent_losses: list[torch.Tensor] = []
        self._logged_step = 0

    def configure_model(self):
        if self.model is None:
            self.model = self.load(self.trainer.strategy)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, L, H] of input_ids [B, L] at position_ids [B, L]."""
        body = self.model.base_model
        return body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

    def on_train_batch_start(self, batch, batch_idx):
        accumulated = batch_idx % self.trainer.accumulate_grad_batches
        source = (self.seed, self.trainer.global_step, accumulated, self.trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(source).generate_state(1)[0]))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss, by_example = with_root(self.model, self._losses, batch)
        self._unchecked[batch_idx] = by_example
        # The logged loss is the mean since the last one logged: examples differ too much for one batch to tell.
        self._recent_losses.append(torch.where(loss.isfinite(), loss.detach(), torch.nan))
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("train/loss", torch.stack(self._recent_losses).nanmean(), sync_dist=True)
        return loss

    def _losses(self, batch):
        hidden = self(batch["input_ids"], batch["position_ids"])
        return loss_and_example_losses(hidden, self.model.get_output_embeddings(), batch["labels"])

    def on_before_optimizer_step(self, optimizer):
        # One look at the device for each optimizer step, by all processes together.
        losses, self._unchecked = self._unchecked, {}
        looked_at = [torch.cat(list(losses.values()))] if losses else []
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients and self._fused:  # with a scaler, infinite ones are its business
            norm = torch.nn.utils.get_total_norm(gradients)
            looked_at.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm)[None])
        broken = bool(looked_at) and not torch.cat([part.float() for part in looked_at]).isfinite().all()
        if not self.trainer.strategy.reduce_boolean_decision(broken, all=False):
            self._num_skipped_in_a_row = 0
            return
        step = self.trainer.global_step + 1
        describe = getattr(self.trainer.datamodule, "describe", lambda batch, row: f"row {row} of batch {batch}")
        found = [
            f"{describe(batch_idx, row)} (loss {by_example[row]:g})"
            for batch_idx, by_example in losses.items()
            for row in range(len(by_example))
            if not by_example[row].isfinite()
        ]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            everywhere = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everywhere, found)
            found = [line for lines in everywhere for line in lines]
        what = f"the loss of step {step} is not finite: {'; '.join(found)}"
        if not found:
            what = f"the gradient of step {step} is not finite, though its losses are"
        self._num_skipped_in_a_row += 1
        if self.on_nonfinite == "stop" or self._num_skipped_in_a_row == SKIPS_IN_A_ROW:
            skipped = f" (the last {SKIPS_IN_A_ROW - 1} steps were skipped)" if self.on_nonfinite == "skip" else ""
            error = TrainingError(
                f"{what}{skipped}. Go on here without such steps (resume=auto trainer.on_nonfinite=skip), or start in "
                "another folder with a lower finetune.lr or with trainer.gradient_clip=1"
            )
            error.is_everywhere = True
            raise error
        self.num_skipped += 1
        log.warning(f"Step {step} is skipped ({self.num_skipped} so far): {what}")
        optimizer.zero_grad()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        step = self.trainer.global_step
        if step % self.trainer.log_every_n_steps == 0 and step != self._logged_step:
            self._recent_losses.clear()
            self._logged_step = step
        if self.num_skipped:
            self.log("train/skipped_steps", float(self.num_skipped))

    def on_save_checkpoint(self, checkpoint: dict):
        recent = torch.stack(self._recent_losses) if self._recent_losses else torch.empty(0, device=self.device)
        checkpoint["pose"] = {
            "recent_losses": torch.atleast_2d(self.all_gather(recent)).cpu(),  # a row a process
            "skipped": (self.num_skipped, self._num_skipped_in_a_row),
        }

    def on_load_checkpoint(self, checkpoint: dict):
        recent = checkpoint["pose"]["recent_losses"].to(self.device)
        same_processes = len(recent) == self.trainer.world_size
        self._recent_losses = list(recent[self.trainer.global_rank] if same_processes else recent.mean(0))
        self.num_skipped, self._num_skipped_in_a_row = checkpoint["pose"]["skipped"]
        self._logged_step = checkpoint["global_step"]
        # The loops begin anew at the step, and the data from there on, so that the number of processes and the
        # micro-batch may be others than before.
        loop = self.trainer.fit_loop.state_dict()
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]
        steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
        steps["ready"] = steps["completed"] = checkpoint["global_step"]
        checkpoint["loops"]["fit_loop"] = loop

    def on_train_start(self):
        # Of a run that goes on the schedule may be longer than it was when this learning rate was worked out.
        scheduler = self.lr_schedulers()
        for group, base, rate in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * rate(scheduler.last_epoch)
        # After the strategy has wrapped, cast and restored the model: what trains is what is probed.
        with self.trainer.precision_plugin.forward_context():
            with_root(self.model, run_guards, self.model, self.expected, self.target_len, self.device)

    @property
    def _fused(self) -> bool:
        return self.trainer.precision != "16-mixed"  # there the scaler must see gradients before the step

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        # Lightning refuses to clip for a fused optimizer in mixed precision; without a scaler it is safe.
        # DeepSpeed has the value in its own config, and clips in its step.
        if gradient_clip_val is not None and self._fused and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
            self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if len(full_shape(p)) >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if len(full_shape(p)) < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]  # adapters alone are all matrices
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=self._fused)
        scheduler = get_scheduler(self.schedule, optimizer, self.warmup_steps, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
