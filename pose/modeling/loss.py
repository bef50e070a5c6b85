"""Next-token cross-entropy, and the distance to a teacher's, from hidden states, without the logits of a whole batch.

What trains goes through `weighted_nll` or `weighted_kl`: each token's weight in the loss is known beforehand, so the
gradients of the hidden states and of the head are made beside the logits of a chunk, which are then forgotten. No logit
of what trains is computed twice, and none is kept. (Liger, arXiv 2410.10989, and torch's `linear_cross_entropy` do the
same, without weights by token.)

Shapes: B batch, L tokens, H hidden size, V vocabulary, C chunk, n scored tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pose.data.examples import IGNORE, Targets, scored_tokens
from pose.modeling.compat import is_partitioned
from pose.modeling.held import HeldLinear

CHUNK_LEN = 1024  # tokens whose logits exist at one time
GIVEN_AWAY = "the gradients of this loss have been given away: backward goes through it once"


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

    def chunk_nll(logits, part, logits_of):
        return F.cross_entropy(logits, targets[part], ignore_index=IGNORE, reduction="none")

    return _chunked(hidden, head, chunk_nll, chunk_len)


def _chunked(
    hidden: torch.Tensor, head: nn.Module, loss: Callable, chunk_len: int, at_most: int | None = None
) -> torch.Tensor:
    """A loss (as of `_weighted`) of each token, fp32 [n]; the logits of a chunk are made again in the backward pass.

    Each call of a head that ZeRO-3 has dealt out puts it together, with all processes. So there are as many calls in
    each of them, of nothing at last, as `at_most` tokens would need.
    """

    def logits_of(states):
        return head(states).float()

    def of_chunk(states, part):
        return loss(logits_of(states), part, logits_of)

    losses, num = [], len(hidden)
    if at_most is not None and any(is_partitioned(p) for p in head.parameters()):
        num = at_most
    for begin in range(0, num, chunk_len):
        part = slice(begin, begin + chunk_len)
        if torch.is_grad_enabled():
            losses.append(checkpoint(of_chunk, hidden[part], part, use_reentrant=False))
        else:
            losses.append(of_chunk(hidden[part], part))
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)


def weighted_nll(
    hidden: torch.Tensor,
    head: nn.Module,
    targets: torch.Tensor,
    weights: torch.Tensor,
    chunk_len: int = CHUNK_LEN,
    at_most: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the cross-entropies of tokens, sum_i w_i nll_i.

    Args:
        hidden: [n, H], the states that predict the targets.
        head: the output layer, H -> V. A plain linear layer whose weight is whole is read by itself, one that does not
            train is called once for each chunk; any other (with adapters, in parts), and any in fp16, is called again
            in the backward pass (`token_nll`).
        targets: int64 [n].
        weights: fp32 [n].
        chunk_len: C.
        at_most: tokens that there can be, in every process the same; None where n is.

    Returns:
        The sum, fp32 scalar, and without gradients the cross-entropy of each token, fp32 [n], in nats.
    """

    def turn(logits, part, scale, logits_of):
        return _turn(logits, targets[part, None], scale)

    def nll(logits, part, logits_of):
        return F.cross_entropy(logits, targets[part], reduction="none")

    return _weighted(hidden, head, weights, turn, nll, chunk_len, at_most)


def weighted_kl(
    hidden: torch.Tensor,
    teacher: torch.Tensor,
    head: nn.Module,
    weights: torch.Tensor,
    chunk_len: int = CHUNK_LEN // 4,
    at_most: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of how far a student's next-token distributions are from a teacher's, sum_i w_i KL(p_i || q_i).

    p is the teacher's, q the student's, both by the same head. Neither's logits ever exist for more than a chunk, and
    no gradient reaches the teacher, nor the head by its logits.

    Args:
        hidden: [n, H], the student's states.
        teacher: [n, H], the teacher's states for the same tokens.
        head, weights: as of `weighted_nll`.
        chunk_len: C; there are three times the logits of a chunk.
        at_most: as of `weighted_nll`.

    Returns:
        The sum, fp32 scalar, and without gradients the divergence of each token, fp32 [n], in nats.
    """
    teacher = teacher.detach()

    def turn(logits, part, scale, logits_of):
        return _turn_to_teacher(logits, logits_of(teacher[part]), scale)

    def kl(logits, part, logits_of):
        with torch.no_grad():
            wanted = logits_of(teacher[part]).log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1)

    return _weighted(hidden, head, weights, turn, kl, chunk_len, at_most)


def _weighted(
    hidden: torch.Tensor,
    head: nn.Module,
    weights: torch.Tensor,
    turn: Callable,
    loss: Callable,
    chunk_len: int,
    at_most: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of a loss of each token's logits, and these losses without gradients.

    Args:
        hidden, head, weights, chunk_len, at_most: as of `weighted_nll`.
        turn: (logits [C, V], part, scale [C, 1] or None, logits_of) -> losses [C]; makes of the logits, in place, scale
            times the gradient of the loss by them. `part` says which tokens; `logits_of` gives states' logits.
        loss: (logits, part, logits_of) -> losses [C], differentiable.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    is_plain = _is_plain(head, dtype)
    is_frozen = not any(p.requires_grad or is_partitioned(p) for p in head.parameters())
    # Gradients in fp16 have to be made of the scaled loss, which is known in the backward pass alone
    if dtype == torch.float16 or not (is_plain or is_frozen):
        losses = _chunked(hidden, head, loss, chunk_len, at_most)
        return (losses * weights).sum(), losses.detach()
    if not is_plain:
        return _FrozenWeightedLoss.apply(hidden, head, weights, turn, chunk_len, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        # Cast out here, so that their gradients are cast back
        states, weight = hidden.to(dtype), head.weight.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        return _WeightedLoss.apply(states, weight, bias, weights, turn, chunk_len, torch.is_grad_enabled())


def _is_plain(head: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a head is x W^T + b and nothing else, with a W that is whole and need not be widened."""
    if type(head) not in (nn.Linear, HeldLinear) or head._forward_hooks or head._forward_pre_hooks:
        return False
    weight = head.weight
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.shape != (head.out_features, head.in_features):
        return False
    return weight.dtype in (torch.float32, dtype)


class _WeightedLoss(torch.autograd.Function):
    """Gradients beside the loss (`_weighted`), with a head that is one weight and a bias."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, weights, turn, chunk_len, has_gradients):
        def logits_of(states):
            return F.linear(states.to(weight.dtype), weight, bias).float()

        of_hidden, of_weight, of_bias = (has_gradients and needed for needed in ctx.needs_input_grad[:3])
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        # The sum over chunks is in fp32
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(hidden), chunk_len):
            part = slice(begin, begin + chunk_len)
            states = hidden[part]
            logits = logits_of(states)
            scale = weights[part, None] if of_hidden or of_weight or of_bias else None
            losses[part] = turn(logits, part, scale, logits_of)
            if scale is None:
                del logits
                continue
            if bias_grad is not None:
                bias_grad += logits.sum(0)
            gradient = logits.to(weight.dtype)
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[part])
            if weight_grad is not None:
                if gradient.dtype == torch.float32:
                    weight_grad.addmm_(gradient.T, states)
                else:
                    weight_grad += gradient.T @ states
            del logits, gradient  # or they would be there while the next chunk's are made
        ctx.grads, ctx.dtypes = (hidden_grad, weight_grad, bias_grad), (hidden.dtype, weight.dtype, weight.dtype)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_loss, of_losses):
        if ctx.grads is None:
            raise RuntimeError(GIVEN_AWAY)
        # Scaled in place and given away, so that there is never a second copy of the head's
        grads, ctx.grads = ctx.grads, None
        scaled = [
            None if grad is None else grad.mul_(of_loss).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


class _FrozenWeightedLoss(torch.autograd.Function):
    """The same with a head that does not train, whatever it is made of: autograd knows the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, hidden, head, weights, turn, chunk_len, has_gradients):
        def logits_of(states):
            return head(states).float()

        has_gradients = has_gradients and ctx.needs_input_grad[0]
        hidden_grad = torch.empty_like(hidden) if has_gradients else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(hidden), chunk_len):
            part = slice(begin, begin + chunk_len)
            states = hidden[part].detach().requires_grad_(has_gradients)
            with torch.set_grad_enabled(has_gradients):
                output = head(states)
            logits = output.detach().float()
            losses[part] = turn(logits, part, weights[part, None] if has_gradients else None, logits_of)
            if hidden_grad is not None:
                (hidden_grad[part],) = torch.autograd.grad(output, states, logits.to(output.dtype))
            del output, logits
        ctx.hidden_grad = hidden_grad
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_loss, of_losses):
        if ctx.hidden_grad is None:
            raise RuntimeError(GIVEN_AWAY)
        hidden_grad, ctx.hidden_grad = ctx.hidden_grad, None
        return hidden_grad.mul_(of_loss), None, None, None, None, None


def _turn(logits: torch.Tensor, target: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Turns logits into the gradient of the loss by them, in place.

    Args:
        logits: fp32 [C, V].
        target: int64 [C, 1].
        scale: fp32 [C, 1], the weight of each token; None leaves no gradient behind.

    Returns:
        The cross-entropy of each token, fp32 [C].
    """
    of_target, largest = logits.gather(1, target), logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    if scale is not None:
        logits.mul_(scale / total).scatter_add_(1, target, -scale)
    return (total.log() + largest - of_target).squeeze(1)


def _turn_to_teacher(logits: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Turns a student's logits into the gradient by them of KL(teacher || student), in place: scale (q - p).

    Args:
        logits: fp32 [C, V], the student's.
        wanted: fp32 [C, V], the teacher's logits; used up.
        scale: as of `_turn`.

    Returns:
        The divergence of each token, fp32 [C].
    """
    logits.sub_(logits.logsumexp(1, keepdim=True))
    wanted.sub_(wanted.logsumexp(1, keepdim=True))
    probabilities = wanted.exp()
    divergence = wanted.sub_(logits).mul_(probabilities).sum(1)
    if scale is not None:
        logits.exp_().sub_(probabilities).mul_(scale)
    return divergence


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
    hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, scored: Targets | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`causal_lm_loss`, and without gradients what each example adds to it, fp32 [B]: its own mean.

    Args:
        hidden, head, labels: as of `causal_lm_loss`.
        scored: of the labels, on their device, by whose weights the means are taken; None works it out there.
    """
    scored = scored_tokens(labels) if scored is None else scored
    batch, length = labels.shape
    states, targets = hidden.flatten(0, 1)[scored.at], labels.flatten()[scored.at + 1]
    loss, nll = weighted_nll(states, head, targets, scored.weights, at_most=batch * length)
    by_example = torch.zeros(batch, dtype=nll.dtype, device=nll.device)
    return loss, by_example.index_add_(0, scored.at // length, nll * scored.weights * batch)
