"""Perplexity against a plain implementation: stock transformers, one window at a time, full logits."""

import copy
import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig

from pose.evaluation.perplexity import Perplexity, sliding, spread, truncated
from pose.evaluation.scoring import Scorer
from pose.modeling.load import build_model, load_config, scale_config
from pose.rope import Dynamic

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"
BOS = 96
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
BYTES = np.random.default_rng(3).integers(1, 9, 97)


@functools.cache
def models(kind: str):
    """A model of ours, and the same weights as stock transformers builds and runs them, in float64."""
    torch.manual_seed(0)
    if kind == "tiny":
        config = load_config(str(TINY))
        stock = AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager", dtype=torch.float64)
        return build_model(config, str(TINY)), stock.eval()
    config = {
        "gqa": LlamaConfig(**SIZES),
        "mha": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
        "sliding window": MistralConfig(**SIZES, sliding_window=11),
        "dynamic": LlamaConfig(**SIZES | {"max_position_embeddings": 18}),
    }[kind]
    if kind == "dynamic":
        scale_config(config, Dynamic(), 40)
    model = build_model(config, None, "sdpa")
    stock = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    stock.load_state_dict(model.state_dict())
    return model, stock.double().eval()


def documents_for(model, lengths=(40, 97, 151)):
    """One exactly as long as the longest window, two longer; stored small, as a token cache stores them."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, min(BOS, model.config.vocab_size), length).astype(np.uint16) for length in lengths]


class Losses:
    """A document's losses, one window at a time, with the stock model; remembers what it has computed."""

    def __init__(self, stock, bos=None):
        self.stock, self.bos, self.known = stock, bos, {}

    def __call__(self, document, start: int, end: int) -> dict[int, float]:
        """{index in the document: loss} of every token after the first of one window."""
        key = (document.tobytes(), start, end)
        if key not in self.known:
            tokens = torch.tensor(document[start:end].astype(np.int64))
            assert len(tokens) == end - start
            if self.bos is not None:
                tokens[0] = self.bos
            with torch.no_grad():
                stock = copy.deepcopy(self.stock)  # `dynamic` remembers the longest text it has seen
                log_p = stock(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
            self.known[key] = {start + i: -log_p[i - 1, tokens[i]].item() for i in range(1, end - start)}
        return self.known[key]


def plain_starts(last: int, windows: int) -> list[int]:
    if windows == 1 or last == 0:
        return [0]
    return sorted({math.floor(i * last / (windows - 1)) for i in range(windows)})


def plain(losses, documents, lengths, *, windows, tail, bin, stride, sliding_tokens=None, token_bytes):
    """The definitions, token by token and a window for each length."""
    scored, bytes_of = {}, {}
    longest = max(lengths)
    for document in documents:
        for start in plain_starts(len(document) - longest, min(windows, math.ceil(len(document) / longest))):
            for n in lengths:
                for t, loss in losses(document, start, start + n).items():
                    scored.setdefault(f"ppl@{n}", []).append(loss)
                    bytes_of.setdefault(n, []).append(int(token_bytes[document[t]]))
                    if n == longest:
                        a = (t - start) // bin * bin
                        scored.setdefault(f"position_ppl@{a}-{min(a + bin, n)}", []).append(loss)
                end = start + longest
                for t in range(end - tail, end) if tail is not None and n > tail else ():
                    scored.setdefault(f"tail_ppl@{n}", []).append(losses(document, end - n, end)[t])
        cut = document[:sliding_tokens]
        for n in lengths if stride else ():
            previous = 1
            for start in itertools.count(0, stride):
                end = min(start + n, len(cut))
                window = losses(cut, start, end)
                scored.setdefault(f"sliding_ppl@{n}", []).extend(window[t] for t in range(previous, end))
                previous = end
                if end == len(cut):
                    break
    metrics = {name: math.exp(math.fsum(values) / len(values)) for name, values in scored.items()}
    for n in lengths:
        metrics[f"bits_per_byte@{n}"] = math.fsum(scored[f"ppl@{n}"]) / math.log(2) / sum(bytes_of[n])
    return metrics


def run(scorer, documents, lengths, **options):
    """The values of a task that has been through JSON between its units, as in an evaluation that was killed."""
    options = {"token_bytes": BYTES, "windows": 3, "tail": 9, "bin": 16, "stride": None} | options
    task = Perplexity(documents, [f"d{i}" for i in range(len(documents))], lengths, **options)
    outcomes = json.loads(json.dumps({unit: task.measure(scorer, unit) for unit in task.units()}))
    return {name: estimate.value for name, estimate in task.summarise(outcomes).items()}


class Recorder:
    """Stands in for a scorer: a loss that depends on the scored token alone; keeps what it was asked."""

    by_length = False

    def __init__(self, vocab: int):
        self.table = np.random.default_rng(1).random(vocab)
        self.calls = []

    def batches(self, windows):
        for window in windows:
            yield window[None]

    def nll(self, windows, scored):
        if isinstance(scored, int):
            scored = np.arange(windows.shape[1] - scored, windows.shape[1])
        self.calls.append((windows[0], scored))
        return self.table[windows[:, scored]]


KINDS = ["gqa", "mha", "sliding window", "dynamic"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "windows, tail, bin, stride", [(3, 9, 16, 3), (1, 20, 7, 15), (12, None, 64, 12), (4, 8, 1, 7)]
)
def test_everything_is_that_of_a_plain_loop(kind, windows, tail, bin, stride):
    """Several documents; strides that divide and do not; 151 - 16 = 9 * 15. Every other case begins with BOS."""
    model, stock = models(kind)
    bos = BOS if (KINDS.index(kind) + windows) % 2 else None
    documents, lengths = documents_for(model), [16, 23, 40]
    options = {"windows": windows, "tail": tail, "bin": bin, "stride": stride, "token_bytes": BYTES}
    ours = run(Scorer(model, 100), documents, lengths, bos_id=bos, **options)
    wanted = plain(Losses(stock, bos), documents, lengths, **options)
    assert ours.keys() == wanted.keys()
    assert ours == pytest.approx(wanted, rel=1e-5)


def test_a_document_counts_by_its_text_and_not_by_its_windows():
    """Several windows of one hardly longer than they would score the same tokens again and again."""
    for tokens, scored in ((64, 63), (71, 2 * 63), (128, 2 * 63), (129, 3 * 63), (600, 8 * 63)):
        outcome = truncated(
            Recorder(1), np.zeros(tokens, int), [64], token_bytes=np.ones(1, int), windows=8, tail=None, bin=64
        )
        assert outcome["ppl@64"][1] == scored, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_windows_longer_than_a_chunk_give_the_same(kind):
    model, stock = models(kind)
    documents, lengths = documents_for(model), [16, 40]
    scorer = Scorer(model, 1)
    scorer.chunk_len = 7
    options = {"windows": 3, "tail": 9, "bin": 16, "stride": 11, "token_bytes": BYTES}
    wanted = plain(Losses(stock, BOS), documents, lengths, **options)
    assert run(scorer, documents, lengths, bos_id=BOS, **options) == pytest.approx(wanted, rel=1e-5)


def test_the_shipped_model():
    """Real weights, real text, lengths within and beyond its window, a short last window."""
    model, stock = models("tiny")
    text = (TINY / "README.md").read_text()
    document = np.array(AutoTokenizer.from_pretrained(TINY)(text).input_ids[:700])
    assert len(document) == 700
    token_bytes = np.random.default_rng(0).integers(1, 9, 4096)
    options = {"windows": 2, "tail": 32, "bin": 64, "stride": 100, "token_bytes": token_bytes}
    ours = run(Scorer(model, 1024), [document], [128, 512], **options)
    wanted = plain(Losses(stock), [document], [128, 512], **options)
    assert ours == pytest.approx(wanted, rel=1e-5)


def test_the_reference_tells_metrics_apart():
    """The comparisons above could not pass with a metric in another's place, or with lengths that do not matter."""
    for kind in ("gqa", "dynamic"):
        model, stock = models(kind)
        values = plain(
            Losses(stock), documents_for(model), [16, 23, 40], windows=3, tail=9, bin=13, stride=7, token_bytes=BYTES
        )
        assert len(values) == 16
        assert all(b / a > 1 + 1e-4 for a, b in itertools.pairwise(sorted(values.values())))
    model, stock = models("dynamic")
    document = documents_for(model)[1]
    long, short = Losses(stock)(document, 0, 40), Losses(stock)(document, 0, 30)
    assert max(abs(long[t] - short[t]) for t in short) > 1e-2


def test_one_pass_of_a_window_serves_all_lengths():
    """And where frequencies depend on the length there is one for each: the same prefixes."""
    recorder = Recorder(140)
    run(recorder, [np.arange(100)], [12, 25, 40], windows=3, tail=None, token_bytes=np.ones(140, int))
    assert [(window[0], len(window), len(at)) for window, at in recorder.calls] == [(s, 40, 39) for s in (0, 30, 60)]
    recorder = Recorder(140)
    recorder.by_length = True
    run(recorder, [np.arange(100)], [12, 25, 40], windows=3, tail=None, token_bytes=np.ones(140, int))
    asked = sorted((window[0], len(window), len(at)) for window, at in recorder.calls)
    assert asked == [(start, n, n - 1) for start in (0, 30, 60) for n in (12, 25, 40)]


def test_lengths_up_to_the_tail_have_no_tail_perplexity():
    document, token_bytes = np.arange(40), np.ones(40, int)
    for tail, wanted in ((20, ["tail_ppl@21"]), (None, []), (15, ["tail_ppl@16", "tail_ppl@20", "tail_ppl@21"])):
        metrics = run(Recorder(40), [document], [16, 20, 21], tail=tail, token_bytes=token_bytes)
        assert [name for name in metrics if name.startswith("tail")] == wanted


def test_tail_perplexity_scores_the_same_tokens_at_every_length():
    """Tokens tell their place, and losses their token: equal means are of equal tokens."""
    documents = [np.arange(40), np.arange(40, 140)]
    recorder = Recorder(140)
    metrics = run(recorder, documents, [12, 25, 40], tail=10, token_bytes=np.ones(140, int))
    tails = [*range(30, 40), *range(70, 80), *range(100, 110), *range(130, 140)]  # ends: 40; 80, 110, 140
    for n in (12, 25, 40):
        assert metrics[f"tail_ppl@{n}"] == pytest.approx(np.exp(recorder.table[tails].mean()), rel=1e-12)


def test_bos_takes_the_place_of_the_first_token_and_is_never_scored():
    recorder = Recorder(140)
    token_bytes = np.where(np.arange(140) == 139, 10**6, 1)
    metrics = run(recorder, [np.arange(100)], [12, 40], tail=10, stride=7, bos_id=139, token_bytes=token_bytes)
    for window, scored in recorder.calls:
        assert window[0] == 139
        assert (np.diff(window[1:]) == 1).all()
        assert scored.min() > 0
    assert metrics["bits_per_byte@12"] > 0.01  # its bytes are not counted either


def test_documents_are_not_written_to():
    document = np.arange(50)
    run(Recorder(60), [document], [20], tail=5, stride=7, bos_id=59, token_bytes=np.ones(60, int))
    assert (document == np.arange(50)).all()


def test_means_are_over_tokens_not_over_documents():
    """Document one has 1 window, document two 4: the second counts four times as much."""
    recorder = Recorder(2)
    recorder.table = np.array([1.0, 3.0])
    documents = [np.zeros(10, int), np.ones(40, int)]
    metrics = run(recorder, documents, [10], windows=4, tail=3, bin=5, stride=7, token_bytes=np.array([2, 5]))
    expected = pytest.approx(np.exp((1 * 1.0 + 4 * 3.0) / 5))
    assert metrics == {
        **dict.fromkeys(["ppl@10", "tail_ppl@10", "position_ppl@0-5", "position_ppl@5-10"], expected),
        "sliding_ppl@10": pytest.approx(np.exp((9 * 1.0 + 39 * 3.0) / 48)),
        "bits_per_byte@10": pytest.approx((1 * 1.0 + 4 * 3.0) / np.log(2) / (1 * 2 + 4 * 5)),
    }


def test_intervals_are_over_documents():
    """Of documents, by their tokens."""
    task = Perplexity([np.zeros(9, int)] * 3, "abc", [9], token_bytes=np.ones(1, int))
    outcomes = {"0:a": {"ppl@9": [8.0, 8, 16]}, "1:b": {"ppl@9": [40.0, 16, 32]}, "2:c": {"ppl@9": [9.0, 8, 24]}}
    assert list(task.units()) == list(outcomes)
    found = task.summarise(outcomes)
    assert set(found) == {"ppl@9", "bits_per_byte@9"}
    assert found["ppl@9"].value == pytest.approx(math.exp(57 / 32)) and found["ppl@9"].num == 3
    rest = [8 - 57 / 4, 40 - 57 / 2, 9 - 57 / 4]  # of losses over what the mean of all gives
    half = 4.3027 * math.sqrt(3 / 2 * sum(one**2 for one in rest)) / 32
    assert found["ppl@9"].low == 1.0 > math.exp(57 / 32 - half), "no perplexity is below 1"
    assert found["ppl@9"].high == pytest.approx(math.exp(57 / 32 + half), rel=1e-4)
    assert found["bits_per_byte@9"].value == pytest.approx(57 / math.log(2) / 72)
    assert found["bits_per_byte@9"].low < found["bits_per_byte@9"].value < found["bits_per_byte@9"].high
    near = task.summarise({key: {"ppl@9": [of["ppl@9"][0] + 80, *of["ppl@9"][1:]]} for key, of in outcomes.items()})[
        "ppl@9"
    ]
    rest = [88 - 297 / 4, 120 - 297 / 2, 89 - 297 / 4]
    half = 4.3027 * math.sqrt(3 / 2 * sum(one**2 for one in rest)) / 32
    assert near.low == pytest.approx(math.exp(297 / 32 - half), rel=1e-4) and near.low > 1
    one = task.summarise({"0:a": outcomes["0:a"]})["ppl@9"]
    assert (one.value, one.low, one.high, one.num) == (pytest.approx(math.e), None, None, 1)


def test_a_unit_says_all_that_its_outcome_depends_on():
    base = {
        "documents": [np.arange(40), np.arange(50)], "ids": ["a", "a"], "lengths": [20, 10], "windows": 3, "tail": 5,
        "bin": 8, "stride": None, "sliding_tokens": None, "bos_id": None, "token_bytes": np.ones(60, int),
    }  # fmt: skip
    units = Perplexity(**base).units()
    assert list(units) == ["0:a", "1:a"]  # ids may repeat
    assert units["0:a"] == json.loads(json.dumps(units["0:a"]))
    same = base | {"documents": [d.astype(np.uint16) for d in base["documents"]], "lengths": [10, 20, 20]}
    assert Perplexity(**same).units() == units
    changes = {
        "lengths": [10, 21], "windows": 4, "tail": None, "bin": 9, "stride": 4, "sliding_tokens": 30, "bos_id": 2,
        "token_bytes": np.full(60, 2), "documents": [np.arange(1, 41), np.arange(50)],
    }  # fmt: skip
    for name, value in changes.items():
        assert Perplexity(**base | {name: value}).units()["0:a"] != units["0:a"], name
    assert Perplexity(**base | {"documents": changes["documents"]}).units()["1:a"] == units["1:a"]
    large = [base["documents"][0] + 2**16, base["documents"][1]]  # as vocabularies of more than 65,536 tokens have them
    assert Perplexity(**base | {"documents": large}).units()["0:a"] != units["0:a"]


def test_sliding_perplexity_of_the_first_tokens():
    """`sliding_tokens` cuts documents, and leaves shorter ones whole."""
    model, stock = models("gqa")
    options = {"windows": 1, "tail": None, "bin": 16, "stride": 5, "sliding_tokens": 60, "token_bytes": BYTES}
    ours = run(Scorer(model, 500), documents_for(model), [16], **options)
    assert ours == pytest.approx(plain(Losses(stock), documents_for(model), [16], **options), rel=1e-5)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_sliding_windows_score_every_token_after_the_first_once(data):
    n = data.draw(st.integers(2, 12))
    stride = data.draw(st.integers(1, n - 1))
    length = data.draw(st.integers(2, 60))
    recorder = Recorder(length)
    assert sliding(recorder, np.arange(length), [n], stride=stride) == {
        f"sliding_ppl@{n}": [pytest.approx(recorder.table[1:].sum()), length - 1]
    }
    scored = np.concatenate([window[at] for window, at in recorder.calls])
    assert scored.tolist() == list(range(1, length))
    assert [window[0] for window, _ in recorder.calls] == [i * stride for i in range(len(recorder.calls))]
    assert all(len(window) == n for window, _ in recorder.calls[:-1])
    assert all(len(at) == stride for _, at in recorder.calls[1:-1])
    assert recorder.calls[-1][0][-1] == length - 1


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_sliding_windows_of_several_lengths_share_passes(data):
    """The losses are those of each length alone (here a token's loss is known by its window's start), in the passes of
    all places where some window begins, none longer than it must be."""
    lengths = data.draw(st.lists(st.integers(2, 14), min_size=2, max_size=4, unique=True))
    stride = data.draw(st.integers(1, min(lengths) - 1))
    document = np.arange(data.draw(st.integers(2, 60)))

    class ByStart(Recorder):
        def nll(self, windows, scored):
            super().nll(windows, scored)
            return self.table[scored] * (1 + windows[:, :1])

    def losses(lengths, by_length=False):
        recorder = ByStart(len(document))
        recorder.by_length = by_length
        return sliding(recorder, document, lengths, stride=stride), recorder.calls

    together, calls = losses(lengths)
    apart, longest = {}, {}
    for n in lengths:
        sums, alone = losses([n])
        apart |= sums
        for window, _ in alone:
            longest[window[0]] = max(longest.get(window[0], 0), len(window))
    wanted = {name: pytest.approx(sums) for name, sums in apart.items()}
    assert together == wanted and losses(lengths, by_length=True)[0] == wanted
    assert {window[0]: len(window) for window, _ in calls} == longest and len(calls) == len(longest)


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


def test_results_do_not_depend_on_the_batch():
    model, _ = models("gqa")
    results = [
        run(Scorer(model, size), documents_for(model), [16, 40], windows=5, stride=9) for size in (1, 90, 10_000)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0] == pytest.approx(results[2], rel=1e-5)
