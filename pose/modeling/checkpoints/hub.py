"""Reading from local folders and from the hub: fast to fail, clear in its errors, and without running any code."""

import functools
import json
import pickle
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from pose.data.network import RETRIES, first_line, may_pass, wait_for_network
from pose.errors import CheckpointError

_LIBRARY_ERRORS = (SafetensorError, huggingface_hub.errors.StrictDataclassError)
WEIGHT_FILES = tuple(
    name + index for name in ("model.safetensors", "pytorch_model.bin") for index in (".index.json", "")
)
HUB_TIMEOUT = 5.0  # seconds


def from_hub(what: str, load: Callable, path: str, revision: str | None, **kwargs) -> Any:
    """load(path, revision=..., **kwargs), and nothing of the hub where the hub does not answer.

    Args:
        what: is loaded: config, tokenizer, weights; for the error.
        load: a from_pretrained, or a function with the same arguments for the hub.
        path: a local folder, or a hub id.
        revision: of the hub repository.

    Raises:
        CheckpointError: it cannot be loaded; says what, of which path, and why.
    """
    folder = _local_folder(path)
    local = Path(path).expanduser()
    meant_local = local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1 or local.parent.is_dir()
    if folder is None and meant_local:
        raise CheckpointError(f"no folder at {path}: give a Hugging Face folder or a hub id (owner/name)")
    if folder is None and not hub_answers():
        kwargs["local_files_only"] = True
    try:
        if folder is not None or "local_files_only" in kwargs:
            return load(folder or path, revision=revision, **kwargs)
        return _with_retries(lambda: load(path, revision=revision, **kwargs), f"the {what} of {path}")
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the {what} of {path} cannot be loaded: a .bin file holds more than tensors, or is damaged, and pickled "
            "code is never run. Take a folder with safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, *_LIBRARY_ERRORS) as error:
        raise CheckpointError(f"the {what} of {path} cannot be loaded: {first_line(error)}") from error


def _with_retries(load: Callable, what: str, sleep: Callable[[float], None] = time.sleep) -> Any:
    """load(), again where the network failed in between: what has been downloaded is in the hub's cache."""
    for attempt in range(1, RETRIES + 1):
        try:
            return load()
        except Exception as error:  # transformers wraps what the hub's library raises in errors of its own
            if not any(may_pass(cause, local=True) for cause in _causes(error)):
                raise
            wait_for_network(f"Downloading {what}", error, attempt, sleep)
    return load()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_available(path: str, revision: str | None = None) -> bool:
    """Whether a path is a folder, or a hub id that the hub or its local cache can serve."""
    return _local_folder(path) is not None or hub_answers() or _is_cached(path, revision)


@functools.cache
def hub_answers() -> bool:
    """Whether the hub answers; asked once, since transformers itself would try for half a minute for each file."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def find_file(path: str, name: str, **hub) -> str | None:
    """The local path of a file of a folder or hub id; None where there is no such file. Args as `read_weights`."""
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)


def read_weights(path: str, **hub) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint with its name, mapped into memory: bytes are read when they are looked at.

    Pickled code in a .bin file is never run.

    Args:
        path: a local folder, or a hub id.
        hub: revision and the like, for transformers' `cached_file`.

    Raises:
        OSError: no weights there, or an index that names files elsewhere.
        pickle.UnpicklingError: a .bin file with more than tensors.
    """
    found = (find_file(path, name, **hub) for name in WEIGHT_FILES)
    file = next((file for file in found if file is not None), None)
    if file is None:
        raise OSError(f"it has none of {', '.join(WEIGHT_FILES)}")
    files = [file]
    if file.endswith(".json"):
        names = sorted(set(json.loads(Path(file).read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise OSError(f"{Path(file).name} names files outside its folder")
        files = [cached_file(path, name, **hub) for name in names]
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no dict
                    yield name, tensors.get_tensor(name)
        else:
            mapped = zipfile.is_zipfile(file)  # files of old versions of torch cannot be memory-mapped
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=mapped).items()


def _local_folder(path: str) -> str | None:
    local = Path(path).expanduser()
    return str(local) if local.is_dir() else None


def _is_cached(path: str, revision: str | None) -> bool:
    """Whether the hub's local cache has a config and weights."""

    def cached(*names: str) -> bool:
        found = (huggingface_hub.try_to_load_from_cache(path, name, revision=revision) for name in names)
        return any(isinstance(file, str) for file in found)

    return cached("config.json") and cached(*WEIGHT_FILES)
