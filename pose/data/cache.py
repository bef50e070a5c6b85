"""Documents become tokens once: a memory-mapped folder for each set of documents, tokenizer and options."""

import fcntl
import hashlib
import json
import logging
import re
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from pose.data.documents import (
    MAX_DOCUMENT_CHARS,
    OF_DATA,
    Broken,
    Document,
    Files,
    Keys,
    changed,
    open_files,
    out_of_memory,
)
from pose.data.hub import HubDataset, HubSource, say_other_splits
from pose.data.tokenise import Tokeniser, all_cores
from pose.data.tokenizer import beyond_vocabulary, tokenizer_digest
from pose.errors import ConfigError, DataError, TooShortError, first_line, one_line, require_int
from pose.files import Memo, atomic_folder, load_json, remove_folder

log = logging.getLogger(__name__)

# Raise it whenever the same documents and tokenizer would give other files than before.
FORMAT_VERSION = 3
NAME = re.compile(r"^.*?-(?=[0-9a-f]{16}(,|$))")  # of a cache, before its digest
A_DAY = 24 * 3600.0  # seconds
CHECKED_AT_ONCE = 8 << 20  # bytes
DTYPES = ("uint16", "uint32")
# A folder in which a cache was being built, or one that was renamed to be removed.
LEFTOVER = re.compile(r"\.?(.+-[0-9a-f]{16})\.([a-z0-9_]{8}|old|removed)")
# What index.json must have.
COUNTS = ("read", "kept", "tokens", "max_id", "too_short", "min_tokens", "without_text", "broken")
KEYS: dict[str, type | tuple] = {"documents": str, "first_broken": list, "dtype": str}
KEYS |= {"checksums": dict, "checksum": int} | dict.fromkeys(COUNTS, int)

_reported: set[Path] = set()
_checked: set[tuple] = set()


class DamagedCache(DataError):
    """A token cache that is not as it was written; `TokenCache.build` makes it again."""


class TokenCache:
    """The tokens of a set of documents, memory-mapped: opening it takes 8 bytes of memory a document.

    Indexing gives the tokens of one document, uint16 or uint32 [Lx], as a view of the file.

    Args:
        folder: as `build` leaves it.
        check: whether the checksums of the files are compared, once in a process: about 0.4 s per GB.

    Attributes:
        lengths: tokens of each document, int64 [documents].
        ids: of the documents, read as they are asked for.
        info: counts of what was read, kept and dropped, and the dtype.

    Raises:
        DamagedCache: the folder is not as it was written, or is not there.
        DataError: it cannot be read.
    """

    def __init__(self, folder: str | Path, check: bool = True):
        self.folder = Path(folder)
        try:
            self._open_files(check)
        except PermissionError as error:
            raise _closed(error) from error
        except OSError as error:
            raise self._damaged(str(error)) from error
        self._tokens: np.ndarray | None = None

    def _open_files(self, check: bool):
        open(self.folder / "index.json").close()  # no permission to read is no damage
        self.info: dict[str, Any] = load_json(self.folder / "index.json", DamagedCache, KEYS)
        if self.info["checksum"] != _checksum_of_index(self.info):
            raise self._damaged("index.json is not what was written")
        if self.info["dtype"] not in DTYPES:
            raise self._damaged(f"index.json has the dtype {self.info['dtype']!r}, and not {' or '.join(DTYPES)}")
        num, num_tokens = self.info["kept"], self.info["tokens"]
        self.dtype = np.dtype(self.info["dtype"])
        index = np.fromfile(self.folder / "index.bin", np.int64)
        if num < 1 or index.shape != (2 * num,):
            raise self._damaged(f"index.bin does not have the {num} documents of index.json")
        self.ends, id_ends = index.reshape(num, 2).T.copy()
        self.lengths = np.diff(self.ends, prepend=0)
        self.ids = _Ids(self.folder / "ids.bin", id_ends)
        for name, size in (("tokens.bin", num_tokens * self.dtype.itemsize), ("ids.bin", int(id_ends[-1]))):
            if (self.folder / name).stat().st_size != size:
                raise self._damaged(f"{name} does not have the {size} bytes of its index")
        if self.ends[-1] != num_tokens or self.lengths.min() < 1 or np.diff(id_ends).min(initial=0) < 0:
            raise self._damaged("index.bin does not belong to tokens.bin")
        if check:
            self._compare_checksums()

    def _compare_checksums(self):
        files = [self.folder / name for name in ("tokens.bin", "index.bin", "ids.bin")]
        stats = [file.stat() for file in files]
        key = (str(self.folder.resolve()), *((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))
        if key in _checked:
            return
        for file in files:
            if _checksum(file) != self.info["checksums"].get(file.name):
                raise self._damaged(f"{file.name} is not what was written")
        _checked.add(key)

    def _damaged(self, what: str) -> DamagedCache:
        return DamagedCache(f"the token cache {self.folder} is damaged: {what}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        if self._tokens is None:  # opened in the process that reads, so that workers share no handle
            try:
                self._tokens = np.memmap(self.folder / "tokens.bin", self.dtype, "r")
            except PermissionError as error:
                raise _closed(error) from error
            except (OSError, ValueError) as error:
                raise self._damaged(first_line(error)) from error
        end = self.ends[document]
        return self._tokens[end - self.lengths[document] : end]

    def __reduce__(self):
        return type(self), (self.folder, False)  # reading processes do not compare the checksums again

    @property
    def max_id(self) -> int:
        """The largest token id of all documents."""
        return self.info["max_id"]

    def check_vocabulary(self, tokenizer, vocab_size: int, documents: Iterable[int] | None = None):
        """Whether a model has a row of its embedding for every token.

        Args:
            tokenizer: that made the tokens.
            vocab_size: rows of the embedding.
            documents: those that are used, by number; None for all.

        Raises:
            DataError: it has not; names the document, the token, its id, and the rows there are.
        """
        if self.max_id < vocab_size:
            return
        for document in range(len(self)) if documents is None else documents:
            largest = int(self[document].max())
            if largest >= vocab_size:
                raise beyond_vocabulary(tokenizer, largest, vocab_size, f"document {self.ids[document]}")

    @classmethod
    def build(
        cls,
        documents: str | Path | Mapping | Sequence,
        tokenizer,
        cache_dir: str | Path,
        text_field: str = "text",
        *,
        min_tokens: int = 1,
        max_documents: int | None = None,
        on_broken: str = "error",
        max_document_chars: int = MAX_DOCUMENT_CHARS,
        keys: Keys = OF_DATA,
    ) -> "TokenCache":
        """Opens the cache of a set of documents, tokenising them first if there is none yet.

        The key is what the tokens depend on: the files' bytes and names (for a dataset of the hub its
        commit), the tokenizer, every option, and FORMAT_VERSION. The files have to stay as they are until they
        are read. Of several jobs that start at once one tokenises and the others wait for it. The folder appears
        in one rename, so a killed build leaves nothing that looks whole; where the file system has no locks, each
        job builds and one is first. A cache that is there and whole is only read; a damaged one is made again.

        Args:
            documents: a file, folder or glob, or one with its own text field (`open_files`); a dataset as the
                fields of `HubDataset`; or a list of these, read in order; what is named twice counts twice.
            tokenizer: a transformers tokenizer; no special tokens are added.
            cache_dir: the folder that holds all caches.
            text_field: the key of the text, for documents that do not name their own.
            min_tokens: shorter documents are left out.
            max_documents: the first so many of the others are taken, and no more is read; None takes all.
            on_broken: "error" or "skip", for lines and rows that cannot be read, or are too long.
            max_document_chars: the most characters that the text of a document may have.
            keys: of the config that these come from, for errors.

        Raises:
            ConfigError: a value that cannot be meant.
            DataError: documents are missing, broken or changing, or none is left; memory runs out, or cache_dir
                cannot be written.
        """
        require_int("data.min_tokens", min_tokens, at_least=1)
        require_int("data.max_documents", max_documents, at_least=1, optional=True)
        broken = Broken(on_broken, max_document_chars, keys)
        root = Path(cache_dir).expanduser()
        memo = Memo(root / ".memo")
        sources: list = [_open_source(spec, text_field, memo, keys) for spec in _as_list(documents, keys)]
        states = [source.state(memo) for source in sources]
        options = [min_tokens, max_documents, on_broken, max_document_chars]
        folder = root / _key(sources, states, tokenizer, options)
        name = sources[0].name + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")

        def check_unchanged():
            for source, before in zip(sources, states, strict=True):
                if differing := set(before) ^ set(source.state(memo)):
                    raise changed(state.path for state in differing)

        def write(building: Path):
            try:
                _tokenise(name, sources, Tokeniser(tokenizer), broken, min_tokens, max_documents, building)
            except DataError:  # it may be caused by a file that is still being written
                check_unchanged()
                raise
            check_unchanged()

        cache = cls._open(folder)
        if cache is None:
            try:
                (root / ".locks").mkdir(parents=True, exist_ok=True)
                with _lock(root / ".locks" / folder.name, f"{name} is being tokenised by another job") as alone:
                    cache = cls._open(folder, warn=False) or cls._build(folder, write, alone)
            except Exception as error:
                if out_of_memory(error):
                    lower = f", or refuse them with a lower {keys.max_document_chars} (it is {max_document_chars:,})"
                    raise DataError(
                        f"memory ran out while {name} was tokenised ({first_line(error)}): each document has to fit. "
                        "Split long ones" + (lower if keys.max_document_chars else "")
                    ) from error
                if isinstance(error, OSError):
                    raise DataError(
                        f"cache_dir={cache_dir} cannot be written to ({error}): give another folder, or room in this "
                        "one"
                    ) from error
                raise
        _report(cache)
        return cache

    @classmethod
    def _open(cls, folder: Path, warn: bool = True) -> "TokenCache | None":
        """The cache in a folder; None where there is none, or a damaged one."""
        try:
            return cls(folder) if folder.exists() else None
        except DamagedCache as error:
            if warn:
                log.warning(f"{error}; it is made again")
            return None
        except OSError as error:
            raise _closed(error) from error

    @classmethod
    def _build(cls, folder: Path, write, alone: bool) -> "TokenCache":
        _remove_leftovers(folder, alone)
        with (
            suppress(FileExistsError),
            atomic_folder(folder) as building,
        ):  # another job may be first
            with all_cores():
                write(building)
            if folder.exists() and cls._open(folder, warn=False) is None:
                with suppress(FileNotFoundError):
                    remove_folder(folder)
        return cls(folder)


def _remove_leftovers(folder: Path, alone: bool):
    """Removes what killed builds of any documents have left beside a cache's folder.

    It is theirs if nobody holds the lock of their cache; where there are no locks, if a day has passed.

    Args:
        folder: of the cache that is to be built.
        alone: whether its lock is held here.
    """
    for left in folder.parent.iterdir():
        if not (match := LEFTOVER.fullmatch(left.name)):
            continue
        lock = nullcontext(alone) if match[1] == folder.name else _lock(folder.parent / ".locks" / match[1])
        with suppress(OSError), lock as is_free:  # another job may remove it too
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if is_free or time.time() - newest > A_DAY:
                shutil.rmtree(left, ignore_errors=True)


class _Ids:
    """Strings in a file, by the byte at which each ends."""

    def __init__(self, path: Path, ends: np.ndarray):
        self.path, self.ends = path, ends

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        begin = int(self.ends[i - 1]) if i else 0
        with open(self.path, "rb") as file:
            file.seek(begin)
            return file.read(int(self.ends[i]) - begin).decode()


@contextmanager
def _lock(path: Path, waiting: str | None = None) -> Iterator[bool]:
    """Holds a file's lock, which the kernel takes from a process that dies; yields whether it is held.

    Args:
        path: of the file.
        waiting: what is said before waiting for another's lock; None does not wait.
    """
    held = False
    with ExitStack() as stack:
        with suppress(OSError):  # no locks on this file system, or one of another user that cannot be opened
            file = stack.enter_context(_open_lock(path))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if waiting is not None:
                    log.info(f"{waiting}: waiting for it")
                    fcntl.flock(file, fcntl.LOCK_EX)
                    held = True
        yield held


def _open_lock(path: Path) -> IO:
    try:
        return open(path, "a")
    except PermissionError:  # another user's lock file can be locked read-only too
        return open(path)


def _closed(error: OSError) -> DataError:
    """The error for a cache that the system does not let this user read."""
    return DataError(
        f"the token cache {error.filename} cannot be read ({error.strerror}): give this user the right to read it, or "
        "give another cache_dir"
    )


def _tokenise(
    name: str,
    sources,
    tokeniser: Tokeniser,
    broken: Broken,
    min_tokens: int,
    max_documents: int | None,
    folder: Path,
):
    """Writes tokens.bin, ids.bin, index.bin (int64 [documents, 2]: where tokens and id end) and index.json."""
    read = kept = too_short = without_text = length = start = id_end = 0
    sizes = [source.size for source in sources]
    bar = tqdm(
        desc=f"Tokenising {one_line(name)}", total=None if None in sizes else sum(sizes),
        unit="B", unit_scale=True, unit_divisor=1000, mininterval=0.5,
    )  # fmt: skip
    characters, began = 0, time.monotonic()
    with (
        open(folder / "tokens.bin", "wb") as out,
        open(folder / "ids.bin", "wb") as ids,
        open(folder / "index.bin", "wb") as index,
        bar,
    ):
        for batch in _batches(sources, tokeniser, broken):
            rows = tokeniser.encode([text for _, text, _, _, _ in batch])
            for (document_id, text, left_out, is_last, num_broken), row in zip(batch, rows, strict=True):
                out.write(row[left_out:].tobytes())
                length += len(row) - left_out
                characters += len(text)
                if not is_last:
                    continue
                read += 1
                if length < min_tokens:
                    without_text += not length and not text
                    too_short += bool(length or text)
                    out.seek(start * tokeniser.dtype.itemsize)
                else:
                    kept, start = kept + 1, start + length
                    id_end += ids.write(document_id.encode())
                    index.write(np.array([start, id_end]).tobytes())
                length = 0
                if kept == max_documents:
                    broken.forget_after(num_broken)
                    break
            seconds = max(time.monotonic() - began, 1e-9)
            bar.update(sum(source.position for source in sources) - bar.n)
            bar.set_postfix_str(f"{kept:,} documents, {characters / 1e6 / seconds:.1f} M characters/s", refresh=False)
            if kept == max_documents:
                break
        out.truncate(start * tokeniser.dtype.itemsize)
    counts: dict[str, Any] = {
        "documents": name,
        "read": read,
        "kept": kept,
        "tokens": start,
        "too_short": too_short,
        "min_tokens": min_tokens,
        "without_text": without_text,
        "broken": broken.count,
        "first_broken": broken.first,
        "dtype": tokeniser.dtype.name,
    }
    if not kept:
        kind = TooShortError if counts["too_short"] else DataError
        raise kind(_nothing(counts, broken.keys.min_tokens))
    counts["max_id"] = int(np.memmap(folder / "tokens.bin", tokeniser.dtype, "r").max())
    counts["checksums"] = {file.name: _checksum(file) for file in folder.iterdir()}
    counts["checksum"] = _checksum_of_index(counts)
    (folder / "index.json").write_text(json.dumps(counts, indent=1))


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(CHECKED_AT_ONCE):
            value = zlib.crc32(block, value)
    return value


def _checksum_of_index(index: dict[str, Any]) -> int:
    """CRC-32 of the content of index.json, without its own."""
    content = {key: value for key, value in index.items() if key != "checksum"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _batches(sources, tokeniser: Tokeniser, broken: Broken) -> Iterator[list[tuple[str, str, int, bool, int]]]:
    """(id, piece of text, tokens to leave out, whether it is the document's last, broken places before it), in lists of
    about batch_size. Documents read before an error are yielded first: max_documents may need no more."""
    batch, size = [], 0
    try:
        for source in sources:
            for document in source.read(broken):
                for piece, left_out, is_last in _pieces(document, tokeniser):
                    batch.append((document.id, piece, left_out, is_last, broken.count))
                    size += len(piece) + 64
                    if size >= tokeniser.batch_size:
                        yield batch
                        batch, size = [], 0
    except DataError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _pieces(document: Document, tokeniser: Tokeniser) -> Iterator[tuple[str, int, bool]]:
    pieces = tokeniser.pieces(document.text)
    piece, left_out = next(pieces)
    for following in pieces:
        yield piece, left_out, False
        piece, left_out = following
    yield piece, left_out, True


def check_documents(documents: Any, keys: Keys = OF_DATA):
    """Whether documents are named in a way that can be read; of files also whether they are there.

    Args:
        documents: as of `TokenCache.build`.
        keys: for errors.

    Raises:
        PoseError: they are not; names the key.
    """
    for spec in _as_list(documents, keys):
        if open_files(spec, "text", keys.documents) is None:
            _dataset(spec, "text", keys)


def _open_source(spec, text_field: str, memo: Memo, keys: Keys) -> Files | HubSource:
    files = open_files(spec, text_field, keys.documents)
    return HubSource(_dataset(spec, text_field, keys), memo) if files is None else files


def _dataset(spec: Any, text_field: str, keys: Keys) -> HubDataset:
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{keys.documents} has {spec!r}: give a file, a folder, a glob, or the fields of a dataset")
    known = [field.name for field in fields(HubDataset)]
    if unknown := set(spec) - set(known):
        unknown_fields = sorted(map(str, unknown))
        raise ConfigError(f"{keys.documents} has a dataset with {unknown_fields}: its fields are {', '.join(known)}")
    if not isinstance(spec.get("path"), str):
        raise ConfigError(f"{keys.documents} has a dataset without a path: {dict(spec)}")
    given = {key: value for key, value in spec.items() if value is not None}
    dataset = HubDataset(**{"text_field": text_field} | given)
    if not {"split", "data_files"} & given.keys():
        say_other_splits(dataset)
    return dataset


def _as_list(documents, keys: Keys) -> list:
    if isinstance(documents, str | Path | Mapping):
        return [documents]
    if not isinstance(documents, Sequence) or not documents:
        raise ConfigError(
            f"{keys.documents}={documents!r} is not accepted: give a file, folder, glob or dataset, or a list"
        )
    return list(documents)


def _key(sources: list, states: list, tokenizer, options: list) -> str:
    read = [
        [source.what, [[state.name, state.digest] for state in files]]
        for source, files in zip(sources, states, strict=True)
    ]
    key = json.dumps([FORMAT_VERSION, read, tokenizer_digest(tokenizer), options])
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in sources[0].name.split(".")[0])
    return f"{name[:48]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def same_text(fingerprint: str) -> str:
    """A fingerprint without the name that a cache has before its digest: of a folder that may be elsewhere."""
    return NAME.sub("", fingerprint)


def _nothing(counts: dict, key: str) -> str:
    if not counts["read"] and not counts["broken"]:
        return f"{counts['documents']} holds no document"
    places = "".join(f"\n  {place}" for place in counts["first_broken"])
    return (
        f"{counts['documents']} holds no document of at least {counts['min_tokens']} tokens ({key}): "
        f"{_dropped(counts)}{places}"
    )


def _dropped(counts: dict) -> str:
    parts = {
        f"shorter than {counts['min_tokens']} tokens": counts["too_short"],
        "without text": counts["without_text"],
        "broken": counts["broken"],
    }
    return ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)


@rank_zero_only
def _report(cache: TokenCache):
    """Says once what a cache holds and what was dropped."""
    if cache.folder in _reported:
        return
    _reported.add(cache.folder)
    counts = cache.info
    dropped = _dropped(counts)
    lines = [
        f"{counts['documents']}: {counts['kept']:,} documents of {counts['tokens']:,} tokens"
        + (f"; left out: {dropped}" if dropped else ""),
        *(f"  broken: {place}" for place in counts["first_broken"]),
    ]
    log.info("\n".join(lines))
