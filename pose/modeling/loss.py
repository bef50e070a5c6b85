"""Next-token cross-entropy, and the distance to a teacher's, from hidden states, without the logits of a whole batch.

What trains goes through `weighted_nll` or `weighted_nll_and_kl`: each token's weight in the loss is known beforehand,
so the gradients of the hidden states and of the head are made beside the logits of a chunk, which are then forgotten.
No logit of what trains is computed twice, and none is kept. (Liger, arXiv 2410.10989, and torch's
`linear_cross_entropy` do the same, without weights by token.)

Shapes: B batch, L tokens, H hidden size, V vocabulary, C chunk, n scored tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pose.data.examples import IGNORE, Targets, scored_tokens
from pose.modeling.attention import compute_dtype
from pose.modeling.compat import is_partitioned
from pose.modeling.held import HeldLinear

CHUNK_LEN = 1024  # tokens whose logits exist at one time
# The same where the model sees its tokens twice: what is kept of the two views takes more, so that the logits take less
CHUNK_LEN_OF_VIEWS = CHUNK_LEN // 2
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

    def chunk_nll(logits, part):
        return F.cross_entropy(logits, targets[part.rows], ignore_index=IGNORE, reduction="none")

    return _chunked(hidden, head, chunk_nll, _chunks(0, len(hidden), chunk_len))


class _Part(NamedTuple):
    """Rows whose logits exist at one time.

    Attributes:
        rows: of the states.
        num_pairs: so many tokens are there twice, first all of the teacher, then all of the student; 0 where no row
            belongs to a pair.
    """

    rows: slice
    num_pairs: int = 0


def _chunks(begin: int, end: int, size: int) -> list[_Part]:
    return [_Part(slice(at, min(at + size, end))) for at in range(begin, end, size)]


def _chunked(
    hidden: torch.Tensor, head: nn.Module, loss: Callable, parts: Sequence[_Part], num_calls: int | None = None
) -> torch.Tensor:
    """A loss (as of `_weighted`) of each row, fp32 [n]; the logits of a part are made again in the backward pass.

    Each call of a head that ZeRO-3 has partitioned gathers it from all processes. So all make `num_calls` of them, the
    last ones with nothing.
    """

    def of_part(states, part):
        return loss(head(states).float(), part)

    if num_calls is not None and any(is_partitioned(p) for p in head.parameters()):
        parts = [*parts, *[_Part(slice(len(hidden), None))] * (num_calls - len(parts))]
    losses = []
    for part in parts or [_Part(slice(0))]:  # a loss of nothing has gradients too
        if torch.is_grad_enabled():
            losses.append(checkpoint(of_part, hidden[part.rows], part, use_reentrant=False))
        else:
            losses.append(of_part(hidden[part.rows], part))
    return torch.cat(losses)


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

    def turn(logits, part, scale):
        return _turn(logits, targets[part.rows, None], scale)

    def nll(logits, part):
        return F.cross_entropy(logits, targets[part.rows], reduction="none")

    num_calls = None if at_most is None else -(-at_most // chunk_len)
    return _weighted(hidden, head, weights, turn, nll, _chunks(0, len(hidden), chunk_len), num_calls)


class NllAndKl(NamedTuple):
    """What `weighted_nll_and_kl` returns.

    Attributes:
        loss: fp32 scalar.
        nll: fp32 [N] without gradients, in nats; meaningless where nothing is scored.
        kl: fp32 [m] without gradients, in nats.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor


def weighted_nll_and_kl(
    teacher: torch.Tensor,
    student: torch.Tensor,
    head: nn.Module,
    targets: torch.Tensor,
    scored: Targets,
    distilled: Targets,
    alone: torch.Tensor,
    factor: float = 1.0,
    chunk_len: int = CHUNK_LEN_OF_VIEWS,
) -> NllAndKl:
    """The weighted cross-entropies of a teacher, and how far a student's next-token distributions are from its own.

    It is sum_i w_i nll_i + factor * sum_j v_j KL(p_j || q_j), with p the teacher's and q the student's distribution,
    both by the same head. The same logits of the teacher serve both sums. The KL gives no gradient to the teacher, nor
    to the head by the teacher's logits. A token that has both counts twice in a chunk.

    Args:
        teacher: [N, H], the states of all tokens.
        student: [m, H], the student's of the tokens in `distilled`.
        head: as of `weighted_nll`.
        targets: int64 [N]; any token where nothing is scored.
        scored: the n tokens that have a cross-entropy, with w.
        distilled: the m tokens that have a student, with v.
        alone: int64, the places of the tokens that are scored and have no student.
        factor: of the KL.
        chunk_len: C.
    """
    num, device, size = len(teacher), teacher.device, max(chunk_len // 2, 1)
    # Rows are of the teacher's states, and of the student's after them. Every token with a student is one of a pair:
    # where it is not scored, its cross-entropy has no weight.
    places = torch.cat([torch.arange(num, device=device), distilled.at])
    rows, parts, begin = [], [], 0
    for students in torch.arange(len(student), device=device).split(size) if len(student) else ():
        rows += [distilled.at[students], num + students]
        parts.append(_Part(slice(begin, begin + 2 * len(students)), len(students)))
        begin += 2 * len(students)
    parts += _chunks(begin, begin + len(alone), chunk_len)
    order = torch.cat([*rows, alone])
    of_teacher = torch.zeros(num, device=device).index_copy(0, scored.at, scored.weights)
    weights = torch.cat([of_teacher, factor * distilled.weights])[order]
    answers = targets[places[order]]

    def turn(logits, part, scale):
        target = answers[part.rows, None]
        return (_turn_pairs if part.num_pairs else _turn)(logits, target, scale)

    def losses_of(logits, part):
        wanted, found = logits.split([len(logits) - part.num_pairs, part.num_pairs])
        nll = F.cross_entropy(wanted, answers[part.rows][: len(wanted)], reduction="none")
        if not part.num_pairs:
            return nll
        kl = F.kl_div(found.log_softmax(-1), wanted.detach().log_softmax(-1), log_target=True, reduction="none")
        return torch.cat([nll, kl.sum(-1)])

    num_calls = -(-num // size) + -(-num // chunk_len)  # as if all tokens had a student, and none
    states = torch.cat([teacher, student])[order]
    loss, losses = _weighted(states, head, weights, turn, losses_of, parts, num_calls)
    by_row = torch.zeros(len(places), device=device).index_copy(0, order, losses)
    return NllAndKl(loss, by_row[:num], by_row[num:])


def _weighted(
    hidden: torch.Tensor,
    head: nn.Module,
    weights: torch.Tensor,
    turn: Callable,
    loss: Callable,
    parts: Sequence[_Part],
    num_calls: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of a loss of each row's logits, and these losses without gradients.

    Args:
        hidden, head, weights: as of `weighted_nll`.
        turn: (logits [C, V], part, scale [C, 1] or None) -> losses [C]; makes of the logits, in place, scale times the
            gradient of the loss by them.
        loss: (logits, part) -> losses [C], differentiable.
        parts: of all rows, in their order.
        num_calls: as of `_chunked`.
    """
    device = hidden.device.type
    dtype = compute_dtype(hidden)
    is_plain = _is_plain(head, dtype)
    is_frozen = not any(p.requires_grad or is_partitioned(p) for p in head.parameters())
    # Gradients in fp16 have to be made of the scaled loss, which is known in the backward pass alone
    if dtype == torch.float16 or not (is_plain or is_frozen):
        losses = _chunked(hidden, head, loss, parts, num_calls)
        return (losses * weights).sum(), losses.detach()
    if not is_plain:
        return _FrozenWeightedLoss.apply(hidden, head, weights, turn, parts, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        # Cast out here, so that their gradients are cast back
        states, weight = hidden.to(dtype), head.weight.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        return _WeightedLoss.apply(states, weight, bias, weights, turn, parts, torch.is_grad_enabled())


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
    def forward(ctx: Any, hidden, weight, bias, weights, turn, parts, has_gradients):
        of_hidden, of_weight, of_bias = (has_gradients and needed for needed in ctx.needs_input_grad[:3])
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        # The sum over parts is in fp32
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for part in parts:
            states = hidden[part.rows]
            logits = F.linear(states, weight, bias).float()
            scale = weights[part.rows, None] if of_hidden or of_weight or of_bias else None
            losses[part.rows] = turn(logits, part, scale)
            if scale is None:
                del logits
                continue
            if bias_grad is not None:
                bias_grad += logits.sum(0)
            gradient = logits.to(weight.dtype)
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[part.rows])
            if weight_grad is not None:
                if gradient.dtype == torch.float32:
                    weight_grad.addmm_(gradient.T, states)
                else:
                    weight_grad += gradient.T @ states
            del logits, gradient  # or they would be there while the next part's are made
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
    def forward(ctx: Any, hidden, head, weights, turn, parts, has_gradients):
        has_gradients = has_gradients and ctx.needs_input_grad[0]
        hidden_grad = torch.empty_like(hidden) if has_gradients else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for part in parts:
            states = hidden[part.rows].detach().requires_grad_(has_gradients)
            with torch.set_grad_enabled(has_gradients):
                output = head(states)
            logits = output.detach().float()
            losses[part.rows] = turn(logits, part, weights[part.rows, None] if has_gradients else None)
            if hidden_grad is not None:
                (hidden_grad[part.rows],) = torch.autograd.grad(output, states, logits.to(output.dtype))
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


def _turn_pairs(logits: torch.Tensor, target: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """As `_turn`, of pairs: cross-entropies of the teacher's rows, and KL(teacher || student) of the student's."""
    teacher, student = logits.chunk(2)
    target = target[: len(teacher)]
    of_target, largest = teacher.gather(1, target), teacher.amax(1, keepdim=True)
    likely = teacher.sub_(largest).exp()  # probabilities, but for their total
    student.sub_(student.amax(1, keepdim=True))
    total = likely.sum(1, keepdim=True)
    kl = teacher.sub_(student).mul_(likely).sum(1, keepdim=True) / total
    total_of_student = student.exp_().sum(1, keepdim=True)
    losses = torch.cat([total.log() + largest - of_target, kl + (total_of_student / total).log()])
    if scale is not None:
        of_nll, of_kl = scale.chunk(2)
        student.mul_(of_kl / total_of_student).addcmul_(likely, -of_kl / total)
        torch.mul(likely, of_nll / total, out=teacher).scatter_add_(1, target, -of_nll)
    return losses.squeeze(1)


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
    hidden: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    scored: Targets | None = None,
    chunk_len: int = CHUNK_LEN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`causal_lm_loss`, and without gradients what each example adds to it, fp32 [B]: its own mean.

    Args:
        hidden, head, labels: as of `causal_lm_loss`.
        scored: of the labels, on their device, by whose weights the means are taken; None works it out there.
        chunk_len: C.
    """
    scored = scored_tokens(labels) if scored is None else scored
    batch, length = labels.shape
    states, targets = hidden.flatten(0, 1)[scored.at], labels.flatten()[scored.at + 1]
    loss, nll = weighted_nll(states, head, targets, scored.weights, chunk_len, at_most=batch * length)
    by_example = torch.zeros(batch, dtype=nll.dtype, device=nll.device)
    return loss, by_example.index_add_(0, scored.at // length, nll * scored.weights * batch)
