"""A trained model as a plain Hugging Face folder."""

import copy
import logging
import shutil
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from pose.errors import GuardError, first_line
from pose.files import atomic_folder, replace_folder
from pose.modeling import compat
from pose.modeling.export.check import ask, compare
from pose.modeling.export.rope import for_old_readers, said
from pose.modeling.export.weights import Weights
from pose.modeling.rotary import target_len_of

log = logging.getLogger(__name__)


def export_model(
    model: PreTrainedModel,
    tokenizer,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    is_writer: bool = True,
    progress: bool = True,
    fold: bool = True,
):
    """Saves model and tokenizer, loads them back as anybody would, and compares the logits.

    The folder appears under its name when it has passed: it is whole and right, or is not there.
    Adapters (`pose.modeling.lora`) are merged into the saved weights; the model in memory keeps
    them apart. Every process of a run must call this, since each may hold a part of the weights;
    one of them writes, and holds no more of them at a time than a file has.

    Args:
        model: built from a scaled config; its config is what is saved, so nothing can get lost, in the words that most
            engines read right.
        tokenizer: its model_max_length becomes the new window.
        folder: replaced when it is there already.
        dtype: of the saved weights.
        is_writer: whether this process writes and compares.
        progress: whether it shows bars.
        fold: whether an attention factor that engines may overlook is multiplied into the saved weights of queries and
            keys (`pose.modeling.export.rope`); the model in memory stays as it is.

    Raises:
        TrainingError: weights or logits of the model are not finite, or absurd; every process raises it.
        GuardError: what was written does not load, or gives other logits than the model. It is kept
            beside the folder's name, with `.rejected` added; a folder that was there before stays.
        MemoryError, torch.OutOfMemoryError, RuntimeError: memory ran out while it was compared, as it was raised. It is
            kept as well, with `.unchecked` added.
    """
    begin, folder = time.perf_counter(), Path(folder)
    answers = ask(model, progress and is_writer)
    config, multiply, kept = said(model, fold)
    weights = Weights(model, dtype, multiply)
    if not is_writer:
        weights.write(folder, is_writer=False)
        return
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a killed process
        if leftover.name != f".{folder.name}.old" or folder.exists():
            shutil.rmtree(leftover, ignore_errors=True)
    if kept:
        log.warning(kept)
    files = f" in {len(weights.files)} files" if len(weights.files) > 1 else ""
    log.info(f"Writing the model ({weights.num_bytes / 1e9:.3g} GB{files}, {_name(dtype)}) ...")
    with atomic_folder(folder, replace=True) as partial:
        weights.write(partial, is_writer=True)
        _write_rest(model, config, tokenizer, partial, dtype)
        log.info("Checking the model that was written ...")
        try:
            agreement = compare(partial, answers, dtype, progress)
        except Exception as error:
            if compat.is_out_of_memory(error):
                unchecked = folder.with_name(folder.name + ".unchecked")
                replace_folder(partial, unchecked)
                log.warning(f"Memory ran out while the model was checked: it is kept, unchecked, as {unchecked}")
                raise
            rejected = folder.with_name(folder.name + ".rejected")
            replace_folder(partial, rejected)
            message = str(error).replace(str(partial), str(rejected))
            raise GuardError(f"{message}. It is kept there for inspection, and nothing was put at {folder}.") from error
    seconds = time.perf_counter() - begin
    log.info(f"Checked     {folder}, loaded by transformers alone: {agreement} ({seconds:.0f} s)")


def verify_export(model: PreTrainedModel, folder: str | Path, dtype: torch.dtype = torch.float32):
    """Compares the logits of an exported folder with those of the model it was written from.

    Args:
        model: the trained model, in memory.
        folder: written by `export_model`.
        dtype: of the saved weights.

    Raises:
        TrainingError: the model's logits are not finite, or absurd.
        GuardError: the logits differ by more than the weights' rounding explains.
    """
    compare(Path(folder), ask(model), dtype)


def _write_rest(model: PreTrainedModel, config: PretrainedConfig, tokenizer, folder: Path, dtype: torch.dtype):
    """Everything of the folder but the weights, as save_pretrained writes it, for the new window."""
    target_len = target_len_of(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # the class as `fully_shard` changes it
    config.dtype = _name(dtype)
    config.save_pretrained(folder)
    if model.can_generate():
        generation = _savable(model.generation_config)
        if generation.max_length is not None:
            generation.max_length = max(generation.max_length, target_len)
        generation.save_pretrained(folder)
    tokenizer.model_max_length = target_len
    tokenizer.save_pretrained(folder)
    for_old_readers(folder)


def _savable(generation: GenerationConfig) -> GenerationConfig:
    """A copy. transformers loads a contradictory one, but may refuse to save it: then its token ids stay."""
    try:
        generation.validate(strict=True)
        return copy.deepcopy(generation)
    except ValueError as error:
        log.warning(f"The generation config contradicts itself ({first_line(error)}): only its token ids are exported")
        return GenerationConfig(
            **{name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
