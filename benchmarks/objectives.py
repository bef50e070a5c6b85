"""A training step by objective, side by side: python -m benchmarks.objectives [PART ...] [--quick] [--json FILE]

Steps of lm, self_distill and long_short on the same examples of pose=pose, with YaRN, all weights trained by AdamW;
those of two views in micro-batches of half as many examples where there are several, as train.py has them. With
--accumulate K a step of lm has K such micro-batches too, as that of a real model has, whose gradients are there while
the next one is computed.
tiny: assets/tiny, 16 examples of 256 tokens. llama: a small Llama (the width and vocabulary of SmolLM2-135M, 4 layers,
random weights), 2 examples of 1,024. long: the same, one example of 2,048, of which no micro-batch can be halved.

A second view begins at the first skip, so what it costs depends on what was drawn. Of 101 drawn steps, time is of those
in the middle of equal parts, by the share of tokens that have a second view (one step: the median); memory is of the
step with the widest micro-batch, as a long run meets it.

Time is CPU seconds of one thread, taken in turn; --compiled compiles the layers for it, as train.py does on a GPU.
Memory, of layers that are not compiled, is the peak of a step above what was there before (weights, optimizer states
and a frozen original are; gradients and activations are not), as torch's allocator gave it; `with states` is that of
both. `process` is the ratio of `with states` by the memory of the process, each objective in one of its own. Ratios are
to lm.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import Options, in_turn, memory, ratio, report, save_part, spread, table, timed, whole, words

PRECISIONS = ["32-true", "bf16-mixed"]
PARTS = {"tiny": (16, 256), "llama": (2, 1024), "long": (1, 2048)}  # examples, tokens of each


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = Options("objectives", __doc__, quick={"parts": ["tiny", "llama"], "steps": 1, "repeats": 2})
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--examples", type=whole(1), help="of a micro-batch of lm, in place of those of the part")
    parser.add_argument("--accumulate", type=whole(1), default=1, metavar="K", help="micro-batches in a step of lm")
    parser.add_argument("--steps", type=whole(1), default=4, help="in one measurement")
    parser.add_argument("--repeats", type=whole(1), default=7)
    parser.add_argument("--compiled", action="store_true", help="time is of compiled layers")
    parser.add_argument("--precision", default=PRECISIONS[0], choices=PRECISIONS)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as model.gradient_checkpointing=true")
    args = parser.read()
    if not memory.is_known():
        parser.error("peak memory is read from /proc, which only Linux has")
    return args


if __name__ == "__main__":
    options()

import copy
import ctypes

import numpy as np
import torch
from transformers import LlamaConfig

from pose.files import locate
from pose.modeling.load import build_model, load_config, scale_config
from pose.modeling.speed import compile_layers, recompute
from pose.modeling.teacher import Teacher, freeze
from pose.positions import PoSE
from pose.rope import Yarn
from pose.training.objectives import LanguageModel, LongShort, SelfDistill

OBJECTIVES = {"lm": LanguageModel(), "self_distill": SelfDistill(), "long_short": LongShort()}
SCALE = 8  # the target over the length of an example
DRAWS = 101  # steps, of which some are taken
LLAMA = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


class Steps:
    """Steps of one objective; the same examples each time.

    Args:
        part: one of PARTS.
        name: one of OBJECTIVES.
        num_steps: in a call; None: the one that takes most memory.
        precision: one of PRECISIONS.
        num_examples: of a micro-batch of lm; None: those of the part.
        accumulate: micro-batches of lm in a step.
        checkpointing: whether layers are computed again in the backward pass.

    Attributes:
        states_bytes: of weights, optimizer states and a frozen original.
    """

    def __init__(
        self, part: str, name: str, num_steps: int | None, precision: str, num_examples: int | None = None,
        accumulate: int = 1, checkpointing: bool = False,
    ):  # fmt: skip
        usual, length = PARTS[part]
        micro = num_examples or usual
        num_examples = micro * accumulate
        path = locate("assets/tiny") if part == "tiny" else None
        original = load_config(path) if path else LlamaConfig(**LLAMA, max_position_embeddings=length)
        config = copy.deepcopy(original)
        scale_config(config, Yarn(), SCALE * length)
        self.objective, self.in_bf16 = OBJECTIVES[name], precision == "bf16-mixed"
        torch.manual_seed(0)
        self.model = build_model(config, path, "sdpa").train()
        recompute(self.model, checkpointing)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.teacher = None
        if self.objective.has_teacher:
            self.teacher = Teacher(build_model(original, path, "sdpa", prepare=freeze).eval())
        rng, self.steps = np.random.default_rng(0), []
        size = max(micro // self.objective.num_views, 1)
        for ids in drawn(length, num_examples, num_steps, max(micro // 2, 1)):
            tokens = [torch.from_numpy(rng.integers(config.vocab_size, size=length)) for _ in ids]
            items = [{"input_ids": x, "labels": x, "position_ids": i} for x, i in zip(tokens, ids, strict=True)]
            parts = [items[i : i + size] for i in range(0, num_examples, size)]
            self.steps.append([self.objective.collate(one) for one in parts])

    def __call__(self):
        for batches in self.steps:
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bf16):
                    loss = self.objective.losses(self.model, batch, self.teacher).loss
                (loss / len(batches)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def states_bytes(self) -> int:
        models = [self.model] if self.teacher is None else [self.model, self.teacher.model]
        held = [p for model in models for p in model.parameters()]
        held += [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def drawn(length: int, num_examples: int, num_steps: int | None, half: int) -> list[torch.Tensor]:
    """Position ids of some steps, int64 [num_examples, length], the same ones for every objective.

    Args:
        length: of an example, in tokens.
        num_examples: of a step.
        num_steps: in the middle of so many equal parts of the draws by width; None: the one with the widest micro-batch
            of two views.
        half: examples of a micro-batch of two views.
    """
    rng, sampler = np.random.default_rng(0), PoSE(length, SCALE * length)
    draws = [[sampler.sample(rng, length).position_ids for _ in range(num_examples)] for _ in range(DRAWS)]
    ids = torch.from_numpy(np.array(draws))
    widths = (ids != torch.arange(length)).float().mean(-1)  # [DRAWS, num_examples]
    if num_steps is None:
        widest = torch.stack([part.mean(1) for part in widths.split(half, 1)], 1).amax(1)
        return [ids[widest.argmax()]]
    order = widths.mean(1).argsort()
    return [ids[order[int((i + 0.5) * DRAWS / num_steps)]] for i in range(num_steps)]


class Bytes(NamedTuple):
    """Of the steps of an objective: the allocator's peak and the process's, and the states."""

    peak: int
    process: int
    states: int


def memory_of(*which) -> Bytes:
    """Bytes of an objective, in a process that has not run any other."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_memory_of, which)


def _memory_of(*which) -> Bytes:
    torch.set_num_threads(1)
    steps = Steps(*which)
    steps()  # the optimizer's states
    ctypes.CDLL(None).malloc_trim(0)  # what the C library has kept of freed memory would hide a part of the peak
    process = memory.peak_above(steps)  # before the profiler, which takes some too
    return Bytes(memory.cpu_peak(steps), process, steps.states_bytes)


def measure(ways: dict[str, Callable[[], None]], repeats: int, taken: dict[str, Bytes]) -> dict[str, dict]:
    """Seconds and bytes of each objective, and their ratios to lm."""
    for run in ways.values():
        run()
    seconds = in_turn({name: timed(run, time.process_time) for name, run in ways.items()}, repeats)
    of_lm = taken["lm"]
    return {
        name: {
            "seconds": spread(seconds[name]),
            "times_as_long": ratio(seconds[name], seconds["lm"]),
            "memory_mib": peak / 2**20,
            "memory_ratio": peak / of_lm.peak,
            "states_mib": states / 2**20,
            "memory_ratio_with_states": (peak + states) / (of_lm.peak + of_lm.states),
            "process_mib": process / 2**20,
            "process_ratio_with_states": (process + states) / (of_lm.process + of_lm.states),
        }
        for name, (peak, process, states) in taken.items()
    }


def as_table(part: str, found: dict[str, dict], args: argparse.Namespace) -> str:
    """What was measured of a part, to be read."""
    head = ["lm = 1", "seconds", "times as long", "memory", "MiB", "states MiB", "with states", "process"]
    rows = [
        [
            name, f"{one['seconds']['median']:.3f}", words(one["times_as_long"]), f"{one['memory_ratio']:.2f}",
            f"{one['memory_mib']:,.0f}", f"{one['states_mib']:,.0f}", f"{one['memory_ratio_with_states']:.2f}",
            f"{one['process_ratio_with_states']:.2f}",
        ]
        for name, one in found.items()
    ]  # fmt: skip
    usual, length = PARTS[part]
    examples = args.examples or usual
    how = f"{args.precision}, {'compiled' if args.compiled else 'eager'}"
    how += ", gradient checkpointing" * args.gradient_checkpointing
    size = f"{args.accumulate} x {examples}" if args.accumulate > 1 else str(examples)
    title = f"{part}: {args.steps} steps of {size} x {length:,} tokens, {how}, {args.repeats} repeats"
    return table(title, head, rows)


def main():
    args = options()
    torch.set_num_threads(1)
    rest = args.steps, args.precision, args.examples, args.accumulate, args.gradient_checkpointing
    # Before anything runs here: what a run leaves to the allocator would serve the forks
    taken = {part: {name: memory_of(part, name, None, *rest[1:]) for name in OBJECTIVES} for part in args.parts}
    found: dict[str, dict] = {}
    for part in args.parts:
        ways = {name: Steps(part, name, *rest) for name in OBJECTIVES}
        if args.compiled:
            for way in ways.values():
                compile_layers(way.model)
        found[part] = measure(ways, args.repeats, taken[part])
        save_part("objectives", args, {"parts": found})
    text = "\n\n".join(as_table(part, one, args) for part, one in found.items())
    report(text, "objectives", args, {"parts": found})


if __name__ == "__main__":
    main()
