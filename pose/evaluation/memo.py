"""A store of earlier measurements: outcomes of units, in the cache folder, keyed by everything that they depend on.

It is shared: what train.py measures of the untuned model serves evaluate.py, and the next job of a sweep.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from pose.errors import ConfigError
from pose.evaluation.task import Task, are_numbers
from pose.files import PACKAGE, Memo

log = logging.getLogger(__name__)

MEASURING = ("evaluation", "modeling", "data", "tasks", "rope.py")  # the code that outcomes depend on
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")  # whose versions they depend on
WITHOUT_EFFECT = ("transformers_version", "dtype", "use_cache")  # keys of a config that do not change the model


class Took(NamedTuple):
    """What one unit took: wall clock seconds, and the most memory that the process had held by then, in GiB."""

    seconds: float
    peak_memory_gib: float


class Kept(NamedTuple):
    """The outcome of a unit, and what it took to measure it."""

    outcome: Any
    took: Took


class Outcomes:
    """Outcomes of units by model, task and unit; one that cannot be read is none.

    Args:
        cache_dir: the folder of all caches.
        reuse: whether what is there is taken over; what is measured is kept all the same.

    Attributes:
        folder: of the outcomes, a file each.
    """

    def __init__(self, cache_dir: str | Path, reuse: bool = True):
        self.folder, self.reuse = Path(cache_dir).expanduser() / ".outcomes", reuse
        self._memo, self._cache_dir = Memo(self.folder), cache_dir

    def require_writable(self):
        """Fails now: otherwise the loss is noticed only after a killed evaluation.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"cache_dir={self._cache_dir} cannot be written to ({reason}): give another") from error

    def find(self, model: Any, task: Task, units: Mapping[str, Any]) -> dict[str, Kept]:
        """The kept outcomes of a task's units, as far as they are there and have the shape that the task gives them.

        Args:
            model: what `identity` says of it.
            task: any.
            units: what each of its units depends on.
        """
        found: dict[str, Kept] = {}
        for unit, depends in units.items() if self.reuse else ():
            entry = self._memo.get([model, task.name, depends])
            if entry is None and not self._memo.is_there([model, task.name, depends]):
                continue
            if is_whole(task, unit, entry):
                found[unit] = Kept(entry["outcome"], Took(*entry["took"]))
            else:
                log.warning(f"the kept outcome of {task.name} ({unit}) is damaged: it is measured again")
        return found

    def keep(self, model: Any, task: Task, depends: Any, kept: Kept):
        """Keeps the outcome of one unit, in one step.

        Args:
            model: as for `find`.
            task: any.
            depends: what the unit depends on.
            kept: its outcome.
        """
        self._memo.set([model, task.name, depends], {"outcome": kept.outcome, "took": list(kept.took)})


def is_whole(task: Task, unit: str, entry: Any) -> bool:
    """Whether what was kept of a unit has the shape that `Outcomes.keep` and the task give it."""
    try:
        return are_numbers(entry["took"], 2) and task.accepts(unit, entry["outcome"])
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        return False


def identity(
    checkpoint: Any, config: PretrainedConfig, *, dtype: torch.dtype, attention: str, device: torch.device
) -> dict[str, Any]:
    """Plain JSON that identifies a model as it is run: its weights, config, code, packages and device.

    The outcome of a unit is a pure function of this and of the unit. So whoever measures the same model finds it again:
    where a checkpoint is scaled but not trained, it is the same checkpoint with another config.

    Args:
        checkpoint: what the weights are, as plain JSON: their fingerprint; of random ones what decides them.
        config: that the model is built from, scaling and all.
        dtype: of the weights.
        attention: the backend, by the name that transformers knows it by.
        device: that it runs on; of GPUs the kind alone counts.
    """
    described = {
        name: value
        for name, value in config.to_dict().items()
        if name not in WITHOUT_EFFECT and not name.startswith("_")  # such as the path that it was read from
    }
    return {
        "checkpoint": checkpoint,
        "config": hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest(),
        "code": code_fingerprint(),
        "packages": {name: version(name) for name in PACKAGES},
        "run": [str(dtype), attention, device.type],
    }


def code_fingerprint() -> str:
    """SHA-256 of the code that measures: an outcome of other code is not taken over."""
    files = [file for name in MEASURING for file in sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / name]]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
