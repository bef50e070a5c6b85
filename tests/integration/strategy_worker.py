"""Trains several cases one after the other, in each process of a group, and notes what each process saw.

torchrun --nproc-per-node 2 strategy_worker.py CASES.json OUT; a case is a list of overrides under its name.
"""

import gc
import hashlib
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from pose.app import runtime, schema
from pose.app.preflight import plan_training
from pose.app.run import Run
from pose.files import CONF
from pose.modeling.compat import local_part
from pose.modeling.rotary import rotary_modules
from pose.training import micro_batch

schema.register()


class Record(L.Callback):
    """What a process saw of a training."""

    def __init__(self, file: Path):
        self.file, self.seen = file, {"batches": [], "lr": {}}

    def setup(self, trainer, pl_module, stage):
        self.before, self.seen["live"] = live_storages(), 0  # kept, so that no address of theirs is used again

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in batch["input_ids"]]
        self.seen["batches"].append([trainer.global_step, rows])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen["lr"][trainer.global_step] = optimizer.param_groups[0]["lr"]
        if trainer.global_step:  # gradients and optimizer states are there
            storages = live_storages()
            live = sum(storages[address].nbytes() for address in storages.keys() - self.before.keys())
            self.seen["live"] = max(self.seen["live"], live)

    def on_train_start(self, trainer, pl_module):
        def held(p):
            if isinstance(p, DTensor):
                return p.to_local().numel()
            return p.ds_tensor.numel() if hasattr(p, "ds_id") else p.numel()

        model = pl_module.model
        self.seen["total"] = sum(getattr(p, "ds_shape", p.shape).numel() for p in model.parameters())
        self.seen["trainable"] = sum(
            getattr(p, "ds_shape", p.shape).numel() for p in model.parameters() if p.requires_grad
        )
        self.seen["held"] = sum(held(p) for p in model.parameters())
        self.seen["dtypes"] = {}
        for name, p in model.named_parameters():
            kind = next((kind for kind in ("norm", "lora") if kind in name), "matrix")
            self.seen["dtypes"].setdefault(str(local_part(p).dtype), []).append(kind)
        self.seen["inv_freq"] = [
            [str(m.inv_freq.dtype), str(m.inv_freq.device), m.inv_freq.tolist()] for m in rotary_modules(model)
        ]

    def on_train_end(self, trainer, pl_module):
        self.before = None
        self.file.write_text(json.dumps(self.seen))


def live_storages() -> dict:
    """The memory of all tensors that are alive, gradients too, by its address."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor) or item.is_meta or issubclass(type(item), FakeTensor):
            continue
        for tensor in (item, item.grad if item.is_leaf else None):
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return storages


def watch(layout, seen: dict):
    """Notes how many whole weights exist at once while a model is dealt out."""
    place, alive = layout.place, []
    seen["whole_at_once"] = 0

    def watched(parameter, whole):
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(whole))
        seen["whole_at_once"] = max(seen["whole_at_once"], len(alive))
        return place(parameter, whole)

    layout.place = watched
    return layout


def limit_memory(rank: int):
    """Has trainer.micro_batch=auto search on the CPU as on a GPU, of which that of process 0 holds 2 examples."""
    peak = micro_batch._peak
    micro_batch.DEVICES = ("cpu",)
    micro_batch._peak = lambda trainer, module, batch, accumulated, can_fail: (
        peak(trainer, module, batch, accumulated, can_fail) or 10.0 * len(batch["input_ids"])
    )
    micro_batch._budget = lambda device: 25.0 if rank == 0 else 45.0


def train(name: str, overrides: list[str], out: Path, rank: int = 0):
    """What train.py does of a case, but for measuring; the run folder is OUT/name."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(cfg, folder)
    plan = run.plan = plan_training(cfg, folder)
    record = Record(folder / f"seen.{rank}.json")
    plan.trainer.callbacks.insert(0, record)
    strategy_type = type(plan.trainer.strategy)
    if hasattr(strategy_type, "layout"):
        plan.trainer.strategy.__class__ = type(
            strategy_type.__name__,
            (strategy_type,),
            {"layout": property(lambda self: watch(super(type(self), self).layout, record.seen))},
        )
    run.train()


def in_two_processes(cases: dict[str, list[str]], out: Path):
    """Trains the cases, by name, in two processes; the run folders are OUT/name."""
    (out / "cases.json").write_text(json.dumps(cases))
    here = Path(__file__).resolve().parent
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    result = subprocess.run(
        [*command, __file__, str(out / "cases.json"), str(out)],
        env=environment, cwd=here.parents[1], capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]


if __name__ == "__main__":
    runtime.quiet_libraries()
    torch.set_num_threads(1)
    limit_memory(int(os.environ["RANK"]))
    gc.freeze()  # what was imported: looking through it takes as long as a training
    for name, overrides in json.loads(Path(sys.argv[1]).read_text()).items():
        train(name, overrides, Path(sys.argv[2]), int(os.environ["RANK"]))
    # Together, and without the teardown of process groups, whose threads may end a process that is done
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
