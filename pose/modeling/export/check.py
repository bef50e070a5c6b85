"""Whether an exported folder, loaded by transformers alone, computes what the trained model computes."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from pose.errors import GuardError
from pose.modeling import compat
from pose.modeling.export.fold import Fold
from pose.modeling.export.rope import attention_factor
from pose.modeling.export.weights import Stored, broken
from pose.modeling.held import held_weight
from pose.modeling.load import rope_geometry
from pose.modeling.rotary import target_len_of
from pose.modeling.shard import decoder_layers
from pose.modeling.weights import places

VERIFY_LEN = 64  # tokens
LONGEST_TEXT = 8192 + VERIFY_LEN  # tokens; fp32 attention over more would take its memory squared
CPU_FLOPS = 2.5e12  # the most that a check on the CPU may take: half a minute on two cores
# Largest difference of a logit, as a share of the logits' standard deviation: some ten times what rounding makes of it.
# In fp32 that was 1.2e-3 for SmolLM2-135M on an H100 and is 3e-4 at most on a CPU (docs/LOG.md); weights in bf16 make
# 2e-2 and more. Where the trained model computes in 16 bits, it is the root of the mean square: the largest of millions
# is noise.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.05}
ABSURD_LOSS = 100.0  # nats per token of random text: a uniform guess costs ln V, about 10, and sound models some 15


class Probe(NamedTuple):
    """An input on which two models are compared.

    Attributes:
        name: what it covers, for messages.
        input_ids: int64 [1, n].
        position_ids: int64 [1, n]; None for 0..n-1, as a user who gives none.
    """

    name: str
    input_ids: torch.Tensor
    position_ids: torch.Tensor | None


class Answers(NamedTuple):
    """The trained model's logits for the probes.

    Attributes:
        probes: all of them.
        logits: of each: [1, VERIFY_LEN, V], of the last tokens, in the model's own dtype.
        model: the trained one.
    """

    probes: list[Probe]
    logits: list[torch.Tensor]
    model: PreTrainedModel


class Agreement(NamedTuple):
    """The result of a comparison.

    Attributes:
        probes: the names of those that both models were asked.
        difference: the largest of their logits, in standard deviations of the trained model's.
        tolerance: what was accepted.
    """

    probes: list[str]
    difference: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"its logits differ from the trained model's by at most {self.difference:.1g} standard deviations "
            f"({self.tolerance:g} accepted) {', '.join(self.probes)}"
        )


def ask(model: PreTrainedModel, progress: bool = False) -> Answers:
    """Random tokens at positions up to the end of the new window, with the trained model's logits for them.

    Every process must call this, since each may hold a part of the weights.

    Args:
        model: the trained one.
        progress: whether to show a bar.

    Raises:
        TrainingError: the logits are not finite, or absurd; every process raises it.
    """
    probes = _probes(model)
    training = model.training
    model.eval()
    try:
        logits = list(_logits(model, probes, "Asking the trained model", progress))
    finally:
        model.train(training)
    for probe, found in zip(probes, logits, strict=True):
        loss = F.cross_entropy(found[0, :-1].float(), probe.input_ids[0, 1 - found.shape[1] :]).item()
        if not found.isfinite().all():
            raise broken(f"{probe.name} its logits are not finite")
        if found.max() == found.min():  # hidden states that overflow in the last norm
            raise broken(f"{probe.name} its logits are all the same")
        if loss > ABSURD_LOSS:
            raise broken(
                f"{probe.name} its logits are worth {loss:.4g} nats per token of random text, where guessing costs "
                f"{math.log(found.shape[-1]):.1f}"
            )
    return Answers(probes, logits, model)


def compare(folder: Path, answers: Answers, dtype: torch.dtype, progress: bool = False) -> Agreement:
    """Loads a folder as anybody would, in fp32, and compares its logits with the trained model's.

    Where that holds frozen weights in fewer bits than the checkpoint, from which they were saved, the loaded ones get
    the same rounding: so the difference is one of what was written, and not of what 4 bits do to a model.

    Args:
        folder: with config and weights.
        answers: of the trained model.
        dtype: of the saved weights.
        progress: whether to show a bar.

    Raises:
        GuardError: the logits differ by more than the weights' rounding explains, or the class is not transformers'.
    """
    wanted = answers.logits
    tolerance = max(TOLERANCE[dtype], TOLERANCE[wanted[0].dtype])
    exported = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    if not type(exported).__module__.startswith("transformers."):
        raise GuardError(f"the model loaded from {folder} is of {type(exported)}, not of a class of transformers")
    if not _round_alike(exported, answers.model):
        tolerance = max(tolerance, TOLERANCE[torch.bfloat16])
    device = _device_with_room(exported, wanted[0].device)
    exported.to(device)  # type: ignore[arg-type]
    asked = [i for i, probe in enumerate(answers.probes) if _affordable(exported, probe.input_ids.shape[1], device)]
    probes = [answers.probes[i] for i in asked]
    differences = []
    for i, got in zip(asked, _logits(exported, probes, "Checking the export", progress), strict=True):
        expected = wanted[i].to(device).float()
        apart = (got - expected).abs()
        apart = apart.max() if wanted[i].dtype == torch.float32 else apart.square().mean().sqrt()
        differences.append((apart / expected.std()).item())
        if not differences[-1] <= tolerance:
            raise GuardError(
                f"the model loaded from {folder} gives other logits than the trained one {answers.probes[i].name}: "
                f"they differ by {differences[-1]:.2g} standard deviations, where {tolerance:g} is expected from "
                "rounding"
            )
    return Agreement([probe.name for probe in probes], max(differences), tolerance)


@torch.no_grad()
def _round_alike(exported: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Adds to exported weights what the trained model has lost of the checkpoint's; False where it is in parts."""
    stored, held, own = Stored(model), places(model), exported.state_dict()
    if not stored.names:
        return True
    by = attention_factor(model) / attention_factor(exported)
    fold = Fold(model, by) if by != 1.0 else lambda name, tensor: tensor
    if any(compat.local_part(held[name]) is not held[name] for name in stored.names):
        return False
    done: set[int] = set()
    for name in held:
        if name in stored.names and id(held[name]) not in done:  # a tied one has two names
            done.add(id(held[name]))
            values = held_weight(held[name]).cpu()
            own[name] += fold(name, values - stored(name).float())
    return True


def _probes(model: PreTrainedModel) -> list[Probe]:
    window, target_len = rope_geometry(model.config).window, target_len_of(model.config)
    device = next(model.parameters()).device
    short, long = min(VERIFY_LEN, target_len), min(window + VERIFY_LEN, target_len)
    # Texts first, the short one before the long: transformers' `dynamic` remembers the longest it has seen.
    lengths = sorted({n for n in (short, long) if n <= LONGEST_TEXT and _affordable(model, n, device)})
    cases: list[tuple[str, int, torch.Tensor | None]] = [(f"on a text of {n} tokens", n, None) for n in lengths]
    cases += [
        ("at positions spread over the window", short, torch.linspace(0, target_len - 1, short).long()),
        ("at the last positions", short, torch.arange(target_len - short, target_len)),
    ]
    generator = torch.Generator().manual_seed(0)
    probes = []
    for name, length, positions in cases:
        tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)
        probes.append(Probe(name, tokens, None if positions is None else positions[None].to(device)))
    return probes


@torch.no_grad()
def _logits(model: PreTrainedModel, probes: list[Probe], title: str, progress: bool) -> Iterator[torch.Tensor]:
    """[1, VERIFY_LEN, V] for each probe; a bar moves with every layer, in proportion to the tokens."""
    layers, device = decoder_layers(model), next(model.parameters()).device
    total = sum(probe.input_ids.shape[1] for probe in probes) * len(layers)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=total, desc=title, bar_format=bar_format, leave=False, disable=not progress) as bar:
        for name, tokens, positions in probes:
            bar.set_postfix_str(name)

            def advance(*_, length=tokens.shape[1]):
                bar.update(length)

            # transformers' own attention takes skips for borders unless a mask tells it that nothing is hidden.
            mask = None if positions is None else torch.ones_like(tokens)
            given = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
            inputs = {key: value.to(device) for key, value in given.items() if value is not None}
            hooks = [layer.register_forward_hook(advance) for layer in layers]
            try:
                logits = model(**inputs, use_cache=False, logits_to_keep=VERIFY_LEN).logits[:, -VERIFY_LEN:]
            finally:
                for hook in hooks:
                    hook.remove()
            yield logits


def _affordable(model: PreTrainedModel, length: int, device: torch.device) -> bool:
    return device.type != "cpu" or length <= VERIFY_LEN or 2 * model.num_parameters() * length <= CPU_FLOPS


def _device_with_room(model: PreTrainedModel, device: torch.device) -> torch.device:
    """The device, or the CPU where another model does not fit beside the trained one."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if free < 1.5 * model.get_memory_footprint():
            return torch.device("cpu")
    return device
