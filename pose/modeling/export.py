"""A trained model as a plain Hugging Face folder."""

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


def export_model(model: PreTrainedModel, tokenizer, folder: str | Path, dtype: torch.dtype = torch.float32):
    """Saves model and tokenizer, in one rename: the folder is whole, or is not there.

    Args:
        model: built from a scaled config; its config is what is saved, so nothing can get lost.
        tokenizer: its model_max_length becomes the new window.
        folder: replaced when it is there already.
        dtype: of the saved weights.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
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


def _write_dtype(config_file: Path, dtype: torch.dtype):
    config = json.loads(config_file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def verify_export(model: PreTrainedModel, folder: str | Path, dtype: torch.dtype = torch.float32):
    """Loads an exported folder as anybody would, and compares its logits with the trained model's.

    Positions reach to the end of the new window. transformers' own attention is used, with an
    explicit mask, so that it does not take the skips for document borders.

    Args:
        model: the trained model, in memory.
        folder: written by `export_model` from it.
        dtype: of the saved weights.

    Raises:
        GuardError: the logits differ by more than the weights' rounding explains.
    """
    parameter = next(model.parameters())
    exported = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    exported.to(parameter.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, VERIFY_LEN), generator=generator).to(parameter.device)
    positions = torch.linspace(0, model.config.max_position_embeddings - 1, VERIFY_LEN).long()[None].to(tokens.device)
    training = model.training
    model.eval()
    wanted = model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
    model.train(training)
    got = exported(
        input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False
    ).logits
    difference = ((got - wanted).abs().max() / wanted.std()).item()
    tolerance = max(TOLERANCE[dtype], TOLERANCE[parameter.dtype])
    if not difference <= tolerance:
        raise GuardError(
            f"the model loaded from {folder} gives other logits than the trained one: they differ by {difference:.2g} "
            f"standard deviations, where {tolerance:g} is expected from rounding. The folder is kept for inspection."
        )
