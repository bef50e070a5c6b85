"""The errors that a user can mend. Their messages name the key or file, the value, what is accepted."""


class PoseError(Exception):
    """Base of the errors below; the command line prints the message alone, without a traceback.

    A check that serves several groups of the config (`eval` and `watch`, `pose` and a sampler nested in it) writes
    `{group}` where the group's name belongs, and who knows the group says it with `under`.

    Args:
        message: for the reader; `{group}` in it stands for the group.
        group: of the config, such as "eval"; None where the message has no `{group}`.

    Attributes:
        status: of the process that ends with it.
        is_everywhere: whether every process of a job raises the same, so that one has to say it.
    """

    status = 1
    is_everywhere = False

    def __init__(self, message: str = "", group: str | None = None):
        super().__init__(message)
        self.message, self.group = message, group

    def __str__(self) -> str:
        return self.message if self.group is None else self.message.replace("{group}", self.group)

    def under(self, group: str) -> "PoseError":
        """The same error, of another group of the config."""
        self.group = group if self.group is not None else None
        return self


class ConfigError(PoseError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(PoseError):
    """A documents file that cannot be read or used."""


class CheckpointError(PoseError):
    """A model folder or hub id that cannot be loaded."""


class GuardError(PoseError):
    """A run that would train, and be silently wrong."""


class TrainingError(PoseError):
    """A training that cannot go on: its loss is not finite, or memory or disk are full."""


class Interrupted(PoseError):
    """A training that was asked to stop, and has written a checkpoint to go on from."""

    status = 143  # 128 + SIGTERM, as of a process that SIGTERM ends
    is_everywhere = True
