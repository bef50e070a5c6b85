"""PoSE against full-length training, side by side: python -m benchmarks.efficiency [--quick] [--json FILE] [--plot PNG]

Equal numbers of sequences (and so of steps): PoSE trains windows of --train-len tokens whose positions reach the
target, full-length training trains every token of the target. For each target: how many times as long full-length
training takes, how much more memory, and the measured ratio of times by that of FLOPs (pose.plan): 1 is where PoSE is
as efficient as its longer rival, below 1 where short windows use the hardware less.

Random weights. On a GPU bf16 autocast, compiled layers, activations recomputed with --recompute; on a CPU fp32, one
thread. Memory is the peak above weights and optimizer states; on a CPU each way has a process of its own.
"""

import argparse
import multiprocessing
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import report, spread
from benchmarks.memory import peak_above
from benchmarks.training import SHAPES, Setting, default_device, on
from pose.plan import Shape, Training


def flops(setting: Setting) -> float:
    """Of a sequence, forward and backward."""
    shape = Shape.of({"model_type": "llama", **SHAPES[setting.shape]})
    training = Training(shape, setting.train_len, setting.target_len, micro_batch=1, global_batch=1, max_steps=1)
    return training.flops_per_token * setting.train_len


def memory(setting: Setting, device: torch.device) -> int:
    """Bytes that a step takes above what is there between two steps."""
    if device.type == "cpu":
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.apply(_memory, (setting,))
    with on(setting, device) as trainee:
        trainee.step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainee.step()
        return torch.cuda.max_memory_allocated() - before


def _memory(setting: Setting) -> int:
    torch.set_num_threads(1)
    with on(setting, torch.device("cpu")) as trainee:
        trainee.step()
        return peak_above(trainee.step)


def compare(args, target: int, device: torch.device) -> dict:
    """Both ways of one target."""
    is_compiled = device.type == "cuda"
    short, full = (
        Setting(args.shape, length, target, recompute=args.recompute, compiled=is_compiled)
        for length in (args.train_len, target)
    )
    bytes_of = {name: memory(setting, device) for name, setting in (("pose", short), ("full", full))}
    seconds: dict[str, list[float]] = {"pose": [], "full": []}
    with on(short, device) as pose, on(full, device) as rival:
        pose.step()
        rival.step()
        for _ in range(args.repeats):
            seconds["pose"].append(pose.seconds(args.steps))
            seconds["full"].append(rival.seconds(1))
    ratio_of_flops = flops(full) / flops(short)
    times = spread([b / a for a, b in zip(seconds["pose"], seconds["full"], strict=True)])
    return {
        "target_len": target,
        "seconds_per_sequence": {name: spread(values) for name, values in seconds.items()},
        "times_as_long": times,
        "flop_ratio": ratio_of_flops,
        "measured_by_flops": times["median"] / ratio_of_flops,
        "memory_mib": {name: found / 2**20 for name, found in bytes_of.items()},
        "memory_ratio": bytes_of["full"] / bytes_of["pose"],
        "settings": {"pose": asdict(short), "full": asdict(full)},
    }


def plot(found: list[dict], train_len: int, file: Path):
    """Ratios over the target, measured and by FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    targets = [one["target_len"] for one in found]
    medians = [one["times_as_long"]["median"] for one in found]
    spans = [
        [one["times_as_long"]["median"] - one["times_as_long"]["min"] for one in found],
        [one["times_as_long"]["max"] - one["times_as_long"]["median"] for one in found],
    ]
    axes.errorbar(targets, medians, spans, fmt="o-", capsize=3, label="time, measured")
    axes.plot(targets, [one["memory_ratio"] for one in found], "s--", label="memory, measured")
    axes.plot(targets, [one["flop_ratio"] for one in found], "k:", label="FLOPs")
    axes.set(
        xscale="log", yscale="log", xlabel="target window (tokens)", ylabel="full-length / PoSE",
        title=f"A sequence of PoSE has {train_len:,} tokens",
    )  # fmt: skip
    axes.set_xticks(targets, [f"{target:,}" for target in targets])
    axes.minorticks_off()
    ticks = [1, 2, 5, 10, 20, 50, 100, 200]
    axes.set_yticks([tick for tick in ticks if tick <= 2 * max(medians)])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--train-len", type=int, default=512)
    parser.add_argument("--targets", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of PoSE in a row, for one time")
    parser.add_argument("--recompute", action="store_true", help="activations, in both ways")
    parser.add_argument("--quick", action="store_true", help="the first two targets, 3 repeats")
    parser.add_argument("--json", type=Path, help="the last line goes into this file too")
    parser.add_argument("--plot", type=Path, help="a PNG of the ratios")
    args = parser.parse_args()
    if min(args.targets) <= args.train_len or args.repeats < 1 or args.steps < 1:
        parser.error("give targets beyond --train-len, and at least 1 repeat and step")
    device = default_device()
    if device.type == "cpu" and sys.platform != "linux":
        parser.error("peak memory is read from /proc, which only Linux has")
    if args.quick:
        args.targets, args.repeats = args.targets[:2], min(args.repeats, 3)
    torch.set_num_threads(1)
    found = [compare(args, target, device) for target in args.targets]
    if args.plot is not None:
        plot(found, args.train_len, args.plot)
    rows = [
        f"{one['target_len']:8,}  {one['times_as_long']['median']:6.1f} ({one['times_as_long']['min']:.1f} to "
        f"{one['times_as_long']['max']:.1f}) times as long, {one['memory_ratio']:5.1f} times the memory; FLOPs "
        f"{one['flop_ratio']:.1f} times; measured by FLOPs {one['measured_by_flops']:.2f}"
        for one in found
    ]
    heading = f"efficiency: full-length against PoSE of {args.train_len} tokens, {args.shape}, {device.type}"
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report("\n".join([heading, *rows]), "efficiency", settings, {"targets": found}, args.json)


if __name__ == "__main__":
    main()
