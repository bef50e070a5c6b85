"""What is measured while a model trains: the group `watch`. Imports nothing heavy: the config is made of it."""

import math
from dataclasses import dataclass

from pose.errors import ConfigError
from pose.evaluation.options import EvalOptions

OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "AdamW with states in 8 bits"}  # `finetune.optimizer`, and in words


@dataclass
class WatchOptions(EvalOptions):
    """What is measured while the model trains: the group `watch`. The rest is as in `eval`."""

    seed: int = 1  # not that of eval: a model chosen by its prompts is measured on others
    every_n_steps: int | None = None  # optimizer steps from one measurement to the next; null: nothing is measured
    before: bool = True  # before the first step too
    best: str | None = None  # metric, such as passkey@2048: RUN/best is the model of the step where it was best
    max_short_increase: float | None = 0.05  # share; perplexity at the window may rise by so much; null: any

    def __post_init__(self):
        super().__post_init__()
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ConfigError(
                f"watch.every_n_steps={self.every_n_steps} is not accepted: give an integer of at least 1, or null"
            )
        if self.max_short_increase is not None and not 0 < self.max_short_increase < math.inf:
            raise ConfigError(
                f"watch.max_short_increase={self.max_short_increase} is not accepted: give a share above 0, such as "
                "0.05, or null"
            )
        if self.best is not None and self.every_n_steps is None:
            raise ConfigError(f"watch.best={self.best} needs watch.every_n_steps, which is null: nothing is measured")
