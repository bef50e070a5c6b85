"""Documents become tokens once: a memory-mapped file for each documents file and tokenizer."""

import hashlib
import json
import os
import shutil
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pose.data.documents import read_documents
from pose.errors import DataError

# Raise it whenever the same documents and tokenizer would give other files than before.
FORMAT_VERSION = 1
DOCUMENTS_AT_ONCE = 16


class TokenCache:
    """The tokens of a documents file, memory-mapped: opening it costs no memory and no time.

    Indexing gives the tokens of one document, uint16 or uint32 [Lx], as a view of the file.

    Args:
        folder: as `build` leaves it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = json.loads((self.folder / "index.json").read_text())
        self.ids: list[str] = index["ids"]
        self.lengths = np.array(index["lengths"], np.int64)
        self.ends = self.lengths.cumsum()
        self.dtype = np.dtype(index["dtype"])
        expected = int(self.lengths.sum()) * self.dtype.itemsize
        if (self.folder / "tokens.bin").stat().st_size != expected:
            raise ValueError(f"{self.folder}/tokens.bin does not have the {expected} bytes of its index")
        self._tokens = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        if self._tokens is None:  # opened in the process that reads, so that workers share no handle
            self._tokens = np.memmap(self.folder / "tokens.bin", self.dtype, "r")
        end = self.ends[document]
        return self._tokens[end - self.lengths[document] : end]

    def __getstate__(self):
        return self.__dict__ | {"_tokens": None}

    @classmethod
    def build(cls, path: str | Path, tokenizer, cache_dir: str | Path, text_field: str = "text") -> "TokenCache":
        """Opens the cache of a documents file, tokenising the file first if there is none yet.

        The key is what the tokens depend on: the file's bytes, the tokenizer, `text_field` and
        FORMAT_VERSION. The folder appears in one rename, so a killed build leaves nothing that
        looks whole, and two jobs that start at once both end with the same files.

        Args:
            path: a .jsonl or .jsonl.gz file.
            tokenizer: a transformers tokenizer; no special tokens are added.
            cache_dir: the folder that holds all caches.
            text_field: the key of the text in each line.

        Raises:
            DataError: the documents file is missing or broken, or holds no document, or cache_dir cannot be written.
        """
        folder = Path(cache_dir).expanduser() / _key(Path(path), tokenizer, text_field)
        if folder.is_dir():
            try:
                return cls(folder)
            except (OSError, ValueError, KeyError, TypeError):  # damaged
                shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        except OSError as error:
            raise DataError(f"cache_dir={cache_dir} cannot be written to ({error}): give another folder") from error
        try:
            _tokenise(Path(path), tokenizer, text_field, building)
            building.chmod(0o755)
            try:
                os.rename(building, folder)
            except OSError:  # another job was first, with the same files
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return cls(folder)


def _tokenise(path: Path, tokenizer, text_field: str, folder: Path):
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    ids, lengths = [], []
    documents = read_documents(path, text_field)
    with open(folder / "tokens.bin", "wb") as out, tqdm(desc=f"Tokenising {path.name}", unit=" documents") as bar:
        while batch := list(islice(documents, DOCUMENTS_AT_ONCE)):
            texts = [document.text for document in batch]
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for document, tokens in zip(batch, encoded, strict=True):
                out.write(np.array(tokens, dtype).tobytes())
                ids.append(document.id)
                lengths.append(len(tokens))
            bar.update(len(batch))
    if not ids:
        raise DataError(f"{path} holds no document")
    index = {"ids": ids, "lengths": lengths, "dtype": dtype.name, "source": path.name}
    (folder / "index.json").write_text(json.dumps(index))


def _key(path: Path, tokenizer, text_field: str) -> str:
    if not path.is_file():
        raise DataError(f"no documents file at {path}: give a .jsonl or .jsonl.gz file")
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = json.dumps([rules | {"truncation": None, "padding": None}])  # which calls set, and do not matter here
    else:
        rules = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    key = json.dumps([FORMAT_VERSION, content, hashlib.sha256(rules.encode()).hexdigest(), text_field])
    return f"{path.name.split('.')[0]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
