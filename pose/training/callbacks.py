"""What happens beside the steps of a training: what a user sees of it, and the export at its end."""

import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from pose.modeling.export import export_model


class ProgressBar(TQDMProgressBar):
    """A bar over the optimizer steps of the whole run, whatever the gradient accumulation."""

    @property
    def total_train_batches(self) -> int:
        return self.trainer.max_steps

    def on_train_epoch_start(self, trainer, *_):
        super().on_train_epoch_start(trainer, *_)
        self.train_progress_bar.set_description("Training")
        self.train_progress_bar.unit = "step"

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer, pl_module):
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


class Throughput(L.Callback):
    """Logs train/tokens_per_second over all devices, and on a GPU its peak memory in GiB."""

    def __init__(self):
        self.seconds_before = 0.0  # of the same run, up to the checkpoint it goes on from

    @property
    def seconds(self) -> float:
        """Of training, in the whole run."""
        return self.seconds_before + time.perf_counter() - self.begin

    def leave_out(self, seconds: float):
        """Takes from the time of training what was none of it, and has just passed."""
        self.start += seconds
        self.begin += seconds

    def on_train_start(self, trainer, pl_module):
        self.tokens, self.start = 0, time.perf_counter()
        self.begin = self.start

    def state_dict(self):
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict):
        self.seconds_before = state_dict["seconds"]

    def on_train_end(self, trainer, pl_module):
        trainer.callback_metrics["train/seconds"] = torch.tensor(self.seconds)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.tokens += batch["input_ids"].numel() * trainer.world_size
        if trainer.global_step == 0 or trainer.global_step % trainer.log_every_n_steps:
            return
        now = time.perf_counter()
        metrics = {"train/tokens_per_second": self.tokens / (now - self.start)}
        if pl_module.device.type == "cuda":
            metrics["train/peak_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        pl_module.log_dict(metrics)
        self.tokens, self.start = 0, now


class Export(L.Callback):
    """Exports the model, while the strategy can still put it together: when the training is complete, as a callback.

    Args:
        tokenizer: of the model.
        folder: to export to.
        dtype: of the saved weights.
    """

    def __init__(self, tokenizer, folder: str | Path, dtype: torch.dtype):
        self.tokenizer, self.folder, self.dtype = tokenizer, folder, dtype

    def on_train_end(self, trainer, pl_module):
        self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule):
        """Exports the model as it is now; every process must call this."""
        export_model(pl_module.model, self.tokenizer, self.folder, self.dtype, trainer.is_global_zero)
