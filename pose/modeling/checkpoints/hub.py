"""Reading from local folders and from the hub: fast to fail, clear in its errors, and without running any code."""

import functools
import os
import pickle
import re
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open

from pose.data.network import RETRIES, may_pass, wait_for_network
from pose.errors import CheckpointError, PoseError, first_line, one_line
from pose.files import load_json
from pose.modeling import compat

# Errors whose first line says enough; of others the class is named too.
_SAID = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, huggingface_hub.errors.StrictDataclassError)
# In transformers' order: the first that is there is read.
WEIGHT_FILES = tuple(
    name + index for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
# What else transformers would read weights from.
ADAPTERS = "adapter_config.json"
RANK_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_TIMEOUT = 5.0  # seconds


def from_hub(what: str, load: Callable, path: str, revision: str | None, **kwargs) -> Any:
    """load(path, revision=..., **kwargs), from the local cache alone where the hub does not answer.

    Args:
        what: is loaded: config, tokenizer, weights; for the error.
        load: a from_pretrained, or a function with the same arguments for the hub.
        path: a local folder, or a hub id.
        revision: of the hub repository.

    Raises:
        CheckpointError: it cannot be loaded; says what, of which path, and why.
    """
    folder = _local_folder(path)
    if folder is None and not HUB_ID.fullmatch(path):
        raise CheckpointError(f"no folder at {path}: give a Hugging Face folder or a hub id (owner/name)")
    if folder is None and not hub_answers():
        kwargs["local_files_only"] = True
    name = f"the {what} of {path}"
    try:
        if folder is not None or "local_files_only" in kwargs:
            return load(folder or path, revision=revision, **kwargs)
        return _with_retries(lambda: load(path, revision=revision, **kwargs), name)
    except (PoseError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{name} cannot be loaded: a .bin file holds more than tensors, or is damaged, and pickled "
            "code is never run. Take a folder with safetensors"
        ) from error
    except Exception as error:  # for malformed files the libraries raise errors of any class
        if folder is None and Path(path).parent.is_dir():  # the path may be meant as a folder that is missing
            name = f"there is no folder at {path}{_beside(Path(path))}, and as a hub id {name}"
        raise CheckpointError(f"{name} cannot be loaded: {_reason(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by tokenizers where its Rust code panics
            raise
        raise CheckpointError(f"{name} cannot be loaded, since it is damaged: {first_line(error)}") from error


def _beside(path: Path) -> str:
    """The last folders where a path leads that is not there, for an error; "" of a name alone, which is no path."""
    try:
        found = [one.name for one in path.parent.iterdir() if one.is_dir()] if len(path.parts) > 1 else []
    except OSError:
        return ""
    there = sorted(name for name in found if not name.startswith("."))[-5:]
    return f" (beside it: {', '.join(there)})" if there else ""


def _reason(error: Exception) -> str:
    """What a library's error says, in one line."""
    said = first_line(error)
    if said.endswith(":"):  # the next line has the reason
        said += f" {' '.join(str(error).strip().splitlines()[1:2]).strip()}"
    return one_line(said if isinstance(error, _SAID) else f"{type(error).__name__}: {said}")


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
    return compat.find_file(path, name, **hub)


def weight_files(path: str, **hub) -> list[Path]:
    """The files that the weights of a checkpoint are read from, by us and by transformers, checked before any is read.

    Args:
        path: a local folder, or a hub id.
        hub: revision and the like, for transformers' `cached_file`.

    Returns:
        One file, or an index and the shards that it names.

    Raises:
        CheckpointError: no weights; a file that cannot be read; an index that is none, or that names what is not there
            or lies outside its folder; weights that transformers would read from elsewhere.
    """
    if find_file(path, ADAPTERS, **hub) is not None:
        raise CheckpointError(
            f"{path} has adapters beside its weights ({ADAPTERS}), which are not read: merge them first (peft's "
            "merge_and_unload), or remove them"
        )
    if os.path.isdir(path):
        _check_folder(Path(path))
    found = (find_file(path, name, **hub) for name in WEIGHT_FILES)
    file = next((Path(file) for file in found if file is not None), None)
    if file is None:
        raise CheckpointError(f"the weights of {path} cannot be loaded: it has none of {', '.join(WEIGHT_FILES)}")
    files = [file]
    if file.suffix == ".json":
        names = shard_names(file)
        if os.path.isdir(path):
            files += [file.parent / name for name in names]
        else:
            files += map(Path, compat.find_files(path, names, **hub))
    for file in files:
        _check_readable(file)
    return files


def shard_names(index: Path) -> list[str]:
    """The files that an index of weights names, relative to its folder, each once and in order.

    Raises:
        CheckpointError: it is not an index, or names a file outside its folder.
    """
    weights = load_json(index, CheckpointError, {"weight_map": dict, "metadata": dict})["weight_map"]
    if not weights:
        raise CheckpointError(f"{index} has an empty 'weight_map', where the file of each weight is expected")
    for weight, name in weights.items():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or parts[0] == "/" or ".." in parts:
            raise CheckpointError(
                f"{index} has {name!r} for {weight!r} in 'weight_map', where a file inside its folder is expected"
            )
    return sorted(set(weights.values()))


def _check_folder(folder: Path):
    """Checks that each file of weights is a file, and that there is none that transformers alone would read."""
    for name in WEIGHT_FILES:
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} cannot be read: it is a folder, or a link to nothing")
    for file in folder.iterdir():
        if RANK_SHARD.fullmatch(file.name):
            raise CheckpointError(
                f"{file} is a part of a distributed checkpoint, which is not read: save the model whole, with "
                "save_pretrained"
            )


def _check_readable(file: Path):
    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error


def read_weights(path: str, **hub) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint with its name, mapped into memory: bytes are read when they are looked at.

    Pickled code in a .bin file is never run.

    Args:
        path, hub: as `weight_files`.

    Raises:
        CheckpointError: as `weight_files`.
        pickle.UnpicklingError: a .bin file with more than tensors.
    """
    files = weight_files(path, **hub)
    for file in files[1:] or files:  # an index holds no weights
        if file.suffix == ".safetensors":
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
