"""A trained model as a plain Hugging Face folder."""

import contextlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from pose.errors import GuardError
from pose.modeling.load import rope_geometry
from pose.modeling.lora import adapters
from pose.modeling.rotary import target_len_of
from pose.modeling.shard import full_weight

log = logging.getLogger(__name__)

VERIFY_LEN = 64  # tokens
LONGEST_TEXT = 8192 + VERIFY_LEN  # tokens; fp32 attention over more would take its memory squared
CPU_FLOPS = 2.5e12  # that a check on the CPU may take; half a minute on two cores
# Largest difference of a logit, as a share of the logits' standard deviation: ten times what rounding makes of it.
# Where the trained model computes in 16 bits, it is the root of the mean square: the largest of millions is noise.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


class Probe(NamedTuple):
    """What two models are asked to compare them.

    Attributes:
        name: what it covers, for messages.
        input_ids: int64 [1, n].
        position_ids: int64 [1, n]; None for 0..n-1, as a user who gives none.
        logits: [1, VERIFY_LEN, V], of the last tokens, from the model that was trained, in its own dtype.
    """

    name: str
    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    logits: torch.Tensor


def export_model(
    model: PreTrainedModel,
    tokenizer,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    is_writer: bool = True,
):
    """Saves model and tokenizer, loads them back as anybody would, and compares the logits.

    The folder appears under its name when it has passed: it is whole and right, or is not there.
    Adapters (`pose.modeling.lora`) are merged into the saved weights; the model in memory keeps
    them apart. Every process of a run must call this, since each may hold a part of the weights;
    one of them writes.

    Args:
        model: built from a scaled config; its config is what is saved, so nothing can get lost.
        tokenizer: its model_max_length becomes the new window.
        folder: replaced when it is there already.
        dtype: of the saved weights.
        is_writer: whether this process writes and compares.

    Raises:
        GuardError: what was written does not load, or gives other logits than the model. It is kept
            beside the folder's name, with `.rejected` added; a folder that was there before stays.
    """
    weights = _gather_weights(model, dtype, keep=is_writer)
    probes = _probe(model)
    if not is_writer:
        return
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(model, weights, tokenizer, partial, dtype)
        try:
            _compare(partial, probes, dtype)
        except Exception as error:
            rejected = folder.with_name(folder.name + ".rejected")
            _replace(partial, rejected)
            message = str(error).replace(str(partial), str(rejected))
            raise GuardError(f"{message}. It is kept there for inspection, and nothing was put at {folder}.") from error
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def verify_export(model: PreTrainedModel, folder: str | Path, dtype: torch.dtype = torch.float32):
    """Compares the logits of an exported folder with those of the model it was written from.

    Args:
        model: the trained model, in memory.
        folder: written by `export_model`.
        dtype: of the saved weights.

    Raises:
        GuardError: the logits differ by more than the weights' rounding explains.
    """
    _compare(Path(folder), _probe(model), dtype)


def _gather_weights(model: PreTrainedModel, dtype: torch.dtype, keep: bool) -> dict[str, torch.Tensor]:
    """All weights, whole, merged, on the CPU; one parameter at a time is put together from its parts."""
    weights, copies = {}, {}
    lora = adapters(model)
    parts = {id(part) for adapter in lora.values() for part in (adapter.down, adapter.up)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in parts:
            continue
        if id(tensor) not in copies:  # tied weights stay one tensor, and are saved once
            full = full_weight(tensor)
            kept = dtype if full.is_floating_point() else full.dtype
            if name in lora:
                down, up, scale = lora[name]
                full = full.float() + scale * (full_weight(up).float() @ full_weight(down).float())
            copies[id(tensor)] = full.to("cpu", kept, copy=True) if keep else None
        weights[name.replace(".base_layer.", ".")] = copies[id(tensor)]
    return weights


def _write(model: PreTrainedModel, weights: dict[str, torch.Tensor], tokenizer, folder: Path, dtype: torch.dtype):
    """Everything of the folder, into one that is there."""
    target_len = target_len_of(model.config)
    _make_generation_savable(model)
    model.save_pretrained(folder, state_dict=weights)
    with _edited(folder / "config.json") as config:
        config["dtype"] = str(dtype).removeprefix("torch.")
    if (folder / "generation_config.json").is_file():
        with _edited(folder / "generation_config.json") as generation:
            if generation.get("max_length") is not None:
                generation["max_length"] = max(generation["max_length"], target_len)
    tokenizer.model_max_length = target_len
    tokenizer.save_pretrained(folder)
    folder.chmod(0o755)


def _make_generation_savable(model: PreTrainedModel):
    """transformers loads a contradictory generation config, but may refuse to save it: then its token ids stay."""
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        log.warning(f"The generation config contradicts itself ({reason}): only its token ids are exported")
        ids = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)


@contextlib.contextmanager
def _edited(json_file: Path):
    content = json.loads(json_file.read_text())
    yield content
    json_file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _replace(new: Path, folder: Path):
    """Renames new to folder. At every moment the old folder, or the new one, is whole: at worst as `.old`."""
    old = folder.with_name(folder.name + ".old")
    try:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
    finally:
        if not folder.exists() and old.exists():
            old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def _probe(model: PreTrainedModel) -> list[Probe]:
    """Random tokens at positions up to the end of the new window, and what the model makes of them."""
    window, target_len = rope_geometry(model.config).window, target_len_of(model.config)
    device = next(model.parameters()).device
    short, long = min(VERIFY_LEN, target_len), min(window + VERIFY_LEN, target_len)
    # Texts first, the short one before the long: transformers' `dynamic` remembers the longest it has seen.
    lengths = sorted({n for n in (short, long) if n <= LONGEST_TEXT and _affordable(model, n, device)})
    cases = [(f"on a text of {n} tokens", n, None) for n in lengths]
    cases += [
        ("at positions spread over the window", short, torch.linspace(0, target_len - 1, short).long()),
        ("at the last positions", short, torch.arange(target_len - short, target_len)),
    ]
    generator = torch.Generator().manual_seed(0)
    training = model.training
    model.eval()
    probes = []
    for name, length, positions in cases:
        tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)
        positions = None if positions is None else positions[None].to(device)
        logits = _last_logits(model, input_ids=tokens, position_ids=positions)
        probes.append(Probe(name, tokens, positions, logits))
    model.train(training)
    return probes


@torch.no_grad()
def _compare(folder: Path, probes: list[Probe], dtype: torch.dtype):
    tolerance = max(TOLERANCE[dtype], TOLERANCE[probes[0].logits.dtype])
    exported = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    if not type(exported).__module__.startswith("transformers."):
        raise GuardError(f"the model loaded from {folder} is of {type(exported)}, not of a class of transformers")
    device = _device_with_room(exported, probes[0].logits.device)
    exported.to(device)
    for name, *inputs in probes:
        tokens, positions, wanted = (None if tensor is None else tensor.to(device) for tensor in inputs)
        if not _affordable(exported, tokens.shape[1], device):
            continue
        # transformers' own attention takes skips for borders unless a mask tells it that nothing is hidden.
        mask = None if positions is None else torch.ones_like(tokens)
        got = _last_logits(exported, input_ids=tokens, position_ids=positions, attention_mask=mask)
        apart = (got - wanted.float()).abs()
        apart = apart.max() if wanted.dtype == torch.float32 else apart.square().mean().sqrt()
        difference = (apart / wanted.float().std()).item()
        if not difference <= tolerance:
            raise GuardError(
                f"the model loaded from {folder} gives other logits than the trained one {name}: they differ by "
                f"{difference:.2g} standard deviations, where {tolerance:g} is expected from rounding"
            )


def _last_logits(model: PreTrainedModel, **inputs) -> torch.Tensor:
    """[1, VERIFY_LEN, V]."""
    return model(**inputs, use_cache=False, logits_to_keep=VERIFY_LEN).logits[:, -VERIFY_LEN:]


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
