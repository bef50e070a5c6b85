"""A training step, lever by lever, side by side: python -m benchmarks.step [head] [model] [--quick] [--json FILE]

head: the output layer and the loss alone, forward and backward. The plain way (all logits) against the loss of this
package, chunks under activation checkpointing, and torch's linear_cross_entropy where the version has it.
model: a step of a small Llama (the width and vocabulary of SmolLM2-135M, 4 layers) with AdamW. transformers' own loss
against this package's; that with each other lever alone: attention, recomputed activations (all, selective), compiled
layers, bf16 residuals (under bf16 autocast only); and all together. In fp32 and under bf16 autocast.

Time is CPU seconds of one thread, taken in turn; memory is the peak above what was there before (the inputs; weights
and optimizer states), each way in a process of its own. Ratios are to the first way, and in `model` to the loss alone.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable

from benchmarks import Options, in_turn, memory, ratio, report, save_part, spread, table, timed, whole, words

PRECISIONS = ["32-true", "bf16-mixed"]


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = Options("step", __doc__, quick={"tokens": 256, "repeats": 3})
    parser.add_argument("parts", nargs="*", metavar="PART", help="head, model; both without it")
    parser.add_argument("--tokens", type=whole(2), default=2048)
    parser.add_argument("--repeats", type=whole(1), default=7)
    parser.add_argument("--precision", nargs="+", default=PRECISIONS, choices=PRECISIONS, help="of `model`")
    args = parser.read()
    args.parts = args.parts or ["head", "model"]
    if unknown := set(args.parts) - {"head", "model"}:
        parser.error(f"{unknown.pop()!r} is no part: choose from head, model")
    if not memory.is_known():
        parser.error("peak memory is read from /proc, which only Linux has")
    return args


if __name__ == "__main__":
    options()

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pose.modeling import speed
from pose.modeling.load import build_model
from pose.modeling.loss import CHUNK_LEN, causal_lm_loss, token_nll, weighted_nll

HIDDEN, VOCAB, LAYERS = 576, 49152, 4
STOCK, LOSS = "transformers' loss", "loss"


def head_ways(tokens: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of head and loss, on the same inputs; the losses of tokens have weights of their own."""
    torch.manual_seed(0)
    hidden, head = torch.randn(tokens, HIDDEN, requires_grad=True), nn.Linear(HIDDEN, VOCAB, bias=False)
    targets, weights = torch.randint(VOCAB, (tokens,)), torch.rand(tokens) / tokens

    def way(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run():
            hidden.grad = head.weight.grad = None
            loss().backward()

        return run

    losses = {
        "materialised": lambda: F.cross_entropy(head(hidden), targets, reduction="none") @ weights,
        "pose": lambda: weighted_nll(hidden, head, targets, weights)[0],
        "checkpointed chunks": lambda: token_nll(hidden, head, targets) @ weights,
    }
    if hasattr(F, "linear_cross_entropy"):  # its weights are of classes: all tokens alike
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_LEN)
        losses["linear_cross_entropy"] = lambda: F.linear_cross_entropy(hidden, head.weight, targets, options=options)
    return {name: way(loss) for name, loss in losses.items()}


def model_ways(tokens: int, precision: str) -> dict[str, Callable[[], None]]:
    """Steps of models with the same weights; each has its own AdamW, whose states are there before it is measured."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.randint(VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens)[None]

    def way(*levers: str) -> Callable[[], None]:
        made: list = []

        def make():
            torch.manual_seed(0)
            if "stock" in levers:
                model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
            else:
                model = build_model(config, None, "eager" if "eager" in levers else "sdpa")
            speed.recompute(model, "selective" if "selective" in levers else "recompute" in levers)
            if "residuals" in levers:
                speed.residuals_as_computed(model)
            if "compile" in levers:
                speed.compile_layers(model)
            made.extend((model.train(), torch.optim.AdamW(model.parameters(), 1e-4, fused=True)))

        def run():
            if not made:
                make()
            model, optimizer = made
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                if "stock" in levers:
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                else:
                    body = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
                    loss = causal_lm_loss(body.last_hidden_state, model.get_output_embeddings(), ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    ways = {
        STOCK: way("stock"),
        LOSS: way(),
        "loss, eager attention": way("eager"),
        "loss, recomputed": way("recompute"),
        "loss, selective": way("selective"),
        "loss, compiled": way("compile"),
    }
    if precision == "bf16-mixed":
        ways["loss, bf16 residuals"] = way("residuals")
    every = ("selective", "compile", *(["residuals"] if precision == "bf16-mixed" else []))
    return ways | {"all": way(*every)}


def ways_of(part: str, tokens: int) -> dict[str, Callable[[], None]]:
    """Of a part: head, or model with a precision."""
    name, _, precision = part.partition(" ")
    return head_ways(tokens) if name == "head" else model_ways(tokens, precision)


def memory_of(part: str, tokens: int, name: str) -> int:
    """Bytes that a run of one way takes above what is there before it: in a process that has not run any other."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_memory_of, (part, tokens, name))


def _memory_of(part: str, tokens: int, name: str) -> int:
    torch.set_num_threads(1)
    run = ways_of(part, tokens)[name]
    if part != "head":
        run()  # the optimizer's states, and what is compiled
    return memory.peak_above(run)


def measure(part: str, tokens: int, repeats: int, taken: dict[str, int]) -> dict:
    """Seconds of each way, and its bytes, as ratios to the first; of a model also to the loss alone."""
    ways = ways_of(part, tokens)
    for run in ways.values():
        run()
    seconds = in_turn({name: timed(run, time.process_time) for name, run in ways.items()}, repeats)
    found = {}
    for name in ways:
        found[name] = {"seconds": spread(seconds[name]), "memory_mib": taken[name] / 2**20}
        for base, suffix in ((next(iter(ways)), ""), (LOSS, "_of_loss")):
            if base in ways:
                found[name] |= {
                    f"times_as_long{suffix}": ratio(seconds[name], seconds[base]),
                    f"memory_ratio{suffix}": taken[name] / taken[base],
                }
    return found


def as_table(part: str, ways: dict, args: argparse.Namespace) -> str:
    """What was measured of a part, to be read."""
    head = [next(iter(ways)) + " = 1", "seconds", "times as long", "memory", "MiB"]
    if LOSS in ways:
        head += ["loss = 1: times as long", "memory"]
    rows = []
    for name, one in ways.items():
        row = [name, f"{one['seconds']['median']:.3f}", words(one["times_as_long"])]
        row += [f"{one['memory_ratio']:.2f}", f"{one['memory_mib']:,.0f}"]
        if LOSS in ways:
            row += [words(one["times_as_long_of_loss"]), f"{one['memory_ratio_of_loss']:.2f}"]
        rows.append(row)
    return table(f"step {part}: {args.tokens:,} tokens, {args.repeats} repeats", head, rows)


def main():
    args = options()
    torch.set_num_threads(1)
    parts = ["head"] if "head" in args.parts else []
    parts += [f"model {precision}" for precision in args.precision if "model" in args.parts]
    # Before anything runs here: what a run leaves to the allocator would serve the forks
    taken = {part: {name: memory_of(part, args.tokens, name) for name in ways_of(part, args.tokens)} for part in parts}
    found: dict[str, dict] = {}
    for part in parts:
        found[part] = measure(part, args.tokens, args.repeats, taken[part])
        save_part("step", args, {"parts": found})
    text = "\n\n".join(as_table(part, ways, args) for part, ways in found.items())
    report(text, "step", args, {"parts": found})


if __name__ == "__main__":
    main()
