"""The identity of a checkpoint: the digests of all files that are read for it."""

import logging
from collections.abc import Iterable
from pathlib import Path

from pose.errors import CheckpointError
from pose.files import Memo, digest, remembered_digest
from pose.modeling.checkpoints.hub import find_file, from_hub, weight_files

log = logging.getLogger(__name__)

MANY_BYTES = 10**9  # take seconds to read
# Beside the weights that `weight_files` names: notes, code, weights of other programs, states of optimizers.
NOT_READ = {
    "", ".md", ".py", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".log"
}  # fmt: skip


def fingerprint(path: str, revision: str | None, memo: Memo) -> list:
    """The fingerprint of a checkpoint; it changes when any file that is read for it changes.

    Args:
        path: a local folder, or a hub id.
        revision: of the hub repository.
        memo: of the digests of large files.

    Returns:
        Plain JSON. Of a folder the name and SHA-256 of each file, of what is behind a link where it is one; of the hub
        its id and commit.

    Raises:
        CheckpointError: there is no such checkpoint, or its weights cannot be read; names the file.
        DataError: another file of it cannot be read; names it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        config = from_hub("config", find_file, path, revision, name="config.json")
        if config is None:
            raise CheckpointError(f"{path} has no config.json")
        return [path, Path(config).parent.name]
    files = set(from_hub("weights", weight_files, str(folder), None))
    files |= set(folder.glob("additional_chat_templates/*.jinja"))
    files |= {file for file in folder.iterdir() if file.suffix not in NOT_READ and file.is_file()}
    _announce(path, files, memo)
    return [[name, digest(folder / name, memo)] for name in sorted(str(file.relative_to(folder)) for file in files)]


def check_unchanged(path: str, revision: str | None, memo: Memo, before: list):
    """Whether a checkpoint is still what its fingerprint was taken of; after its weights were read.

    Raises:
        CheckpointError: it is another, so that what is measured of these weights would be noted as that of others.
    """
    if fingerprint(path, revision, memo) != before:
        raise CheckpointError(
            f"{path} was changed since this command began (does a training still write to it?): nothing was measured "
            "of it. The same command measures it as it is now"
        )


def _announce(path: str, files: Iterable[Path], memo: Memo):
    """Says that much is to be read, which takes a while."""
    stats = {file: file.stat() for file in files if file.is_file()}
    num_bytes = sum(stat.st_size for file, stat in stats.items() if remembered_digest(file, stat, memo) is None)
    if num_bytes >= MANY_BYTES:
        log.info(f"Reading {num_bytes / 1e9:.1f} GB of {path} to identify its weights (once; it is remembered)")
