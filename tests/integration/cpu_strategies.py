"""DeepSpeed on the CPU, for tests alone: Lightning refuses it there, and ZeRO itself does not."""

import importlib

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy

from pose.training.strategies import DeepSpeed

BUCKET = 300_000  # elements of a reduction; DeepSpeed's default would outweigh every small model


class CpuDeepSpeed(DeepSpeed):
    """The strategy of a GPU, with processes of gloo. Every weight is partitioned, however small."""

    needs_gpu = False

    def __init__(self, stage: int, offload_optimizer: bool = False, offload_parameters: bool = False):
        super().__init__(stage, offload_optimizer, offload_parameters)
        self.config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": BUCKET}

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        reset_seed()
        # Its all-reduce through shared memory, in place of gloo's, would be compiled first, which takes a minute
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        self.set_world_ranks()
        self._init_deepspeed_distributed()
