"""Needle in a haystack: exact lengths, places between sentences, and verdicts, for several tokenizers."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from pose.errors import ConfigError
from pose.evaluation.needle import Needle

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"
PLACES = ["north", "the old mill", "a river", "Mr. Brown's house", "nowhere at all", "the sea and its islands"]
HAYSTACK = "\n\n".join(f"Sentence {i} speaks of {PLACES[i % 6]}. Has it an end? Yes!" for i in range(120))
LINE = re.compile(r" One of the special magic numbers for ([a-z ]+-[A-Za-z -]+) is: (\d{7})\.")


def llamas_kind():
    """An underline stands before every text and for each space; else characters."""
    characters = sorted(map(chr, range(33, 127)))
    vocabulary = {token: i for i, token in enumerate(["<s>", "▁", "\n", *characters, "▁O", "▁S"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "O"), ("▁", "S")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="module", params=["shipped", "llama"])
def tokenizer(request):
    return PreTrainedTokenizerFast.from_pretrained(TINY) if request.param == "shipped" else llamas_kind()


def make(tokenizer, lengths, **options):
    return Needle(tokenizer, HAYSTACK, lengths, **{"depths": [0.5], "trials": 2, "seed": 0} | options)


@pytest.mark.parametrize("length", [600, 601, 602, 603, 1500, 4097])
def test_every_prompt_is_exact_and_whole(tokenizer, length):
    depths = [0, 0.25, 0.5, 1]
    for bos_id in (None, tokenizer.bos_token_id):
        task = make(tokenizer, [length], depths=depths, bos_id=bos_id)
        for depth in depths:
            prompt = task.sample(length, depth, 1)
            assert prompt.input_ids.shape == (length,)
            assert bos_id is None or prompt.input_ids[0] == bos_id
            text = tokenizer.decode(prompt.input_ids[bos_id is not None :])
            (found,) = LINE.finditer(text)
            key, number = found.groups()
            assert number == prompt.key and text.count(number) == 2
            assert text.endswith(f"? The special magic number for {key} mentioned in the provided text is {number}")
            assert tokenizer.decode(prompt.input_ids[-prompt.num_answer :]).strip() == number
            before = text[: found.start()]
            assert before.endswith((".", "!", "?", "afterwards.\n"))
            start = tokenizer.decode(prompt.input_ids[prompt.needle_start :]).strip()
            assert start.startswith("One of the special magic numbers")


@pytest.mark.parametrize("depth", [0, 0.1, 0.25, 0.5, 0.77, 1])
def test_the_needle_is_at_its_depth_within_a_sentence(tokenizer, depth):
    """In tokens of the haystack, counted from the text around the needle."""
    longest = max(len(tokenizer.encode(s, add_special_tokens=False)) for s in re.split(r"(?<=[.?!])\s", HAYSTACK)) + 3
    task = make(tokenizer, [3000], depths=[depth])
    for trial in range(8):
        prompt = task.sample(3000, depth, trial)
        text = tokenizer.decode(prompt.input_ids)
        found = LINE.search(text)
        before = text[text.index("afterwards.\n") + 12 : found.start()]
        after = text[found.end() : text.index("\nWhat is the special")]
        a, b = (len(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after))
        assert abs(a - depth * (a + b)) <= (longest if depth == 1 else longest / 2)  # at 1 a sentence may be cut
        assert prompt.depth == pytest.approx(a / (a + b), abs=3 / (a + b))


def test_at_the_end_nothing_follows_where_a_sentence_ends_there(tokenizer):
    lengths = range(1500, 1560)
    task = make(tokenizer, lengths, depths=[1], trials=1)
    depths = [task.sample(length, 1.0, 0).depth for length in lengths]
    assert 1.0 in depths and min(depths) < 1


def test_the_needle_is_tokenised_as_in_running_text(tokenizer):
    prompt = make(tokenizer, [1500]).sample(1500, 0.5, 0)
    text = tokenizer.decode(prompt.input_ids)
    begin, end = LINE.search(text).span()
    stop, both = (tokenizer.encode(t, add_special_tokens=False) for t in (".", "." + text[begin:end]))
    assert both[: len(stop)] == stop
    needle = both[len(stop) :]
    assert prompt.input_ids[prompt.needle_start : prompt.needle_start + len(needle)].tolist() == needle


def test_prompts_are_pure_and_differ(tokenizer):
    task, other = make(tokenizer, [700, 800], trials=3), make(tokenizer, [800], trials=9, depths=[0.2, 0.5])
    assert np.array_equal(task.sample(800, 0.5, 2).input_ids, other.sample(800, 0.5, 2).input_ids)
    keys = {task.sample(n, depth, trial).key for n in (700, 800) for depth in (0.2, 0.5) for trial in range(3)}
    assert len(keys) == 12
    assert make(tokenizer, [800], seed=1).sample(800, 0.5, 2).key != task.sample(800, 0.5, 2).key
    assert task.sample(800, 0.5, 2).key != task.sample(800, 0.501, 2).key
    tasks = [task, make(tokenizer, [800], trials=3, seed=1)]
    starts = {tuple(each.sample(800, 0, trial).input_ids[-400:-380]) for each in tasks for trial in range(3)}
    assert len(starts) == 6


def test_the_prompts_of_a_trial_share_their_text(tokenizer):
    """Up to the earlier of two needles they are the same."""
    task = make(tokenizer, [1500])
    early, late = (task.sample(1500, depth, 1) for depth in (0.3, 0.9))
    assert np.array_equal(early.input_ids[: early.needle_start], late.input_ids[: early.needle_start])
    assert early.needle_start > 400 and early.key != late.key


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


def test_the_depth_is_right_in_a_text_without_sentences(tokenizer):
    """Where a model sees nothing but words, or only characters."""
    for haystack in (" ".join(f"w{i % 97}" for i in range(6000)), "xyz" * 9000):
        task = Needle(tokenizer, haystack, [9000], depths=[0.5], trials=1, seed=0)
        for depth in (0, 0.3, 0.5, 1):
            assert abs(task.sample(9000, depth, 0).depth - depth) < 0.1


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


def test_too_short_names_the_shortest(tokenizer):
    with pytest.raises(ConfigError, match=r"of 50 tokens is not possible.*the shortest has (\d+)") as caught:
        make(tokenizer, [50], trials=1)
    shortest = int(re.search(r"shortest has (\d+)", str(caught.value))[1])
    assert 80 < shortest < 500
    possible = []
    for length, trials in itertools.product(range(shortest - 30, shortest + 30), (1, 4)):
        try:
            task = make(tokenizer, [length], trials=trials)
        except ConfigError as error:
            assert int(re.search(r"shortest has (\d+)", str(error))[1]) > length
            continue
        prompts = [task.sample(length, 0.5, trial) for trial in range(trials)]
        assert all(len(prompt.input_ids) == length for prompt in prompts)
        possible.append(length)
    assert 30 < len(possible) < 110
    with pytest.raises(ConfigError, match=r"eval\.haystack is empty"):
        Needle(tokenizer, " \n", [700], depths=[0.5], trials=1, seed=0)
