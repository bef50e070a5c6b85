"""What `python -m pose.search` has found, read into the config of a run."""

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pose.errors import ConfigError, first_line, require_number
from pose.files import locate

log = logging.getLogger(__name__)

KEYS = ("long_factor", "attention_factor", "searched_for")


def read_factors(node: DictConfig):
    """Fills in what a search has found, in place, so that config.yaml says it: where `factors` names one.

    Args:
        node: the group `rope`. `factors` is the folder of a search, or its factors.yaml. The attention factor of
            mixed windows is 1 unless given, whatever it was in the search.

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
    require_number(f"rope.factors={factors}: attention_factor", found["attention_factor"], above=0)
    if node.get("mixed") is True and node.get("attention_factor") is None:
        node.attention_factor = 1.0  # or plain examples would not see the original model
        if found["attention_factor"] != 1:
            log.warning(
                f"rope.mixed=true has rope.attention_factor=1, and the divisors of {path} were searched with "
                f"{found['attention_factor']:.4g}: search again with search.attention_factor=1"
            )
    for key in KEYS:
        if node.get(key) is None:
            node[key] = found[key]
