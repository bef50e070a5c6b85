"""Synthetic retrieval examples, on which a model learns to look things up.

Each task is a small class with ``sample(rng, length)``, which returns ``(tokens, is_answer)``, int64 and bool
[length], and with ``question_len``: so many tokens before the first answer are its question, and what is asked for
stands before them. The loss is taken on the answers alone. A new one is a file beside this one, and a line here.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from pose.tasks.copy import Copy
from pose.tasks.key_value import KeyValue
from pose.tasks.passkey import Passkey


class TrainingTask(Protocol):
    """What makes the examples of a task.

    Attributes:
        question_len: tokens of a question, which an answer follows.
    """

    question_len: int

    def sample(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One example: its tokens, int64, and which of them are answers, bool; [length]."""


# By name, what makes a task for a tokenizer, documents to take text from, and the rows of the model's embedding.
TASKS: dict[str, Callable[..., TrainingTask]] = {"key_value": KeyValue, "copy": Copy, "passkey": Passkey}
