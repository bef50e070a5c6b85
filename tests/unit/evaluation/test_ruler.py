"""RULER as a task: a score that reciting does not raise, and what is measured."""

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from ruler_texts import HAYSTACK, shipped

from pose.errors import ConfigError
from pose.evaluation import generation
from pose.evaluation.ruler import Ruler, score
from pose.evaluation.task import wilson
from pose.tasks.ruler import NEEDLES, TASKS, RulerPrompts


@cache
def sample(task, length=3000, trial=0):
    return RulerPrompts(task, shipped(), HAYSTACK).sample(0, length, trial)


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_in_usual_forms(task):
    prompt = sample(task)
    a = prompt.answers
    forms = [
        " ".join(a),
        " " + ", ".join(a) + ".",
        "\n" + "\n".join(f"{i}. {x}" for i, x in enumerate(a, 1)),
        "; ".join(a),
    ]
    forms += [" " + ", ".join(a[:-1]) + " and " + a[-1], " ".join(a).upper(), " ".join(a) + "\x00\n and more"]
    for form in forms:
        assert score(task, form, a, prompt.text) == 1, form
    assert score(task, " and ".join(reversed(a)), a, prompt.text) == 1
    for n in range(len(a)):
        assert score(task, " ".join(a[:n]), a, prompt.text) == pytest.approx(n / len(a))
    assert score(task, "", a, prompt.text) == 0


@pytest.mark.parametrize("length", [900, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_itself_scores_nothing(task, length):
    for trial in range(2):
        prompt = sample(task, length, trial)
        for echo in (
            prompt.text,
            prompt.text + "\n",
            prompt.text.upper(),
            " ".join(prompt.text.split()),
            prompt.text * 2,
        ):
            assert score(task, echo, prompt.answers, prompt.text) == 0


@pytest.mark.parametrize("task", TASKS)
def test_reciting_from_any_place_scores_nothing(task):
    """Up to 500 characters from everywhere in the prompt, but for those that begin within a needle's lead."""
    prompt = sample(task)
    for begin in range(0, len(prompt.text) - 500, 97):
        echo = prompt.text[begin : begin + (500, 160, 70)[begin % 3]]
        if task in NEEDLES and any(0 <= echo.find(answer) < 140 for answer in prompt.answers):
            continue
        assert score(task, echo, prompt.answers, prompt.text) == 0, echo


@pytest.mark.parametrize("task", NEEDLES)
def test_copying_from_the_needle_on_is_finding_it(task):
    prompt = sample(task)
    begin = prompt.text.index(prompt.answers[0])
    share = 1 / len(prompt.answers)
    assert score(task, prompt.text[begin : begin + 60], prompt.answers[:1], prompt.text) == 1
    assert score(task, prompt.text[begin:], prompt.answers, prompt.text) == pytest.approx(share)
    sentence = prompt.text.rindex("One of", 0, begin)
    assert score(task, prompt.text[sentence : begin + 60], prompt.answers[:1], prompt.text) == 1
    before = prompt.text[max(begin - 250, 0) : begin + 60]
    assert score(task, before, prompt.answers[:1], prompt.text) == 0
    assert score(task, before + " So it is " + prompt.answers[0], prompt.answers[:1], prompt.text) == 1


@pytest.mark.parametrize(("task", "longest"), [("vt", 49), ("cwe", 49), ("fwe", 49), ("niah_single_2", 106)])
def test_where_a_recital_begins(task, longest):
    """At 50 characters of the prompt, or with 100 of them before a needle's answer (here of 7 characters)."""
    words = " ".join(f"{i:03}{'abcd'[i % 4] * (i % 3 + 1)}" for i in range(60))
    prompt, answer = f"{words} 7654321 {words[::-1]}", "7654321"
    end = prompt.index(answer) + len(answer)
    for length in range(longest - 3, longest + 4):
        said = prompt[end - length : end]
        if said == said.strip():
            assert score(task, said, [answer], prompt) == (length <= longest), length
    cut = prompt[end - 70 : end - 4]  # what goes on otherwise than the prompt is not recited
    assert score(task, cut + "999", [answer[:3] + "999"], prompt) == 1
    assert score(task, prompt[end - 150 : end] + " so it is " + answer, [answer], prompt) == 1


def test_without_recitals_the_score_is_rulers():
    """string_match_all, as defined: the share of the answers that are contained, in any case."""
    rng = np.random.default_rng(0)
    words = ["apple", "Pear", "fig", "figs", "x-1", "Ab"]
    for _ in range(300):
        answers = list(rng.choice(words, 3, replace=False))
        prediction = "".join(rng.choice(["app", "le", "FIG", "s", " ", "\t", "pe", "ar", "x-1", "AB", "\x01"], 12))
        expected = sum(answer.lower() in prediction.lower() for answer in answers) / 3
        for task in ("niah_multivalue", "cwe"):
            assert score(task, prediction, answers, "nothing of it") == expected


def test_measuring_reads_what_is_written_and_nothing_else(monkeypatch):
    task = Ruler("niah_multivalue", shipped(), HAYSTACK, [800], trials=5, seed=2, bos_id=shipped().bos_token_id)
    prompts = [RulerPrompts("niah_multivalue", shipped(), HAYSTACK, num_added=1).sample(2, 800, t) for t in range(5)]
    asked = []

    def greedy(model, batch, max_new_tokens, eos_ids):
        assert batch.shape[1] == 800 and max_new_tokens == 128 and eos_ids == [shipped().eos_token_id]
        rows = []
        for row in batch:
            asked.append(row)
            prompt = prompts[len(asked) - 1]
            assert row[0] == shipped().bos_token_id and shipped().decode(row[1:]) == prompt.text
            text = " " + " and ".join(prompt.answers[: len(asked) - 1])
            rows.append(np.array([row[0], *shipped()(text, add_special_tokens=False)["input_ids"]]))
        return rows

    class Scorer:
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))

        def batches(self, windows):
            windows = list(windows)
            yield np.stack(windows[:3])
            yield np.stack(windows[3:])

    monkeypatch.setattr(generation, "greedy", greedy)
    outcome = json.loads(json.dumps(task.measure(Scorer(), "800")))
    assert outcome["scores"] == [0, 0.25, 0.5, 0.75, 1]
    assert outcome["predictions"][1] == f" {prompts[1].answers[0]}"  # without special tokens
    assert outcome["answers"] == [prompt.answers for prompt in prompts] and len(outcome["depths"][0]) == 4
    estimate = task.summarise({"800": outcome})["ruler/niah_multivalue@800"]
    assert estimate.value == 0.5 and estimate.num == 5 and 0 < estimate.low < 0.5 < estimate.high < 1


def test_units_name_all_that_they_depend_on(monkeypatch):
    def unit(text=HAYSTACK, **change):
        return Ruler("niah_single_2", shipped(), text, [800], **{"trials": 2, "seed": 0} | change).units()["800"]

    changes = [{"trials": 3}, {"seed": 1}, {"depths": [0.5]}, {"bos_id": 0}, {"text": HAYSTACK + " End."}]
    units = [str(unit(**change)) for change in [{}, *changes]]
    units.append(str(Ruler("niah_single_2", shipped(), HAYSTACK, [801], trials=2, seed=0).units()["801"]))
    monkeypatch.setattr("pose.evaluation.ruler.words_digest", lambda: "other words")
    assert len({*units, str(unit())}) == 8
    without = [Ruler("vt", shipped(), HAYSTACK, [800], trials=1, seed=0, depths=depths) for depths in (None, [0.5])]
    assert without[0].units() == without[1].units()
    with pytest.raises(ConfigError, match="ruler/vt with 100 tokens"):
        Ruler("vt", shipped(), HAYSTACK, [3000, 100], trials=1, seed=0)


def test_intervals_hold_where_no_answer_or_every_answer_is_found():
    """The spread of scores that are all the same would say that it is sure."""
    task = Ruler("vt", shipped(), HAYSTACK, [900], trials=1, seed=0)
    for scores in ([0.0] * 3, [1.0] * 3, [0.0, 1.0, 1.0], [0.2] * 3, [0.25, 0.5, 1.0]):
        found = task.summarise({"900": {"scores": scores}})["ruler/vt@900"]
        assert found == wilson(sum(scores), 3) and found.high - found.low > 0.5
    assert found.value == pytest.approx(7 / 12) and 0 <= found.low < found.value < found.high <= 1


def test_a_length_that_is_too_short_names_its_key():
    with pytest.raises(ConfigError, match=r"with 30 tokens is not possible.*give more, in eval\.lengths"):
        Ruler("vt", shipped(), HAYSTACK, [30, 900], trials=1, seed=0)


def test_an_unknown_task_names_its_key():
    with pytest.raises(ConfigError, match=r"^eval\.tasks: ruler has no task 'niah', choose from niah_single_1"):
        Ruler("niah", shipped(), HAYSTACK, [900], trials=1, seed=0)
