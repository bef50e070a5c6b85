"""Which key or group was meant, where a configuration does not have the given one. Hydra names only the given one."""

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException, HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pose.files import CONF

UNKNOWN = re.compile(r"Could not override '([^']+)'")
SIMILAR, MOST = 0.7, 3  # of two names, by difflib; names that a hint has at most


@contextlib.contextmanager
def naming_near_keys(config_name: str) -> Iterator[None]:
    """Around the main function that Hydra makes: where it ends for a key that is not there, says which are near.

    Args:
        config_name: of the configuration that the function has.
    """
    try:
        yield
    except SystemExit as ending:
        error = ending.__context__
        if isinstance(error, CompactHydraException) and (told := hint(f"{error}", config_name, sys.argv[1:])):
            print(told, file=sys.stderr)
        raise


def hint(message: str, config_name: str, overrides: Sequence[str]) -> str:
    """What to add to Hydra's message: a line, or nothing where it is not about an unknown key.

    Args:
        message: Hydra's.
        config_name: of the configuration that was to be composed.
        overrides: those that were given; choices of groups decide which keys there are.
    """
    unknown = UNKNOWN.match(message)
    if unknown is None:
        return ""
    key = unknown[1].partition("@")[0]
    found = near(key, _names(config_name, overrides))
    told = f"Did you mean {' or '.join(found)}? " if found else ""
    return f"{told}Add --cfg job to see all keys."


def near(key: str, names: Sequence[str]) -> list[str]:
    """The names that a key may stand for: the same last part in another place, then those written alike, best first."""
    last = key.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    return list(dict.fromkeys([*same, *difflib.get_close_matches(key, names, MOST, SIMILAR)]))[:MOST]


def _names(config_name: str, overrides: Sequence[str]) -> list[str]:
    """The keys and groups of a configuration, with the choices that were given if they are good."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = [group for group in loader.list_groups("") if group not in ("hydra", "schema")]
        choices = [one for one in overrides if one.partition("=")[0].partition("@")[0] in groups]
        try:
            cfg = compose(config_name, choices)
        except (HydraException, OmegaConfBaseException):
            cfg = compose(config_name)
        return [*groups, *_keys(cast(dict, OmegaConf.to_container(cfg)))]


def _keys(values: Mapping, before: str = "") -> Iterator[str]:
    for key, value in values.items():
        if key.startswith("_"):  # not for who runs it
            continue
        yield f"{before}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{before}{key}.")
