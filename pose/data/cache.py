"""Documents become tokens once: a memory-mapped folder for each set of documents, tokenizer and options."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from pose.data.documents import Broken, Document, Files, find_files
from pose.data.hub import HubDataset, HubSource
from pose.data.tokenise import Tokeniser, all_cores
from pose.data.tokenizer import tokenizer_digest
from pose.errors import ConfigError, DataError
from pose.files import DAMAGE, Memo, digest

log = logging.getLogger(__name__)

# Raise it whenever the same documents and tokenizer would give other files than before.
FORMAT_VERSION = 2
A_DAY = 24 * 3600.0  # seconds

_reported: set[Path] = set()


class TokenCache:
    """The tokens of a set of documents, memory-mapped: opening it takes 8 bytes of memory a document.

    Indexing gives the tokens of one document, uint16 or uint32 [Lx], as a view of the file.

    Args:
        folder: as `build` leaves it.

    Attributes:
        lengths: tokens of each document, int64 [documents].
        ids: of the documents, read as they are asked for.
        info: counts of what was read, kept and dropped, and the dtype.

    Raises:
        OSError, ValueError, KeyError, TypeError: the folder is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.info: dict[str, Any] = json.loads((self.folder / "index.json").read_text())
        num, num_tokens = self.info["kept"], self.info["tokens"]
        self.dtype = np.dtype(self.info["dtype"])
        index = np.fromfile(self.folder / "index.bin", np.int64)
        if num < 1 or index.shape != (2 * num,):
            raise ValueError(f"{self.folder}/index.bin does not have the {num} documents of index.json")
        self.ends, id_ends = index.reshape(num, 2).T.copy()
        self.lengths = np.diff(self.ends, prepend=0)
        self.ids = _Ids(self.folder / "ids.bin", id_ends)
        _expect_size(self.folder / "tokens.bin", num_tokens * self.dtype.itemsize)
        _expect_size(self.folder / "ids.bin", int(id_ends[-1]))
        if self.ends[-1] != num_tokens or self.lengths.min() < 1 or np.diff(id_ends).min(initial=0) < 0:
            raise ValueError(f"{self.folder}/index.bin does not belong to tokens.bin")
        self._tokens = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        if self._tokens is None:  # opened in the process that reads, so that workers share no handle
            self._tokens = np.memmap(self.folder / "tokens.bin", self.dtype, "r")
        end = self.ends[document]
        return self._tokens[end - self.lengths[document] : end]

    def __reduce__(self):
        return type(self), (self.folder,)

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
        asked_by: str = "{group}.min_tokens",
    ) -> "TokenCache":
        """Opens the cache of a set of documents, tokenising them first if there is none yet.

        The key is what the tokens depend on: the files' bytes and names (for a dataset of the hub its
        commit), the tokenizer, every option, and FORMAT_VERSION. Of several jobs that start at once one
        tokenises and the others wait for it. The folder appears in one rename, so a killed build leaves
        nothing that looks whole; where the file system has no locks, each job builds and one is first.

        Args:
            documents: a file, folder or glob (`find_files`), a dataset as the fields of `HubDataset`, or a
                list of these, read in order; what is named twice counts twice.
            tokenizer: a transformers tokenizer; no special tokens are added.
            cache_dir: the folder that holds all caches.
            text_field: the key of the text, for documents that do not name their own.
            min_tokens: shorter documents are left out.
            max_documents: the first so many of the others are taken, and no more is read; None takes all.
            on_broken: "error" or "skip", for lines and rows that cannot be read.
            asked_by: the key that min_tokens comes from, for errors.

        Raises:
            ConfigError: a value that cannot be meant.
            DataError: documents are missing or broken, or none is left, or cache_dir cannot be written.
        """
        for key, value in (("min_tokens", min_tokens), ("max_documents", max_documents)):
            if not (isinstance(value, int) and value >= 1) and (key, value) != ("max_documents", None):
                raise ConfigError(f"data.{key}={value!r} is not accepted: give an integer of at least 1")
        broken = Broken(on_broken)
        root = Path(cache_dir).expanduser()
        memo = Memo(root / ".memo")
        sources, prints = zip(*(_open_source(spec, text_field, memo) for spec in _as_list(documents)), strict=True)
        options = [min_tokens, max_documents, on_broken]
        folder = root / _key(sources, list(prints), tokenizer, options)
        cache = cls._open(folder)
        if cache is None:
            try:
                (root / ".locks").mkdir(parents=True, exist_ok=True)
                with _lock(
                    root / ".locks" / folder.name, f"{sources[0].name} is being tokenised by another job"
                ) as alone:
                    cache = cls._open(folder) or cls._build(
                        folder, sources, Tokeniser(tokenizer), broken, min_tokens, max_documents, alone, asked_by
                    )
            except OSError as error:
                raise DataError(
                    f"cache_dir={cache_dir} cannot be written to ({error}): give another folder, or room in this one"
                ) from error
        _report(cache)
        return cache

    @classmethod
    def _open(cls, folder: Path) -> "TokenCache | None":
        try:
            return cls(folder)
        except DAMAGE:  # or not there
            return None

    @classmethod
    def _build(
        cls, folder: Path, sources, tokeniser, broken, min_tokens, max_documents, alone, asked_by
    ) -> "TokenCache":
        for old in folder.parent.glob(
            folder.name + ".*"
        ):  # of killed jobs, or where there are no locks of running ones
            if alone or time.time() - old.stat().st_mtime > A_DAY:
                shutil.rmtree(old, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            with all_cores():
                _tokenise(sources, tokeniser, broken, min_tokens, max_documents, building, asked_by)
            building.chmod(0o755)
            cache = cls._open(folder)  # of a job that was first, where there are no locks
            if cache is None:
                with suppress(FileNotFoundError):  # damaged: moved in one step, so that two jobs do not meet in it
                    os.rename(folder, building / "damaged")
                    shutil.rmtree(building / "damaged")
                with suppress(OSError):
                    os.rename(building, folder)
                cache = cls(folder)
            return cache
        finally:
            shutil.rmtree(building, ignore_errors=True)


class _Ids(Sequence):
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
def _lock(path: Path, waiting: str) -> Iterator[bool]:
    """Holds a file's lock, which the kernel takes from a process that dies; yields whether there is one to hold."""
    with open(path, "a") as file:
        alone = False
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info(f"{waiting}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        yield alone


def _tokenise(
    sources,
    tokeniser: Tokeniser,
    broken: Broken,
    min_tokens: int,
    max_documents: int | None,
    folder: Path,
    asked_by: str,
):
    """Writes tokens.bin, ids.bin, index.bin (int64 [documents, 2]: where tokens and id end) and index.json."""
    read = kept = too_short = without_text = length = start = id_end = 0
    sizes = [source.size for source in sources]
    name = sources[0].name + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
    bar = tqdm(
        desc=f"Tokenising {name}", total=None if None in sizes else sum(sizes),
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
                out.write(row[left_out:])
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
                    index.write(np.array([start, id_end]))
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
    counts = {
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
        raise DataError(_nothing(counts, asked_by), group="data")
    (folder / "index.json").write_text(json.dumps(counts, indent=1))


def _batches(sources, tokeniser: Tokeniser, broken: Broken) -> Iterator[list[tuple[str, str, int, bool, int]]]:
    """(id, piece of text, tokens to leave out, whether it is the document's last, broken places before it), in lists of
    about batch_size. What is there before an error comes before it: no more than that may be asked for."""
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
    waiting = None
    for piece, left_out in tokeniser.pieces(document.text):
        if waiting is not None:
            yield *waiting, False
        waiting = piece, left_out
    yield *waiting, True


def _open_source(spec, text_field: str, memo: Memo) -> tuple[Files | HubSource, Any]:
    """A source, and what its documents depend on."""
    if isinstance(spec, str | Path):
        paths = find_files(spec)
        files = Files(paths, Path(spec).name or str(spec), text_field)
        return files, ["files", text_field, [[path.name, digest(path, memo)] for path in paths]]
    if not isinstance(spec, Mapping):
        raise ConfigError(f"data.documents has {spec!r}: give a file, a folder, a glob, or the fields of a dataset")
    known = [field.name for field in fields(HubDataset)]
    if unknown := set(spec) - set(known):
        raise ConfigError(f"data.documents has a dataset with {sorted(unknown)}: its fields are {', '.join(known)}")
    if not isinstance(spec.get("path"), str):
        raise ConfigError(f"data.documents has a dataset without a path: {dict(spec)}")
    given = {key: value for key, value in spec.items() if value is not None}
    dataset = HubDataset(**{"text_field": text_field} | given)
    what = [dataset.name, dataset.split, dataset.data_files, dataset.format, dataset.text_field]
    if dataset.is_local:
        folder = Path(dataset.path).expanduser()
        inside = sorted(file for file in folder.rglob("*") if file.is_file() and ".git" not in file.parts)
        content = [[str(file.relative_to(folder)), digest(file, memo)] for file in inside]
        return HubSource(dataset, None), ["folder", *what, content]
    commit = dataset.commit(memo)
    return HubSource(dataset, commit), ["hub", dataset.path, commit, *what]


def _as_list(documents) -> list:
    if isinstance(documents, str | Path | Mapping):
        return [documents]
    if not isinstance(documents, Sequence) or not documents:
        raise ConfigError(
            f"data.documents={documents!r} is not accepted: give a file, folder, glob or dataset, or a list"
        )
    return list(documents)


def _key(sources, prints: list, tokenizer, options: list) -> str:
    key = json.dumps([FORMAT_VERSION, prints, tokenizer_digest(tokenizer), options])
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in sources[0].name.split(".")[0])
    return f"{name[:48]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _expect_size(path: Path, size: int):
    if path.stat().st_size != size:
        raise ValueError(f"{path} does not have the {size} bytes of its index")


def _nothing(counts: dict, asked_by: str) -> str:
    if not counts["read"] and not counts["broken"]:
        return f"{counts['documents']} holds no document"
    places = "".join(f"\n  {place}" for place in counts["first_broken"])
    return (
        f"{counts['documents']} holds no document of at least {counts['min_tokens']} tokens ({asked_by}): "
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
