"""The errors that a user can mend. Their messages name the key or file, the value, what is accepted."""


class PoseError(Exception):
    """Base of the errors below; the command line prints the message alone, without a traceback."""


class ConfigError(PoseError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(PoseError):
    """A documents file that cannot be read or used."""


class CheckpointError(PoseError):
    """A model folder or hub id that cannot be loaded."""


class GuardError(PoseError):
    """A run that would train, and be silently wrong."""
