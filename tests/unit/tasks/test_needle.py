"""Needle in a haystack: exact lengths, and places between sentences, for several tokenizers."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from pose.errors import ConfigError
from pose.tasks.needle import NeedlePrompts

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


def make(tokenizer, **options):
    return NeedlePrompts(tokenizer, HAYSTACK, **{"seed": 0} | options)


@pytest.mark.parametrize("length", [600, 601, 602, 603, 1500, 4097])
def test_every_prompt_is_exact_and_whole(tokenizer, length):
    depths = [0, 0.25, 0.5, 1]
    for bos_id in (None, tokenizer.bos_token_id):
        prompts = make(tokenizer, bos_id=bos_id)
        for depth in depths:
            prompt = prompts.sample(length, depth, 1)
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
    prompts = make(tokenizer)
    for trial in range(8):
        prompt = prompts.sample(3000, depth, trial)
        text = tokenizer.decode(prompt.input_ids)
        found = LINE.search(text)
        before = text[text.index("afterwards.\n") + 12 : found.start()]
        after = text[found.end() : text.index("\nWhat is the special")]
        a, b = (len(tokenizer.encode(part, add_special_tokens=False)) for part in (before, after))
        assert abs(a - depth * (a + b)) <= (longest if depth == 1 else longest / 2)  # at 1 a sentence may be cut
        assert prompt.depth == pytest.approx(a / (a + b), abs=3 / (a + b))


def test_at_the_end_nothing_follows_where_a_sentence_ends_there(tokenizer):
    prompts = make(tokenizer)
    depths = [prompts.sample(length, 1.0, 0).depth for length in range(1500, 1560)]
    assert 1.0 in depths and min(depths) < 1


def test_the_needle_is_tokenised_as_in_running_text(tokenizer):
    prompt = make(tokenizer).sample(1500, 0.5, 0)
    text = tokenizer.decode(prompt.input_ids)
    begin, end = LINE.search(text).span()
    stop, both = (tokenizer.encode(t, add_special_tokens=False) for t in (".", "." + text[begin:end]))
    assert both[: len(stop)] == stop
    needle = both[len(stop) :]
    assert prompt.input_ids[prompt.needle_start : prompt.needle_start + len(needle)].tolist() == needle


def test_prompts_are_pure_and_differ(tokenizer):
    prompts, again, other = make(tokenizer), make(tokenizer), make(tokenizer, seed=1)
    assert np.array_equal(prompts.sample(800, 0.5, 2).input_ids, again.sample(800, 0.5, 2).input_ids)
    keys = {prompts.sample(n, depth, trial).key for n in (700, 800) for depth in (0.2, 0.5) for trial in range(3)}
    assert len(keys) == 12
    assert other.sample(800, 0.5, 2).key != prompts.sample(800, 0.5, 2).key
    assert prompts.sample(800, 0.5, 2).key != prompts.sample(800, 0.501, 2).key
    starts = {tuple(each.sample(800, 0, trial).input_ids[-400:-380]) for each in (prompts, other) for trial in range(3)}
    assert len(starts) == 6


def test_the_prompts_of_a_trial_share_their_text(tokenizer):
    """Up to the earlier of two needles they are the same."""
    prompts = make(tokenizer)
    early, late = (prompts.sample(1500, depth, 1) for depth in (0.3, 0.9))
    assert np.array_equal(early.input_ids[: early.needle_start], late.input_ids[: early.needle_start])
    assert early.needle_start > 400 and early.key != late.key


def test_the_depth_is_right_in_a_text_without_sentences(tokenizer):
    """Where a model sees nothing but words, or only characters."""
    for haystack in (" ".join(f"w{i % 97}" for i in range(6000)), "xyz" * 9000):
        prompts = NeedlePrompts(tokenizer, haystack, seed=0)
        for depth in (0, 0.3, 0.5, 1):
            assert abs(prompts.sample(9000, depth, 0).depth - depth) < 0.1


def test_too_short_names_the_shortest(tokenizer):
    prompts = make(tokenizer)
    with pytest.raises(ConfigError, match=r"of 50 tokens is not possible.*the shortest has (\d+)") as caught:
        prompts.check(50, [0.5], 1)
    shortest = int(re.search(r"shortest has (\d+)", str(caught.value))[1])
    assert 80 < shortest < 500
    possible = []
    for length, trials in itertools.product(range(shortest - 30, shortest + 30), (1, 4)):
        try:
            prompts.check(length, [0.5], trials)
        except ConfigError as error:
            assert int(re.search(r"shortest has (\d+)", str(error))[1]) > length
            continue
        drawn = [prompts.sample(length, 0.5, trial) for trial in range(trials)]
        assert all(len(prompt.input_ids) == length for prompt in drawn)
        possible.append(length)
    assert 30 < len(possible) < 110


def test_errors_name_the_key_of_the_group_that_asks(tokenizer):
    with pytest.raises(ConfigError, match=r"give more, in eval\.lengths") as caught:
        make(tokenizer).check(50, [0.5], 1)
    assert str(caught.value.under("watch")).endswith("give more, in watch.lengths")
    with pytest.raises(ConfigError, match=r"eval\.haystack is empty"):
        NeedlePrompts(tokenizer, " \n", seed=0)


def test_a_text_without_tokens_is_refused_and_not_looked_through_for_ever():
    digits = Tokenizer(models.BPE({token: i for i, token in enumerate("0123456789.")}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=digits)
    with pytest.raises(ConfigError, match=r"eval\.haystack has no text that this tokenizer has tokens for"):
        NeedlePrompts(tokenizer, "Nothing it knows! Nor here", seed=0)
