"""What was meant by an override that Hydra refuses: it names what was given, and not what is accepted."""

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException, HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pose.errors import ConfigError
from pose.files import CONF

UNKNOWN = re.compile(r"Could not override '([^']+)'")
MERGED = re.compile(r"Error merging override ([^=\s]+)=(.*)")
NO_CHOICE = re.compile(r"\+{0,2}(\w+)=(null|None|none|false|)")
WITHOUT = {"logger": "logger=csv", "rope": "rope=none", "eval": "eval=none"}  # what no choice of a group may stand for
SIMILAR, MOST = 0.7, 3  # of two names, by difflib; names that a hint has at most


@contextlib.contextmanager
def naming_near_keys(config_name: str) -> Iterator[None]:
    """Around the main function that Hydra makes: where it ends for an override that is refused, says what is accepted.

    Args:
        config_name: of the configuration that the function has.
    """
    try:
        check_choices(sys.argv[1:])
    except ConfigError as refused:
        raise SystemExit(f"ConfigError: {refused}") from None
    try:
        yield
    except SystemExit as ending:
        error = ending.__context__
        if isinstance(error, CompactHydraException) and (told := hint(error, config_name, sys.argv[1:])):
            print(told, file=sys.stderr)
        raise


def check_choices(overrides: Sequence[str]):
    """Raises a ConfigError where a group has null instead of a choice, of which Hydra makes a traceback."""
    for override in overrides:
        given = NO_CHOICE.fullmatch(override)
        group = given[1] if given else ""
        choices = sorted(file.stem for file in (CONF / group).glob("*.yaml")) if group else []
        if given and choices and given[2] not in choices:
            instead = f" ({WITHOUT[group]} stands for none)" if group in WITHOUT else ""
            raise ConfigError(f"{override} is no choice of the group {group}: choose {', '.join(choices)}{instead}")


def hint(error: BaseException, config_name: str, overrides: Sequence[str]) -> str:
    """What to add to Hydra's message: a line, or nothing where nothing is known to help.

    Args:
        error: Hydra's.
        config_name: of the configuration that was to be composed.
        overrides: those that were given; choices of groups decide which keys there are.
    """
    if isinstance(error, OverrideParseException):
        return _grammar(error.override, config_name)
    message = f"{error}"
    given = MERGED.match(message)
    if given is not None and "is not a ListConfig" in f"{error.__cause__}":
        return f"{given[1]} takes a list: '{given[1]}=[{given[2]}]'"
    unknown = UNKNOWN.match(message)
    if unknown is None:
        return ""
    key = unknown[1].partition("@")[0]
    found = near(key, _names(config_name, overrides))
    told = f"Did you mean {' or '.join(found)}? " if found else ""
    return f"{told}Add --cfg job to see all keys."


def _grammar(override: str, config_name: str) -> str:
    """Of an override that cannot be read: a value without its key, or with characters that mean something to Hydra."""
    key, sign, value = override.partition("=")
    if not sign:
        meant = f"ckpt={override}" if config_name == "evaluate" else "trainer.max_steps=100"
        return f"{override!r} is no setting: settings are given as key=value, such as {meant}"
    if value[:1] in ("[", "{"):
        return f"Hydra cannot read the value of {key}: quotes around each part, within those of the shell, make it text"
    return f"Hydra cannot read the value of {key}: quotes within those of the shell make it text: '{key}=\"{value}\"'"


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
