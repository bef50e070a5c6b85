"""Greedy decoding: what a model writes after a prompt, whatever its checkpoint says about sampling.

Shapes: B prompts, N tokens in a prompt.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from pose.evaluation.scoring import Scorer
from pose.modeling.layers import cache_is_exact

PREFILL_CHUNK = 2048  # tokens of a long prompt that go through the model at once


def end_ids(model: PreTrainedModel, tokenizer) -> list[int]:
    """The tokens that end a text, by the tokenizer and by the checkpoint; sorted."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list | tuple) else [named]
    return sorted({i for i in (tokenizer.eos_token_id, *named) if i is not None})


def write(scorer: Scorer, tokenizer, prompts: Sequence[np.ndarray], max_new_tokens: int) -> list[np.ndarray]:
    """What greedy decoding writes after each prompt; prompts of one length share batches.

    Args:
        scorer: of the model.
        tokenizer: the model's.
        prompts: token ids; of any lengths.
        max_new_tokens: at most so many for each.

    Returns:
        The new tokens of each prompt, as `greedy` gives them.
    """
    written: list[np.ndarray] = [np.empty(0, np.int64)] * len(prompts)
    ends = end_ids(scorer.model, tokenizer)
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for _, alike in groupby(longest_first, key=lambda i: len(prompts[i])):
        indices = list(alike)
        batches = scorer.batches(prompts[i] for i in indices)
        rows = (row for batch in batches for row in greedy(scorer.model, batch, max_new_tokens, ends))
        for i, row in zip(indices, rows, strict=True):
            written[i] = row
    return written


@torch.no_grad()
def greedy(
    model: PreTrainedModel, prompts: np.ndarray, max_new_tokens: int, eos_ids: Sequence[int] = ()
) -> list[np.ndarray]:
    """The most likely token, again and again, from `generate` of transformers.

    A cache of keys and values is used, and a long prompt fills it in chunks. Where one is not exact
    (`pose.modeling.layers.cache_is_exact`), every token takes a pass over the whole text, as when it is scored.

    Args:
        model: built by `pose.modeling.load.build_model`.
        prompts: int [B, N]; of one length, so that there is no padding.
        max_new_tokens: at most so many for each.
        eos_ids: tokens that end a text.

    Returns:
        The new tokens of each prompt, int64, up to its first end token, which is left out.
    """
    tokens = torch.from_numpy(np.asarray(prompts, np.int64)).to(model.device)
    use_cache = cache_is_exact(model.config)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=use_cache,
        prefill_chunk_size=PREFILL_CHUNK if use_cache and tokens.shape[1] > PREFILL_CHUNK else None,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=eos_ids[0] if eos_ids else 0,  # after the end of a text, where it is cut
    )
    own, model.generation_config = model.generation_config, GenerationConfig()  # which would fill in what is None here
    try:
        written = model.generate(  # type: ignore[operator]  # a causal model's class has it, their base has not
            tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
        )
    finally:
        model.generation_config = own
    rows = written[:, tokens.shape[1] :].cpu().numpy()
    return [row[: next((i for i, token in enumerate(row) if token in eos_ids), len(row))] for row in rows]
