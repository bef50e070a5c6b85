"""Classes that a config names (`_target_`): looked up and checked before they are called."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from pose.errors import ConfigError, PoseError

T = TypeVar("T")


def make(node: DictConfig | Mapping[str, Any], base: type[T], key: str) -> T:
    """The object of a group whose config names a class: looked up, checked to be of its kind, and only then called.

    Args:
        node: `_target_` and the arguments of the class; arguments may be such nodes of the same kind.
        base: the class that `_target_` must be, or inherit from.
        key: of the config, for errors.

    Raises:
        ConfigError: another class, something that is no class, or arguments that it does not take.
    """
    arguments = dict(OmegaConf.to_object(node) if OmegaConf.is_config(node) else node)  # type: ignore[arg-type]
    target = arguments.pop("_target_", None)
    try:
        found = get_class(target)
    except Exception as error:  # whatever importing the module raises
        raise ConfigError(f"{key}._target_={target!r} names no class that can be imported: {error}") from error
    if not issubclass(found, base) or inspect.isabstract(found):
        raise ConfigError(
            f"{key}._target_={target} is not accepted: give a class that inherits from {base.__module__}."
            f"{base.__qualname__} (docs/EXTENDING.md)"
        )
    accepted = inspect.signature(found).parameters
    if unknown := [name for name in arguments if name not in accepted]:
        raise ConfigError(f"{key}.{unknown[0]} is not accepted: {target} takes {', '.join(accepted) or 'nothing'}")
    for name, value in arguments.items():
        if isinstance(value, Mapping) and "_target_" in value:
            arguments[name] = make(value, base, f"{key}.{name}")
    try:
        return found(**arguments)
    except PoseError as error:
        raise error.under(key) from None
    except TypeError as error:  # an argument is missing
        raise ConfigError(f"{key}: {error}") from error
