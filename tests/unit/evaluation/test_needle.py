"""The needle's metrics, verdicts and units."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from pose.errors import ConfigError
from pose.evaluation.needle import Needle

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"
PLACES = ["north", "the old mill", "a river", "Mr. Brown's house", "nowhere at all", "the sea and its islands"]
HAYSTACK = "\n\n".join(f"Sentence {i} speaks of {PLACES[i % 6]}. Has it an end? Yes!" for i in range(120))
LINE = re.compile(r" One of the special magic numbers for ([a-z ]+-[A-Za-z -]+) is: (\d{7})\.")


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(TINY)


def make(tokenizer, lengths, **options):
    return Needle(tokenizer, HAYSTACK, lengths, **{"depths": [0.5], "trials": 2, "seed": 0} | options)


def test_a_model_that_finds_what_is_early(tokenizer):
    """A scorer that knows the answers where the needle stands in the first half."""

    class Scorer:
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))

        def batches(self, windows):
            for window in windows:
                yield window[None]

        def predictions(self, windows, num):
            return np.array([self.predicted(window, num) for window in windows])

        def predicted(self, window, num):
            full_stop = tokenizer.encode(".", add_special_tokens=False)[-1]
            row = np.array([*window[1 - num :], full_stop])
            text = tokenizer.decode(window)
            return row if LINE.search(text).start() < len(text) / 2 else row * 0 + full_stop

    task = make(tokenizer, [2000], depths=[0.75, 0, 0.25, 1.0], trials=3)
    outcome = task.measure(Scorer(), "2000")
    assert outcome == {"0": [1, 1, 1], "0.25": [1, 1, 1], "0.75": [0, 0, 0], "1": [0, 0, 0]}
    estimates = task.summarise({"2000": outcome})
    assert {name: estimate.value for name, estimate in estimates.items()} == {
        "needle@2000": 0.5, "needle@2000/0": 1, "needle@2000/0.25": 1, "needle@2000/0.75": 0, "needle@2000/1": 0,
    }  # fmt: skip
    assert estimates["needle@2000"].num == 12 and estimates["needle@2000/0"].low < 1


def test_units_name_all_that_they_depend_on(monkeypatch, tokenizer):
    def unit(**change):
        return make(tokenizer, [700], **change).units()["700"]

    changes = [{"trials": 3}, {"seed": 1}, {"depths": [0.5, 1]}, {"bos_id": tokenizer.bos_token_id}]
    units = [str(unit(**change)) for change in [{}, *changes]]
    units.append(str(Needle(tokenizer, HAYSTACK + " End.", [700], depths=[0.5], trials=2, seed=0).units()["700"]))
    units.append(str(make(tokenizer, [800]).units()["800"]))
    monkeypatch.setattr("pose.evaluation.needle.words_digest", lambda: "other words")
    units.append(str(unit()))
    assert len(set(units)) == 8


@pytest.mark.parametrize(
    ("depth", "name"),
    [
        (0, "0"), (-0.0, "0"), (1, "1"), (0.1 + 0.2, "0.30000000000000004"), (1 / 3, "0.3333333333333333"),
        (1e-7, "0.0000001"), (0.5, "0.5"), (0.25, "0.25"),
    ],
)  # fmt: skip
def test_a_depth_has_one_name_and_no_other_depth_has_it(tokenizer, depth, name):
    task = make(tokenizer, [700], depths=[depth])
    assert list(task.metrics()) == ["needle@700", f"needle@700/{name}"]
    assert float(name) == depth


def test_a_length_that_is_too_short_is_refused_at_once(tokenizer):
    with pytest.raises(ConfigError, match=r"of 50 tokens is not possible.*in eval\.lengths"):
        make(tokenizer, [700, 50])
