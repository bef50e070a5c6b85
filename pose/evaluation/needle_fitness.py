"""How well a model answers for needles at its target, by its frequencies: what a search minimises."""

from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np

from pose.evaluation.scoring import Scorer
from pose.modeling.rotary import set_frequencies
from pose.rope import Frequencies
from pose.tasks.needle_gain import NUM_KEYS, MultiKeyPrompts


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
        places = cycle(depths)
        self.texts = [
            prompts.sample(length, list(islice(places, NUM_KEYS)), trial, target_len) for trial in range(trials)
        ]
        self.first = min(answer.start for text in self.texts for answer in text.answers)

    def __call__(self, frequencies: Frequencies) -> float:
        """With the given frequencies, float; lower is better."""
        set_frequencies(self.scorer.model, frequencies)
        losses = []
        for text in self.texts:
            num = text.input_ids.shape[1] - self.first  # tokens at the end of a window, among them its answer
            ending = self.scorer.ending_nll(text.input_ids, num, text.position_ids)
            for nll, answer in zip(ending, text.answers, strict=True):
                losses.append(nll[answer.start - self.first : answer.stop - self.first].mean())
        return float(np.mean(losses))
