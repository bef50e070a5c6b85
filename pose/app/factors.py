"""What `python -m pose.search` has found, read into the config of a run."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pose.errors import ConfigError, first_line
from pose.files import locate

KEYS = ("long_factor", "attention_factor", "searched_for")


def read_factors(node: DictConfig):
    """Fills in what a search has found, in place, so that config.yaml says it: where `factors` names one.

    Args:
        node: the group `rope`. `factors` is the folder of a search, or its factors.yaml.

    Raises:
        ConfigError: there is no such file, or it is none of a search; names it.
    """
    factors = node.get("factors")
    if factors is None:
        return
    if node.get("long_factor") is not None:  # of a config.yaml, which has both
        if node.get("searched_for") is None:
            raise ConfigError(
                f"rope.long_factor beside rope.factors={factors}, which has divisors of its own: leave out one of them"
            )
        return
    path = Path(locate(str(factors)))
    path = path / "factors.yaml" if path.is_dir() else path
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"rope.factors={factors} cannot be read: {first_line(error)}. Give the folder of a finished search (python "
            "-m pose.search), or its factors.yaml"
        ) from error
    if not isinstance(found, dict) or any(key not in found for key in KEYS):
        raise ConfigError(f"rope.factors={factors} is no factors.yaml of a search, which has {', '.join(KEYS)}")
    for key in KEYS:
        if node.get(key) is None:
            node[key] = found[key]
