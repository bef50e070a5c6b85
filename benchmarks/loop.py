"""What Lightning costs: seconds a step, over a bare PyTorch loop: python -m benchmarks.loop

Both train the tiny model's shape from the same random weights on the same batches, in turn in one
process: same loss, optimizer, schedule and autocast. The Trainer is the one `train.py` builds, with
its progress bar, logger and callbacks. Time runs from the end of the first step to the end of the
last, so that start-up is left out. At the end both must have the same weights, to the bit.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import Options, in_turn, ratio, report, spread, table, whole, words


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = Options("loop", __doc__, quick={"repeats": 5, "steps": 10, "batch": 8})
    parser.add_argument("--repeats", type=whole(1), default=7, help="pairs of runs")
    parser.add_argument("--steps", type=whole(2), default=30, help="in a run; the first is not timed")
    parser.add_argument("--batch", type=whole(1), default=16)
    parser.add_argument("--length", type=whole(2), default=256)
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true"])
    args = parser.read()
    if args.length >= TARGET_LEN:
        parser.error(f"--length {args.length} is not below the window of {TARGET_LEN} tokens")
    return args


TARGET_LEN = 2048
if __name__ == "__main__":
    options()

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from transformers import LlamaConfig, PreTrainedModel, get_scheduler

from pose.app import schema
from pose.app.build import build_trainer
from pose.app.runtime import quiet_libraries
from pose.files import REPOSITORY
from pose.modeling.load import build_model
from pose.modeling.loss import causal_lm_loss
from pose.training.module import PoseModule

OPTIMIZER = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.1}
SCHEDULE, WARMUP_STEPS = "linear", 10


class Batches:
    """The same batches [B, L] for every loop, made before any clock starts."""

    def __init__(self, num: int, batch: int, length: int, vocab_size: int):
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for _ in range(num):
            ids = torch.randint(vocab_size, (batch, length), generator=generator)
            skips = torch.randint(TARGET_LEN - length, (batch, 1), generator=generator)
            positions = torch.arange(length) + skips * (torch.arange(length) >= length // 2)
            self.batches.append({"input_ids": ids, "labels": ids.clone(), "position_ids": positions})

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.batches)


class StepClock(L.Callback):
    """Notes when each step has ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_train_batch_end(self, *_):
        self.ends.append(time.perf_counter())


def tiny_model() -> PreTrainedModel:
    """The shape of assets/tiny, with the same random weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=704,
        vocab_size=4096,
        max_position_embeddings=TARGET_LEN,
        tie_word_embeddings=True,
    )
    return build_model(config, None)


def bare_loop(model: PreTrainedModel, batches: Batches, bf16: bool) -> list[float]:
    """Trains for one pass over batches; returns when each step ended."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **OPTIMIZER, fused=True)
    scheduler = get_scheduler(SCHEDULE, optimizer, WARMUP_STEPS, len(batches))
    model.train()
    ends = []
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):  # as Lightning
            hidden = model.base_model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).last_hidden_state
            loss = causal_lm_loss(hidden, model.get_output_embeddings(), batch["labels"])
        loss.backward()
        optimizer.step()
        scheduler.step()
        ends.append(time.perf_counter())
    return ends


def lightning_loop(model: PreTrainedModel, batches: Batches, cfg: DictConfig) -> list[float]:
    """The same with the Trainer and the module of a training run."""
    module = PoseModule(
        lambda strategy: model,
        expected=None,
        target_len=TARGET_LEN,
        schedule=SCHEDULE,
        warmup_steps=WARMUP_STEPS,
        max_steps=len(batches),
        **OPTIMIZER,
    )
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # the progress bar
        trainer = build_trainer(cfg, Path(folder))
        trainer.callbacks.append(clock)
        trainer.fit(module, batches)
    return clock.ends


def seconds_per_step(ends: list[float]) -> float:
    """Mean over the steps after the first."""
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def compose_config(steps: int, precision: str) -> DictConfig:
    """The config of `train.py` for a run of so many steps on the CPU."""
    schema.register()
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        overrides = [f"trainer.max_steps={steps}", f"trainer.precision={precision}", "trainer.accelerator=cpu"]
        return compose("train", [*overrides, "trainer.devices=1"])


def main():
    args = options()
    quiet_libraries()
    cfg = compose_config(args.steps, args.precision)
    batches = Batches(args.steps, args.batch, args.length, vocab_size=4096)
    reference: list[torch.Tensor] = []  # weights after the first run, which all others must end with
    are_same: list[bool] = []

    def run(loop: Callable[[PreTrainedModel], list[float]]) -> float:
        model = tiny_model()
        seconds = seconds_per_step(loop(model))
        weights = [parameter.detach() for parameter in model.parameters()]
        reference.extend([] if reference else weights)
        are_same.append(all(torch.equal(a, b) for a, b in zip(weights, reference, strict=True)))
        return seconds

    ways = {
        "bare": lambda: run(lambda model: bare_loop(model, batches, args.precision == "bf16-mixed")),
        "lightning": lambda: run(lambda model: lightning_loop(model, batches, cfg)),
    }
    seconds = in_turn(ways, args.repeats)
    over = ratio(seconds["lightning"], seconds["bare"])
    by_loop = {name: spread(values) for name, values in seconds.items()}
    rows = [
        ("bare", words(by_loop["bare"], ".4f"), ""),
        ("lightning", words(by_loop["lightning"], ".4f"), words(over, ".3f")),
    ]
    is_same = all(are_same)
    end = "the same" if is_same else "DIFFER: the loops do not do the same work"
    title = f"loop: {args.repeats} pairs of {args.steps} steps; final weights {end}"
    report(
        table(title, ["loop", "seconds a step", "times as long"], rows),
        "loop",
        args,
        {"ratio": over, "seconds_per_step": by_loop, "same_weights": is_same},
    )


if __name__ == "__main__":
    main()
