"""What was expensive to find is remembered: digests of large files, commits of the hub, outcomes of evaluations."""

import hashlib
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from pose.errors import DataError

BYTES_TO_REMEMBER = 64 << 20  # smaller files are hashed at every start
DAMAGE = (OSError, ValueError, KeyError, TypeError)


class Memo:
    """Small answers that were expensive to find, a JSON file each; one that cannot be read or written is none.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, key) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"

    def get(self, key):
        """The value that was set for a key, plain JSON; None where there is none."""
        try:
            entry = json.loads(self._path(key).read_text())
            return entry["value"] if entry["key"] == key else None
        except DAMAGE:
            return None

    def set(self, key, value):
        """Keeps a value, plain JSON, in one step."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as file:
                json.dump({"key": key, "value": value}, file)
            os.replace(file.name, self._path(key))


def digest(path: Path, memo: Memo) -> str:
    """SHA-256 of a file. Of a large one it is remembered, for as long as nothing says that the file has changed.

    Raises:
        DataError: it cannot be read; names it.
    """
    stat = path.stat()
    key = ["digest", str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    large = stat.st_size >= BYTES_TO_REMEMBER
    if large and (known := memo.get(key)) is not None:
        return known
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if large and time.time() - max(stat.st_mtime, stat.st_ctime) > 2:  # a later change has a later time
        memo.set(key, found)
    return found
