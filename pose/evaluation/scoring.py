"""What tasks ask of a model: losses and predictions of the last tokens of a window.

Shapes: B windows, N tokens in a window, S tokens scored at its end, H hidden size.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from pose.modeling.loss import token_nll


class Scorer:
    """Scores windows with plain position ids 0..N-1; logits exist for the scored tokens alone.

    Args:
        model: built by `pose.modeling.load.build_model`.
        batch_tokens: tokens in one forward pass, at least one window.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int):
        self.model, self.batch_tokens = model.eval(), batch_tokens
        self.device = next(model.parameters()).device
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

    @torch.inference_mode()
    def nll(self, windows: np.ndarray, num_scored: int) -> np.ndarray:
        """Cross-entropy of the last tokens of each window, given all before them.

        Args:
            windows: int [B, N].
            num_scored: S, at most N - 1.

        Returns:
            float64 [B, S], in nats.
        """
        tokens, hidden = self._hidden(windows)
        states = hidden[:, -num_scored - 1 : -1]
        nll = token_nll(states.reshape(-1, states.shape[-1]), self.head, tokens[:, -num_scored:].reshape(-1))
        return nll.view(len(windows), num_scored).double().cpu().numpy()

    @torch.inference_mode()
    def predictions(self, windows: np.ndarray, num: int) -> np.ndarray:
        """The most likely token after each of the last num tokens of each window; int64 [B, num]."""
        _, hidden = self._hidden(windows)
        return self.head(hidden[:, -num:]).argmax(-1).cpu().numpy()

    def _hidden(self, windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.from_numpy(windows.astype(np.int64)).to(self.device)
        return tokens, self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
