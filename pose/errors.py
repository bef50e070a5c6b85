"""The errors that a user can mend. Their messages name the key or file, the value, what is accepted."""

import re

# What moves a terminal's cursor or turns the reading direction, and what no file can hold: controls but for new lines
# and tabs, bidirectional marks, separators of lines and paragraphs, surrogates (of file names that are not UTF-8).
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


class PoseError(Exception):
    """Base of the errors below; the command line prints the message alone, without a traceback.

    A check that serves several groups of the config (`eval` and `watch`, `pose` and a sampler nested in it) writes
    `{group}` where the group's name belongs, and who knows the group says it with `under`.

    Args:
        message: for the reader; `{group}` in it stands for the group.
        group: of the config, such as "eval"; "" for a command whose keys are in no group; None leaves the message as it
            is.

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
        if self.group is None:
            return self.message
        return self.message.replace("{group}", self.group) if self.group else self.message.replace("{group}.", "")

    def under(self, group: str) -> "PoseError":
        """The same error, of another group of the config."""
        self.group = group
        return self


class ConfigError(PoseError):
    """A setting, or a combination of settings, that cannot work."""


class WindowError(ConfigError):
    """A benchmark that does not fit into the window of a model."""


class DataError(PoseError):
    """A documents file that cannot be read or used."""


class TooShortError(DataError):
    """No document has as many tokens as are needed."""


class CheckpointError(PoseError):
    """A model folder or hub id that cannot be loaded."""


class GuardError(PoseError):
    """A run that would train, and be silently wrong."""


class TrainingError(PoseError):
    """A training that cannot go on: its loss is not finite, or memory or disk are full.

    Args:
        message: for the reader.
        changes: overrides that may help, such as trainer.on_nonfinite=skip; they become part of the command that is
            shown to go on with.
        anew: whether going on cannot help, and the run has to start again in another folder.
    """

    def __init__(self, message: str = "", changes: tuple[str, ...] = (), anew: bool = False):
        super().__init__(message)
        self.changes, self.anew = changes, anew


class Interrupted(PoseError):
    """A training that was asked to stop, and has written a checkpoint to go on from."""

    status = 143  # 128 + SIGTERM, as of a process that SIGTERM ends
    is_everywhere = True


def require_int(
    key: str, value, *, at_least: int, at_most: int | None = None, group: str | None = None, optional=False
):
    """Raises a ConfigError unless value is an int, and no bool, in the given bounds (or None where optional).

    Args:
        key: of the config; may begin with `{group}`.
        value: to check.
        at_least, at_most: bounds, both accepted.
        group: for `{group}`.
        optional: whether None is accepted.
    """
    if value is None and optional:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and value >= at_least and (at_most is None or value <= at_most):
        return
    bounds = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    raise ConfigError(f"{key}={value!r} is not accepted: give an integer {bounds}{', or null' * optional}", group)


def require_number(
    key: str, value, *, at_least=None, above=None, below=None, at_most=None, group: str | None = None, optional=False
):
    """Raises a ConfigError unless value is a finite number in the given bounds (or None where optional).

    Args:
        key: of the config; may begin with `{group}`.
        value: to check.
        at_least: least value that is accepted.
        above, below: values that are just not accepted.
        at_most: largest value that is accepted.
        group: for `{group}`.
        optional: whether None is accepted.
    """
    if value is None and optional:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    in_bounds = number and (at_least is None or value >= at_least) and (above is None or value > above)
    if in_bounds and (below is None or value < below) and (at_most is None or value <= at_most):
        return
    given = {"of at least": at_least, "above": above, "below": below, "of at most": at_most}
    bounds = [f"{text} {bound:g}" for text, bound in given.items() if bound is not None]
    raise ConfigError(
        f"{key}={value!r} is not accepted: give a number {' and '.join(bounds)}{' or null' * optional}", group
    )


def require_choice(key: str, value, choices, *, group: str | None = None):
    """Raises a ConfigError unless value is one of the choices."""
    if value not in choices:
        listed = (" or " if len(choices) == 2 else ", ").join(map(str, choices))
        raise ConfigError(f"{key}={value!r} is unknown: choose {listed}", group)


def printable(text: str) -> str:
    """A text without what is not printed; its lines stay."""
    return _CONTROLS.sub("", text)


def one_line(text: object) -> str:
    """A text without what is not printed, in one line."""
    return " ".join(printable(" ".join(str(text).split())).split())


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
