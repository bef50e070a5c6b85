"""Training steps of random models of known shapes, for benchmarks: on a GPU or a CPU, data and optimizer included."""

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig

from benchmarks.shapes import SHAPES
from pose.data.examples import PoseDataset, Targets, collate_scored
from pose.modeling import speed
from pose.modeling.attention import preferred_kernels
from pose.modeling.held import hold
from pose.modeling.load import build_model, scale_config
from pose.modeling.lora import add_lora
from pose.modeling.loss import loss_and_example_losses
from pose.modeling.options import LoraOptions
from pose.positions import Full, PoSE
from pose.rope import Linear
from pose.training.optimizers import make_optimizer


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        shape: one of SHAPES.
        train_len: tokens of an example.
        target_len: of the window; equal to train_len, every position is trained (full-length).
        micro_batch: examples that are computed at one time.
        accumulate: micro-batches of an optimizer step.
        recompute: activations, as of `pose.modeling.speed.recompute`.
        compiled: whether layers are compiled.
        rank: of LoRA, over bf16 weights; None trains all weights.
        optimizer: one of `pose.training.optimizers`; adamw8bit steps on bf16 weights, as a run with one GPU does.
        attention: a backend.
    """

    shape: str
    train_len: int
    target_len: int
    micro_batch: int = 1
    accumulate: int = 1
    recompute: bool | str = False
    compiled: bool = False
    rank: int | None = None
    optimizer: str = "adamw"
    attention: str = "auto"

    @property
    def tokens(self) -> int:
        """Of an optimizer step."""
        return self.accumulate * self.micro_batch * self.train_len


class Trainee:
    """A model with its optimizer and data; under bf16 autocast on a GPU, in fp32 on a CPU.

    Args:
        setting: what is trained.
        device: to train on. The weights are made there: 7B on a CPU would take minutes.
        in_bf16: autocast; None is on a GPU alone.
    """

    def __init__(self, setting: Setting, device: torch.device, in_bf16: bool | None = None):
        self.setting, self.device = setting, device
        self.in_bf16 = device.type == "cuda" if in_bf16 is None else in_bf16
        window = min(setting.train_len, setting.target_len)
        config = LlamaConfig(max_position_embeddings=window, **SHAPES[setting.shape])
        scale_config(config, Linear(), setting.target_len)
        torch.manual_seed(0)
        options = None if setting.rank is None else LoraOptions(rank=setting.rank)
        is_narrow = options is not None or setting.optimizer == "adamw8bit"
        dtype = torch.bfloat16 if is_narrow else torch.float32
        with device:
            prepare = None if options is None else lambda model: add_lora(model, options)
            model = build_model(config, None, setting.attention, dtype, prepare=prepare)
        self.model = model.to(device).train()
        if is_narrow:
            _widen(self.model, trained=torch.float32 if options is not None else torch.bfloat16)
        speed.recompute(self.model, setting.recompute)
        speed.residuals_as_computed(self.model)
        if setting.compiled:
            speed.compile_layers(self.model)
        trained = [{"params": [p for p in self.model.parameters() if p.requires_grad], "weight_decay": 0.0}]
        self.optimizer = make_optimizer(setting.optimizer, trained, 1e-5, (0.9, 0.999), fused=True)
        self._examples = self._drawn()

    def backward(self, num_examples: int) -> torch.Tensor:
        """Forward and backward of so many examples at one time; their loss, fp32 scalar."""
        batch = collate_scored([next(self._examples) for _ in range(num_examples)])
        batch = {name: self._sent(value) for name, value in batch.items()}
        # Casts are not kept for a second layer that shares a weight, as in Lightning: there would be two of all weights
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16, cache_enabled=False):
            body = self.model.base_model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            )
            scored = Targets.of_batch(batch)
            head = self.model.get_output_embeddings()
            loss, _ = loss_and_example_losses(body.last_hidden_state, head, batch["labels"], scored)
        (loss / self.setting.accumulate).backward()
        return loss.detach()

    def step(self) -> torch.Tensor:
        """One optimizer step; the loss of its last micro-batch, which a GPU may still be at work on."""
        for _ in range(self.setting.accumulate):
            loss = self.backward(self.setting.micro_batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def seconds(self, steps: int = 1) -> float:
        """Of one step, the mean of several in a row, until the device is done."""
        start = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        loss.item()
        return (time.perf_counter() - start) / steps

    def _sent(self, value: torch.Tensor) -> torch.Tensor:
        on_gpu = self.device.type == "cuda"
        return value.pin_memory().to(self.device, non_blocking=True) if on_gpu else value

    def _drawn(self) -> Iterator[dict]:
        setting = self.setting
        lengths = {"train_len": setting.train_len, "target_len": setting.target_len}
        is_full = setting.train_len == setting.target_len
        sampler = Full(**lengths) if is_full else PoSE(**lengths)
        rng = np.random.default_rng(0)
        documents = [rng.integers(SHAPES[setting.shape]["vocab_size"], size=2 * setting.target_len, dtype=np.uint32)]
        dataset = PoseDataset(documents, sampler, num_examples=1 << 30, seed=0)
        item = 0
        while True:
            yield dataset[item]
            item += 1


def _widen(model, trained: torch.dtype):
    """Makes the dtypes of a model in bf16 those of a run (`pose.modeling.held.Held`).

    Args:
        model: in place. Matrices that do not train stay bf16, and whatever is no matrix becomes fp32.
        trained: of matrices that train, whose gradients are fp32.
    """
    matrices = hold(model)
    for parameter in model.parameters():
        if id(parameter) not in matrices or (parameter.requires_grad and trained == torch.float32):
            parameter.data = parameter.data.float()
        elif parameter.requires_grad:
            parameter.grad_dtype = torch.float32


@contextlib.contextmanager
def on(setting: Setting, device: torch.device, in_bf16: bool | None = None) -> Iterator[Trainee]:
    """A trainee whose memory is free afterwards."""
    trainee = Trainee(setting, device, in_bf16)
    try:
        with preferred_kernels(device):
            yield trainee
    finally:
        trainee.__dict__.clear()  # whoever got it still has the name
        gc.collect()  # a compiled layer and its forward hold each other
        if device.type == "cuda":
            torch.cuda.empty_cache()


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
