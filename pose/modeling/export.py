"""A trained model as a plain Hugging Face folder."""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel


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
        model.config.dtype = dtype
        weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
