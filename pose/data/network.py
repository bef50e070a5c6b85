"""Failures of a network: which are temporary, and how long to wait before the next attempt."""

import gzip
import logging
import time
from collections.abc import Callable

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pose.errors import first_line

log = logging.getLogger(__name__)

RETRIES = 5  # in a row
FIRST_WAIT = 1.0  # seconds; doubles with each


def may_pass(error: BaseException, local: bool = False) -> bool:
    """Whether the same request may succeed a little later.

    Args:
        error: as a library raised it; what caused it counts too.
        local: the files are local: an OSError is not of the network.
    """
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return status is None or status in (408, 425, 429) or status >= 500
    if isinstance(error, LocalEntryNotFoundError):  # the hub could not be asked, and the cache has no such file
        return True
    if isinstance(error, FileNotFoundError | PermissionError | gzip.BadGzipFile):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    networking = type(error).__module__.startswith(("httpx", "httpcore", "aiohttp", "requests", "urllib3"))
    return networking or (isinstance(error, OSError) and not local)


def wait_for_network(what: str, error: BaseException, attempt: int, sleep: Callable[[float], None] = time.sleep):
    """Says what failed and waits before the next attempt.

    Args:
        what: was under way.
        error: that may pass.
        attempt: the next one, from 1 to RETRIES.
        sleep: waits so many seconds.
    """
    wait = FIRST_WAIT * 2 ** (attempt - 1)
    log.warning(
        f"{what} failed ({first_line(error)}): attempt {attempt} of {RETRIES} to go on from there, in {wait:g} s"
    )
    sleep(wait)
