"""Messages as a person reads them: Hydra's log file has the same, with time and level (conf/hydra/job_logging)."""

import logging
import os
import sys
from typing import TextIO

from tqdm import tqdm

from pose.errors import printable


class ConsoleHandler(logging.Handler):
    """Writes to the terminal without tearing progress bars: errors to stderr, everything else to stdout."""

    def emit(self, record: logging.LogRecord):
        """Writes one message."""
        try:
            stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except BrokenPipeError:  # `command | head`: nobody reads on, and what is at work goes on
            _discard(stream)
        except Exception:
            self.handleError(record)


def _discard(stream: TextIO):
    """Nothing that is written to a stream from now on goes anywhere; its end is no error either."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class FileFormatter(logging.Formatter):
    """Messages without control characters, which names of files and documents may bring."""

    def format(self, record: logging.LogRecord) -> str:
        """The line or lines of one message."""
        return printable(super().format(record))


class ConsoleFormatter(FileFormatter):
    """The message alone; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line or lines of one message."""
        prefix = "Warning: " if record.levelno == logging.WARNING else ""
        return prefix + super().format(record)


def log_to_terminal():
    """For commands without Hydra: the messages of `pose` go to the terminal."""
    logger = logging.getLogger("pose")
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        handler = ConsoleHandler()
        handler.setFormatter(ConsoleFormatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
