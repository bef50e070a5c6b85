"""What the commands without Hydra share. Nothing heavy is imported before their arguments stand."""

import argparse
import contextlib
from collections.abc import Iterator

from pose.app.console import log_to_terminal


def path(text: str) -> str:
    """The argparse type of paths.

    Raises:
        argparse.ArgumentTypeError: it is blank; it would be the folder that one stands in.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty (is a shell variable in it not set?)")
    return text


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Around the work of a command: its messages go to the terminal, errors that a user can mend are one line."""
    log_to_terminal()
    from pose.app.runtime import quiet_libraries, readable_errors

    quiet_libraries()
    with readable_errors():
        yield
