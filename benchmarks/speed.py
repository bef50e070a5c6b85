"""Tokens a second, model FLOPs utilisation and peak memory of one setting: python -m benchmarks.speed --shape 135m ...

Random weights of a published shape; a step is forward, backward and optimizer, with its batch drawn and sent. MFU is
causal: 6 N + 6 n_layer n_head d_head L FLOPs a token (pose.plan), over the peak of a known GPU; elsewhere none.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import report, spread
from benchmarks.training import SHAPES, Setting, default_device, on
from pose.modeling.options import RECOMPUTE
from pose.plan import Shape, Training, peak_flops


def flops_per_token(setting: Setting) -> float:
    """Forward and backward, of the weights that train alone where some are frozen."""
    shape = Shape.of({"model_type": "llama", **SHAPES[setting.shape]})
    return Training(
        shape, setting.train_len, setting.target_len, micro_batch=1, global_batch=1, max_steps=1, rank=setting.rank
    ).flops_per_token


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--train-len", type=int, default=2048)
    parser.add_argument("--target-len", type=int, default=16384)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--recompute", default="false", choices=[str(how).lower() for how in RECOMPUTE])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rank", type=int, help="of LoRA; without it all weights train")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "adamw8bit"])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=10, help="of one time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 steps, 2 repeats")
    parser.add_argument("--json", type=Path, help="the last line goes into this file too")
    args = parser.parse_args()
    if args.quick:
        args.warmup, args.steps, args.repeats = 1, 2, 2
    device = default_device()
    recompute = {"false": False, "true": True}.get(args.recompute, args.recompute)
    setting = Setting(
        args.shape, args.train_len, args.target_len, args.micro_batch, recompute, args.compiled, args.rank,
        args.optimizer, args.attention,
    )  # fmt: skip
    with on(setting, device) as trainee:
        losses = [trainee.step() for _ in range(args.warmup)]
        seconds = [trainee.seconds(args.steps) for _ in range(args.repeats)]
    rates = spread([setting.tokens / one for one in seconds])
    peak = peak_flops(torch.cuda.get_device_name(device), "bf16-mixed") if device.type == "cuda" else None
    mfu = None if peak is None else spread([rate * flops_per_token(setting) / peak for rate in _each(rates)])
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    line = f"speed: {args.shape}, {rates['median']:,.0f} ({rates['min']:,.0f} to {rates['max']:,.0f}) tokens/s"
    line += "" if mfu is None else f", MFU {mfu['median']:.1%}"
    line += "" if memory is None else f", {memory:.1f} GiB at most"
    results = {
        "tokens_per_second": rates, "mfu": mfu, "peak_memory_gib": memory, "first_losses": losses,
        "setting": asdict(setting), "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }  # fmt: skip
    report(line, "speed", vars(args) | {"json": None if args.json is None else str(args.json)}, results, args.json)


def _each(rates: dict) -> list[float]:
    return [rates["min"], rates["median"], rates["max"]]


if __name__ == "__main__":
    main()
