"""Which documents a run has trained on: noted in its folder, so that an evaluation can tell them from held-out ones."""

import logging
from pathlib import Path

import numpy as np

from pose.data.datamodule import PoseDataModule
from pose.data.heldout import document_digests
from pose.evaluation.suite import Suite
from pose.files import atomic_file

log = logging.getLogger(__name__)

FILE = "documents.npy"  # in the run's folder: a digest for each document


def note_trained(run: Path, data: PoseDataModule):
    """Writes the digests of the documents that train, 8 bytes each."""
    with atomic_file(run / FILE, "wb") as file:
        np.save(file, data.trained_digests())


def warn_of_trained(name: str, model: str, suite: Suite):
    """Warns where perplexity of a run's model is measured on documents that the run has trained on.

    Args:
        name: of the model, as the evaluation calls it.
        model: its folder in the run's; of any other nothing is known, and nothing said.
        suite: what is measured, with the model's tokenizer.
    """
    noted = Path(model).parent / FILE
    if not suite.documents or not noted.is_file():
        return
    try:
        digests = np.load(noted)
    except (OSError, ValueError, EOFError) as error:
        log.warning(f"{noted} is damaged ({error}): whether {name} has trained on eval.documents is not known")
        return
    seen = np.isin(document_digests(suite.documents), digests)
    ids = [each for each, is_seen in zip(suite.document_ids, seen, strict=True) if is_seen]
    if ids:
        log.warning(
            f"{name} has trained on {len(ids)} of the {len(seen)} documents that its perplexity is measured on "
            f"({', '.join(ids[:3])}{' ...' * (len(ids) > 3)}), so it is not of held-out text: give others with "
            "eval.documents"
        )
