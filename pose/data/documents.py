"""Documents as files hold them: JSON lines, plain or gzipped."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pose.errors import DataError


class Document(NamedTuple):
    """One document.

    Attributes:
        id: its `id` field, or FILE:LINE where it has none.
        text: the whole text.
    """

    id: str
    text: str


def read_documents(path: str | Path, text_field: str = "text") -> Iterator[Document]:
    """Reads a .jsonl or .jsonl.gz file, one JSON object a line; blank lines are passed over.

    Args:
        path: the file.
        text_field: the key that holds the text.

    Raises:
        DataError: the file is missing, is not such a file, or a line is broken; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no documents file at {path}: give a .jsonl or .jsonl.gz file")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{path} is not a .jsonl or .jsonl.gz file, which is what is read here")
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(path, number, line, text_field)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read past line {number}: {error}") from error


def _parse(path: Path, number: int, line: bytes, text_field: str) -> Document:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise DataError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__} where a JSON object was expected")
    text = record.get(text_field)
    if not isinstance(text, str):
        raise DataError(
            f"{where}: no text under {text_field!r}; the line has the fields {sorted(record)} "
            "(choose one with data.text_field)"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text has half a character, which no encoding allows ({error})") from error
    return Document(str(record.get("id", f"{path.name}:{number}")), text)
