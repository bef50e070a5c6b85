"""PoSE against full-length training, side by side: python -m benchmarks.efficiency [--quick] [--json FILE] [--plot PNG]

Equal numbers of sequences, and of optimizer steps (--batch sequences each): PoSE trains windows of --train-len tokens
whose positions reach the target, full-length training trains every token of the target. For each target: how many times
as long full-length training takes, how much more memory, and the measured ratio of times by that of FLOPs (pose.plan):
1 is where PoSE is as efficient as its longer rival, below 1 where short windows use the hardware less.

Random weights. On a GPU bf16 autocast and compiled layers, on a CPU fp32 and one thread; activations recomputed with
--recompute. Full-length training computes a sequence at a time, PoSE --micro-batch of them. Memory is what one sequence
at a time takes at its peak above weights and optimizer states, in both; on a CPU each way has a process of its own.
"""

import argparse
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import Options, in_turn, memory, output, ratio, report, save_part, spread, table, whole, words
from benchmarks.shapes import SHAPES


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = Options("efficiency", __doc__, quick={"targets": [1024, 2048], "repeats": 3})
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--train-len", type=whole(2), default=512)
    parser.add_argument("--targets", type=whole(2), nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--batch", type=whole(1), default=1, help="sequences in an optimizer step, both ways")
    parser.add_argument("--micro-batch", type=whole(1), default=1, help="sequences of PoSE at one time")
    parser.add_argument("--repeats", type=whole(1), default=5)
    parser.add_argument("--steps", type=whole(1), default=5, help="of PoSE in a row, for one time")
    parser.add_argument("--recompute", action="store_true", help="activations, in both ways")
    parser.add_argument("--plot", type=output, metavar="PNG", help="a plot of the ratios")
    args = parser.read()
    if min(args.targets) <= args.train_len:
        parser.error(f"--targets {min(args.targets)} is not beyond --train-len {args.train_len}")
    if args.batch % args.micro_batch:
        parser.error(f"--batch {args.batch} is not a multiple of --micro-batch {args.micro_batch}")
    return args


if __name__ == "__main__":
    options()

import torch

from benchmarks.training import Setting, Trainee, default_device, on
from pose.plan import Shape, Training


def flops(setting: Setting) -> float:
    """Of a sequence, forward and backward."""
    shape = Shape.of({"model_type": "llama", **SHAPES[setting.shape]})
    training = Training(shape, setting.train_len, setting.target_len, micro_batch=1, global_batch=1, max_steps=1)
    return training.flops_per_token * setting.train_len


def cpu_memory(setting: Setting) -> int:
    """Bytes that a step of one sequence takes above what is there between two steps."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_cpu_memory, (replace(setting, micro_batch=1, accumulate=1),))


def _cpu_memory(setting: Setting) -> int:
    torch.set_num_threads(1)
    with on(setting, torch.device("cpu")) as trainee:
        trainee.step()
        return memory.peak_above(trainee.step)


def gpu_memory(trainee: Trainee) -> int:
    """The same, of a trainee that has taken a step; its optimizer steps in place and takes nothing of that size."""
    trainee.backward(1)  # compiles this shape
    trainee.optimizer.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainee.backward(1)
    trainee.optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() - before


def compare(args: argparse.Namespace, target: int, device: torch.device, bytes_of: dict, so_far: list[dict]) -> dict:
    """Both ways of one target; saved after each repeat, with what was found `so_far` of others."""
    short, full = settings_of(args, target, device)
    by_flops = flops(full) / flops(short)

    def result(seconds: dict[str, list[float]]) -> dict:
        times = ratio(seconds["full"], seconds["pose"])
        return {
            "target_len": target,
            "seconds_per_sequence": {name: spread(values) for name, values in seconds.items()},
            "times_as_long": times,
            "flop_ratio": by_flops,
            "measured_by_flops": times["median"] / by_flops,
            "memory_mib": {name: found / 2**20 for name, found in bytes_of.items()},
            "memory_ratio": bytes_of["full"] / bytes_of["pose"],
            "settings": {"pose": asdict(short), "full": asdict(full)},
        }

    def save(seconds: dict[str, list[float]]):
        save_part("efficiency", args, {"targets": [*so_far, result(seconds)]})

    with on(short, device) as pose, on(full, device) as rival:
        pose.step()
        rival.step()
        if device.type == "cuda":
            bytes_of = {"pose": gpu_memory(pose), "full": gpu_memory(rival)}
        ways = {
            "pose": lambda: pose.seconds(args.steps) / args.batch,
            "full": lambda: rival.seconds() / args.batch,
        }
        return result(in_turn(ways, args.repeats, after=save))


def settings_of(args: argparse.Namespace, target: int, device: torch.device) -> tuple[Setting, Setting]:
    """PoSE and full-length training of one target."""
    common = {"recompute": args.recompute, "compiled": device.type == "cuda"}
    micro = args.micro_batch
    short = Setting(args.shape, args.train_len, target, micro, args.batch // micro, **common)
    return short, Setting(args.shape, target, target, 1, args.batch, **common)


def plot(found: list[dict], train_len: int, file: Path):
    """Ratios over the target, measured and by FLOPs."""
    from matplotlib.figure import Figure

    from pose.reporting.plots import save_figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
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
    save_figure(figure, file)


def main():
    args = options()
    device = default_device()
    torch.set_num_threads(1)
    bytes_of: dict[int, dict] = {}
    if device.type == "cpu":
        if not memory.is_known():
            raise SystemExit("peak memory is read from /proc, which only Linux has")
        for target in args.targets:  # before anything runs here: what a run leaves to the allocator would serve
            short, full = settings_of(args, target, device)
            bytes_of[target] = {"pose": cpu_memory(short), "full": cpu_memory(full)}
    else:
        torch._dynamo.config.automatic_dynamic_shapes = False  # else the second length gets kernels for any length
    found: list[dict] = []
    for target in args.targets:
        found.append(compare(args, target, device, bytes_of.get(target, {}), found))
    rows = [
        (
            f"{one['target_len']:,}", words(one["times_as_long"], ".1f"), f"{one['memory_ratio']:.1f}",
            f"{one['flop_ratio']:.1f}", f"{one['measured_by_flops']:.2f}",
        )
        for one in found
    ]  # fmt: skip
    title = f"efficiency: full-length over PoSE of {args.train_len:,} tokens, {args.shape}, {device.type}"
    head = ["target", "time", "memory", "FLOPs", "time by FLOPs"]
    report(table(title, head, rows), "efficiency", args, {"targets": found})
    if args.plot is not None:
        plot(found, args.train_len, args.plot)


if __name__ == "__main__":
    main()
