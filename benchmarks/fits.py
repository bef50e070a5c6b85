"""Peak memory of training a random model, by what is held in how many bits: python -m benchmarks.fits

A checkpoint of random bf16 weights is written, and trained from in a process for each way, by the Trainer, the module
and the loading code of `train.py`, on its data. Two peaks of the process's resident memory are read from the kernel
(VmHWM), less what the process had before the model was built: until the training starts, where the files of the
checkpoint are mapped and count as well, and from there to the last step. Both are given as multiples of the bf16
weights. glibc is told to give back what is freed (MALLOC_MMAP_THRESHOLD_): by itself it keeps what it has from small
tensors, in an amount that grows over the first steps and is no memory of the training. Linux.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import Options, memory, report, save_part, table, whole
from benchmarks.shapes import SHAPES
from pose.files import CONF, REPOSITORY

OF_156M = {  # parameters
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
WAYS = {
    "lora_fp32": ["finetune=lora", "finetune.lora.frozen_dtype=float32"],
    "lora": ["finetune=lora"],
    "qlora": ["finetune=qlora"],
    "adamw8bit_bf16": ["finetune.optimizer=adamw8bit", "finetune.weights_dtype=bfloat16"],
    "adamw8bit_fp32": ["finetune.optimizer=adamw8bit", "finetune.weights_dtype=float32"],
    "adamw": [],
}
WINDOW, TARGET_LEN = 256, 2048
TOKENIZER = REPOSITORY / "assets" / "tiny"


SHAPES = SHAPES | {"156m": OF_156M}


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = Options("fits", __doc__, quick={"shape": "156m"})
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["lora", "qlora"])
    parser.add_argument("--steps", type=whole(1), default=2)
    parser.add_argument("--length", type=whole(2), default=WINDOW, help="tokens of an example")
    parser.add_argument("--precision", default="32-true", choices=["bf16-mixed", "32-true"])
    parser.add_argument("--checkpointing", action="store_true", help="activations are made again")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.read()
    if not memory.is_known():
        parser.error("peak memory is read from /proc, which only Linux has")
    if args.length > WINDOW:
        parser.error(f"--length {args.length} is beyond the window of {WINDOW} tokens")
    return args


if __name__ == "__main__":
    options()

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pose.app import schema
from pose.app.preflight import plan_training
from pose.app.run import Run
from pose.app.runtime import quiet_libraries
from pose.training.callbacks import Export


class Peaks(L.Callback):
    """Peaks of resident memory, in bytes, before and after the first step began; the seconds of each step."""

    def __init__(self):
        self.loading = self.training = 0
        self.begins: list[float] = []

    def on_train_start(self, *_):
        self.loading = memory.resident("VmHWM")
        memory.forget_peak()

    def on_train_batch_start(self, *_):
        self.begins.append(time.perf_counter())

    def on_train_end(self, *_):
        self.begins.append(time.perf_counter())
        self.training = memory.resident("VmHWM")


def write_checkpoint(shape: str, folder: Path):
    """Random weights in bf16."""
    sizes = {"tie_word_embeddings": True} | SHAPES[shape]
    config = LlamaConfig(**sizes, max_position_embeddings=WINDOW, rope_theta=5e5, pad_token_id=None)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def train(way: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Trains in this process; returns bytes and seconds."""
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "train",
            [
                f"model.path={folder}", "eval=none", "data.synthetic={passkey:0,copy:0,key_value:0}",
                f"pose.train_len={args.length}", f"pose.target_len={TARGET_LEN}", f"trainer.max_steps={args.steps}",
                "trainer.global_batch=1", "trainer.micro_batch=1", "trainer.accelerator=cpu", "trainer.devices=1",
                f"trainer.precision={args.precision}", "trainer.checkpoint_every_n_steps=null",
                f"model.gradient_checkpointing={str(args.checkpointing).lower()}", *WAYS[way],
            ],
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as run_dir, contextlib.redirect_stdout(sys.stderr):
        run = Run(cfg, Path(run_dir))
        run.plan = plan_training(cfg, Path(run_dir))
        trainer, peaks = run.plan.trainer, Peaks()
        trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, Export)] + [peaks]
        before = memory.resident("VmRSS")
        run.train()
    seconds = [end - begin for begin, end in zip(peaks.begins, peaks.begins[1:], strict=False)]
    return {
        "before_bytes": before,
        "loading_bytes": peaks.loading - before,
        "training_bytes": peaks.training - before,
        "seconds_per_step": min(seconds),
    }


def in_a_process(*arguments: str) -> str:
    """What this script prints with other arguments."""
    command = [sys.executable, "-m", "benchmarks.fits", *arguments]
    environment = {"MALLOC_MMAP_THRESHOLD_": f"{2**20}"} | os.environ
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main():
    args = options()
    quiet_libraries()
    if args.child is not None:
        way, folder = args.child
        if way == "write":
            write_checkpoint(args.shape, Path(folder))
        else:
            print(json.dumps(train(way, Path(folder), args)))
        return
    del args.child
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="pose-fits-") as folder:
        in_a_process(*sys.argv[1:], "--child", "write", folder)
        weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for way in args.ways:
            one = json.loads(in_a_process(*sys.argv[1:], "--child", way, folder).splitlines()[-1])
            one |= {phase: one[f"{phase}_bytes"] / weights for phase in ("loading", "training")}
            found[way] = one
            save_part("fits", args, {"weights_bytes": weights, "ways": found})
    rows = [
        (way, *(f"{one[key]:.2f}" for key in ("loading", "training", "seconds_per_step"))) for way, one in found.items()
    ]
    title = f"fits: peak memory over {weights / 1e9:.2f} GB of bf16 weights, {args.shape}"
    text = table(title, ["way", "loading", "training", "seconds a step"], rows)
    report(text, "fits", args, {"weights_bytes": weights, "ways": found})


if __name__ == "__main__":
    main()
