"""The LightningModule: one step, one optimizer, one schedule."""

from collections.abc import Sequence

import lightning as L
import torch
from transformers import PreTrainedModel, get_scheduler

from pose.modeling.guards import run_guards
from pose.modeling.loss import causal_lm_loss
from pose.rope import Frequencies


class PoseModule(L.LightningModule):
    """Trains a causal language model on batches that bring their own position ids.

    Args:
        model: a transformers model built by `pose.modeling.load.build_model`.
        expected: the closed form of its rotary frequencies, for the guards; None where there is none.
        target_len: the window to extend to, in tokens; the guards probe positions up to it.
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices only.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: a schedule of transformers' `get_scheduler`, such as linear, cosine, constant_with_warmup.
        max_steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        expected: Frequencies | None,
        target_len: int,
        lr: float,
        betas: Sequence[float],
        weight_decay: float,
        warmup_steps: int,
        schedule: str,
        max_steps: int,
    ):
        super().__init__()
        self.model = model
        self.expected, self.target_len = expected, target_len
        self.lr, self.betas, self.weight_decay = lr, tuple(betas), weight_decay
        self.warmup_steps, self.schedule, self.max_steps = warmup_steps, schedule, max_steps
        self._recent_losses: list[torch.Tensor] = []
        self._logged_step = 0

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, L, H] of input_ids [B, L] at position_ids [B, L]."""
        body = self.model.base_model
        return body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        hidden = self(batch["input_ids"], batch["position_ids"])
        loss = causal_lm_loss(hidden, self.model.get_output_embeddings(), batch["labels"])
        # The logged loss is the mean since the last one logged: examples differ too much for one batch to tell.
        self._recent_losses.append(loss.detach())
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("train/loss", torch.stack(self._recent_losses).mean(), sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        step = self.trainer.global_step
        if step % self.trainer.log_every_n_steps == 0 and step != self._logged_step:
            self._recent_losses.clear()
            self._logged_step = step

    def on_train_start(self):
        # After the strategy has wrapped, cast and restored the model: what trains is what is probed.
        with self.trainer.precision_plugin.forward_context():
            run_guards(self.model, self.expected, self.target_len, self.device)

    @property
    def _fused(self) -> bool:
        return self.trainer.precision != "16-mixed"  # there the scaler must see gradients before the step

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        # Lightning refuses to clip for a fused optimizer in mixed precision; without a scaler it is safe.
        if gradient_clip_val is not None and self._fused:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
            self.log("train/grad_norm", norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]  # adapters alone are all matrices
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=self._fused)
        scheduler = get_scheduler(self.schedule, optimizer, self.warmup_steps, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
