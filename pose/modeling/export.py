"""A trained model as a plain Hugging Face folder."""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pose.errors import GuardError

VERIFY_LEN = 64  # tokens
# Largest difference of a logit, as a share of the logits' standard deviation.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}


def export_model(
    model: PreTrainedModel,
    tokenizer,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    is_writer: bool = True,
):
    """Saves model and tokenizer, then loads them back as anybody would and compares the logits.

    The folder appears in one rename: it is whole, or is not there. Every process of a run must call
    this, since each may hold a part of the weights; one of them writes.

    Args:
        model: built from a scaled config; its config is what is saved, so nothing can get lost.
        tokenizer: its model_max_length becomes the new window.
        folder: replaced when it is there already.
        dtype: of the saved weights.
        is_writer: whether this process writes and compares.

    Raises:
        GuardError: the folder gives other logits than the model.
    """
    weights = _gather_weights(model, dtype, keep=is_writer)
    probe, wanted = _probe_logits(model)
    if not is_writer:
        return
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(partial, state_dict=weights)
        _write_dtype(partial / "config.json", dtype)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _compare(folder, probe, wanted, max(TOLERANCE[dtype], TOLERANCE[next(model.parameters()).dtype]))


def verify_export(model: PreTrainedModel, folder: str | Path, dtype: torch.dtype = torch.float32):
    """Compares the logits of an exported folder with those of the model it was written from.

    Args:
        model: the trained model, in memory.
        folder: written by `export_model`.
        dtype: of the saved weights.

    Raises:
        GuardError: the logits differ by more than the weights' rounding explains.
    """
    probe, wanted = _probe_logits(model)
    _compare(Path(folder), probe, wanted, max(TOLERANCE[dtype], TOLERANCE[next(model.parameters()).dtype]))


def _gather_weights(model: PreTrainedModel, dtype: torch.dtype, keep: bool) -> dict[str, torch.Tensor]:
    """All weights, whole, on the CPU; one parameter at a time is put together from its parts."""
    weights, copies = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in copies:  # tied weights stay one tensor, and are saved once
            with _whole(tensor):
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                kept = dtype if full.is_floating_point() else full.dtype
                copies[id(tensor)] = full.detach().to("cpu", kept, copy=True) if keep else None
        weights[name] = copies[id(tensor)]
    return weights


def _whole(tensor: torch.Tensor):
    """The context in which a parameter that ZeRO-3 has partitioned is whole."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def _write_dtype(config_file: Path, dtype: torch.dtype):
    config = json.loads(config_file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def _probe_logits(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random tokens at positions that reach the end of the new window, and the model's logits; fp32."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, VERIFY_LEN), generator=generator)
    positions = torch.linspace(0, model.config.max_position_embeddings - 1, VERIFY_LEN).long()[None]
    probe = {"input_ids": tokens.to(device), "position_ids": positions.to(device)}
    training = model.training
    model.eval()
    logits = model(**probe, use_cache=False).logits.float()
    model.train(training)
    return probe, logits


@torch.no_grad()
def _compare(folder: Path, probe: dict[str, torch.Tensor], wanted: torch.Tensor, tolerance: float):
    exported = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    exported.to(wanted.device)
    # transformers' own attention, told by a mask that nothing is hidden: it would take the skips for borders.
    mask = torch.ones_like(probe["input_ids"])
    got = exported(**probe, attention_mask=mask, use_cache=False).logits
    difference = ((got - wanted).abs().max() / wanted.std()).item()
    if not difference <= tolerance:
        raise GuardError(
            f"the model loaded from {folder} gives other logits than the trained one: they differ by {difference:.2g} "
            f"standard deviations, where {tolerance:g} is expected from rounding. The folder is kept for inspection."
        )
