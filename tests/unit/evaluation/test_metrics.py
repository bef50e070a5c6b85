"""Metrics are known before anything is measured: exactly the names that come out, by every task and odd options."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pose.evaluation import generation
from pose.evaluation.harness import FEWSHOT
from pose.evaluation.memo import is_whole
from pose.evaluation.needle import Needle
from pose.evaluation.needle_gain import NeedleGain
from pose.evaluation.passkey import Passkey
from pose.evaluation.perplexity import Perplexity
from pose.evaluation.ruler import Ruler
from pose.evaluation.task import BENCHMARKS, FAMILIES, Metric, Task, describe, shown
from pose.tasks.passkey import PasskeyPrompts

TOKENIZER = PreTrainedTokenizerFast.from_pretrained(Path(__file__).resolve().parents[3] / "assets" / "tiny")
PROMPTS = PasskeyPrompts(TOKENIZER)
HAYSTACK = "\n\n".join(f"Sentence {i} speaks of the sea. Has it an end? Yes!" for i in range(60))
LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=4)
LONG = st.lists(st.integers(400, 420), min_size=1, max_size=3)
DEPTHS = st.lists(st.floats(0, 1), min_size=1, max_size=4)


class FakeScorer:
    """Every token costs a nat, and the most likely one is the first of the vocabulary."""

    def __init__(self, by_length: bool):
        self.by_length = by_length
        self.model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))

    def batches(self, windows):
        for window in windows:
            yield window[None]

    def nll(self, windows, scored):
        return np.ones((len(windows), scored if isinstance(scored, int) else len(scored)))

    def predictions(self, windows, num):
        return np.zeros((len(windows), num), np.int64)

    def ending_nll(self, windows, num):
        return np.ones((len(windows), num))


def measured(task: Task, by_length: bool) -> dict:
    """What comes out, by name, of outcomes that went through the memory's form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "greedy", lambda model, batch, *_: [np.array([5, 6, 7])] * len(batch))
        outcomes = {unit: task.measure(FakeScorer(by_length), unit) for unit in task.units()}
    kept = json.loads(json.dumps(outcomes))
    assert all(is_whole(task, unit, {"outcome": kept[unit], "took": [1.0, 1.0]}) for unit in kept)
    return task.summarise(kept)


@settings(max_examples=150, deadline=None)
@given(
    LENGTHS, st.none() | st.integers(1, 100), st.integers(1, 100), st.booleans(), st.none() | st.integers(90, 120),
    st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_perplexities(lengths, tail, bin, slides, sliding_tokens, windows, by_length):
    documents = [np.arange(num) for num in (100, 130)]
    task = Perplexity(
        documents, ["a", "b"], lengths, token_bytes=np.ones(130, int), windows=windows, tail=tail, bin=bin,
        stride=max(min(lengths) - 1, 1) if slides else None, sliding_tokens=sliding_tokens,
    )  # fmt: skip
    assert list(task.metrics()) == list(measured(task, by_length))
    assert all(metric.higher_is_better is False and not metric.is_share for metric in task.metrics().values())


@settings(max_examples=15, deadline=None)
@given(LONG, DEPTHS, st.integers(1, 3))
def test_needles(lengths, depths, trials):
    task = Needle(TOKENIZER, HAYSTACK, lengths, depths=depths, trials=trials, seed=0)
    assert list(task.metrics()) == list(measured(task, False))
    assert len(task.metrics()) == len(set(lengths)) * (len(set(depths)) + 1)


@settings(max_examples=10, deadline=None)
@given(LONG, DEPTHS, st.integers(4, 6), st.integers(350, 500))
def test_gains(lengths, depths, trials, window):
    task = NeedleGain(TOKENIZER, HAYSTACK, lengths, window=window, depths=depths, trials=trials, seed=0)
    assert list(task.metrics()) == list(measured(task, False))
    assert all(metric.higher_is_better and not metric.is_share for metric in task.metrics().values())


@settings(max_examples=10, deadline=None)
@given(LONG, st.none() | DEPTHS, st.booleans())
def test_passkeys(lengths, depths, generate):
    task = Passkey(PROMPTS, lengths, trials=2, seed=0, depths=depths, generate=generate)
    assert list(task.metrics()) == list(measured(task, False))


@settings(max_examples=10, deadline=None)
@given(LONG, st.none() | DEPTHS, st.sampled_from(["niah_single_2", "fwe"]))
def test_rulers(lengths, depths, name):
    task = Ruler(name, TOKENIZER, HAYSTACK, lengths, trials=2, seed=0, depths=depths)
    assert list(task.metrics()) == list(measured(task, False))
    assert all(metric.title == f"ruler/{name}" and metric.higher_is_better for metric in task.metrics().values())


def tasks() -> dict[str, Task]:
    documents = [np.arange(100), np.arange(130)]
    return {
        "perplexity": Perplexity(documents, ["a", "b"], [8, 16], token_bytes=np.ones(130, int), tail=4, stride=4),
        "needle": Needle(TOKENIZER, HAYSTACK, [400], depths=[0.25, 1], trials=2, seed=0),
        "needle_gain": NeedleGain(TOKENIZER, HAYSTACK, [400], window=400, depths=[0.25, 1], trials=4, seed=0),
        "passkey": Passkey(PROMPTS, [400], trials=2, seed=0),
        "ruler": Ruler("vt", TOKENIZER, HAYSTACK, [900], trials=2, seed=0),
    }


@pytest.mark.parametrize("name", tasks())
def test_outcomes_of_another_shape_are_not_taken_for_whole(name):
    """Whatever stands in the place of any part."""
    task = tasks()[name]
    unit = next(iter(task.units()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "greedy", lambda model, batch, *_: [np.array([5, 6, 7])] * len(batch))
        outcome = json.loads(json.dumps(task.measure(FakeScorer(False), unit)))
    entry = {"outcome": outcome, "took": [1.0, 2.0]}
    assert is_whole(task, unit, entry)
    for damaged in (None, 7, "x", [], {}, {"outcome": outcome}, {"took": [1.0, 2.0]}, entry | {"took": [1.0]}):
        assert not is_whole(task, unit, damaged)
    for key, value in outcome.items():
        lost = {k: v for k, v in outcome.items() if k != key}
        odd = [lost, *(outcome | {key: other} for other in (None, 7, "x", {}, [], [None] * 2, [True] * 2))]
        odd += [outcome | {key: other} for other in (value[:-1], [*value, 1], [None, *value[1:]])]
        if key in ("scores", "found") or name in ("needle", "needle_gain"):
            odd.append(outcome | {key: [7, *value[1:]]})
        for damaged in odd:
            assert not is_whole(task, unit, entry | {"outcome": damaged}), damaged


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("ppl@256", 12.345, "12.3"), ("tail_ppl@256", 2.604, "2.60"), ("ppl@256", 9.994, "9.99"),
        ("ppl@256", 9.995, "10.0"), ("tail_ppl@256", 12345.0, "1.2e+04"), ("position_ppl@0-64", 9999.94, "9999.9"),
        ("sliding_ppl@8", math.inf, "inf"), ("ppl@8", math.nan, "nan"), ("bits_per_byte@256", 1.23456, "1.235"),
        ("passkey@256", 0.95, "95%"), ("needle@256/0.3333333333333333", 1 / 3, "33%"), ("ruler/vt@9", 0.125, "12%"),
        ("passkey@256", math.nan, "nan"), ("harness/boolq", 0.7512, "75.1%"), ("harness/wikitext", 0.7512, "0.751"),
        ("harness/wikitext", 23.456, "23.456"), ("harness/squadv2", 45.25, "45.250"), ("harness/boolq", 45.25, "45.25"),
        ("mine@9", 0.75, "0.75"), ("mine", 1234.5, "1234"), ("needle_gain@256", 0.12345, "0.123"),
        ("needle_gain@256/0.5", -0.0123, "-0.012"), ("needle_gain_kept@256", 1.045, "1.04"),
        ("needle_gain_kept@256", 0.5, "0.50"), ("needle_gain_kept@256", math.nan, "nan"),
    ],
)  # fmt: skip
def test_a_value_is_shown_as_what_it_is(name, value, text):
    assert shown(name, value) == text


def test_a_task_knows_more_of_its_metric_than_its_name_tells():
    metrics = {"harness/mine": Metric("mine", True, ".1%"), "harness/bits": Metric("bits", False, ".3f")}
    assert shown("harness/mine", 0.5, metrics) == "50.0%" and shown("harness/mine", 0.5) == "0.500"
    assert shown("harness/bits", 0.5, metrics) == "0.500" and shown("ppl@8", 0.5, metrics) == "0.50"


@pytest.mark.parametrize(
    ("name", "title", "direction"),
    [
        ("ppl@8", "perplexity", False), ("needle@8/0.5", "needle", True), ("ruler/vt@8", "ruler/vt", True),
        ("harness/boolq", "boolq", True), ("harness/wikitext", "wikitext", None), ("mine@8", "mine", None),
    ],
)  # fmt: skip
def test_names_tell_title_and_direction(name, title, direction):
    assert (describe(name).title, describe(name).higher_is_better) == (title, direction)


def test_every_family_and_benchmark_is_described():
    families = {name.partition("@")[0].partition("/")[0] for task in tasks().values() for name in task.metrics()}
    assert families == set(FAMILIES)
    assert set(BENCHMARKS) == set(FEWSHOT)
