"""Documents as files hold them: JSON lines, Parquet, plain text; plain or compressed, one file or many."""

import codecs
import errno
import glob
import gzip
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from pose.errors import ConfigError, DataError, require_choice, require_int
from pose.files import REPOSITORY, Memo, digest, is_inside

log = logging.getLogger(__name__)

KINDS = (".jsonl", ".txt", ".parquet")
PACKED = (".gz", ".zst")  # of .jsonl and .txt; Parquet packs its columns itself
ACCEPTED = ".jsonl or .txt, each also as .gz or .zst, or .parquet"
ON_BROKEN = ("error", "skip")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
MAX_DOCUMENT_CHARS = 200_000_000  # about a hundred long novels
BLOCK = 1 << 20  # bytes of a line or text file that are read at a time
CONTINUATION = bytes(range(0x80, 0xC0))  # the bytes of UTF-8 that begin no character
SHIPPED = REPOSITORY / "assets" / "corpora"  # their text is under "text", whatever text_field says


class Document(NamedTuple):
    """One document.

    Attributes:
        id: its `id` field, or where it stands: FILE:LINE, FILE:ROW, FILE.
        text: the whole text; empty where the field holds "" or null.
    """

    id: str
    text: str


class Keys(NamedTuple):
    """The keys of the config that say which documents are read and how: errors name them.

    Those of `data` are the default. Each may begin with `{group}` (`PoseError`).

    Attributes:
        documents: which are read.
        text_field: where their text is; None where the documents alone say it.
        min_tokens: how long they have to be.
        max_document_chars: how long they may be; None where no key says it.
        takes_field: whether the value of `documents` may be {path, text_field}.
    """

    documents: str = "data.documents"
    text_field: str | None = "data.text_field"
    min_tokens: str = "data.min_tokens"
    max_document_chars: str | None = "data.max_document_chars"
    takes_field: bool = True

    @classmethod
    def of_paths(cls, documents: str, takes_field: bool = False) -> "Keys":
        """Of a key or an argument that takes paths, and beside which no other says how they are read."""
        return cls(documents, text_field=None, max_document_chars=None, takes_field=takes_field)

    def choose_field(self) -> str:
        """What to do where the text is under another field."""
        keys = [self.text_field] if self.text_field is not None else []
        keys += [f"'{self.documents}={{path: FILE, text_field: FIELD}}'"] if self.takes_field else []
        return f"choose one with {', or '.join(keys)}" if keys else "give text under that name"


OF_DATA = Keys()


class Broken:
    """How a place that cannot be read, or is too long, is handled: as an error, or skipped and counted.

    Args:
        on_broken: "error" or "skip".
        max_document_chars: the most characters that the text of a document may have.
        keys: for errors.

    Attributes:
        count: places that were skipped.
        first: the messages of the first few.

    Raises:
        ConfigError: a value that cannot be meant.
    """

    def __init__(self, on_broken: str = "error", max_document_chars: int = MAX_DOCUMENT_CHARS, keys: Keys = OF_DATA):
        require_choice("data.on_broken", on_broken, ON_BROKEN)
        require_int("data.max_document_chars", max_document_chars, at_least=1)
        self.on_broken, self.max_document_chars, self.keys = on_broken, max_document_chars, keys
        self.count = 0
        self.first: list[str] = []

    def too_long(self, where: str):
        """As `found`, for a document of more than max_document_chars characters."""
        key = self.keys.max_document_chars
        self.found(
            f"{where}: the document has more than {self.max_document_chars:,} characters: split it"
            + (f", or allow more with {key}" if key else "")
        )

    def found(self, message: str, cause: Exception | None = None):
        """Raises a DataError, or counts.

        Args:
            message: names file and line.
            cause: the error that was caught.
        """
        if self.on_broken == "error":
            raise DataError(message) from cause
        self.count += 1
        if len(self.first) < 5:
            self.first.append(message)

    def forget_after(self, count: int):
        """Keeps the first `count` broken places: those after them were read ahead, and are not used."""
        self.count, self.first = count, self.first[:count]


class FileState(NamedTuple):
    """A file as it was when it was digested: equal states are the same bytes.

    Attributes:
        path: as it is opened.
        name: which of its documents' ids and its place in a set depend on.
        digest: SHA-256 of its content.
        stamp: what a file system changes with any change of it.
    """

    path: str
    name: str
    digest: str
    stamp: tuple[int, ...]


def state_of(path: Path, name: str, memo: Memo) -> FileState:
    """The state of a file, behind links.

    Args:
        path: of the file.
        name: see `FileState`.
        memo: of the digests of large files.

    Raises:
        DataError: it cannot be read; names it.
    """
    try:
        stamp = _stamp(path.stat())
    except OSError as error:
        raise unreadable(error) from error
    return FileState(str(path), name, digest(path, memo), stamp)


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def changed(paths: Iterable[str]) -> DataError:
    """The error for files that have changed since they were digested."""
    return DataError(
        f"{', '.join(sorted(set(paths))[:3])} changed while it was read: start again when nothing writes to it any more"
    )


def unreadable(error: OSError) -> DataError:
    """The error for a file or folder that the system does not let this user read; names it."""
    return DataError(
        f"{error.filename} cannot be read ({error.strerror}): give this user the right to read it, or name documents "
        "that are without it"
    )


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, in whatever form a library reports it: that is never a fault of the documents."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if type(error).__name__ == "ZstdError" and "memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class Files:
    """The documents of files, in order.

    Args:
        paths: files, each of a kind in KINDS.
        name: what they are called on screen.
        text_field: the key or column that holds the text.

    Attributes:
        size: bytes of all files, packed as they are.
        what: plain JSON that tells how the files are read.

    Raises:
        DataError: a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path], name: str, text_field: str = "text"):
        self.paths, self.name, self.text_field = list(paths), name, text_field
        self.what = ["files", text_field]
        try:
            self._sizes = [path.stat().st_size for path in self.paths]
        except OSError as error:
            raise unreadable(error) from error
        self.size = sum(self._sizes)
        self._before, self._tell = 0, lambda: 0
        self._stamps: dict[Path, tuple[int, ...]] = {}

    @property
    def position(self) -> int:
        """Bytes of `size` that are read."""
        return self._before + self._tell()

    def state(self, memo: Memo) -> list[FileState]:
        """The state of each file; `read` then reads these files and no others.

        Raises:
            DataError: a file cannot be read.
        """
        states = [state_of(path, path.name, memo) for path in self.paths]
        self._stamps = {path: state.stamp for path, state in zip(self.paths, states, strict=True)}
        return states

    def read(self, broken: Broken) -> Iterator[Document]:
        """Every document, those without text included.

        Args:
            broken: what is done about lines, rows and tails of archives that cannot be read.

        Raises:
            DataError: as `broken` says, for a Parquet file without the column, and for a file that is another than
                `state` has found; names file and line.
        """
        for path, size in zip(self.paths, self._sizes, strict=True):
            try:
                file = open(path, "rb")  # noqa: SIM115
            except OSError as error:
                raise unreadable(error) from error
            with file:
                stamp = _stamp(os.fstat(file.fileno()))
                if self._stamps.get(path, stamp) != stamp:
                    raise changed([str(path)])
                self._tell = file.tell
                try:
                    yield from READERS[str(_kind(path))](path, file, self.text_field, broken)
                finally:
                    self._before, self._tell = self._before + size, lambda: 0


def open_files(
    spec: Any, text_field: str = "text", key: str = OF_DATA.documents, folders: bool = False
) -> Files | None:
    """The files that an entry of `documents` names; None for one that names something else, such as a dataset.

    Args:
        spec: a file, folder or glob; or a mapping of `path`, a file or glob, and `text_field`, its own.
        text_field: the key of the text, for files that do not name their own. The shipped ones have theirs.
        key: of the config, for errors.
        folders: whether `path` of a mapping may be a folder of files; otherwise a folder there is a dataset.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    if isinstance(spec, Mapping):
        given = {key: value for key, value in spec.items() if value is not None}
        path = given.get("path")
        if not isinstance(path, str | Path) or not given.keys() <= {"path", "text_field"}:
            return None
        is_folder = folders and Path(path).is_dir()
        if _kind(Path(path)) is None and not glob.has_magic(str(path)) and not is_folder:
            return None
        own = given.get("text_field")
    elif isinstance(spec, str | Path):
        path, own = spec, None
    else:
        return None
    field = own or ("text" if is_inside(path, SHIPPED) else text_field)
    return Files(find_files(path, key), Path(path).name or str(path), field)


def find_files(pattern: str | Path, key: str = OF_DATA.documents) -> list[Path]:
    """The files of a file, a folder or a glob, sorted.

    Args:
        pattern: a file; a folder, of which every file of a kind that is read here is taken, at any depth,
            but hidden ones; or a glob, ** included, of files and such folders.
        key: of the config, for errors.

    Raises:
        DataError: nothing is there, something cannot be read, or a file is of another kind.
    """
    path = Path(pattern)
    if not str(pattern).strip():
        raise DataError(f"{key}={str(pattern)!r} is empty: give a file ({ACCEPTED}), a folder or a glob of them")
    try:
        if path.is_dir():
            found = _files_of(path, key)
            if not found:
                raise DataError(f"{key}: the folder {path} holds no file that is read here: {ACCEPTED}")
            return found
        found = [path] if path.is_file() else []
        if not found and glob.has_magic(str(pattern)):
            _check_folders(path)
            matched = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
            inside = {file for folder in matched if folder.is_dir() for file in _files_of(folder, key)}
            found = sorted(inside.union(file for file in matched if _is_there(file)))
            if not found:
                raise DataError(f"{key}: no file matches {pattern}")
    except OSError as error:
        raise unreadable(error) from error
    if not found:
        raise DataError(f"{key}: no documents file at {path}: give a file ({ACCEPTED}), a folder or a glob of them")
    for file in found:
        if _kind(file) is None:
            raise DataError(f"{key}: {file} is not a file that is read here: {ACCEPTED}")
    return found


def _files_of(folder: Path, key: str) -> list[Path]:
    """Every file of a kind that is read here, at any depth, but hidden ones; warns of others beside them."""
    files = [file for file in files_in(folder, lambda name: name.startswith(".")) if _is_there(file)]
    found = [file for file in files if _kind(file)]
    others = [file for file in files if not _kind(file) and not file.name.lower().startswith(("readme", "license"))]
    if found and others:
        count = Counter(file.suffix or file.name for file in others)
        endings = ", ".join(f"{num} {ending}" for ending, num in count.most_common(5)) + ", ..." * (len(count) > 5)
        _warn_of_others(key, str(folder), endings)
    return found


@cache  # once a process: a folder is opened several times
def _warn_of_others(key: str, folder: str, endings: str):
    log.warning(f"{key}: {folder} has files of other kinds, which are left out ({endings}): {ACCEPTED} are read")


def files_in(folder: Path, leave_out: Callable[[str], bool]) -> list[Path]:
    """All files in a folder, at any depth and behind links, sorted.

    Args:
        folder: to look through.
        leave_out: says of a file's or folder's name that it does not count.

    Raises:
        OSError: a folder in it cannot be read.
    """

    def fail(error: OSError):
        raise error

    found = []
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        above = [parent for parent in Path(place).parents if parent.is_relative_to(folder)]
        if any(os.path.samefile(place, parent) for parent in above):  # a link to a folder above it
            folders.clear()
            continue
        folders[:] = [name for name in folders if not leave_out(name)]
        found += [Path(place, name) for name in names if not leave_out(name)]
    return sorted(found)


def _check_folders(pattern: Path):
    """Raises OSError where a folder that a glob looks into cannot be read: `glob` skips it silently."""
    for end in range(1, len(pattern.parts)):
        for folder in glob.glob(os.path.join(*pattern.parts[:end], ""), recursive=True):
            os.scandir(folder).close()


def _is_there(file: Path) -> bool:
    """Whether it is a file; a dangling link with the name of one is an error."""
    if file.is_symlink() and not file.exists() and _kind(file):
        raise DataError(f"{file} is a link to {os.readlink(file)}, and nothing is there: mend it, or take it away")
    return file.is_file()


def read_documents(documents: Any, text_field: str = "text", keys: Keys = OF_DATA) -> Iterator[Document]:
    """Reads files.

    A .jsonl file has one JSON object a line, and blank lines are passed over; a .txt file is one
    document; a .parquet file has one a row.

    Args:
        documents: a file, folder or glob, or one with a field of its own (`open_files`); or a list of these.
        text_field: the key or column that holds the text, for files that do not name their own.
        keys: for errors.

    Raises:
        ConfigError: it is nothing of the kind.
        DataError: it is missing, of another kind, or broken; names file and line.
    """
    for spec in documents if isinstance(documents, list | tuple) else [documents]:
        files = open_files(spec, text_field, keys.documents, folders=True)
        if files is None:
            raise ConfigError(
                f"{keys.documents}: {spec!r} names no file to read: give a file ({ACCEPTED}), a folder or a glob"
            )
        yield from files.read(Broken(keys=keys))


def document_of(record: dict, text_field: str, where: str, place: str, broken: Broken) -> Document | None:
    """A row of a file or dataset as a document; None for a broken one that is skipped.

    Args:
        record: the row.
        text_field: the key of the text; null counts as no text.
        where: the row stands, for errors.
        place: the id of a row without an `id`.
        broken: what is done about a broken one.
    """
    text = record.get(text_field)
    if text is None and text_field in record:
        text = ""
    if not isinstance(text, str):
        kind = f" but a value of type {type(text).__name__}" if text_field in record else ""
        return broken.found(
            f"{where}: no text under {text_field!r}{kind}; it has the fields {sorted(map(str, record))} "
            f"({broken.keys.choose_field()})"
        )
    if len(text) > broken.max_document_chars:
        return broken.too_long(where)
    if not text.isascii() and (half := HALF_CHARACTER.search(text)):
        return broken.found(
            f"{where}: the text has half a character ({half[0]!r} at {half.start()}), which no encoding allows"
        )
    own = record.get("id")
    return Document(_printable(place if own is None else str(own)), text)


def _printable(name: str) -> str:
    """An id without what UTF-8 cannot encode, as the name of a file may have it."""
    return name.encode(errors="replace").decode()


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        suffix = suffixes[0] if len(suffixes) == 2 else ""
        return suffix if suffix in (".jsonl", ".txt") else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def _unpack(path: Path, file: BufferedIOBase) -> BufferedIOBase:
    if path.suffix.lower() == ".gz":
        return gzip.open(file)
    if path.suffix.lower() == ".zst":
        zstd = _zstd(path)
        return zstd.open(file, options={zstd.DecompressionParameter.window_log_max: 31})
    return file


def _zstd(path: Path):
    try:
        from backports import zstd
    except ImportError as error:
        raise ConfigError(f"{path} needs the package backports.zstd: pip install backports.zstd") from error
    return zstd


def _read_jsonl(path: Path, file: BufferedIOBase, text_field: str, broken: Broken) -> Iterator[Document]:
    number = 0
    # A line may have other fields too, and escapes of two characters for one: a longer line is not read into memory.
    most = 2 * broken.max_document_chars + BLOCK
    try:
        for number, line in enumerate(_lines(_unpack(path, file), most), 1):
            if line is None:
                broken.too_long(f"{path}, line {number}")
                continue
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line and not line.isspace():
                document = _parse(line, path, number, text_field, broken)
                del line  # so that a long line is freed while its text is used
                if document is not None:
                    yield document
    except Exception as error:
        if not _is_damage(error):
            raise
        broken.found(f"{path} cannot be read past line {number}: {error}", error)


def _lines(file: BufferedIOBase, most: int) -> Iterator[bytes | bytearray | None]:
    """The lines of a file; None for one of more than `most` characters."""
    while block := file.readline(BLOCK):
        if len(block) < min(BLOCK, most):
            yield block
        else:
            blocks = _to_the_end(block, file)
            yield _join(blocks, most)
            for _ in blocks:  # the rest of a line that is too long is passed over
                pass


def _to_the_end(block: bytes, file: BufferedIOBase) -> Iterator[bytes]:
    """The line that begins with a block, in blocks."""
    yield block
    while not block.endswith(b"\n") and (block := file.readline(BLOCK)):
        yield block


def _join(blocks: Iterable[bytes], most: int) -> bytearray | None:
    """Blocks of UTF-8 in one; None, without reading further, once they have more than `most` characters."""
    content, num = bytearray(), 0
    for block in blocks:
        content += block
        num += len(block.translate(None, CONTINUATION))
        if num > most:
            return None
    return content


def _is_damage(error: Exception) -> bool:
    """Whether an error is of the file or its archive."""
    is_of_file = isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ == "ZstdError"
    return is_of_file and not out_of_memory(error)


def _parse(line: bytes | bytearray, path: Path, number: int, text_field: str, broken: Broken) -> Document | None:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        return broken.found(f"{where}: not valid JSON ({error})", error)
    if not isinstance(record, dict):
        return broken.found(f"{where}: a {type(record).__name__} where a JSON object was expected")
    return document_of(record, text_field, where, f"{path.name}:{number}", broken)


def _read_txt(path: Path, file: BufferedIOBase, text_field: str, broken: Broken) -> Iterator[Document]:
    try:
        unpacked = _unpack(path, file)
        content = _join(iter(lambda: unpacked.read(BLOCK), b""), broken.max_document_chars)
        text = None if content is None else content.decode("utf-8-sig")
        del content
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        broken.found(f"{path}, line {number}: not UTF-8 ({error.reason})", error)
    except Exception as error:
        if not _is_damage(error):
            raise
        broken.found(f"{path} cannot be read: {error}", error)
    else:
        if text is None:
            return broken.too_long(str(path))
        yield Document(_printable(path.name), text)


def _read_parquet(path: Path, file: BufferedIOBase, text_field: str, broken: Broken) -> Iterator[Document]:
    pyarrow = _pyarrow(path)
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        parquet = ParquetFile(file)
        names = parquet.schema_arrow.names
        kind = parquet.schema_arrow.field(text_field).type if names.count(text_field) == 1 else None
        if kind is None or not _is_text(kind, pyarrow.types):
            columns = ", ".join(f"{field.name} ({field.type})" for field in parquet.schema_arrow)
            raise DataError(
                f"{path}: no single column of text named {text_field!r}; it has {columns} "
                f"({broken.keys.choose_field()})"
            )
        wanted = [text_field, *(["id"] if names.count("id") == 1 and text_field != "id" else [])]
        # A row at a time: a value that the file stores once, in a dictionary, may be repeated by every row.
        for batch in parquet.iter_batches(1, columns=wanted, use_threads=False):
            number += 1
            where = f"{path}, row {number}"
            values = {name: batch.column(name)[0] for name in wanted}
            if _num_bytes(values[text_field]) > 4 * broken.max_document_chars:
                broken.too_long(where)
                continue
            try:
                record = {name: value.as_py() for name, value in values.items()}
            except UnicodeDecodeError as error:
                broken.found(f"{where}: not UTF-8 ({error.reason})", error)
                continue
            except (
                ValueError,
                OverflowError,
                LookupError,
            ) as error:  # a time out of range or zone
                broken.found(f"{where}: the id cannot be read ({error})", error)
                continue
            document = document_of(record, text_field, where, f"{path.name}:{number}", broken)
            if document is not None:
                yield document
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:  # UnicodeDecodeError: a column's name
        if out_of_memory(error):
            raise
        broken.found(f"{path} cannot be read past row {number}: {error}", error)


def _num_bytes(value) -> int:
    """Of a pyarrow scalar of text, without making a string of it."""
    buffer = getattr(value, "value", value).as_buffer() if value.is_valid else None
    return 0 if buffer is None else buffer.size


def _is_text(kind, types) -> bool:
    if types.is_dictionary(kind):
        return _is_text(kind.value_type, types)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _pyarrow(path: Path):
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow: pip install pyarrow") from error
    return pyarrow


READERS: dict[str, Callable[..., Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
