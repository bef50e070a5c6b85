"""The gain of a needle: closed forms, models that look nearby alone, what is kept, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from pose.errors import ConfigError
from pose.evaluation.memo import Outcomes
from pose.evaluation.needle_gain import NeedleGain, kept
from pose.evaluation.options import EvalOptions
from pose.evaluation.scoring import Scorer
from pose.evaluation.suite import Suite, far_depths
from pose.evaluation.task import student_95
from pose.modeling.load import build_model

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"
FAR_DEPTHS = far_depths(20)
TOKENIZER = PreTrainedTokenizerFast.from_pretrained(TINY)
PLACES = ["north", "the old mill", "a river", "Mr. Brown's house", "nowhere at all", "the sea and its islands"]
HAYSTACK = "\n\n".join(f"Sentence {i} speaks of {PLACES[i % 6]}. Has it an end? Yes!" for i in range(120))


def make(lengths, **options):
    options = {"window": min(lengths), "depths": [0, 0.5], "trials": 4, "seed": 0} | options
    return NeedleGain(TOKENIZER, HAYSTACK, lengths, **options)


def measured(task, scorer) -> dict:
    """The metrics, of outcomes that went through JSON."""
    outcomes = {unit: json.loads(json.dumps(task.measure(scorer, unit))) for unit in task.units()}
    assert all(task.accepts(unit, outcome) for unit, outcome in outcomes.items())
    return task.summarise(outcomes)


class Copier:
    """Gives a digit that stands at the same place of the needle asked for a probability, all others share the rest.

    A needle further than `reach` tokens from the answer is not seen: every digit is as likely as any other. A text of
    more tokens costs more, in its context and answer alike, which is no gain.
    """

    def __init__(self, probability: float, reach: float = math.inf):
        self.probability, self.reach = probability, reach

    def ending_nll(self, windows, num):
        return np.array([self.nll(window, num) for window in windows])

    def nll(self, window, num):
        text = TOKENIZER.decode(window[:-num])
        key = text.rpartition("number for ")[2].partition(" mentioned")[0]
        after = text.partition(f"numbers for {key} is: ")[2]
        distance = len(TOKENIZER.encode(after, add_special_tokens=False))
        losses = []
        for digit, own in zip(TOKENIZER.decode(window[-num:]).strip(), after, strict=False):
            p = 0.1 if distance > self.reach else self.probability if digit == own else (1 - self.probability) / 9
            losses.append(-math.log(p) + 1e-3 * len(window))
        return losses


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9, 0.01])
def test_a_model_that_copies_has_the_closed_form(probability):
    """log p of the right digit, less log of what any other has: at each place the values have other digits."""
    found = measured(make([400, 800], trials=6), Copier(probability))
    gain = math.log(probability) - math.log((1 - probability) / 9)
    for name in ("needle_gain@400", "needle_gain@800", "needle_gain@800/0", "needle_gain@800/0.5"):
        assert found[name].value == pytest.approx(gain, abs=1e-9)
        assert found[name].low == pytest.approx(gain, abs=1e-9)
    assert found["needle_gain@400"].num == 6 and found["needle_gain@400/0.5"].num == 3
    if gain > 0.01:
        assert found["needle_gain_kept@800"].value == pytest.approx(1)
    else:
        assert math.isnan(found["needle_gain_kept@800"].value) and found["needle_gain_kept@800"].low is None


def test_every_token_of_an_answer_counts_and_none_before_it():
    """Seven digits, and the space before them is of the question."""

    class Counting:
        def ending_nll(self, windows, num):
            return np.tile(2.0 ** np.arange(num)[::-1], (len(windows), 1))

    assert make([400], trials=2).measure(Counting(), "400") == {"0": [[127 / 7] * 2], "0.5": [[127 / 7] * 2]}


def test_what_is_kept_is_the_share_that_is_within_reach():
    """Of 400 tokens all are within 500, of 800 tokens the needles at depth 0.5, of 1600 none."""
    found = measured(make([400, 800, 1600], trials=8), Copier(0.5, reach=500))
    gain = math.log(9)
    assert found["needle_gain@400"].value == pytest.approx(gain)
    assert found["needle_gain@800/0"].value == pytest.approx(0, abs=1e-9)
    assert found["needle_gain@800/0.5"].value == pytest.approx(gain)
    half = found["needle_gain_kept@800"]
    assert half.value == pytest.approx(0.5) and 0 < half.low < 0.5 < half.high < 1 and half.num == 8
    assert found["needle_gain_kept@1600"][:3] == pytest.approx((0, 0, 0), abs=1e-9)
    assert found["needle_gain_kept@400"][:3] == pytest.approx((1, 1, 1))


def test_the_models_window_is_measured_too_unless_all_lengths_are_inside(capsys):
    names = [f"needle_gain{kept}@{n}" for n in (400, 800) for kept in ("", "_kept")]
    assert [name for name in make([800], window=400).metrics() if "/" not in name] == names
    assert [name for name in make([400, 800], window=100_000).metrics() if "/" not in name] == names
    found = measured(make([400, 800], window=100_000, trials=8), Copier(0.5, reach=500))
    assert found["needle_gain_kept@800"].value == pytest.approx(1), "of the longest, which is inside"
    assert found["needle_gain_kept@400"].value == pytest.approx(2)
    assert "is not given" not in capsys.readouterr().out


def test_without_a_gain_inside_the_window_no_share_is_given_and_that_is_said(capsys):
    found = measured(make([400, 800]), Copier(0.1))
    assert found["needle_gain@400"].value == pytest.approx(0, abs=1e-9)
    assert all(math.isnan(found[f"needle_gain_kept@{n}"].value) for n in (400, 800))
    printed = " ".join(capsys.readouterr().out.split())
    assert "needle_gain_kept is not given: inside the model's own window, at 400 tokens, the gain of" in printed
    alone = measured(make([400], depths=[0], trials=1), Copier(0.5))
    assert alone["needle_gain@400"].value > 2 and math.isnan(alone["needle_gain_kept@400"].value), "of one prompt"


def test_the_interval_of_what_is_kept_holds_it_about_95_times_in_100():
    """Of prompts whose gains go together, as those of one question at two lengths do."""
    rng, held, widths, apart = np.random.default_rng(0), 0, [], []
    for _ in range(300):
        inside = rng.gamma(4, 0.25, 40)
        gains = 0.5 * inside + rng.normal(0, 0.05, 40)
        found = kept(gains, inside)
        held += found.low <= 0.5 <= found.high
        widths.append(found.high - found.low)
        other = kept(rng.permutation(gains), inside)
        apart.append(other.high - other.low)
    assert 0.88 < held / 300 < 0.98
    assert np.mean(widths) < 0.5 * np.mean(apart), "pairs are told from two samples"
    assert math.isnan(kept([1.0, 2.0, 3.0], [1.0, -1.2, 0.3]).value)
    assert kept([1.0, 2.0, -3.0], [1.0, 1.2, 1.3]).value == 0


def test_fiellers_interval_are_the_shares_that_the_sample_allows():
    """The interval by its definition: the mean of gains - share * inside is within t standard errors of 0."""
    rng = np.random.default_rng(1)
    inside = rng.normal(1, 1, 20)
    gains = 0.7 * inside + rng.normal(0, 0.5, 20)
    found = kept(gains, inside)
    assert found.value == pytest.approx(gains.mean() / inside.mean()) and found.num == 20

    def deviation(share):
        rest = gains - share * inside
        return abs(rest.mean()) / (rest.std(ddof=1) / math.sqrt(20))

    t = student_95(19)
    assert deviation(found.low) == pytest.approx(t) == deviation(found.high) and t == pytest.approx(2.0930, abs=1e-4)
    assert deviation((found.low + found.value) / 2) < 2.05 and deviation(found.high + 0.1) > 2.1
    shift = inside.mean() - t * inside.std(ddof=1) / math.sqrt(20)  # where the gain inside may be 0
    assert math.isnan(kept(gains, inside - shift - 1e-6).value) and kept(gains, inside - shift + 1e-3).high > 10


@pytest.mark.parametrize("kind", ["plain", "dynamic frequencies"])
def test_a_model_that_attends_locally_has_no_gain(kind):
    """Random weights with a window of attention; without it the same weights do answer to the needle."""
    sizes = {
        "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.5,
    }  # fmt: skip
    if kind != "plain":
        sizes["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    torch.manual_seed(0)
    local = build_model(MistralConfig(sliding_window=40, **sizes), None, "sdpa")
    whole = build_model(LlamaConfig(**sizes), None, "sdpa")
    whole.load_state_dict(local.state_dict())
    task = make([512], trials=8)
    outcomes = [task.measure(Scorer(model), "512") for model in (local, whole)]
    gains = [np.abs([a - b for row in outcome.values() for a, b in row]) for outcome in outcomes]
    assert gains[0].max() < 1e-4 and gains[1].max() > 0.01
    assert min(outcomes[0]["0"])[0] > 1, "it has losses all the same"


def far_cut(reach: int):
    """The shipped model, of which no layer attends further than so many tokens."""
    model = build_model(LlamaConfig.from_pretrained(TINY), str(TINY), "sdpa")
    if reach is None:
        return model
    config = MistralConfig(**model.config.to_dict() | {"model_type": "mistral", "sliding_window": reach})
    cut = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    cut.load_state_dict(model.state_dict())
    return cut


def test_the_shipped_model_gains_inside_its_window_and_not_with_its_far_attention_cut():
    """Six layers of 16 tokens reach less than 128, which is where the nearest needle stands."""
    task = make([256], depths=FAR_DEPTHS, trials=10, seed=1)
    whole, cut = (measured(task, Scorer(far_cut(reach))) for reach in (None, 16))
    assert whole["needle_gain@256"].low > 0.3 and whole["needle_gain_kept@256"].value == 1
    assert abs(cut["needle_gain@256"].value) < 1e-4 and math.isnan(cut["needle_gain_kept@256"].value)


def test_the_nearest_needle_of_the_defaults_is_half_a_text_away():
    """So that each length adds the distances that half of it lacks, and a model that sees less gains nothing."""
    task = make([256, 512, 2048], depths=FAR_DEPTHS, trials=5)
    for n in task.lengths:
        for depth in FAR_DEPTHS:
            for trial in range(4):
                start = task.prompts.sample(n, depth, trial).needle_start
                assert n - start > 0.5 * n - 30


def test_with_few_trials_there_are_fewer_depths():
    assert far_depths(1) == [0] and far_depths(2) == [0, 0.5] and far_depths(3) == [0, 0.25, 0.5]
    assert far_depths(5) == far_depths(20) == [0, 0.125, 0.25, 0.375, 0.5]


def test_units_name_all_that_they_depend_on(monkeypatch):
    def unit(**change):
        return make([700], **change).units()["700"]

    changes = [{"trials": 3}, {"seed": 1}, {"depths": [0.5, 1]}, {"bos_id": TOKENIZER.bos_token_id}]
    units = [str(unit(**change)) for change in [{}, *changes]]
    options = {"window": 700, "depths": [0, 0.5], "trials": 4, "seed": 0}
    units.append(str(NeedleGain(TOKENIZER, HAYSTACK + " End.", [700], **options).units()["700"]))
    units.append(str(make([800]).units()["800"]))
    monkeypatch.setattr("pose.evaluation.needle_gain.words_digest", lambda: "other words")
    units.append(str(unit()))
    assert len(set(units)) == 8
    assert make([700], window=500).units()["700"] == unit(), "an outcome is the same for any window"


def test_depths_are_taken_in_turn():
    outcome = make([400], depths=[0.5, 0, 0.25], trials=7).measure(Copier(0.5), "400")
    assert {depth: len(row) for depth, row in outcome.items()} == {"0": 3, "0.25": 2, "0.5": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": [50, 700], "window": 50}, r"of 50 tokens is not possible.*give more, in eval\.lengths"),
        (
            {"lengths": [700, 800], "window": 50},
            r"^eval\.tasks has needle_gain, which needs a prompt inside the model's own window of 50 tokens, and with "
            r"this tokenizer the shortest has \d+: leave it out",
        ),
        (
            {"trials": 1},
            r"^eval\.trials=1 is too few for needle_gain at 2 depths: give at least 2, or fewer eval\.depths",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once_by_its_key(options, words):
    lengths = options.pop("lengths", [700])
    with pytest.raises(ConfigError, match=words) as caught:
        make(lengths, **options)
    assert "eval." not in str(caught.value.under("watch"))


def test_a_killed_measurement_goes_on_and_the_window_reaches_the_task(tmp_path, monkeypatch):
    """Killed in the third length, the first two are there, and come again from the disk."""
    file = tmp_path / "haystack.txt"
    file.write_text(HAYSTACK)
    options = EvalOptions(tasks=["needle_gain"], lengths=[400, 800], trials=5, haystack=str(file))
    suite = Suite(options, TOKENIZER, None, tmp_path, window=300)
    (task,) = suite.tasks
    assert task.lengths == [300, 400, 800] and task.window == 300 and task.depths == FAR_DEPTHS
    model = build_model(
        LlamaConfig(
            vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ),
        None,
        "sdpa",
    )
    measure, units = task.measure, []

    def until(stop):
        def measure_unit(scorer, unit):
            units.append(unit)
            if unit == stop:
                raise KeyboardInterrupt
            return measure(scorer, unit)

        return measure_unit

    outcomes = Outcomes(tmp_path)
    monkeypatch.setattr(task, "measure", until("800"))
    with pytest.raises(KeyboardInterrupt):
        suite.run(model, outcomes=outcomes, progress=False)
    monkeypatch.setattr(task, "measure", until(None))
    found = suite.run(model, outcomes=outcomes, progress=False)
    assert units == ["300", "400", "800", "800"]
    assert list(found) == list(suite.metrics()) and len(found) == 3 * 7
    again = suite.run(load=lambda: pytest.fail("nothing is missing"), outcomes=outcomes, progress=False)
    assert str(again) == str(found)
