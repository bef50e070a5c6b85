"""Documents of a dataset on the Hugging Face hub, or of a local folder in that form, streamed by `datasets`."""

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pose.data.documents import (
    Broken,
    Document,
    FileState,
    Keys,
    document_of,
    files_in,
    out_of_memory,
    state_of,
    unreadable,
)
from pose.data.network import RETRIES, may_pass, wait_for_network
from pose.errors import ConfigError, DataError, first_line
from pose.files import Memo

log = logging.getLogger(__name__)

FORMATS = ("json", "parquet", "csv", "text")
HUB_TIMEOUT = 10.0  # seconds, for the question which commit is meant


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the hub, read row by row without being downloaded whole; no code of it is run.

    Attributes:
        path: hub id (owner/name), or a local folder.
        name: configuration (subset); None is the dataset's default.
        split: such as train, validation, test.
        revision: branch, tag or commit; None is main.
        data_files: file or glob in the dataset, or a list of them; None takes what the dataset says.
        format: a reader of FORMATS for `data_files`, where the dataset has only a loading script.
        text_field: the column of the text.

    Raises:
        ConfigError: a value that cannot be meant.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: Any = None
    format: str | None = None
    text_field: str = "text"

    def __post_init__(self):
        for key in ("path", "name", "split", "revision", "format", "text_field"):
            value = getattr(self, key)
            if not isinstance(value, str) and (value is not None or key in ("path", "split", "text_field")):
                raise ConfigError(
                    f"{key}={value!r} of the dataset {self.path} is not accepted: give a string (a number in quotes)"
                )
        if not isinstance(self.data_files, str | list | tuple | None):
            raise ConfigError(
                f"data_files={self.data_files!r} of the dataset {self.path} is not accepted: give a file or glob in "
                "it, or a list of them"
            )
        if not self.path or (not self.is_local and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.path)):
            raise ConfigError(f"path={self.path!r} of a dataset is neither a folder nor a hub id: give owner/name")
        if not self.split:
            raise ConfigError(f"split={self.split!r} of the dataset {self.path} is not accepted: give its name")
        if self.format is not None and self.format not in FORMATS:
            raise ConfigError(f"format={self.format!r} of the dataset {self.path}: choose {', '.join(FORMATS)}")
        if self.format is not None and self.data_files is None:
            raise ConfigError(f"format={self.format} of the dataset {self.path} needs data_files, a glob in it")
        files = [self.data_files] if isinstance(self.data_files, str) else list(self.data_files or [])
        if not all(isinstance(file, str) and _is_inside(file) for file in files):
            raise ConfigError(f"data_files={self.data_files!r} of the dataset {self.path}: give globs inside of it")
        object.__setattr__(self, "data_files", files or None)

    @property
    def is_local(self) -> bool:
        """Whether the path is a folder."""
        return Path(self.path).expanduser().is_dir()

    @property
    def label(self) -> str:
        """Name on screen."""
        return f"{self.path} ({', '.join(part for part in (self.name, self.split) if part)})"

    def commit(self, memo: Memo) -> str:
        """The commit that the revision names.

        Args:
            memo: remembers the last answer for the case that the hub does not give one.

        Raises:
            DataError: there is no such dataset or revision, or no answer and none to remember.
        """
        if self.revision is not None and re.fullmatch("[0-9a-f]{40}", self.revision):
            return self.revision
        key = ["commit", self.path, self.revision]
        try:
            sha = huggingface_hub.HfApi().dataset_info(self.path, revision=self.revision, timeout=HUB_TIMEOUT).sha
        except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError, HFValidationError) as error:
            raise DataError(
                f"the dataset {self.path} (revision {self.revision or 'main'}) is not on the hub, or not open to you: "
                f"look at https://huggingface.co/datasets/{self.path}, and log in with `hf auth login` if it asks for "
                f"it ({first_line(error)})"
            ) from error
        except Exception as error:
            if isinstance(error, HfHubHTTPError) and not may_pass(error):
                raise DataError(
                    f"the hub refuses the dataset {self.path} ({first_line(error)}). A token that is wrong or has "
                    "expired is refused for open datasets too: log in again with `hf auth login` (or set HF_TOKEN), or "
                    "go without one with `hf auth logout`"
                ) from error
            if not may_pass(error):
                raise
            known = memo.get(key)
            if not isinstance(known, str) or not re.fullmatch("[0-9a-f]{40}", known):
                raise DataError(
                    f"the hub does not answer, and {self.path} was not read here before: look to the network, or "
                    f"download the dataset elsewhere and give its folder in place of the hub id ({first_line(error)})"
                ) from error
            log.warning(f"The hub does not answer: {self.path} is taken at {known[:12]}, as last time")
            return known
        memo.set(key, sha)
        return str(sha)

    @property
    def folder(self) -> Path:
        """Of a local dataset."""
        return Path(os.path.abspath(os.path.expanduser(self.path)))

    def rows(self, commit: str | None):
        """The rows as `datasets` streams them.

        Args:
            commit: of the hub repository; None for a local folder.

        Raises:
            DataError: the dataset names files that are not its own.
        """
        datasets = _datasets()
        path = str(self.folder) if self.is_local else self.path
        if self.format is None:
            builder = datasets.load_dataset_builder(path, self.name, data_files=self.data_files, revision=commit)
        else:
            root = path if self.is_local else f"hf://datasets/{path}@{commit}"
            files = [f"{root}/{file}" for file in self.data_files]
            builder = datasets.load_dataset_builder(self.format, data_files={self.split: files})
        roots = (f"{path}/",) if self.is_local else (f"hf://datasets/{path}@", f"hf://datasets/{path}/")
        for file in chain.from_iterable((builder.config.data_files or {}).values()):
            inside = [file.removeprefix(root) for root in roots if str(file).startswith(root)]
            if not inside or ".." in Path(inside[0]).parts:
                raise DataError(
                    f"the dataset {self.label} names the file {file}, which is not in it: what lies elsewhere is not "
                    "read. Name it as documents of its own, or mend data_files in the README.md"
                )
        return builder.as_streaming_dataset(self.split)

    def read(self, broken: Broken, commit: str | None = None, sleep: Callable[[float], None] = time.sleep):
        """Every document, going on where it stopped when the hub fails in between.

        Args:
            broken: what is done about rows without a text.
            commit: see `rows`.
            sleep: waits so many seconds.

        Yields:
            Document: those without text included.

        Raises:
            DataError: the hub fails RETRIES times in a row, or the dataset cannot be read; names it.
        """
        state, number, failures = None, 0, 0
        while True:
            try:
                rows = self.rows(commit)
                if state is not None:
                    rows.load_state_dict(state)
                for record in rows:
                    number, failures, state = number + 1, 0, rows.state_dict()
                    where = f"{self.label}, row {number}"
                    document = document_of(record, self.text_field, where, f"{self.split}:{number}", broken)
                    if document is not None:
                        yield document
                return
            except (DataError, ConfigError):
                raise
            except Exception as error:  # datasets, its readers and its file systems raise errors of any class
                if out_of_memory(error):
                    raise
                if not may_pass(error, self.is_local):
                    raise DataError(self._cannot(number, error, broken.keys)) from error
                failures += 1
                if failures > RETRIES:
                    raise DataError(
                        f"the dataset {self.label} failed {failures} times in a row after row {number} "
                        f"({first_line(error)}): start again later, or download it (hf download {self.path} "
                        "--repo-type dataset --local-dir FOLDER) and give the folder in place of the hub id"
                    ) from error
                wait_for_network(f"{self.label} after row {number}", error, failures, sleep)

    def _cannot(self, number: int, error: Exception, keys: Keys) -> str:
        message = f"the dataset {self.label} cannot be read past row {number}: {first_line(error)}"
        if "scripts are no longer supported" in str(error):
            return f"{message}. Code of a dataset is never run: name its files with data_files and their format"
        return (
            f"{message}. Check name, split and data_files; broken lines can be skipped in files of your own: "
            f"hf download {self.path} --repo-type dataset --local-dir FOLDER, {keys.documents}=FOLDER"
        )


def say_other_splits(dataset: HubDataset):
    """Warns once of files of a local folder that are of other splits than the one that is read, which nobody named."""
    if dataset.is_local:
        _say_other_splits(dataset.folder, dataset.name, dataset.split, dataset.label)


@functools.cache
def _say_other_splits(folder: Path, name: str | None, split: str, label: str):
    """Where a README.md does not say which files are of which split, `datasets` goes by the names of files."""
    try:
        readme = folder / "README.md"
        header = readme.read_text(errors="replace").split("\n---", 1)[0] if readme.is_file() else ""
        if header.startswith("---") and "configs:" in header:
            return
        builder = _datasets().load_dataset_builder(str(folder), name)
    except Exception:  # said when it is read
        return
    if others := sorted({str(each) for each in builder.config.data_files or ()} - {split}):
        log.warning(
            f"the dataset {label}: only files of the split {split} are read, since others are named for "
            f"{', '.join(others)}. Give split=NAME for these, or {folder} itself, without keys, for all files"
        )


def _is_inside(file: str) -> bool:
    """Whether a glob names files of the dataset alone, of which its cache is a copy."""
    return ".." not in Path(file).parts and not Path(file).is_absolute() and "://" not in file


class HubSource:
    """The documents of a HubDataset at one commit, as `pose.data.cache` reads them.

    Args:
        dataset: which.
        memo: see `HubDataset.commit`.

    Attributes:
        what: plain JSON that tells what is read of it.
    """

    size, position = None, 0

    def __init__(self, dataset: HubDataset, memo: Memo):
        self.dataset, self.name = dataset, dataset.label
        self.commit = None if dataset.is_local else dataset.commit(memo)
        where = ["folder"] if dataset.is_local else ["hub", dataset.path, self.commit]
        self.what = [*where, dataset.name, dataset.split, dataset.data_files, dataset.format, dataset.text_field]

    def state(self, memo: Memo) -> list[FileState]:
        """The state of every file in a local folder, behind links too; none for a commit, which does not change.

        Raises:
            DataError: one cannot be read.
        """
        if not self.dataset.is_local:
            return []
        folder = self.dataset.folder
        try:
            inside = [file for file in files_in(folder, lambda name: name == ".git") if file.is_file()]
        except OSError as error:
            raise unreadable(error) from error
        return [state_of(file, str(file.relative_to(folder)), memo) for file in inside]

    def read(self, broken: Broken) -> Iterator[Document]:
        """As `HubDataset.read`."""
        return self.dataset.read(broken, self.commit)


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "datasets of the hub need the package datasets: pip install datasets backports.zstd"
        ) from error
    return datasets
