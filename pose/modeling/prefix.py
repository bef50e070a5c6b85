"""Windows that begin alike: what they share goes through the model once.

Sorted, windows with a common beginning are neighbours, and each goes on from what it shares with the one before it. So
every distinct beginning takes one pass, as in the prefix tree of the windows.

Shapes: B windows, N tokens in a window, H hidden size.
"""

import copy

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from pose.modeling.layers import cache_can_be_cut, cache_width

WORTH = 0.8  # of all tokens: sharing must leave no more, since a token takes longer with a cache than without
MAX_BYTES = 4 * 2**30  # of keys and values; no sharing beyond, but where one process has a GPU with more to spare
SHARE_OF_FREE = 1 / 3  # of a GPU's memory that they may take: a batch has copies


class PrefixCache:
    """Keys and values of the tokens that the windows so far have begun with.

    Args:
        model: one that `can_share` accepts.
        chunk_len: tokens that go through it at once.
        position_ids: int [N] of every window; None: 0..N-1.
    """

    def __init__(self, model: PreTrainedModel, chunk_len: int, position_ids: np.ndarray | None = None):
        self.model, self.chunk_len, self.position_ids = model, chunk_len, position_ids
        self.cache = DynamicCache(config=model.config)
        self.tokens = np.empty(0, np.int64)

    def states(self, windows: np.ndarray, num: int) -> torch.Tensor:
        """The last hidden states of the last num tokens of each window.

        Args:
            windows: int [B, N], a group of `groups_that_share`.
            num: at most N.

        Returns:
            [B, num, H].
        """
        begin = _num_shared(windows, num)
        prefix = windows[0, :begin]
        kept = _common(self.tokens, prefix)
        if kept:
            self._crop(len(self.tokens) - kept)
        else:  # an empty cache that was cut could not be repeated for a batch
            self.cache = DynamicCache(config=self.model.config)
        for i in range(kept, begin, self.chunk_len):
            self._pass(windows[:1, i : min(i + self.chunk_len, begin)], i, self.cache)
        self.tokens = prefix
        if len(windows) == 1:
            states = self._pass(windows[:, begin:], begin, self.cache)
            self._crop(windows.shape[1] - begin)
        else:
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(windows))
            states = self._pass(windows[:, begin:], begin, cache)
        return states[:, -num:]

    def _pass(self, tokens: np.ndarray, begin: int, cache: DynamicCache) -> torch.Tensor:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.model.device)
        positions = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
        if self.position_ids is not None:
            positions = torch.from_numpy(self.position_ids).to(ids.device)[positions]
        return self.model.base_model(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state

    def _crop(self, num: int):
        if num:
            self.cache.crop(-num)


def can_share(model: PreTrainedModel, num_tokens: int) -> bool:
    """Whether a cache of so many tokens is exact for this model, can be cut, and is not too large."""
    size = cache_width(model.config) * num_tokens * model.dtype.itemsize
    return size <= _most_bytes(model.device) and cache_can_be_cut(model.config)


def _most_bytes(device: torch.device) -> float:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return MAX_BYTES  # processes that hold parts of one model have to make the same passes, whatever each has free
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return max(MAX_BYTES, SHARE_OF_FREE * free)


def groups_that_share(windows: np.ndarray, size: int, num: int) -> list[np.ndarray] | None:
    """The order in which windows share most.

    Args:
        windows: int [P, N].
        size: windows in a batch.
        num: of the last tokens of a window, which are never shared.

    Returns:
        Indices of the windows of each batch; None where sharing would not save enough to be WORTH it.
    """
    order = np.lexsort(windows.T[::-1])
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    passed, before = 0, windows[0, :0]
    for group in groups:
        prefix = windows[group[0], : _num_shared(windows[group], num)]
        passed += len(prefix) - _common(before, prefix) + len(group) * (windows.shape[1] - len(prefix))
        before = prefix
    return groups if passed <= WORTH * windows.size else None


def _num_shared(windows: np.ndarray, num: int) -> int:
    """How many tokens all windows begin with, the last num left out."""
    alike = (windows == windows[0]).all(0)[: windows.shape[1] - num]
    return int(alike.cumprod().sum())


def _common(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    return int((a[:size] == b[:size]).cumprod().sum())
