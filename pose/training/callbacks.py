"""What happens beside the steps of a training: what a user sees of it, and the export at its end."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from pose.modeling.export import export_model
from pose.plan import peak_flops
from pose.training.module import PoseModule


class ProgressBar(TQDMProgressBar):
    """A bar over the optimizer steps of the whole run, whatever the gradient accumulation; closed however it ends."""

    def __init__(self):
        super().__init__()
        self.bar: Tqdm | None = None

    def init_train_tqdm(self) -> Tqdm:
        """With its name and length from the beginning, so that Lightning need not draw it anew."""
        self.bar = Tqdm(
            desc="Training", total=self.trainer.max_steps, initial=self.trainer.global_step, unit="step",
            disable=self.is_disabled, dynamic_ncols=True, file=sys.stdout, smoothing=0, bar_format=self.BAR_FORMAT,
        )  # fmt: skip
        return self.bar

    def on_train_epoch_start(self, trainer, *_):
        pass

    def on_train_epoch_end(self, trainer, pl_module):
        pass

    def on_train_batch_end(self, trainer, pl_module, *_):
        bar = self.bar
        if bar is None or trainer.global_step == bar.n:
            return
        bar.n = trainer.global_step
        bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=bar.n < trainer.max_steps)  # the end draws it too

    def on_exception(self, trainer, pl_module, exception):
        if self.bar is not None:  # or the bars of a sweep's later jobs are drawn below it
            self.bar.close()

    def get_metrics(self, trainer, pl_module):
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        if (loss := getattr(pl_module, "shown_loss", None)) is not None:
            items["loss"] = f"{loss:.3f}"
        for callback in trainer.callbacks:
            if isinstance(callback, Throughput):
                items |= {
                    name: f"{value:,.0f}" if value > 1 else f"{value:.0%}" for name, value in callback.shown.items()
                }
        return items


class Throughput(L.Callback):
    """Logs what training costs, over all devices; what is measured in between is left out.

    Since it was logged last: cost/tokens_per_second; cost/step_seconds, of it cost/data_seconds (waiting for a batch)
    and cost/optimizer_seconds, each of one optimizer step; on a GPU whose peak is known cost/mfu, the model FLOPs
    utilisation: 6 N + 6 n_layer n_head d_head L FLOPs a token (causal; `pose.plan`) over the peak. Of the whole run:
    cost/seconds, cost/tokens, cost/flops; on a GPU cost/peak_memory_gib, since it was started.

    Attributes:
        flops_per_token: of the training; None logs neither FLOPs nor MFU.
    """

    def __init__(self):
        self.flops_per_token: float | None = None
        self.peak_flops: float | None = None
        self.shown: dict[str, float] = {}  # of what was logged last, for the bar
        self.waited = self.optimizing = self.ended = 0.0
        self.seconds_before = 0.0  # of the same run, up to the checkpoint it goes on from
        self.begin = self.start = 0.0  # of the training; of what is logged next
        self.tokens = self.step = self.peak = 0

    @property
    def seconds(self) -> float:
        """Of training, in the whole run."""
        return self.seconds_before + time.perf_counter() - self.begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is none of the training, so that it counts neither in its time nor in its memory."""
        begin = time.perf_counter()
        self.peak = max(self.peak, self._peak_memory())
        try:
            yield
        finally:
            self._forget_peak()
            seconds = time.perf_counter() - begin
            self.start += seconds
            self.begin += seconds
            self.ended += seconds

    def on_train_start(self, trainer, pl_module):
        self.device = pl_module.device
        self.peak = 0
        self._forget_peak()  # what was measured before
        if self.device.type == "cuda":
            self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device), str(trainer.precision))
        self.begin = self.ended = time.perf_counter()
        self._count_from(trainer.global_step)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.waited += time.perf_counter() - self.ended

    def state_dict(self):
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict):
        self.seconds_before = state_dict["seconds"]

    def on_train_end(self, trainer, pl_module):
        trainer.callback_metrics["cost/seconds"] = torch.tensor(self.seconds)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.tokens += batch["input_ids"].numel() * trainer.world_size
        step, self.ended = trainer.global_step, time.perf_counter()
        since = getattr(pl_module, "stepping_since", None)
        if since is not None:  # the last batch of a step
            self.optimizing += self.ended - since
            pl_module.stepping_since = None
        if step == self.step or step % trainer.log_every_n_steps:  # once, at the last batch of a step
            return
        seconds, steps = self.ended - self.start, step - self.step
        metrics = {
            "cost/tokens_per_second": self.tokens / seconds,
            "cost/step_seconds": seconds / steps,
            "cost/data_seconds": self.waited / steps,
            "cost/optimizer_seconds": self.optimizing / steps,
            "cost/seconds": self.seconds,
            "cost/tokens": step * self.tokens / steps,  # every step has as many
        }
        self.shown = {"tokens/s": metrics["cost/tokens_per_second"]}
        if self.flops_per_token is not None:
            metrics["cost/flops"] = self.flops_per_token * metrics["cost/tokens"]
            if self.peak_flops is not None:
                peak = self.peak_flops * trainer.world_size
                metrics["cost/mfu"] = self.shown["MFU"] = self.flops_per_token * self.tokens / seconds / peak
        if self.device.type == "cuda":
            self.peak = max(self.peak, self._peak_memory())
            metrics["cost/peak_memory_gib"] = self.peak / 2**30
        pl_module.log_dict({name: torch.tensor(value) for name, value in metrics.items()})
        self._count_from(step)

    def _count_from(self, step: int):
        self.tokens, self.step, self.start = 0, step, time.perf_counter()
        self.waited = self.optimizing = 0.0

    def _peak_memory(self) -> int:
        """Bytes, since they were last forgotten."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _forget_peak(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


class Export(L.Callback):
    """Exports the model, while the strategy can still put it together: when the training is complete, as a callback.

    Args:
        tokenizer: of the model.
        folder: to export to.
        dtype: of the saved weights.
        fold: as of `export_model`.
    """

    def __init__(self, tokenizer, folder: str | Path, dtype: torch.dtype, fold: bool = True):
        self.tokenizer, self.folder, self.dtype, self.fold = tokenizer, Path(folder), dtype, fold

    def on_train_end(self, trainer, pl_module):
        self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: PoseModule):
        """Exports the model as it is now; every process must call this."""
        with torch.compiler.set_stance("force_eager"):  # it is asked with texts of other lengths
            export_model(
                pl_module.model, self.tokenizer, self.folder, self.dtype, trainer.is_global_zero, fold=self.fold
            )
