"""Documents as files hold them: JSON lines, Parquet, plain text; plain or compressed, one file or many."""

import codecs
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pose.errors import ConfigError, DataError

KINDS = (".jsonl", ".txt", ".parquet")
PACKED = (".gz", ".zst")  # of .jsonl and .txt; Parquet packs its columns itself
ACCEPTED = ".jsonl or .txt, each also as .gz or .zst, or .parquet"
ON_BROKEN = ("error", "skip")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
PARQUET_BATCH_BYTES = 8 << 20  # of text in memory at a time, at least one row


class Document(NamedTuple):
    """One document.

    Attributes:
        id: its `id` field, or where it stands: FILE:LINE, FILE:ROW, FILE.
        text: the whole text; empty where the field holds "" or null.
    """

    id: str
    text: str


class Broken:
    """What is done about a place that cannot be read: an error, or one more in a count.

    Args:
        on_broken: "error" or "skip".

    Attributes:
        count: places that were skipped.
        first: the messages of the first few.

    Raises:
        ConfigError: on_broken is neither.
    """

    def __init__(self, on_broken: str = "error"):
        if on_broken not in ON_BROKEN:
            raise ConfigError(f"data.on_broken={on_broken!r} is unknown: choose {' or '.join(ON_BROKEN)}")
        self.on_broken, self.count, self.first = on_broken, 0, []

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
        """Counts the first ones alone: what came after them was read ahead, and is not used."""
        self.count, self.first = count, self.first[:count]


class Files:
    """The documents of files, in order.

    Args:
        paths: files, each of a kind in KINDS.
        name: what they are called on screen.
        text_field: the key or column that holds the text.

    Attributes:
        size: bytes of all files, packed as they are.
    """

    def __init__(self, paths: Sequence[Path], name: str, text_field: str = "text"):
        self.paths, self.name, self.text_field = list(paths), name, text_field
        self._sizes = [path.stat().st_size for path in self.paths]
        self.size = sum(self._sizes)
        self._before, self._tell = 0, lambda: 0

    @property
    def position(self) -> int:
        """Bytes of `size` that are read."""
        return self._before + self._tell()

    def read(self, broken: Broken) -> Iterator[Document]:
        """Every document, those without text included.

        Args:
            broken: what is done about lines, rows and tails of archives that cannot be read.

        Raises:
            DataError: as `broken` says, and for a Parquet file without the column; names file and line.
        """
        for path, size in zip(self.paths, self._sizes, strict=True):
            try:
                file = open(path, "rb")  # noqa: SIM115
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error}") from error
            with file:
                self._tell = file.tell
                try:
                    yield from READERS[_kind(path)](path, file, self.text_field, broken)
                finally:
                    self._before, self._tell = self._before + size, lambda: 0


def find_files(pattern: str | Path) -> list[Path]:
    """The files of a file, a folder or a glob, sorted.

    Args:
        pattern: a file; a folder, of which every file of a kind that is read here is taken, at any depth,
            but hidden ones; or a glob, ** included.

    Raises:
        DataError: nothing is there, or a file is of another kind.
    """
    path = Path(pattern)
    if path.is_dir():
        found, seen = [], set()
        for folder, folders, names in os.walk(path, followlinks=True):
            place = os.path.realpath(folder)
            folders[:] = [] if place in seen else [name for name in folders if not name.startswith(".")]
            seen.add(place)
            found += [Path(folder, name) for name in names if _kind(Path(name)) and not name.startswith(".")]
        found = sorted(file for file in found if file.is_file())
        if not found:
            raise DataError(f"the folder {path} holds no file that is read here: {ACCEPTED}")
        return found
    found = [path] if path.is_file() else []
    if not found and glob.has_magic(str(pattern)):
        found = sorted(file for file in map(Path, glob.glob(str(pattern), recursive=True)) if file.is_file())
        if not found:
            raise DataError(f"no file matches {pattern}")
    if not found:
        raise DataError(f"no documents file at {path}: give a file ({ACCEPTED}), a folder or a glob of them")
    for file in found:
        if _kind(file) is None:
            raise DataError(f"{file} is not a file that is read here: {ACCEPTED}")
    return found


def read_documents(path: str | Path, text_field: str = "text") -> Iterator[Document]:
    """Reads a file, a folder or a glob; see `find_files`.

    A .jsonl file has one JSON object a line, and blank lines are passed over; a .txt file is one
    document; a .parquet file has one a row.

    Args:
        path: the file, folder or glob.
        text_field: the key or column that holds the text.

    Raises:
        DataError: it is missing, of another kind, or broken; names file and line.
    """
    yield from Files(find_files(path), str(path), text_field).read(Broken())


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
        return broken.found(
            f"{where}: no text under {text_field!r}; it has the fields {sorted(record)} "
            "(choose one with data.text_field, or eval.text_field)"
        )
    if not text.isascii() and (half := HALF_CHARACTER.search(text)):
        return broken.found(
            f"{where}: the text has half a character ({half[0]!r} at {half.start()}), which no encoding allows"
        )
    own = record.get("id")
    return Document(place if own is None else str(own).encode(errors="replace").decode(), text)


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        suffix = suffixes[0] if len(suffixes) == 2 else ""
        return suffix if suffix in (".jsonl", ".txt") else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def _unpack(path: Path, file: BinaryIO) -> BinaryIO:
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


def _read_jsonl(path: Path, file: BinaryIO, text_field: str, broken: Broken) -> Iterator[Document]:
    number = 0
    try:
        for number, line in enumerate(_unpack(path, file), 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line and not line.isspace():
                document = _parse(line, path, number, text_field, broken)
                del line  # a long one is not held while its text is worked on
                if document is not None:
                    yield document
    except Exception as error:
        if not _is_damage(error):
            raise
        broken.found(f"{path} cannot be read past line {number}: {error}", error)


def _is_damage(error: Exception) -> bool:
    """Whether an error is of the file or its archive."""
    return isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ == "ZstdError"


def _parse(line: bytes, path: Path, number: int, text_field: str, broken: Broken) -> Document | None:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        return broken.found(f"{where}: not valid JSON ({error})", error)
    if not isinstance(record, dict):
        return broken.found(f"{where}: a {type(record).__name__} where a JSON object was expected")
    return document_of(record, text_field, where, f"{path.name}:{number}", broken)


def _read_txt(path: Path, file: BinaryIO, text_field: str, broken: Broken) -> Iterator[Document]:
    try:
        text = _unpack(path, file).read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        broken.found(f"{path}, line {number}: not UTF-8 ({error.reason})", error)
    except Exception as error:
        if not _is_damage(error):
            raise
        broken.found(f"{path} cannot be read: {error}", error)
    else:
        yield Document(path.name, text)


def _read_parquet(path: Path, file: BinaryIO, text_field: str, broken: Broken) -> Iterator[Document]:
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
                "(choose one with data.text_field, or eval.text_field)"
            )
        columns = [name for name in (text_field, "id") if name in names]
        for batch in parquet.iter_batches(_rows_at_once(parquet, text_field), columns=columns, use_threads=False):
            for row in range(batch.num_rows):
                number += 1
                where = f"{path}, row {number}"
                try:
                    record = {name: batch.column(name)[row].as_py() for name in columns}
                except UnicodeDecodeError as error:
                    broken.found(f"{where}: not UTF-8 ({error.reason})", error)
                    continue
                document = document_of(record, text_field, where, f"{path.name}:{number}", broken)
                if document is not None:
                    yield document
    except (OSError, pyarrow.ArrowException) as error:
        broken.found(f"{path} cannot be read past row {number}: {error}", error)


def _is_text(kind, types) -> bool:
    if types.is_dictionary(kind):
        return _is_text(kind.value_type, types)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _rows_at_once(parquet, text_field: str) -> int:
    """Rows that hold about PARQUET_BATCH_BYTES of text, by the row group whose rows are longest."""
    longest = 1
    for i in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(i)
        columns = (group.column(c) for c in range(group.num_columns))
        size = next(column.total_uncompressed_size for column in columns if column.path_in_schema == text_field)
        longest = max(longest, size // max(group.num_rows, 1))
    return min(max(PARQUET_BATCH_BYTES // longest, 1), 4096)


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
