"""How well a model answers for needles at its target, by its frequencies: what a search minimises."""

from collections.abc import Sequence

import numpy as np

from pose.evaluation.scoring import Scorer
from pose.modeling.rotary import set_frequencies
from pose.rope import Frequencies
from pose.tasks.needle_gain import SwapPrompts


class NeedleFitness:
    """The mean NLL of the answers' tokens, in nats, after texts that hold them.

    Args:
        scorer: of the model, whose frequencies do not depend on the length.
        prompts: where the needles' texts come from.
        length: N, tokens of prompt and answer together.
        depths: of the needle, taken in turn.
        trials: prompts.
    """

    def __init__(self, scorer: Scorer, prompts: SwapPrompts, length: int, depths: Sequence[float], trials: int):
        self.scorer = scorer
        made = [prompts.sample(length, depths[i % len(depths)], i // len(depths)) for i in range(trials)]
        self.windows = np.stack([prompt.input_ids[0, 0] for prompt in made])  # the answer that its text holds
        self.num_answer = [prompt.num_answer for prompt in made]

    def __call__(self, frequencies: Frequencies) -> float:
        """With the given frequencies, float; lower is better."""
        set_frequencies(self.scorer.model, frequencies)
        losses = self.scorer.ending_nll(self.windows, max(self.num_answer))
        return float(np.mean([nll[-num:].mean() for nll, num in zip(losses, self.num_answer, strict=True)]))
