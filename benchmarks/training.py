"""Training steps of random models of known shapes, for benchmarks: on a GPU or a CPU, data and optimizer included."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig

from pose.data.examples import PoseDataset, Targets, collate_scored
from pose.modeling import speed
from pose.modeling.attention import preferred_kernels
from pose.modeling.load import build_model, rope_geometry, scale_config
from pose.modeling.lora import add_lora
from pose.modeling.loss import loss_and_example_losses
from pose.modeling.options import LoraOptions
from pose.positions import Full, PoSE
from pose.rope import Linear

# Sizes of published models; weights are random.
SHAPES = {
    "rehearsal": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2},
    "small": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 4},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},  # SmolLM2-135M
    "1b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},  # Llama-3.2-1B
    "7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32},  # LLaMA-7B
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        shape: one of SHAPES.
        train_len: tokens of an example.
        target_len: of the window; equal to train_len, every position is trained (full-length).
        micro_batch: examples of a step.
        recompute: activations, as of `pose.modeling.speed.recompute`.
        compiled: whether layers are compiled.
        rank: of LoRA, over bf16 weights; None trains all weights.
        optimizer: makes one from parameters.
        attention: a backend.
    """

    shape: str
    train_len: int
    target_len: int
    micro_batch: int = 1
    recompute: bool | str = False
    compiled: bool = False
    rank: int | None = None
    optimizer: str = "adamw"
    attention: str = "auto"

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batch * self.train_len


class Trainee:
    """A model with its optimizer and data; under bf16 autocast on a GPU, in fp32 on a CPU.

    Args:
        setting: what is trained.
        device: to train on.
        in_bf16: autocast; None is on a GPU alone.
    """

    def __init__(self, setting: Setting, device: torch.device, in_bf16: bool | None = None):
        self.setting, self.device = setting, device
        self.in_bf16 = device.type == "cuda" if in_bf16 is None else in_bf16
        window = min(setting.train_len, setting.target_len)
        config = LlamaConfig(max_position_embeddings=window, **SHAPES[setting.shape])
        self.geometry = rope_geometry(config)
        scale_config(config, Linear(), setting.target_len)
        torch.manual_seed(0)
        options = LoraOptions(rank=setting.rank) if setting.rank is not None else None
        dtype = torch.bfloat16 if options is not None else torch.float32
        with device:  # 7B in fp32 would be made on the CPU for minutes
            prepare = None if options is None else lambda model: add_lora(model, options)
            model = build_model(config, None, setting.attention, dtype, prepare=prepare)
        self.model = model.to(device).train()
        for parameter in self.model.parameters():
            if options is not None and parameter.requires_grad:
                parameter.data = parameter.data.float()
        speed.recompute(self.model, setting.recompute)
        speed.residuals_as_computed(self.model)
        if setting.compiled:
            speed.compile_layers(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(setting.optimizer, trained)
        self.batches = self._batches()

    def step(self) -> float:
        """One optimizer step; its loss, when the device is done."""
        batch = next(self.batches)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16):
            body = self.model.base_model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            )
            scored = Targets(batch["scored_at"], batch["scored_weights"])
            head = self.model.get_output_embeddings()
            loss, _ = loss_and_example_losses(body.last_hidden_state, head, batch["labels"], scored)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def seconds(self, steps: int) -> float:
        """Of one step, the mean of several in a row."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - start) / steps

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        setting = self.setting
        lengths = {"train_len": setting.train_len, "target_len": setting.target_len}
        is_full = setting.train_len == setting.target_len
        sampler = Full(**lengths) if is_full else PoSE(**lengths)
        rng = np.random.default_rng(0)
        documents = [rng.integers(SHAPES[setting.shape]["vocab_size"], size=2 * setting.target_len, dtype=np.uint32)]
        dataset = PoseDataset(documents, sampler, num_examples=1 << 30, seed=0)
        item = 0
        while True:
            batch = collate_scored([dataset[item + i] for i in range(setting.micro_batch)])
            item += setting.micro_batch
            yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


def _optimizer(name: str, parameters: list) -> torch.optim.Optimizer:
    made: dict[str, Callable] = {"adamw": lambda: torch.optim.AdamW(parameters, 1e-5, fused=True)}
    if name == "adamw8bit":
        from pose.training.optimizers import make_optimizer

        return make_optimizer(name, [{"params": parameters}], 1e-5, (0.9, 0.999), fused=True)
    return made[name]()


@contextlib.contextmanager
def on(setting: Setting, device: torch.device, in_bf16: bool | None = None) -> Iterator[Trainee]:
    """A trainee whose memory is free afterwards."""
    trainee = Trainee(setting, device, in_bf16)
    try:
        with preferred_kernels(device):
            yield trainee
    finally:
        del trainee
        if device.type == "cuda":
            torch.cuda.empty_cache()


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
