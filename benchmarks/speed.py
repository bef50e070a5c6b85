"""Tokens a second, model FLOPs utilisation and peak memory of one setting: python -m benchmarks.speed --shape 135m ...

Random weights of a published shape; a step is forward, backward and optimizer, with its batch drawn and sent. MFU is
causal: 6 N + 6 n_layer n_head d_head L FLOPs a token (pose.plan), over the peak of a known GPU; elsewhere none. Steps
that warm up and compile are timed by themselves. Where a GPU's memory does not do, the micro-batch is halved.
"""

import argparse
import sys
import time
from dataclasses import asdict, replace

from benchmarks import Options, report, save_part, spread, table, whole, words
from benchmarks.shapes import SHAPES
from pose.modeling.options import RECOMPUTE

RECOMPUTE_NAMES = {str(how).lower(): how for how in RECOMPUTE}


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = Options("speed", __doc__, quick={"warmup": 1, "steps": 2, "repeats": 2})
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--train-len", type=whole(2), default=2048)
    parser.add_argument("--target-len", type=whole(2), default=16384)
    parser.add_argument("--micro-batch", type=whole(1), default=8)
    parser.add_argument("--recompute", default="false", choices=RECOMPUTE_NAMES)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rank", type=whole(1), help="of LoRA; without it all weights train")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "adamw8bit"])
    parser.add_argument("--attention", default="auto", choices=["auto", "sdpa", "eager", "flash_attention_2"])
    parser.add_argument("--warmup", type=whole(1), default=5, help="steps that are no part of the speed")
    parser.add_argument("--steps", type=whole(1), default=10, help="of one time")
    parser.add_argument("--repeats", type=whole(1), default=5)
    args = parser.read()
    if args.target_len < args.train_len:
        parser.error(f"--target-len {args.target_len} is below --train-len {args.train_len}")
    return args


if __name__ == "__main__":
    options()

import torch

from benchmarks.training import Setting, default_device, on
from pose.plan import Shape, Training, peak_flops


def flops_per_token(setting: Setting) -> float:
    """Forward and backward, of the weights that train alone where some are frozen."""
    shape = Shape.of({"model_type": "llama", **SHAPES[setting.shape]})
    return Training(
        shape, setting.train_len, setting.target_len, micro_batch=1, global_batch=1, max_steps=1, rank=setting.rank
    ).flops_per_token


def measure(setting: Setting, args: argparse.Namespace, device: torch.device, tried: list[int]) -> dict:
    """What a setting does; what is known so far is saved after the warm-up and each repeat.

    Raises:
        torch.OutOfMemoryError: there is too little memory.
    """
    on_gpu = device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(device), "bf16-mixed") if on_gpu else None
    found = {"setting": asdict(setting), "device": device.type, "out_of_memory_at": tried}
    start = time.perf_counter()
    with on(setting, device) as trainee:
        found["seconds_to_build"] = time.perf_counter() - start
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()  # of training alone
        losses, warmup = [], []
        for _ in range(args.warmup):
            begin = time.perf_counter()
            losses.append(trainee.step().item())
            warmup.append(time.perf_counter() - begin)
            found |= {"first_losses": losses, "warmup_seconds": warmup}
            save_part("speed", args, found)
        rates: list[float] = []
        for _ in range(args.repeats):
            rates.append(setting.tokens / trainee.seconds(args.steps))
            per_token = None if peak is None else flops_per_token(setting) / peak
            found |= {
                "tokens_per_second": spread(rates),
                "mfu": None if per_token is None else spread([rate * per_token for rate in rates]),
                "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
                "reserved_memory_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
            }
            save_part("speed", args, found)
    return found


def main():
    args = options()
    device = default_device()
    setting = Setting(
        args.shape, args.train_len, args.target_len, args.micro_batch, recompute=RECOMPUTE_NAMES[args.recompute],
        compiled=args.compiled, rank=args.rank, optimizer=args.optimizer, attention=args.attention,
    )  # fmt: skip
    tried: list[int] = []
    while True:
        try:
            found = measure(setting, args, device, tried)
            break
        except torch.OutOfMemoryError:
            if setting.micro_batch == 1:
                raise
        # Out here the error, and with it what its frames held, is gone
        tried.append(setting.micro_batch)
        setting = replace(setting, micro_batch=setting.micro_batch // 2)
        print(f"out of memory: again with a micro-batch of {setting.micro_batch}", file=sys.stderr, flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()
    rows = [("tokens/s", words(found["tokens_per_second"], ",.0f"))]
    rows += [("MFU", words(found["mfu"], ".1%"))] if found["mfu"] else []
    rows += [("GiB at most", f"{found['peak_memory_gib']:.1f}")] if found["peak_memory_gib"] else []
    rows += [("seconds of the first step", f"{found['warmup_seconds'][0]:.1f}")]
    title = f"speed: {args.shape}, {setting.micro_batch} examples of {args.train_len:,} tokens, {device.type}"
    report(table(title, ["", f"{args.repeats} repeats"], rows), "speed", args, found)


if __name__ == "__main__":
    main()
