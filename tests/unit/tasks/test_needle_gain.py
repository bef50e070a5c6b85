"""Swapped needles: only the value's tokens differ, whatever the tokenizer, the length and the depth."""

import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from pose.errors import ConfigError
from pose.tasks.needle_gain import NUM_KEYS, MultiKeyPrompts, SwapPrompts, _only_difference

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"
PLACES = ["north", "the old mill", "a river", "Mr. Brown's house", "nowhere at all", "the sea and its islands"]
HAYSTACK = "\n\n".join(f"Sentence {i} speaks of {PLACES[i % 6]}. Has it an end? Yes!" for i in range(120))
LINE = re.compile(r" One of the special magic numbers for ([a-z ]+-[A-Za-z -]+) is: (\d{7})\.")
DEPTHS = [0, 0.125, 0.5, 0.8, 1]


def by_characters(*merges, prepend="▁"):
    """A tokenizer of characters and of what is merged of them."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "▁", "\n", *map(chr, range(33, 127))])}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(prepend), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


TOKENIZERS = {
    "shipped": lambda: PreTrainedTokenizerFast.from_pretrained(TINY),
    "llama": lambda: by_characters(("▁", "O"), ("▁", "S")),
    # Numbers of as many digits have other numbers of tokens, of which the first and the last take what is beside them
    "merges": lambda: by_characters(
        ("▁", "1"), ("▁", "2"), ("▁", "3"), ("4", "5"), ("4", "6"), ("0", "1"), ("7", "."), ("8", "."), ("0", "7"),
        ("9", "9"), ("5", "."),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def make(tokenizer, **options):
    return SwapPrompts(tokenizer, HAYSTACK, **{"seed": 0} | options)


@pytest.mark.parametrize("length", [700, 701, 702, 1500])
def test_every_prompt_is_exact_and_has_four_needles_of_which_one_is_asked_for(tokenizer, length):
    for bos_id in (None, tokenizer.bos_token_id):
        prompts = make(tokenizer, bos_id=bos_id)
        for depth in DEPTHS:
            prompt = prompts.sample(length, depth, 1)
            assert prompt.input_ids.shape == (2, 2, length) and prompt.input_ids.dtype == np.int64
            for text in range(2):
                for answer in range(2):
                    ids = prompt.input_ids[text, answer]
                    assert bos_id is None or ids[0] == bos_id
                    shown = tokenizer.decode(ids[bos_id is not None :])
                    found = dict(match.groups() for match in LINE.finditer(shown))
                    assert len(found) == len(set(found.values())) == 4
                    key = next(key for key, value in found.items() if value == prompt.values[text])
                    value = prompt.values[answer]
                    assert shown.endswith(
                        f"? The special magic number for {key} mentioned in the provided text is {value}"
                    )
                    assert prompt.values[1 - text] not in found.values()
                    assert tokenizer.decode(ids[-prompt.num_answer :]).strip() == value
                    start = tokenizer.decode(ids[prompt.needle_start :]).strip()
                    assert start.startswith(f"One of the special magic numbers for {key} is: ")


def test_texts_differ_in_the_values_tokens_alone(tokenizer):
    """As many tokens, at the same places, none of them the same: at every depth, length and trial."""
    prompts, lengths = make(tokenizer), set()
    for length in (700, 1500):
        for depth in DEPTHS:
            for trial in range(6):
                prompt = prompts.sample(length, depth, trial)
                (own, other), (another, own_too) = prompt.input_ids
                text, answer = length - prompt.num_answer, prompt.num_answer
                assert np.array_equal(own[:text], other[:text]) and np.array_equal(another[:text], own_too[:text])
                assert np.array_equal(own[text:], another[text:]) and np.array_equal(other[text:], own_too[text:])
                assert (own[text:] != other[text:]).all()
                places = np.flatnonzero(own[:text] != another[:text])
                assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
                for ids, value in ((own, prompt.values[0]), (another, prompt.values[1])):
                    needle = tokenizer.decode(ids[places[0] : places[-1] + 1])
                    assert value in needle and set(needle) <= set(value) | set(" .")
                assert all(a != b for a, b in zip(*prompt.values, strict=True)), "no digit is the same"
                assert prompt.needle_start < places[0] < prompt.needle_start + 90
                lengths.add((len(places), answer))
    if tokenizer.get_vocab().get("▁1"):
        assert len(lengths) > 1, "values have other numbers of tokens from prompt to prompt, and never within one"


def test_either_value_is_as_likely_to_be_the_true_one():
    """Exchanged, they change the sign and nothing else: so they must be drawn alike, token counts and all."""
    prompts = make(TOKENIZERS["merges"]())
    pairs = [prompts.sample(600, 0.5, trial).values for trial in range(400)]
    larger = np.mean([int(a) > int(b) for a, b in pairs])
    assert abs(larger - 0.5) < 3 * 0.5 / 20
    digits = np.array([[list(map(int, value)) for value in pair] for pair in pairs])
    assert np.abs(digits[:, 0].mean(0) - digits[:, 1].mean(0)).max() < 4 * 2.9 * np.sqrt(2 / 400)
    assert digits[:, :, 0].min() >= 1 and len(set(digits[:, :, 1].ravel())) == 10


@pytest.mark.parametrize("depth", [0, 0.125, 0.3, 0.5, 0.9])
def test_the_needle_is_at_its_depth_within_a_sentence(tokenizer, depth):
    """In tokens of what lies around it: text and distractors."""
    prompts = make(tokenizer)
    longest = max(len(sentence) for sentence in prompts.sentences)
    for trial in range(8):
        prompt = prompts.sample(3000, depth, trial)
        shown = tokenizer.decode(prompt.input_ids[0, 0])
        head = len(tokenizer.encode(shown[: shown.index("afterwards.\n") + 12], add_special_tokens=False))
        question = len(tokenizer.encode(shown[shown.index("\nWhat is the special") :], add_special_tokens=False))
        around = 3000 - head - question - 35  # of the needle, about
        assert abs(prompt.needle_start - head - depth * around) <= max(longest, 90) / 2 + 40


def test_lengths_are_compared_on_the_same_questions(tokenizer):
    prompts = make(tokenizer)
    for depth in DEPTHS:
        short, long = (prompts.sample(length, depth, 2) for length in (700, 1500))
        assert short.values == long.values
        lines = [set(LINE.findall(tokenizer.decode(prompt.input_ids[0, 0]))) for prompt in (short, long)]
        assert lines[0] == lines[1] and len(lines[0]) == 4
    other = make(tokenizer, seed=1).sample(700, 0.5, 2)
    assert len({prompts.sample(700, 0.5, t).values for t in range(5)} | {other.values}) == 6


def test_the_prompts_of_a_trial_share_their_text(tokenizer):
    """Up to the earlier of two needles they are the same, distractors included."""
    prompts = make(tokenizer)
    for trial in range(6):
        early, late = (prompts.sample(1500, depth, trial) for depth in (0.4, 0.9))
        begin = early.needle_start
        assert np.array_equal(early.input_ids[0, 0, :begin], late.input_ids[1, 1, :begin])
        assert begin > 400 and early.values != late.values


def test_too_short_names_the_shortest(tokenizer):
    prompts = make(tokenizer)
    with pytest.raises(ConfigError, match=r"of 50 tokens is not possible.*give more, in eval\.lengths") as caught:
        prompts.check(50, DEPTHS, 3)
    shortest = int(re.search(r"shortest has (\d+)", str(caught.value))[1])
    assert shortest == prompts.shortest(50, DEPTHS, 3)
    prompts.check(shortest, DEPTHS, 3)
    for depth in DEPTHS:
        for trial in range(3):
            assert prompts.sample(shortest, depth, trial).input_ids.shape == (2, 2, shortest)
    with pytest.raises(ConfigError):
        prompts.check(shortest - 1, DEPTHS, 3)


def test_a_tokenizer_that_cannot_tell_numbers_apart_is_refused():
    letters = {chr(i): i for i in range(32, 127) if not chr(i).isdigit()}
    tokenizer = Tokenizer(models.BPE(letters | {"\n": 10, "<unk>": 0}, [], unk_token="<unk>"))
    with pytest.raises(ConfigError, match=r"eval\.tasks has needle_gain, which needs numbers"):
        make(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).check(2000, [0], 1)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [1, 5, 6, 4], (1, 3)), ([1, 2], [3, 4], (0, 2)), ([1, 2, 3], [4, 2, 5], (0, 0)),
        ([1, 2], [1, 2], (0, 0)), ([1, 2, 3], [1, 2], (0, 0)), ([1, 2], [1, 3], (1, 2)),
    ],
)  # fmt: skip
def test_the_one_difference_of_two_texts(a, b, expected):
    assert _only_difference(np.array(a), np.array(b)) == expected


@pytest.mark.parametrize("length", [800, 801, 802, 1500])
def test_each_needle_of_a_text_is_asked_for(tokenizer, length):
    for bos_id in (None, tokenizer.bos_token_id):
        prompts = MultiKeyPrompts(tokenizer, HAYSTACK, seed=0, bos_id=bos_id)
        made = prompts.sample(length, [0.5, 0, 1, 0], 1)
        assert made.input_ids.shape == (NUM_KEYS, length) and made.input_ids.dtype == np.int64
        texts = {tokenizer.decode(row).rpartition("\nWhat is")[0] for row in made.input_ids}
        assert len(texts) == 1, "the text is the same, whatever is asked"
        found = [match.groups() for match in LINE.finditer(texts.pop())]
        assert sorted(found) == sorted(zip(made.keys, made.values, strict=True)) and len(set(made.values)) == NUM_KEYS
        assert found == [(made.keys[i], made.values[i]) for i in (1, 3, 0, 2)], "in the order of their depths"
        assert max(answer.stop for answer in made.answers) == length
        for ids, answer, key, value in zip(made.input_ids, made.answers, made.keys, made.values, strict=True):
            shown = tokenizer.decode(ids[bos_id is not None : answer.stop])
            assert shown.endswith(f"? The special magic number for {key} mentioned in the provided text is {value}")
            assert tokenizer.decode(ids[answer]).strip() == value, "with no token that another value would have too"
            assert set(ids[answer.stop :]) <= {ids[answer.stop - 1]}


def test_needles_that_are_all_asked_for_stand_where_they_are_put(tokenizer):
    made = MultiKeyPrompts(tokenizer, HAYSTACK, seed=3).sample(3000, [0.25, 0.75, 0.9, 0.1], 0)
    for place, value in zip([0.25, 0.75, 0.9, 0.1], made.values, strict=True):
        shown = tokenizer.decode(made.input_ids[0, : made.answers[0].start])
        before = tokenizer(shown[: shown.index(value)], add_special_tokens=False)["input_ids"]
        assert len(before) / 3000 == pytest.approx(place, abs=0.06)


@pytest.mark.parametrize("depths", [[0, 0.125, 0.25, 0.5], [0.5, 0, 0.9, 0], [0.3] * 4, [1, 0.5, 0, 0.25], [1] * 4])
@pytest.mark.parametrize(("length", "target_len"), [(1500, 1501), (1500, 8192), (900, 131072)])
def test_position_ids_skip_to_where_the_needles_would_be(tokenizer, length, target_len, depths):
    prompts = MultiKeyPrompts(tokenizer, HAYSTACK, seed=3)
    plain, made = prompts.sample(length, depths, 0), prompts.sample(length, depths, 0, target_len)
    assert plain.position_ids.tolist() == [*range(length)]
    assert (plain.input_ids == made.input_ids).all() and plain.answers == made.answers
    steps = np.diff(made.position_ids)
    assert made.position_ids[0] == 0 and made.position_ids[-1] == target_len - 1 and (steps >= 1).all()
    assert (steps > 1).sum() <= NUM_KEYS + 1
    texts = [tokenizer.decode(made.input_ids[0, :i]) for i in range(length + 1)]
    ends = [  # of each needle
        next(i for i in range(length) if f"for {key} is: {value}." in texts[i])
        for key, value in zip(made.keys, made.values, strict=True)
    ]
    for end, depth in zip(ends, depths, strict=True):
        assert made.position_ids[end] == pytest.approx(depth * target_len, abs=length / 2)
        assert (steps[end - 10 : end - 1] == 1).all(), "a needle is not torn apart"
    asked = next(i for i in range(length) if "What is" in texts[i])
    assert max(ends) < asked and (steps[asked - 3 :] == 1).all(), "nor a question, nor its answer"


@pytest.mark.parametrize("depths", [[0.375, 0.5, 0, 0.125], [0.5, 0.25, 0.125, 0], [0, 0.125, 0.25, 0.5]])
def test_needles_before_one_sentence_keep_the_positions_of_their_depths(tokenizer, depths):
    """In the order of their depths, where sentences are long beside the text."""
    long = " ".join(f"word{i % 97}" for i in range(6000))  # has no end of a sentence
    for trial in range(10):
        made = MultiKeyPrompts(tokenizer, long, seed=0).sample(640, depths, trial, 16384)
        text = tokenizer.decode(made.input_ids[0])
        for value, depth in zip(made.values, depths, strict=True):
            place = len(tokenizer(text[: text.index(value)], add_special_tokens=False)["input_ids"])
            assert made.position_ids[place] == pytest.approx(depth * 16384, abs=640), (trial, depth)


def test_the_shortest_text_that_is_asked_for_each_needle(tokenizer):
    prompts = MultiKeyPrompts(tokenizer, HAYSTACK, seed=0)
    shortest = prompts.shortest(10, [0.5], 3)
    lengths = {prompts.sample(shortest, [0.5] * NUM_KEYS, trial).input_ids.shape[1] for trial in range(3)}
    assert lengths == {shortest}
    with pytest.raises(ValueError):
        for trial in range(3):
            prompts.sample(shortest - 1, [0.5] * NUM_KEYS, trial)


def test_numbers_that_a_tokenizer_drops_cannot_be_asked_for():
    tokenizer = by_characters()
    kept = [chr(i) for i in range(33, 127) if not chr(i).isdigit()]
    vocabulary = {token: i for i, token in enumerate(["<s>", "▁", "\n", *kept])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.normalizer = tokenizer.backend_tokenizer.normalizer
    with pytest.raises(ConfigError, match="no tokens that tell them apart"):
        MultiKeyPrompts(PreTrainedTokenizerFast(tokenizer_object=backend), HAYSTACK, seed=0).sample(900, [0.5] * 4, 0)
