"""How well a model answers for needles at its target, by its frequencies: what a search minimises."""

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np

from pose.evaluation.scoring import Scorer
from pose.modeling.rotary import set_frequencies
from pose.rope import Frequencies
from pose.tasks.needle_gain import NUM_KEYS, MultiKeyPrompts


class NeedleAnswer(NamedTuple):
    """What the answer for one needle costs.

    Attributes:
        trial: of its text.
        depth: of the needle, 0 (start of the text) to 1 (end).
        nll: mean over the answer's tokens, nats.
    """

    trial: int
    depth: float
    nll: float


def depths_of_texts(depths: Sequence[float], trials: int) -> list[list[float]]:
    """Those of the needles of each text, the given ones in turn."""
    places = cycle(depths)
    return [list(islice(places, NUM_KEYS)) for _ in range(trials)]


class NeedleFitness:
    """The mean NLL of the answers' tokens, in nats, after texts that hold them; an answer counts as any other.

    Args:
        scorer: of the model, whose frequencies do not depend on the length.
        prompts: where the needles' texts come from.
        length: N, tokens of prompt and answer together.
        depths: of the needles, taken in turn.
        trials: texts, each with NUM_KEYS needles of which each is asked for.
        target_len: T, where the answers' position ids end; None: N. With more than N they skip ahead between the
            needles and the questions (`MultiKeyPrompts.sample`).
    """

    def __init__(
        self,
        scorer: Scorer,
        prompts: MultiKeyPrompts,
        length: int,
        depths: Sequence[float],
        trials: int,
        target_len: int | None = None,
    ):
        self.scorer = scorer
        self.depths = depths_of_texts(depths, trials)
        self.texts = [prompts.sample(length, asked, trial, target_len) for trial, asked in enumerate(self.depths)]
        self.first = min(answer.start for text in self.texts for answer in text.answers)

    def __call__(self, frequencies: Frequencies) -> float:
        """With the given frequencies, float; lower is better."""
        return float(np.mean([answer.nll for answer in self.answers(frequencies)]))

    def answers(self, frequencies: Frequencies, progress: Callable[[], object] = lambda: None) -> list[NeedleAnswer]:
        """Each answer with the given frequencies; `progress` is called after each text."""
        set_frequencies(self.scorer.model, frequencies)
        found = []
        for trial, (text, depths) in enumerate(zip(self.texts, self.depths, strict=True)):
            num = text.input_ids.shape[1] - self.first  # tokens at the end of a window, among them its answer
            ending = self.scorer.ending_nll(text.input_ids, num, text.position_ids)
            for depth, nll, answer in zip(depths, ending, text.answers, strict=True):
                mean = nll[answer.start - self.first : answer.stop - self.first].mean()
                found.append(NeedleAnswer(trial, float(depth), float(mean)))
            progress()
        return found
