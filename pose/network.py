"""Failures of a network: which may pass, and how long to wait for it."""

import gzip

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

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


def first_line(error: BaseException) -> str:
    """Of its message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
