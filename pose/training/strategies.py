"""The strategies that deal a model out to several processes, as Lightning's with what this project needs of them.

`layout` says how the weights are sharded while the model is built (`pose.modeling.shard`). Each keeps fp32 master
weights in mixed precision.
"""

import importlib.util
import warnings
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy

from pose.errors import ConfigError
from pose.modeling.shard import FullyShard, Layout, Whole, Zero3, set_masters
from pose.modeling.speed import CUDA, check_accelerator, cpu_computes_bf16
from pose.training.compat import deepspeed_config, set_data_parallel_size, undo_deepspeed_patches

# Weights are fp32, or have fp32 masters. Why what Lightning has besides is not for this:
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
REFUSED = {
    "16-true": "it keeps the weights themselves in fp16 and has no scaler of the gradients, so small ones vanish and "
    "the training diverges without an error",
    "bf16-true": "it keeps the weights themselves in bf16, whose rounding is larger than most steps at the learning "
    "rates of fine-tuning, so many weights never move",
    "64-true": "positions and losses are computed in fp32, and the export is fp32 at most, so fp64 weights take twice "
    "the memory for nothing",
}


class FSDP(ModelParallelStrategy):
    """PyTorch's FSDP2: weights, gradients and optimizer states are sharded over all processes."""

    precisions = ("32-true", "bf16-mixed")

    def __init__(self):
        super().__init__(tensor_parallel_size=1)

    def setup_environment(self):
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    @property
    def layout(self) -> Layout:
        compute_dtype = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        return FullyShard(self.device_mesh["data_parallel"], self.root_device, compute_dtype)


class DeepSpeed(DeepSpeedStrategy):
    """DeepSpeed's ZeRO (arXiv 1910.02054).

    Args:
        stage: 1 shards optimizer states, 2 gradients too, 3 weights too.
        offload_optimizer: keep optimizer states and fp32 weights in CPU memory, and take the steps there.
        offload_parameters: keep the weights in CPU memory as well; stage 3 only.

    Raises:
        ConfigError: the package is missing, or a value is not accepted.
    """

    precisions = ("32-true", "bf16-mixed", "16-mixed")
    needs_gpu = True

    def __init__(self, stage: int, offload_optimizer: bool = False, offload_parameters: bool = False):
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                "this strategy needs the package deepspeed, which is not installed: pip install "
                "deepspeed, or choose strategy=fsdp"
            )
        if stage not in (1, 2, 3):
            raise ConfigError(f"strategy.stage={stage!r} is not accepted: choose 1, 2 or 3")
        if offload_parameters and stage != 3:
            raise ConfigError(f"strategy.offload_parameters=true needs strategy.stage=3, and it is {stage}")
        super().__init__(stage=stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters)
        self.stage = stage
        # torch's fused AdamW takes the steps on the CPU too: DeepSpeed's own would be compiled first, for minutes.
        assert self.config is not None
        self.config["zero_force_ds_cpu_optimizer"] = False
        self.config["data_types"] = {"grad_accum_dtype": "fp32"}  # or micro-batches would add up in bf16

    @property
    def layout(self) -> Layout:
        config = deepspeed_config(self)
        if self.stage == 3:
            return Zero3(config, self.root_device)
        return Whole(self.root_device, Zero3(config, self.root_device).dtype)

    @contextmanager
    def model_sharded_context(self):
        yield  # the layout does it, one weight at a time

    def backward(self, closure_loss, optimizer, *args, **kwargs):
        # Lightning has divided the loss by the accumulated batches, and DeepSpeed would once more.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def init_deepspeed(self):
        with warnings.catch_warnings():  # PoseModule clips by itself, but not here
            warnings.filterwarnings("ignore", message=".*DeepSpeed handles gradient clipping internally.*")
            super().init_deepspeed()

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        with warnings.catch_warnings():  # of ZeRO-3's folder with a part for each process: a run goes on from these
            warnings.filterwarnings("ignore", message=".*saving the DeepSpeed Stage 3 checkpoint.*")
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def setup(self, trainer: L.Trainer):
        super().setup(trainer)
        model: Any = getattr(self.lightning_module, "model", None)
        if model.source is not None and self.precision_plugin.precision != "32-true":
            set_masters(model, model.source())

    def teardown(self):
        undo_deepspeed_patches()
        super().teardown()


def is_compiled(choice: str | bool, strategy: Strategy) -> bool:
    """Whether decoder layers are compiled, by `trainer.compile`: auto is on a GPU, but for ZeRO-3."""
    if choice != "auto":
        return bool(choice)
    return strategy.root_device.type == "cuda" and not _gathers_in_layers(strategy)


def _gathers_in_layers(strategy: Strategy) -> bool:
    return isinstance(strategy, DeepSpeed) and strategy.stage == 3


def resolve_precision(precision: str, accelerator: str) -> Any:
    """A precision of Lightning; "auto" is bf16-mixed where the hardware has fast bf16, else 32-true.

    Raises:
        ConfigError: Lightning has no such precision; the accelerator is a GPU, and there is none.
    """
    check_accelerator(accelerator)
    if precision not in ("auto", *PRECISIONS, *REFUSED, "32", "bf16", "16", "64"):  # these by check_strategy
        raise ConfigError(f"trainer.precision={precision!r} is unknown: choose auto, {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    on_gpu = accelerator in ("auto", *CUDA) and torch.cuda.is_available()
    if on_gpu:
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast_bf16 = cpu_computes_bf16()
    return "bf16-mixed" if fast_bf16 else "32-true"


def check_strategy(strategy: Strategy, precision: str, on_nonfinite: str = "stop", compiled: str | bool = "auto"):
    """Whether a strategy can work on the devices it has got.

    Raises:
        ConfigError: it cannot; says what can.
    """
    precisions = getattr(strategy, "precisions", PRECISIONS)
    if precision not in precisions:
        why = f", since {REFUSED[precision]}" if precision in REFUSED else " by this strategy"
        raise ConfigError(f"trainer.precision={precision} is not supported{why}: choose {', '.join(precisions)}")
    if isinstance(strategy, DeepSpeed) and strategy.needs_gpu and not isinstance(strategy.accelerator, CUDAAccelerator):
        raise ConfigError("DeepSpeed's strategies need a GPU: choose strategy=fsdp or ddp to train on the CPU")
    if compiled is True and _gathers_in_layers(strategy):
        raise ConfigError(
            "trainer.compile=true is not supported by ZeRO-3, which gathers each weight inside a layer as it is used: "
            "take auto, or strategy=fsdp"
        )
    if isinstance(strategy, DeepSpeedStrategy) and on_nonfinite == "skip":
        raise ConfigError(
            "trainer.on_nonfinite=skip is not supported by DeepSpeed, which takes its steps by itself: choose stop, or "
            "strategy=fsdp"
        )
