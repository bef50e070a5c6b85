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
    """

    def __init__(self, scorer: Scorer, prompts: MultiKeyPrompts, length: int, depths: Sequence[float], trials: int):
        self.scorer = scorer
        places = cycle(depths)
        made = [prompts.sample(length, list(islice(places, NUM_KEYS)), trial) for trial in range(trials)]
        self.windows = np.concatenate([prompt.input_ids for prompt in made])
        answers = [answer for prompt in made for answer in prompt.answers]
        first = min(answer.start for answer in answers)
        self.scored = length - first  # tokens at the end of a window, and which of them are its answer
        self.answers = [slice(answer.start - first, answer.stop - first) for answer in answers]

    def __call__(self, frequencies: Frequencies) -> float:
        """With the given frequencies, float; lower is better."""
        set_frequencies(self.scorer.model, frequencies)
        losses = self.scorer.ending_nll(self.windows, self.scored)
        return float(np.mean([nll[answer].mean() for nll, answer in zip(losses, self.answers, strict=True)]))
