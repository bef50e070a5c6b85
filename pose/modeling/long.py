"""Windows too long for one forward pass: the same hidden states in less memory.

Either the tokens go through the model in chunks, with a cache of the keys and values of those before; or all tokens go
through one layer after the other, without a cache, and the feed-forward parts, the widest, take them in chunks. The
first is for models with few key-value heads and layers, the second for those whose cache would be larger than what one
layer holds, and for those whose frequencies depend on the length: a chunk would have those of the text up to it.

Shapes: B batch, N tokens, C tokens in a chunk, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from pose.modeling.layers import cache_is_exact, cache_width

LAYER_STATES = 8  # what attention holds of a token, in hidden sizes: residual, input, queries, keys, values, and copies


def takes_cache(config: PretrainedConfig) -> bool:
    """Whether a long window goes through a model in chunks: it groups queries, and the cache is the smaller part."""
    grouped = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) < config.num_attention_heads
    return grouped and cache_width(config) < LAYER_STATES * config.hidden_size and cache_is_exact(config)


def hidden_states(
    model: PreTrainedModel, tokens: torch.Tensor, chunk_len: int, position_ids: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """The last hidden states, chunk after chunk.

    Args:
        model: with an output layer.
        tokens: int64 [B, N].
        chunk_len: C. Windows of no more take one plain forward pass.
        position_ids: int64 [N] of every window; None: 0..N-1.

    Yields:
        [B, C, H], the last one shorter; or one chunk of all N tokens.
    """
    given = {} if position_ids is None else {"position_ids": position_ids[None]}
    if tokens.shape[1] <= chunk_len:
        yield model.base_model(input_ids=tokens, use_cache=False, **given).last_hidden_state
    elif takes_cache(model.config):
        cache = DynamicCache(config=model.config)
        positions = given.get("position_ids", torch.arange(tokens.shape[1], device=tokens.device)[None])
        for chunk, places in zip(tokens.split(chunk_len, 1), positions.split(chunk_len, 1), strict=True):
            yield model.base_model(
                input_ids=chunk, position_ids=places, past_key_values=cache, use_cache=True
            ).last_hidden_state
    else:
        with feed_forward_in_chunks(model, chunk_len):
            states = model.base_model(input_ids=tokens, use_cache=False, **given).last_hidden_state
        yield states


@contextmanager
def feed_forward_in_chunks(model: nn.Module, chunk_len: int):
    """While it lasts, the modules named `mlp` take chunk_len tokens at a time."""
    modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    for module in modules:
        module.forward = _in_chunks(module.forward, chunk_len)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class has its own


def _in_chunks(forward, chunk_len: int):
    def chunked(x_BNH):
        output = torch.empty_like(x_BNH)
        for chunk, part in zip(x_BNH.split(chunk_len, 1), output.split(chunk_len, 1), strict=True):
            part.copy_(forward(chunk.contiguous()))
        return output

    return chunked
