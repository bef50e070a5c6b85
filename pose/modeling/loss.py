"""Next-token cross-entropy from hidden states, without the logits of a whole batch.

Shapes: B batch, L tokens, H hidden size, V vocabulary, C chunk.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pose.data.examples import IGNORE

CHUNK_LEN = 1024


def token_nll(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, chunk_len: int = CHUNK_LEN) -> torch.Tensor:
    """Cross-entropy of each target, with the logits of `chunk_len` tokens at a time.

    Logits are taken to fp32 whatever the precision, and made again in the backward pass.

    Args:
        hidden: [n, H], the states that predict the targets.
        head: the output layer, H -> V.
        targets: int64 [n]; IGNORE gives 0.
        chunk_len: C, tokens whose logits exist at one time.

    Returns:
        fp32 [n], in nats.
    """

    def chunk_nll(hidden_CH, targets_C):
        return F.cross_entropy(head(hidden_CH).float(), targets_C, ignore_index=IGNORE, reduction="none")

    losses = []
    for h, t in zip(hidden.split(chunk_len), targets.split(chunk_len), strict=True):
        if torch.is_grad_enabled():
            losses.append(checkpoint(chunk_nll, h, t, use_reentrant=False))
        else:
            losses.append(chunk_nll(h, t))
    return torch.cat(losses)


def causal_lm_loss(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token: the mean over examples of each example's mean.

    Where every token carries a loss this is transformers' mean over tokens. Where only answers do, an
    example with a short answer counts as much as any other, so that a share of the examples is a share
    of the loss, whatever micro-batch or process they fall to.

    Args:
        hidden: [B, L, H].
        head: the output layer, H -> V.
        labels: int64 [B, L], not shifted, IGNORE where no loss is taken (as in transformers).

    Returns:
        fp32 scalar, in nats per token. An example without a loss counts as 0.
    """
    return loss_and_example_losses(hidden, head, labels)[0]


def loss_and_example_losses(
    hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`causal_lm_loss`, and without gradients what each example adds to it, fp32 [B]: its own mean."""
    targets = labels[:, 1:]
    scored = targets != IGNORE
    nll = token_nll(hidden[:, :-1][scored], head, targets[scored])
    weights = (1 / scored.sum(1, keepdim=True).clamp(min=1)).expand_as(scored)[scored]
    weighted = nll * weights
    by_token = torch.zeros(scored.shape, dtype=nll.dtype, device=nll.device)
    by_token[scored] = weighted.detach()
    return weighted.sum() / len(labels), by_token.sum(1)
