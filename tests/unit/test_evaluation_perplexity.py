"""Perplexity against a plain implementation: stock transformers, one window at a time, full logits."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pose.evaluation.perplexity import Mean, sliding_perplexity, spread, truncated_perplexity
from pose.evaluation.scoring import Scorer
from pose.modeling.load import build_model

VOCAB, BOS = 97, 96
CONFIG = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(LlamaConfig(**CONFIG), None, "sdpa")


@pytest.fixture(scope="module")
def stock(model):
    reference = LlamaForCausalLM._from_config(LlamaConfig(**CONFIG), attn_implementation="eager")
    reference.load_state_dict(model.state_dict())
    return reference.double().eval()


@pytest.fixture(scope="module")
def documents():
    """One exactly as long as the longest window, two longer; stored small, as a token cache stores them."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, BOS, length).astype(np.uint16) for length in (40, 97, 151)]


class Losses:
    """A document's losses, one at a time, with the stock model; remembers what it has computed."""

    def __init__(self, stock, bos):
        self.stock, self.bos, self.known = stock, bos, {}

    def __call__(self, document, start: int, n: int) -> dict[int, float]:
        """{index in the document: loss} of every token after the first of one window."""
        key = (document.tobytes(), start, n)
        if key not in self.known:
            tokens = torch.tensor(document[start : start + n].astype(np.int64))
            assert len(tokens) == n
            if self.bos is not None:
                tokens[0] = self.bos
            with torch.no_grad():
                log_p = self.stock(input_ids=tokens[None]).logits[0].log_softmax(-1)
            self.known[key] = {start + i: -log_p[i - 1, tokens[i]].item() for i in range(1, n)}
        return self.known[key]


def perplexity(losses) -> float:
    return math.exp(math.fsum(losses) / len(losses))


def plain_starts(last: int, windows: int) -> list[int]:
    if windows == 1 or last == 0:
        return [0]
    return sorted({math.floor(i * last / (windows - 1)) for i in range(windows)})


def plain_truncated(losses, documents, lengths, windows, tail, bin):
    """The definitions, token by token."""
    scored = {}
    longest = max(lengths)
    for document in documents:
        for n in lengths:
            for start in plain_starts(len(document) - n, windows):
                for t, loss in losses(document, start, n).items():
                    scored.setdefault(f"ppl@{n}", []).append(loss)
                    if n == longest:
                        a = (t - start) // bin * bin
                        scored.setdefault(f"position_ppl@{a}-{min(a + bin, n)}", []).append(loss)
            if n <= tail:
                continue
            for start in plain_starts(len(document) - longest, windows):
                end = start + longest
                for t in range(end - tail, end):
                    scored.setdefault(f"tail_ppl@{n}", []).append(losses(document, end - n, n)[t])
    return {name: perplexity(values) for name, values in scored.items()}


def plain_sliding(losses, documents, n, stride, max_tokens=None):
    """Windows end at n, n + stride, ... and at the document's end; each scores what none before it has."""
    scored = []
    for document in documents:
        document = document[:max_tokens]
        known = 1
        for end in [*range(n, len(document), stride), len(document)]:
            window = losses(document, end - n, n)
            scored += [window[t] for t in range(known, end)]
            known = end
    return perplexity(scored)


class Recorder:
    """Stands in for a scorer: a loss that depends on the scored token alone; keeps what it was asked."""

    def __init__(self, vocab: int):
        self.table = np.random.default_rng(1).random(vocab)
        self.calls = []

    def batches(self, windows):
        for window in windows:
            yield window[None]

    def nll(self, windows, num_scored):
        self.calls.append((windows[0], num_scored))
        return self.table[windows[:, -num_scored:]]


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("windows, tail, bin", [(3, 9, 16), (1, 20, 7), (50, 15, 64), (4, 8, 1)])
def test_truncated_perplexity_is_that_of_a_plain_loop(model, stock, documents, bos, windows, tail, bin):
    lengths = [16, 23, 40]
    ours = truncated_perplexity(
        Scorer(model, 100), documents, lengths, windows=windows, tail=tail, bin=bin, bos_id=bos, progress=False
    )
    plain = plain_truncated(Losses(stock, bos), documents, lengths, windows, tail, bin)
    assert ours.keys() == plain.keys()
    assert ours == pytest.approx(plain, rel=1e-5)


def test_the_reference_tells_metrics_apart(stock, documents):
    """The comparison above could not pass with a metric in another's place."""
    plain = plain_truncated(Losses(stock, None), documents, [16, 23, 40], 3, 9, 16)
    values = sorted(plain.values())
    assert len(values) == 9
    assert all(b / a > 1 + 1e-4 for a, b in itertools.pairwise(values))


def test_lengths_up_to_the_tail_have_no_tail_perplexity(model, documents):
    metrics = truncated_perplexity(
        Scorer(model, 400), documents, [16, 20, 21], windows=2, tail=20, bin=64, progress=False
    )
    assert [name for name in metrics if name.startswith("tail")] == ["tail_ppl@21"]


def test_tail_perplexity_scores_the_same_tokens_at_every_length():
    """Tokens tell their place, and losses their token: equal means are of equal tokens."""
    documents = [np.arange(40), np.arange(40, 140)]
    recorder = Recorder(140)
    metrics = truncated_perplexity(
        recorder, documents, [12, 25, 40], windows=3, tail=10, bin=64, bos_id=None, progress=False
    )
    tails = [*range(30, 40), *range(70, 80), *range(100, 110), *range(130, 140)]  # ends: 40; 80, 110, 140
    for n in (12, 25, 40):
        assert metrics[f"tail_ppl@{n}"] == pytest.approx(np.exp(recorder.table[tails].mean()), rel=1e-12)
        ends = {window[-1] + 1 for window, _ in recorder.calls if len(window) == n}
        assert {40, 80, 110, 140} <= ends


def test_bos_takes_the_place_of_the_first_token_and_is_never_scored():
    recorder = Recorder(140)
    truncated_perplexity(recorder, [np.arange(100)], [12, 40], windows=3, tail=10, bin=64, bos_id=139, progress=False)
    for window, num_scored in recorder.calls:
        assert window[0] == 139
        assert (np.diff(window[1:]) == 1).all()
        assert num_scored == len(window) - 1


def test_documents_are_not_written_to():
    document = np.arange(50)
    truncated_perplexity(Recorder(60), [document], [20], windows=2, tail=5, bin=8, bos_id=59, progress=False)
    sliding_perplexity(Recorder(60), [document], [20], stride=7, bos_id=59, progress=False)
    assert (document == np.arange(50)).all()


def test_means_are_over_tokens_not_over_documents():
    """Document one has 1 window, document two 4: the second counts four times as much."""
    recorder = Recorder(2)
    recorder.table = np.array([1.0, 3.0])
    documents = [np.zeros(10, int), np.ones(40, int)]
    metrics = truncated_perplexity(recorder, documents, [10], windows=4, tail=3, bin=5, progress=False)
    expected = pytest.approx(np.exp((1 * 1.0 + 4 * 3.0) / 5))
    assert metrics == dict.fromkeys(["ppl@10", "tail_ppl@10", "position_ppl@0-5", "position_ppl@5-10"], expected)

    metrics = sliding_perplexity(recorder, documents, [10], stride=7, progress=False)
    assert metrics == {"sliding_ppl@10": pytest.approx(np.exp((9 * 1.0 + 39 * 3.0) / 48))}


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("stride", [3, 15, 19])  # 151 - 16 = 9 * 15: divides; the others leave a short last window
def test_sliding_perplexity_is_that_of_a_plain_loop(model, stock, documents, bos, stride):
    ours = sliding_perplexity(Scorer(model, 100), documents, [20, 31, 40], stride=stride, bos_id=bos, progress=False)
    plain = {f"sliding_ppl@{n}": plain_sliding(Losses(stock, bos), documents, n, stride) for n in (20, 31, 40)}
    assert ours == pytest.approx(plain, rel=1e-5)


def test_sliding_perplexity_of_the_first_tokens(model, stock, documents):
    """`max_tokens` cuts documents, and leaves shorter ones whole."""
    ours = sliding_perplexity(Scorer(model, 500), documents, [16], stride=5, max_tokens=60, progress=False)
    plain = plain_sliding(Losses(stock, None), [d[:60] for d in documents], 16, 5)
    assert ours["sliding_ppl@16"] == pytest.approx(plain, rel=1e-5)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_sliding_windows_score_every_token_after_the_first_once(data):
    n = data.draw(st.integers(2, 12))
    stride = data.draw(st.integers(1, n - 1))
    length = data.draw(st.integers(n, 60))
    recorder = Recorder(length)
    sliding_perplexity(recorder, [np.arange(length)], [n], stride=stride, progress=False)
    scored = np.concatenate([window[-num:] for window, num in recorder.calls])
    assert scored.tolist() == list(range(1, length))
    assert all(len(window) == n for window, _ in recorder.calls)
    assert all(num == stride for _, num in recorder.calls[1:-1])


@pytest.mark.parametrize(
    "last, num, expected",
    [
        (0, 5, [0]),
        (9, 1, [0]),
        (9, 2, [0, 9]),
        (9, 4, [0, 3, 6, 9]),
        (10, 4, [0, 3, 6, 10]),
        (2, 8, [0, 1, 2]),
        (100, 3, [0, 50, 100]),
    ],
)
def test_spread(last, num, expected):
    assert spread(last, num) == expected


@given(last=st.integers(0, 10_000), num=st.integers(2, 50))
def test_spread_is_even_from_end_to_end(last, num):
    places = spread(last, num)
    assert places[0] == 0
    assert places[-1] == last
    assert len(places) == min(num, last + 1)
    gaps = np.diff(places)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_mean_weighs_by_tokens():
    mean = Mean()
    mean.add(np.array([[1.0, 2.0]]))
    mean.add(np.array([6.0]))
    assert mean.perplexity == pytest.approx(math.exp(3))


@given(num=st.integers(0, 20), length=st.integers(1, 9), batch_tokens=st.integers(1, 40))
def test_batches_are_as_full_as_allowed_and_in_order(num, length, batch_tokens):
    windows = [np.arange(length) + 100 * i for i in range(num)]
    batches = list(Scorer.batches(_Limit(batch_tokens), iter(windows)))
    assert all(batch.size <= batch_tokens or len(batch) == 1 for batch in batches)
    assert all((len(batch) + 1) * length > batch_tokens for batch in batches[:-1])
    joined = np.concatenate(batches) if batches else np.empty((0, length))
    assert np.array_equal(joined, np.array(windows).reshape(num, length))


class _Limit:
    """What `Scorer.batches` needs to know of a scorer."""

    def __init__(self, batch_tokens: int):
        self.batch_tokens = batch_tokens


def test_scores_do_not_depend_on_the_batch(model, documents):
    results = [
        truncated_perplexity(Scorer(model, size), documents, [16, 40], windows=5, tail=9, bin=8, progress=False)
        for size in (1, 90, 10_000)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0] == pytest.approx(results[2], rel=1e-5)


def test_scorer_gives_the_stock_models_losses_and_predictions(model, stock, documents):
    """Shapes, types, and values of the last tokens of each window of a batch."""
    windows = np.stack([documents[2][i : i + 30] for i in (0, 50, 100)])
    with torch.no_grad():
        logits = stock(input_ids=torch.from_numpy(windows.astype(np.int64))).logits
    targets = torch.from_numpy(windows.astype(np.int64))
    losses = -logits[:, :-1].log_softmax(-1).gather(2, targets[:, 1:, None])[..., 0]
    scorer = Scorer(model, 1000)
    for num in (1, 7, 29):
        nll = scorer.nll(windows, num)
        assert nll.dtype == np.float64
        np.testing.assert_allclose(nll, losses[:, -num:].numpy(), rtol=1e-4, atol=1e-5)
        assert np.array_equal(scorer.predictions(windows, num), logits[:, -num:].argmax(-1).numpy())


def test_scorer_turns_dropout_off(documents):
    torch.manual_seed(0)
    model = build_model(LlamaConfig(**CONFIG, attention_dropout=0.5), None, "sdpa").train()
    scorer = Scorer(model, 1000)
    window = documents[0][None]
    assert np.array_equal(scorer.nll(window, 20), scorer.nll(window, 20))
