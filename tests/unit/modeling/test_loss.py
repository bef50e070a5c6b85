"""The chunked losses against F.cross_entropy on all the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pose.data.examples import IGNORE, Targets, collate_scored, scored_tokens
from pose.modeling.held import HeldLinear
from pose.modeling.loss import causal_lm_loss, loss_and_example_losses, token_nll, weighted_nll, weighted_nll_and_kl

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


@pytest.mark.parametrize("chunk_len", [1, 5, 36, 37, 1024])
@pytest.mark.parametrize("frozen", [(), ("head",), ("hidden",), ("bias",)])
def test_weighted_nll_equals_cross_entropy(hidden, chunk_len, frozen):
    """In fp64 but for the sums, to 1e-6: values, and whichever gradients are wanted, also through a factor."""
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB, bias="bias" not in frozen)
    head.weight.requires_grad_("head" not in frozen)
    hidden.requires_grad_("hidden" not in frozen)
    targets = torch.randint(VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(2))
    weights = torch.linspace(-1, 2, NUM_TOKENS)
    got, nll = weighted_nll(hidden, head, targets, weights, chunk_len)
    logits = F.linear(hidden.double(), head.weight.double(), None if head.bias is None else head.bias.double())
    by_token = F.cross_entropy(logits, targets, reduction="none")
    wanted = by_token @ weights.double()
    assert got.dtype == nll.dtype == torch.float32 and not nll.requires_grad
    torch.testing.assert_close(nll.double(), by_token.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
    leaves = [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]
    pairs = zip(torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * wanted, leaves), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


def test_logits_are_computed_once_and_not_kept(hidden, monkeypatch):
    """Forward and backward together call the output layer once for each chunk, and nothing of a chunk's size lives."""
    head, calls, kept = nn.Linear(HIDDEN, VOCAB), [], []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda states, *rest: calls.append(len(states)) or linear(states, *rest))
    targets, weights = torch.zeros(NUM_TOKENS, dtype=torch.int64), torch.ones(NUM_TOKENS)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss, _ = weighted_nll(hidden, head, targets, weights, 10)
    loss.backward()
    assert calls == [10, 10, 10, 7]
    assert not [shape for shape in kept if shape[-1:] == (VOCAB,) and len(shape) == 2]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_frozen_head_of_16_bits(hidden, autocast):
    """Read as it is where layers compute in its bits; where they do not, it widens itself."""
    torch.manual_seed(0)
    head = HeldLinear(HIDDEN, VOCAB, bias=False)
    head.weight = nn.Parameter(head.weight.detach().bfloat16(), requires_grad=False)
    targets, weights = torch.zeros(NUM_TOKENS, dtype=torch.int64), torch.ones(NUM_TOKENS) / NUM_TOKENS
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = weighted_nll(hidden, head, targets, weights, 10)
        wanted = F.cross_entropy(head(hidden).float(), targets)
    torch.testing.assert_close(loss, wanted, rtol=1e-3 if autocast else 1e-6, atol=0)
    pair = [torch.autograd.grad(one, hidden)[0] for one in (loss, wanted)]
    assert (pair[0] - pair[1]).norm() < (0.02 if autocast else 1e-6) * pair[1].norm()


@pytest.mark.parametrize("frozen", [False, True])
def test_fp16_gradients_are_made_of_the_scaled_loss(frozen):
    """Below fp16's least number (6e-8) are a token's weight times most probabilities, and not those times the scale."""
    torch.manual_seed(0)
    num_tokens, vocab, scale = 64, 2000, 2.0**16
    head, hidden = nn.Linear(HIDDEN, vocab, bias=False), torch.randn(num_tokens, HIDDEN, requires_grad=True)
    head.requires_grad_(not frozen)
    targets, weights = torch.randint(vocab, (num_tokens,)), torch.full((num_tokens,), 1e-5)
    leaves = [hidden, *([] if frozen else [head.weight])]
    with torch.autocast("cpu", torch.float16):
        got = weighted_nll(hidden, head, targets, weights)[0]
    wanted = (F.cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
    pairs = zip(torch.autograd.grad(scale * got, leaves), torch.autograd.grad(scale * wanted, leaves), strict=True)
    assert all((a - b).norm() < 2e-3 * b.norm() for a, b in pairs)


def test_its_gradients_are_given_once(hidden, head):
    loss, _ = weighted_nll(hidden, head, torch.zeros(NUM_TOKENS, dtype=torch.int64), torch.ones(NUM_TOKENS))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward goes through it once"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_with_something_in_it_is_called(hidden, targets, frozen, autocast):
    """An adapter or a hook has its say; where nothing of it trains, once for each chunk."""
    calls = []

    class Doubled(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return 2 * super().forward(x)

    torch.manual_seed(0)
    head, hooked = Doubled(HIDDEN, VOCAB), nn.Linear(HIDDEN, VOCAB)
    hooked.load_state_dict(head.state_dict())
    hooked.register_forward_hook(lambda module, arguments, output: 2 * output)
    targets, weights = targets.clamp(min=0), torch.linspace(-1, 2, NUM_TOKENS)
    for one in (head, hooked):
        one.requires_grad_(not frozen)
        leaves = [hidden, *(p for p in one.parameters() if p.requires_grad)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wanted = F.cross_entropy(one(hidden).float(), targets, reduction="none").mul(weights).sum()
            calls.clear()
            got, nll = weighted_nll(hidden, one, targets, weights, 10)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close((nll * weights).sum(), wanted.detach())
        pairs = zip(torch.autograd.grad(2 * got, leaves), torch.autograd.grad(2 * wanted, leaves), strict=True)
        assert all((a - b).norm() < (0.02 if autocast else 1e-6) * b.norm() for a, b in pairs)
        assert one is hooked or sorted(calls) == sorted([10, 10, 10, 7] * (1 if frozen else 2))
        with torch.no_grad():
            torch.testing.assert_close(
                weighted_nll(hidden, one, targets, weights, 10)[0], got.detach(), rtol=0.01, atol=0.1
            )


def test_what_is_scored_is_what_carries_a_label(targets):
    """And the tokens of a row count together as much as those of any other."""
    labels = targets[:36].reshape(3, 12).clone()
    labels[1] = IGNORE
    scored = scored_tokens(labels)
    rows = [(b, i) for b in range(3) for i in range(11) if labels[b, i + 1] != IGNORE]
    assert scored.at.tolist() == [12 * b + i for b, i in rows] and scored.weights.dtype == torch.float32
    for b in (0, 2):
        assert scored.weights[[row == b for row, _ in rows]].sum().item() == pytest.approx(1 / 3)


def test_the_losses_of_examples_are_their_own_means(head, targets):
    hidden = torch.randn(3, 12, HIDDEN, generator=torch.Generator().manual_seed(3)).requires_grad_()
    labels = targets[:36].reshape(3, 12).clone()
    labels[1] = IGNORE
    loss, by_example = loss_and_example_losses(hidden, head, labels, scored_tokens(labels))
    logits = head(hidden)
    wanted = [F.cross_entropy(logits[b, :-1], labels[b, 1:], ignore_index=IGNORE).item() for b in (0, 2)]
    assert by_example.tolist() == pytest.approx([wanted[0], 0, wanted[1]], rel=1e-5) and not by_example.requires_grad
    assert loss.item() == pytest.approx(sum(wanted) / 3, rel=1e-5)


def weighted_rows(targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [3, 12], the second row without any, and their weights."""
    labels = targets[:36].reshape(3, 12).clone()
    labels[1] = IGNORE
    return labels, torch.rand(3, 12, generator=torch.Generator().manual_seed(8)) + 0.01


def test_the_loss_of_an_example_is_the_weighted_mean_of_its_tokens(head, targets):
    """In fp64, by hand; only how the weights of a row compare counts, and a row counts as much as any other."""
    hidden = torch.randn(3, 12, HIDDEN, generator=torch.Generator().manual_seed(3)).requires_grad_()
    labels, weights = weighted_rows(targets)
    logits = head.double()(hidden.double())
    nll = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], ignore_index=IGNORE, reduction="none")
    counted = weights[:, 1:].double() * (labels[:, 1:] != IGNORE)
    wanted = [((nll[b] * counted[b]).sum() / counted[b].sum()).item() for b in (0, 2)]
    head.float()
    for scale in (torch.ones(3, 1), torch.tensor([[2.0], [3.0], [0.1]])):
        scored = scored_tokens(labels, weights * scale)
        loss, by_example = loss_and_example_losses(hidden, head, labels, scored)
        assert by_example.tolist() == pytest.approx([wanted[0], 0, wanted[1]], rel=1e-5)
        assert loss.item() == pytest.approx(sum(wanted) / 3, rel=1e-5)
        assert scored.weights.sum().item() == pytest.approx(2 / 3)


def test_equal_weights_are_no_weights(targets):
    """To the bit."""
    labels, _ = weighted_rows(targets)
    plain, equal = scored_tokens(labels), scored_tokens(labels, torch.ones(3, 12))
    assert torch.equal(plain.at, equal.at) and torch.equal(plain.weights, equal.weights)
    counts = (labels[:, 1:] != IGNORE).sum(1)
    assert torch.equal(plain.weights, (3 * counts).float().reciprocal().repeat_interleave(counts))


def test_a_batch_carries_the_weights_bit_for_bit_where_floats_are_rounded(targets):
    """As DeepSpeed does, to bf16."""
    labels, weights = weighted_rows(targets)
    items = [{"labels": row, "token_weights": w} for row, w in zip(labels, weights, strict=True)]
    batch = collate_scored(items)
    assert batch.keys() == {"labels", "scored_at", "scored_weights"}
    sent = {name: one.bfloat16() if one.is_floating_point() else one for name, one in batch.items()}
    got, wanted = Targets.of_batch(sent), scored_tokens(labels, weights)
    assert torch.equal(got.at, wanted.at) and torch.equal(got.weights, wanted.weights)
    assert Targets.of_batch({"labels": labels}) is None


def test_weighted_micro_batches_add_up(head, targets):
    hidden = torch.randn(3, 12, HIDDEN, generator=torch.Generator().manual_seed(3))
    labels, weights = weighted_rows(targets)

    def loss(rows):
        scored = scored_tokens(labels[rows], weights[rows])
        return loss_and_example_losses(hidden[rows], head, labels[rows], scored)[0].item()

    assert sum(loss([b]) for b in range(3)) / 3 == pytest.approx(loss([0, 1, 2]), rel=1e-6)


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


def kl_by_hand(head, student, teacher):
    p, q = head(teacher).double().log_softmax(-1).detach(), head(student).double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


HEADS_OF_KL = {
    "plain": lambda head: head,
    "frozen": lambda head: head.requires_grad_(False),
    "with a hook": lambda head: head.register_forward_hook(lambda *given: given[-1]) and head,
    "frozen, with a hook": lambda head: HEADS_OF_KL["with a hook"](head.requires_grad_(False)),
}


def tokens(is_in, weights):
    (at,) = is_in.nonzero(as_tuple=True)
    return Targets(at, weights[at])


def distillation(scored, distilled):
    """What `weighted_nll_and_kl` is given of tokens of which some are scored, and some have a student."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(2, len(scored), generator=generator) + 0.1
    both = tokens(scored, weights[0]), tokens(distilled, weights[1])
    targets = torch.randint(VOCAB, (len(scored),), generator=generator)
    return targets, *both, (scored & ~distilled).nonzero()[:, 0]


SOME = torch.rand(2, NUM_TOKENS, generator=torch.Generator().manual_seed(4)) < torch.tensor([[0.7], [0.5]])
ALL = torch.ones(NUM_TOKENS, dtype=torch.bool)
SCORED_AND_DISTILLED = {
    "some": tuple(SOME),
    "all": (ALL, ALL),
    "none scored": (~ALL, SOME[1]),
    "none distilled": (SOME[0], ~ALL),
    "apart": (SOME[0], ~SOME[0]),
    "nothing": (~ALL, ~ALL),
}


@pytest.mark.parametrize("which", SCORED_AND_DISTILLED)
@pytest.mark.parametrize("kind", HEADS_OF_KL)
@pytest.mark.parametrize("chunk_len", [4, 20, 1024])
def test_weighted_nll_and_kl_by_hand(head, hidden, which, kind, chunk_len):
    """Values, their weighted sum and its gradients, in fp64; the KL gives none to the teacher."""
    head = HEADS_OF_KL[kind](head)
    is_scored, is_distilled = SCORED_AND_DISTILLED[which]
    targets, scored, distilled, alone = distillation(is_scored, is_distilled)
    noise = torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5))
    student = (hidden + noise).detach()[distilled.at].requires_grad_()
    got = weighted_nll_and_kl(hidden, student, head, targets, scored, distilled, alone, 0.7, chunk_len)

    logits = F.linear(hidden.double(), head.weight.double(), head.bias.double())
    nll = F.cross_entropy(logits, targets, reduction="none")
    kl = kl_by_hand(head, student, hidden.detach()[distilled.at])
    wanted = (nll[scored.at] * scored.weights).sum() + 0.7 * (kl * distilled.weights).sum()
    torch.testing.assert_close(got.nll[scored.at].double(), nll[scored.at].detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.kl.double(), kl.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got.loss.double(), wanted, atol=1e-6, rtol=1e-6)
    assert got.loss.dtype == torch.float32 and not got.nll.requires_grad and not got.kl.requires_grad
    trained = [hidden, student, *(p for p in head.parameters() if p.requires_grad)]
    pairs = zip(*(torch.autograd.grad(2 * one, trained, allow_unused=True) for one in (got.loss, wanted)), strict=True)
    for a, b in pairs:
        zero = torch.zeros(())
        a, b = (zero if a is None else a), (zero if b is None else b.float())
        torch.testing.assert_close(a, b.expand_as(a), atol=1e-5, rtol=1e-5)


def test_weighted_nll_and_kl_without_gradients(head, hidden):
    targets, scored, distilled, alone = distillation(*SOME)
    given = hidden, hidden[distilled.at] + 1, head, targets, scored, distilled, alone
    with torch.no_grad():
        got = weighted_nll_and_kl(*given)
    assert not got.loss.requires_grad
    torch.testing.assert_close(got.loss, weighted_nll_and_kl(*given).loss.detach())


def test_logits_of_teacher_and_student_are_made_once_and_exist_for_a_chunk_alone(monkeypatch, head, hidden):
    """The teacher's serve both losses: 12 tokens have both, 20 a student alone, 5 a cross-entropy alone."""
    shapes, honest = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *given: shapes.append(len(x)) or honest(x, *given))
    place = torch.arange(NUM_TOKENS)
    targets, scored, distilled, alone = distillation((place < 12) | (place >= 32), place < 32)
    weighted_nll_and_kl(hidden, hidden[:32] + 1, head, targets, scored, distilled, alone, 1, 20)[0].backward()
    assert shapes == [20, 20, 20, 4, 5]


@pytest.mark.parametrize("num", [0, 5, 12])
def test_a_head_in_parts_is_called_as_often_in_every_process(num):
    """Each call gathers it from all processes, whatever number of tokens they score: as for 12 here."""
    torch.manual_seed(0)
    hidden, head, calls = torch.randn(num, 8, requires_grad=True), nn.Linear(8, 11), []
    head.weight.ds_id = 0
    head.register_forward_hook(lambda *args: calls.append(1))
    given = hidden, head, torch.randint(11, (num,)), torch.rand(num)
    total, by_token = weighted_nll(*given, chunk_len=4, at_most=12)
    assert len(calls) == 3
    total.backward()
    assert len(calls) == 2 * 3, "the backward pass makes the logits again"
    wanted, wanted_by_token = weighted_nll(*given, chunk_len=4)
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(by_token, wanted_by_token)


@pytest.mark.parametrize("which", SCORED_AND_DISTILLED)
def test_a_head_in_parts_is_called_as_often_whichever_tokens_have_a_student(head, hidden, which):
    targets, scored, distilled, alone = distillation(*SCORED_AND_DISTILLED[which])
    student, calls = hidden.detach()[distilled.at] + 1, []
    given = hidden, student, head, targets, scored, distilled, alone, 1.0, 16
    wanted = weighted_nll_and_kl(*given)
    head.weight.ds_id = 0
    head.register_forward_hook(lambda *args: calls.append(1))
    got = weighted_nll_and_kl(*given)
    assert len(calls) == 5 + 3
    got.loss.backward()
    assert len(calls) == 2 * (5 + 3)
    torch.testing.assert_close(got.loss, wanted.loss)
    torch.testing.assert_close(got.kl, wanted.kl)
