"""The one place of file operations: shipped files, files and folders that are whole or not there, digests, JSON."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pose.errors import DataError, PoseError

PACKAGE = Path(__file__).resolve().parent
REPOSITORY = PACKAGE.parent
# The configs: in the package where it is installed, beside it in the repository.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else REPOSITORY / "conf"

BYTES_TO_REMEMBER = 64 << 20  # smaller files are hashed at every start
DAMAGE = (OSError, ValueError, KeyError, TypeError)  # what reading a damaged file of our own can raise


def locate(path: str) -> str:
    """A path as given, or inside the repository when it is found only there (shipped files).

    Hub ids, and paths that are nowhere, come back unchanged for their reader to judge.
    """
    path = os.path.expanduser(path)
    shipped = REPOSITORY / path
    return str(shipped) if not os.path.exists(path) and shipped.exists() else path


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is a folder, or lies in it; links and `..` are resolved first."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def same_path(a: str | Path, b: str | Path) -> bool:
    """Whether two paths, however they are spelt, are one place."""
    return Path(a).resolve() == Path(b).resolve()


def short_name(folder: str | Path) -> str:
    """The end of a folder's path: with what it lies in where that is a date, and it a time."""
    parts = Path(folder).resolve().parts
    return "/".join(parts[-2:]) if parts[-1].replace("-", "").isdigit() else parts[-1]


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w", **options) -> Iterator[IO]:
    """Opens a file that appears under its name in one step, when the block ends without an error.

    A killed process leaves the old file, or none; what it had written is a hidden file beside it.

    Args:
        path: of the file; its folder must exist.
        mode: "w" or "wb".
        options: of `open`; text is UTF-8 unless they say otherwise.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    if "b" not in mode:
        options = {"encoding": "utf-8"} | options
    try:
        with open(partial, mode, **options) as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: str | Path, replace: bool = False) -> Iterator[Path]:
    """Gives a new empty folder, which gets its name in one rename, when the block ends without an error.

    Args:
        folder: must not exist, unless `replace`; its parents are made.
        replace: whether a folder of that name is taken away first, and put back where the rename fails.

    Raises:
        FileExistsError: the folder is there, and `replace` is not given.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        if replace:
            replace_folder(partial, folder)
        elif folder.exists():
            raise FileExistsError(f"{folder} exists")
        else:
            try:
                partial.rename(folder)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                    raise FileExistsError(f"{folder} exists") from error
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, folder: Path):
    """Renames a folder, in place of one that may be there: a failure leaves the old one."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        with suppress(FileNotFoundError):
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path):
    """Takes a folder's name from it before its files: a half-removed one does not look like a whole one.

    Of a link the link goes, and nothing that it leads to; a file of that name goes, too.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        doomed = folder.with_name(f".{folder.name.lstrip('.')}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def write_json(path: str | Path, content: Any):
    """Writes a JSON file in one step, so that a killed run leaves the old one or the new one.

    NaN and infinity, which JSON does not have (RFC 8259), are written as null.
    """
    with atomic_file(path) as file:
        file.write(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file's object; {} where there is none, or nothing that can be read: for what is only a memory."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def load_json(path: str | Path, error: type[PoseError] = DataError, required: dict[str, type | tuple] | None = None):
    """A JSON object of a file that somebody else may have written or damaged.

    Args:
        path: of the file.
        error: raised where it is not as it must be.
        required: keys that must be there, with the type of each value (of `isinstance`; a bool is no int).

    Returns:
        The object, a dict.

    Raises:
        PoseError: `error`; names the file, the key, and what is expected.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid JSON: {cause}") from cause
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__} where a JSON object is expected")
    for key, kind in (required or {}).items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        value = content.get(key)
        if key not in content or not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("null" if each is type(None) else each.__name__ for each in kinds)
            found = f"{value!r}"[:60] if key in content else "nothing"
            raise error(f"{path} has {found} under {key!r}, where {names} is expected")
    return content


class Memo:
    """Small answers that were expensive to find, a JSON file each; one that cannot be read or written is none.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def _path(self, key: Any) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"

    def get(self, key: Any) -> Any:
        """The value that was set for a key, plain JSON; None where there is none."""
        try:
            entry = json.loads(self._path(key).read_text())
            return entry["value"] if entry["key"] == key else None
        except (*DAMAGE, RecursionError):
            return None

    def is_there(self, key: Any) -> bool:
        """Whether a value was set for a key: where `get` has none then, its file is damaged."""
        return self._path(key).exists()

    def set(self, key: Any, value: Any):
        """Keeps a value, plain JSON, in one step."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._path(key)) as file:
                json.dump({"key": key, "value": value}, file)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: str | Path, memo: Memo) -> str:
    """SHA-256 of a file. Of a large one it is remembered, for as long as nothing says that the file has changed.

    Raises:
        DataError: it cannot be read; names it.
    """
    path = Path(path)
    try:
        stat = path.stat()
        if (known := remembered_digest(path, stat, memo)) is not None:
            return known
        found = sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    # A later change has a later time
    if stat.st_size >= BYTES_TO_REMEMBER and time.time() - max(stat.st_mtime, stat.st_ctime) > 2:
        memo.set(_digest_key(path, stat), found)
    return found


def remembered_digest(path: Path, stat: os.stat_result, memo: Memo) -> str | None:
    """What `digest` gives without reading the file; None where it has to read it."""
    return memo.get(_digest_key(path, stat)) if stat.st_size >= BYTES_TO_REMEMBER else None


def _digest_key(path: Path, stat: os.stat_result) -> list:
    return ["digest", str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
