"""A training step, lever by lever, side by side: python -m benchmarks.step head|model [--quick] [--json FILE]

head: the output layer and the loss alone, forward and backward. The plain way (all logits) against the loss of this
package, chunks under activation checkpointing, and torch's linear_cross_entropy where the version has it.
model: a step of a small Llama (the width and vocabulary of SmolLM2-135M, 4 layers) with AdamW. transformers' own loss
against this package's, and that with each lever alone and all together: recomputed activations, compiled layers, bf16
residuals (under bf16 autocast only).

Time is CPU seconds of one thread, taken in turn; memory is the peak above what was there before (the inputs; weights
and optimizer states), each way in a process of its own. Ratios are to the first way.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import report, spread
from benchmarks.memory import peak_above
from pose.modeling import speed
from pose.modeling.load import build_model
from pose.modeling.loss import CHUNK_LEN, causal_lm_loss, token_nll, weighted_nll

HIDDEN, VOCAB, LAYERS = 576, 49152, 4
PLAIN = "materialised"


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
        PLAIN: lambda: F.cross_entropy(head(hidden), targets, reduction="none") @ weights,
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
                model = build_model(config, None, "sdpa")
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
        "transformers' loss": way("stock"),
        "pose": way(),
        "pose, recomputed": way("recompute"),
        "pose, selective": way("selective"),
        "pose, compiled": way("compile"),
    }
    if precision == "bf16-mixed":
        ways["pose, bf16 residuals"] = way("residuals")
    every = ("selective", "compile", *(["residuals"] if precision == "bf16-mixed" else []))
    return ways | {"pose, all": way(*every)}


def ways_of(args) -> dict[str, Callable[[], None]]:
    return head_ways(args.tokens) if args.part == "head" else model_ways(args.tokens, args.precision)


def memory(args, name: str) -> int:
    """Bytes that a run of one way takes above what is there before it: in a process that has not run any other."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_memory, (args, name))


def _memory(args, name: str) -> int:
    torch.set_num_threads(1)
    run = ways_of(args)[name]
    if args.part == "model":
        run()  # the optimizer's states, and what is compiled
    return peak_above(run)


def measure(args) -> dict:
    """Seconds and bytes of each way, and both as ratios to the first."""
    torch.set_num_threads(1)
    ways = ways_of(args)
    names = list(ways)
    taken = {name: memory(args, name) for name in names}  # first: what a run here leaves to the allocator would serve
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(args.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:  # each goes first in turn
            start = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - start)
    first = names[0]
    return {
        name: {
            "seconds": spread(seconds[name]),
            "times_as_long": spread([a / b for a, b in zip(seconds[name], seconds[first], strict=True)]),
            "memory_mib": taken[name] / 2**20,
            "memory_ratio": taken[name] / taken[first],
        }
        for name in names
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["head", "model"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"], help="of `model`")
    parser.add_argument("--quick", action="store_true", help="512 tokens, 3 repeats")
    parser.add_argument("--json", type=Path, help="the last line goes into this file too")
    args = parser.parse_args()
    if args.tokens < 2 or args.repeats < 1:
        parser.error("give at least 2 tokens and 1 repeat")
    if args.quick:
        args.tokens, args.repeats = min(args.tokens, 512), min(args.repeats, 3)
    if sys.platform != "linux":
        parser.error("peak memory is read from /proc, which only Linux has")
    found = measure(args)
    rows = [
        f"{name:24} {one['times_as_long']['median']:5.2f} ({one['times_as_long']['min']:.2f} to "
        f"{one['times_as_long']['max']:.2f}) times as long, {one['memory_ratio']:.2f} of the memory "
        f"({one['memory_mib']:,.0f} MiB)"
        for name, one in found.items()
    ]
    settings = vars(args) | {"json": None if args.json is None else str(args.json)}
    report("\n".join([f"step {args.part}: {args.tokens} tokens, {args.repeats} repeats", *rows]), "step", settings,
           {"ways": found}, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
