"""Passkey retrieval accuracy, teacher-forced: one batched forward pass per batch of prompts."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from pose.data.passkey import PasskeyPrompt, PasskeyPrompts
from pose.evaluation.scoring import Scorer


def passkey_prompts(
    prompts: PasskeyPrompts, length: int, trials: int, seed: int, depths: Sequence[float] | None
) -> list[PasskeyPrompt]:
    """The prompts of one length: a pure function of the arguments."""
    return [
        prompts.sample(np.random.default_rng((seed, length, t)), length, depths[t % len(depths)] if depths else None)
        for t in range(trials)
    ]


def passkey_accuracy(
    scorer: Scorer,
    prompts: PasskeyPrompts,
    lengths: Sequence[int],
    *,
    trials: int,
    seed: int,
    depths: Sequence[float] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """The share of prompts whose key would be generated greedily, and no digit more.

    With the key already in place, each of its tokens must be the most likely one, and the most
    likely one after it must not go on with a digit: so greedy
    decoding gives the key, in the tokens that the tokenizer splits it into.

    Args:
        scorer: of the model.
        prompts: for the model's tokenizer.
        lengths: tokens of prompt and key together.
        trials: prompts per length.
        seed: of keys and places.
        depths: places of the key in [0, 1], taken in turn; None draws them.
        progress: whether to show a bar.

    Returns:
        passkey@N for each N, in [0, 1].
    """
    tokenizer = prompts.tokenizer
    accuracy = {}
    for n in tqdm(lengths, desc="Passkey", unit="length", leave=False, disable=not progress):
        drawn = passkey_prompts(prompts, n, trials, seed, depths)
        num = max(prompt.num_answer for prompt in drawn) + 1
        batches = scorer.batches(prompt.input_ids for prompt in drawn)
        predictions = np.concatenate([scorer.predictions(batch, num) for batch in batches])
        correct = 0
        for prompt, predicted in zip(drawn, predictions, strict=True):
            answer = prompt.input_ids[-prompt.num_answer :]
            following = tokenizer.convert_ids_to_tokens(int(predicted[-1])) or ""
            found = np.array_equal(predicted[-prompt.num_answer - 1 : -1], answer)
            correct += bool(found and not following[:1].isdigit())
        accuracy[f"passkey@{n}"] = correct / trials
    return accuracy
