"""What tasks ask of a model: losses and predictions of the last tokens of a window.

Shapes: B windows in a batch, P in all, N tokens in a window, S tokens scored at its end, C tokens in a chunk, H hidden
size.
"""

import resource
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from pose.modeling.long import hidden_states
from pose.modeling.loss import token_nll
from pose.modeling.prefix import PrefixCache, can_share, groups_that_share
from pose.modeling.rotary import depends_on_length

BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}  # a CPU is fastest where a layer's states stay in its caches
CHUNK_LEN = 2048  # tokens; no shorter chunks of a long window are worth a forward pass


class Scorer:
    """Scores windows, with plain position ids 0..N-1 unless given; logits exist for the scored tokens alone.

    Gradients are off, but not by inference_mode: FSDP could not train on with the buffers that it would leave behind.

    Args:
        model: built by `pose.modeling.load.build_model`.
        batch_tokens: tokens in one forward pass; a longer window (and one of more than CHUNK_LEN tokens) is run alone,
            in chunks: `pose.modeling.long`. None takes BATCH_TOKENS.

    Attributes:
        by_length: whether the frequencies change with N, so that a window's beginning cannot serve as a shorter one.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int | None = None):
        self.model, self.device = model.eval(), next(model.parameters()).device
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device.type, max(BATCH_TOKENS.values()))
        self.chunk_len = max(self.batch_tokens, CHUNK_LEN)
        self.by_length = depends_on_length(model.config)
        self.head = model.get_output_embeddings()

    def batches(self, windows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Joins windows of one length to [B, N] batches of at most batch_tokens."""
        batch: list[np.ndarray] = []
        for window in windows:
            batch.append(window)
            if (len(batch) + 1) * len(window) > self.batch_tokens:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    @torch.no_grad()
    def nll(self, windows: np.ndarray, scored: int | np.ndarray) -> np.ndarray:
        """Cross-entropy of some tokens of each window, given all before them.

        Args:
            windows: int [B, N].
            scored: S, the last so many tokens are scored, at most N - 1; or the indices of those that are, int [S],
                rising from 1 on.

        Returns:
            float64 [B, S], in nats.
        """
        tokens = self._tokens(windows)
        if isinstance(scored, int):
            scored = np.arange(tokens.shape[1] - scored, tokens.shape[1])
        losses = []
        for states, places in self._states(tokens, scored - 1):
            targets = tokens[:, places + 1]
            nll = token_nll(states.reshape(-1, states.shape[-1]), self.head, targets.reshape(-1))
            losses.append(nll.view(targets.shape))
        return torch.cat(losses, 1).double().cpu().numpy()

    @torch.no_grad()
    def predictions(self, windows: np.ndarray, num: int) -> np.ndarray:
        """The most likely token after each of the last num tokens of each window.

        What windows begin with in common goes through the model once, where that saves much: `pose.modeling.prefix`.

        Args:
            windows: int [P, N], in any number and order.
            num: at most N.

        Returns:
            int64 [P, num].
        """
        predicted = np.empty((len(windows), num), np.int64)
        for group, states in self._ends(windows, num):
            predicted[group] = self.head(states).argmax(-1).cpu().numpy()
        return predicted

    @torch.no_grad()
    def ending_nll(self, windows: np.ndarray, num: int, position_ids: np.ndarray | None = None) -> np.ndarray:
        """Cross-entropy of the last num tokens of each window; their common beginnings go through once.

        Args:
            windows: int [P, N], in any number and order.
            num: at most N - 1.
            position_ids: int [N], rising, of every window; None: 0..N-1.

        Returns:
            float64 [P, num], in nats.
        """
        losses = np.empty((len(windows), num))
        for group, states in self._ends(windows, num + 1, position_ids):
            targets = self._tokens(windows[group][:, -num:])
            nll = token_nll(states[:, :-1].flatten(0, 1), self.head, targets.flatten())
            losses[group] = nll.view(targets.shape).double().cpu().numpy()
        return losses

    def _ends(
        self, windows: np.ndarray, num: int, position_ids: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """The windows of each batch, int [B], and their last num hidden states, [B, num, H]."""
        size = max(self.batch_tokens // windows.shape[1], 1)
        groups = groups_that_share(windows, size, num) if can_share(self.model, size * windows.shape[1]) else None
        cache = None if groups is None else PrefixCache(self.model, self.chunk_len, position_ids)
        if groups is None:
            groups = np.split(np.arange(len(windows)), range(size, len(windows), size))
        for group in groups:
            batch = windows[group]
            states = self._last_states(batch, num, position_ids) if cache is None else cache.states(batch, num)
            yield group, states

    def _last_states(self, windows: np.ndarray, num: int, position_ids: np.ndarray | None) -> torch.Tensor:
        places = np.arange(windows.shape[1] - num, windows.shape[1])
        return torch.cat([states for states, _ in self._states(self._tokens(windows), places, position_ids)], 1)

    def _tokens(self, windows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(windows.astype(np.int64)).to(self.device)

    def _states(
        self, tokens: torch.Tensor, places: np.ndarray, position_ids: np.ndarray | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The hidden states [B, C, H] at some places [C] of the windows, with these, a chunk after the other."""
        wanted = torch.from_numpy(places).to(self.device)
        given = None if position_ids is None else torch.from_numpy(position_ids).to(self.device)
        begin = 0
        for states in hidden_states(self.model, tokens, self.chunk_len, given):
            here = wanted[(wanted >= begin) & (wanted < begin + states.shape[1])]
            if len(here):
                yield states[:, here - begin], here
            begin += states.shape[1]


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held so far: of a GPU, or of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
