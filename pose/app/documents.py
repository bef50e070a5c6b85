"""Documents as a config names them, with the files of this repository found."""

from omegaconf import OmegaConf

from pose.errors import ConfigError
from pose.files import locate


def find_documents(key: str, value):
    """Documents as `TokenCache.build` takes them, with shipped files found.

    Args:
        key: of the config, for the error.
        value: file, folder, glob or dataset, or a list of them.

    Raises:
        ConfigError: a dataset without a path, or with one that is no text.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        if value.get("path") in (None, "???"):
            raise ConfigError(
                f"{key}.path is not set: give a folder, or the id of a dataset on the hub (owner/name)", "eval"
            )
        if not isinstance(value["path"], str):
            raise ConfigError(
                f"{key}.path={value['path']!r} is not accepted: give a folder, a file, or the id of a dataset on the "
                "hub (owner/name); a number in quotes",
                "eval",
            )
        return value | {"path": locate(value["path"])}
    if isinstance(value, list):
        return [find_documents(key, one) for one in value]
    return locate(value) if isinstance(value, str) else value
