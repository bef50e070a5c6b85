"""Memory of a training step, planned and measured: python -m benchmarks.plan [--quick] [--device cuda] [--json FILE]

A step of random weights, forward, loss and backward, while the gradients of an earlier micro-batch are there: its peak
above weights, gradients and batch, against the activations, loss and copies of weights that `pose.plan` says. On the
CPU the peak is that of torch's own allocator, event by event (torch.profiler); on a GPU it is max_memory_allocated.
"""

import argparse
import contextlib

from benchmarks import Options, memory, report, save_part, spread, table


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = Options("plan", __doc__, quick={"cases": "few"})
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    help = "few: the first three shapes, with SDPA"
    parser.add_argument("--cases", choices=("all", "few"), default="all", help=help)
    return parser.read()


if __name__ == "__main__":
    options()

import torch
from transformers import AutoConfig

from pose.modeling import speed
from pose.modeling.load import build_model
from pose.modeling.lora import add_lora
from pose.modeling.options import LoraOptions
from pose.modeling.teacher import Teacher, freeze
from pose.plan import Shape, Training
from pose.training.objectives import LanguageModel, LongShort, Objective, SelfDistill

# hidden size, layers, heads, key-value heads, width of the MLP, vocabulary; tokens of an example, examples
SHAPES = {
    "deep": (256, 6, 4, 2, 704, 1000, 512, 1),
    "many examples": (192, 4, 6, 6, 512, 4096, 256, 4),
    "large vocabulary": (512, 2, 8, 2, 1024, 16384, 1024, 2),
    "long": (64, 8, 2, 2, 160, 512, 2048, 1),
}
GPU_SHAPES = {
    "135M": (576, 30, 9, 3, 1536, 49152, 2048, 4),
    "1B": (2048, 16, 32, 8, 8192, 128256, 2048, 1),
}
OBJECTIVES: dict[str, Objective] = {"lm": LanguageModel(), "self_distill": SelfDistill(), "long_short": LongShort()}
KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip


def compare(
    sizes: tuple[int, ...],
    *,
    model_type: str = "llama",
    attention: str = "sdpa",
    checkpointing: bool | str = False,
    precision: str = "32-true",
    rank: int | None = None,
    device: str = "cpu",
    objective: str = "lm",
    **config,
) -> tuple[float, float]:
    """Bytes of one shape's step above weights, gradients and batch: planned, measured.

    Args:
        sizes: as in SHAPES.
        model_type: a class that `pose.plan` knows.
        attention: sdpa or eager.
        checkpointing: which activations of layers are made again, as of `pose.modeling.speed.recompute`.
        precision: 32-true or bf16-mixed.
        rank: of adapters on every matrix of a layer; None trains all weights.
        device: cpu or cuda.
        objective: one of OBJECTIVES; of two views, with a skip before the first token.
        config: more of the model's config.
    """
    *numbers, length, num_examples = sizes
    own = {**dict(zip(KEYS, numbers, strict=True)), "max_position_embeddings": length, "tie_word_embeddings": False}
    settings = AutoConfig.for_model(model_type, **{**own, **config})
    prepare = None if rank is None else lambda model: add_lora(model, LoraOptions(rank=rank))
    model = build_model(settings, None, attention, prepare=prepare).to(device).train()  # type: ignore[arg-type]
    speed.recompute(model, checkpointing)
    speed.residuals_as_computed(model)
    minimised, tokens = OBJECTIVES[objective], torch.randint(numbers[-1], (num_examples, length))
    position_ids = torch.arange(length) + (minimised.num_views > 1)
    items = [{"input_ids": row, "labels": row, "position_ids": position_ids} for row in tokens]
    batch = {name: value.to(device) for name, value in minimised.collate(items).items()}
    teacher = Teacher(model, settings)
    if rank is None and minimised.has_teacher:
        teacher = Teacher(build_model(settings, None, attention, prepare=freeze).to(device).eval())  # type: ignore[arg-type]
    mixed = torch.autocast(device, torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()

    def loss():
        with mixed:
            return minimised.losses(model, batch, teacher).loss

    def step():
        loss().backward()

    step()  # the gradients are there from now on
    measured = memory.cuda_peak(step) if device == "cuda" else memory.cpu_peak(step)
    planned = Training(
        Shape.of(settings.to_dict()),
        train_len=length,
        target_len=8 * length,
        micro_batch=num_examples,
        global_batch=num_examples,
        precision=precision,
        gradient_checkpointing=checkpointing,
        attention=attention,
        rank=rank,
        objective=objective,
        num_compared=len(LongShort().layers_of(settings.num_hidden_layers)) if minimised.has_teacher else 0,
    ).memory
    return sum(planned[part] for part in ("activations", "loss", "gathered")), measured


def main():
    args = options()
    torch.manual_seed(0)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no GPU here")
    few = args.cases == "few"
    shapes = dict(list((GPU_SHAPES if on_gpu else SHAPES).items())[: 3 if few else None])
    attentions = ("sdpa",) if few or on_gpu else ("sdpa", "eager")
    precision = "bf16-mixed" if on_gpu else "32-true"
    cases = [
        (name, {"attention": attention, "checkpointing": checkpointing, "rank": rank})
        for name in shapes
        for attention in attentions
        for rank in (None, 8)
        for checkpointing in (False, True, "selective")
        if attention == "sdpa" or (rank is None and checkpointing != "selective")
    ]
    results: list[dict] = []
    for name, case in cases:
        planned, measured = compare(shapes[name], precision=precision, device=args.device, **case)
        over = planned / measured
        results.append({"shape": name, **case, "planned": planned, "measured": measured, "ratio": over})
        save_part("plan", args, {"cases": results})
    rows = []
    for one in results:
        what = f"{one['shape']}, {one['attention']}" + (f", rank {one['rank']}" if one["rank"] else "")
        again = {False: "", True: ", gradient checkpointing", "selective": ", selective"}[one["checkpointing"]]
        rows.append(
            (what + again, *(f"{one[key] / 2**20:.2f}" for key in ("planned", "measured")), f"{one['ratio']:.3f}")
        )
    ratios = spread([one["ratio"] for one in results])
    title = f"plan: planned over measured {ratios['min']:.3f} to {ratios['max']:.3f} in {len(results)} cases"
    results_of = {"precision": precision, "shapes": shapes, "cases": results, "ratio": ratios}
    report(table(title, ["case", "planned MiB", "measured MiB", "ratio"], rows), "plan", args, results_of)


if __name__ == "__main__":
    main()
