"""The chunked loss against F.cross_entropy on all the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pose.data.examples import IGNORE
from pose.modeling.loss import causal_lm_loss, token_nll

NUM_TOKENS, HIDDEN, VOCAB = 37, 16, 29


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, VOCAB)


@pytest.fixture
def hidden():
    return (3 * torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))).requires_grad_()


@pytest.fixture
def targets():
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    targets[torch.rand(NUM_TOKENS, generator=generator) < 0.3] = IGNORE
    assert (targets == IGNORE).any()
    return targets


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss, [hidden, head.weight, head.bias])


@pytest.mark.parametrize("chunk_len", [1, 5, 36, 37, 1024])
def test_token_nll_equals_cross_entropy(head, hidden, targets, chunk_len):
    """Values of each token and gradients of a weighted sum, with chunks that do and do not divide."""
    weights = torch.linspace(-1, 2, NUM_TOKENS)
    got = token_nll(hidden, head, targets, chunk_len)
    wanted = F.cross_entropy(head(hidden), targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(got, wanted)
    assert (got[targets == IGNORE] == 0).all()
    for a, b in zip(gradients(got @ weights, head, hidden), gradients(wanted @ weights, head, hidden), strict=True):
        torch.testing.assert_close(a, b)


def test_token_nll_without_gradients(head, hidden, targets):
    with torch.no_grad():
        got = token_nll(hidden, head, targets, 5)
    assert not got.requires_grad
    wanted = F.cross_entropy(head(hidden), targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(got, wanted.detach())


@pytest.mark.parametrize("grad", [True, False])
def test_no_more_logits_than_a_chunk(head, hidden, targets, grad):
    """No call of the head is longer than chunk_len, and forward and backward each cover every token once."""
    lengths = []
    head.register_forward_hook(lambda _, args, output: lengths.append(len(output)))
    with torch.set_grad_enabled(grad):
        loss = token_nll(hidden, head, targets, 10).sum()
    assert lengths == [10, 10, 10, 7]
    if grad:
        loss.backward()
        assert sorted(lengths[4:]) == [7, 10, 10, 10]


def test_causal_lm_loss_equals_cross_entropy(head, targets):
    """Shifted by one within each row, mean over rows of the mean over the labels that count; values and gradients."""
    hidden = torch.randn(3, 12, HIDDEN, generator=torch.Generator().manual_seed(3)).requires_grad_()
    labels = targets[:36].reshape(3, 12)
    got = causal_lm_loss(hidden, head, labels)
    logits = head(hidden)
    assert len({int((row[1:] != IGNORE).sum()) for row in labels}) > 1, "rows of one count could not tell"
    wanted = sum(F.cross_entropy(logits[b, :-1], labels[b, 1:], ignore_index=IGNORE) for b in range(3)) / 3
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted)
    for a, b in zip(gradients(got, head, hidden), gradients(wanted, head, hidden), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("counted", [[], [0]])
def test_labels_that_all_are_ignored(head, counted):
    """Loss 0 and gradients of 0, not NaN; the label of a row's first token never counts."""
    hidden = torch.randn(2, 6, HIDDEN, requires_grad=True)
    labels = torch.full((2, 6), IGNORE)
    labels[:, counted] = 1
    loss = causal_lm_loss(hidden, head, labels)
    assert loss.item() == 0
    for gradient in gradients(loss, head, hidden):
        assert (gradient == 0).all()


def test_bf16_autocast_is_near_fp32(head):
    """The logits round to bf16 (2^-8), the sum over the vocabulary and the tokens does not."""
    hidden = torch.randn(2, 400, HIDDEN, generator=torch.Generator().manual_seed(4)).requires_grad_()
    labels = torch.randint(VOCAB, (2, 400), generator=torch.Generator().manual_seed(5))
    wanted = causal_lm_loss(hidden, head, labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = causal_lm_loss(hidden, head, labels)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert got.item() != wanted.item()
    for a, b in zip(gradients(got, head, hidden), gradients(wanted, head, hidden), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_bf16_weights_sum_in_fp32(head):
    """A mean of 4,000 bf16 losses, taken in bf16, would be off by several per cent."""
    hidden = torch.randn(1, 4001, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    labels = torch.randint(VOCAB, (1, 4001), generator=torch.Generator().manual_seed(7))
    wanted = F.cross_entropy(head.bfloat16()(hidden)[0, :-1].double(), labels[0, 1:])
    got = causal_lm_loss(hidden, head, labels)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_where_every_token_counts_it_is_the_mean_over_tokens(head):
    hidden = torch.randn(3, 12, HIDDEN, generator=torch.Generator().manual_seed(3))
    labels = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(4))
    wanted = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(causal_lm_loss(hidden, head, labels), wanted)


def test_micro_batches_add_up(head, targets):
    """The mean over micro-batches is that of the whole batch, however the answers are spread over them."""
    hidden = torch.randn(4, 9, HIDDEN, generator=torch.Generator().manual_seed(5))
    labels = targets[:36].reshape(4, 9)
    parts = [causal_lm_loss(hidden[i : i + 2], head, labels[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, causal_lm_loss(hidden, head, labels))
