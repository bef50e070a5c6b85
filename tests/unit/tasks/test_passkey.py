"""pose.tasks.passkey: the paper's prompt, whole, of an exact length, for any tokenizer."""

import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pose.errors import ConfigError
from pose.tasks.passkey import PasskeyPrompts
from pose.tasks.synthetic import TASKS

ASSETS = Path(__file__).resolve().parents[3] / "assets"

# The paper's words, written out here once more.
INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY_LINE = "The pass key is {0}. Remember it. {0} is the pass key."
QUESTION = "What is the pass key? The pass key is"


def training_texts():
    numbers = np.random.default_rng(0).integers(0, 100_000, 3000)
    return [f"{INTRODUCTION} {FILLER} {QUESTION} {n:05}. {n % 97} {n % 10}" for n in numbers]


@cache
def merged_digits():
    """Byte-level BPE that joins digits: a key has one to five tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@cache
def word_pieces():
    """BERT's kind: lower case, no line breaks, digits joined."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(training_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[CLS]")


def sentence_pieces():
    """LLaMA's kind: an underline is put before every text and stands for each space; digits single."""
    tokens = ["<s>", "▁", "▁▁", "\n", *sorted(set(INTRODUCTION + FILLER + KEY_LINE + QUESTION) - {" "}), *"0123456789"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for word in ("▁i", "▁is"):
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "▁"), ("▁", "i"), ("▁i", "s")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@cache
def shipped():
    return PreTrainedTokenizerFast.from_pretrained(ASSETS / "tiny")


MAKERS = {"shipped": shipped, "merged digits": merged_digits, "word pieces": word_pieces}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


@pytest.fixture(scope="module", params=["shipped", "merged digits"])
def lossless(request):
    """A tokenizer whose decoded text is exactly what was encoded."""
    return MAKERS[request.param]()


def sample(tokenizer, length, seed=0, bos_id=None, **kwargs):
    return PasskeyPrompts(tokenizer, bos_id).sample(np.random.default_rng(seed), length, **kwargs)


def plain(tokenizer, ids) -> str:
    """Decoded text without case and spaces: what every tokenizer keeps."""
    return "".join(tokenizer.decode(ids).lower().split())


def squeezed(text: str) -> str:
    return "".join(text.lower().split())


def shortest(tokenizer, seed) -> int:
    """The shortest prompt of this seed's key, found by trying."""
    for length in range(20, 400):
        try:
            sample(tokenizer, length, seed)
        except ConfigError:
            continue
        return length
    raise AssertionError("no length was possible")


def test_the_tokenizers_are_of_three_kinds(tokenizer):
    """What makes the others different from the shipped one: keys of fewer tokens than digits."""
    lengths = {len(tokenizer.encode(f" {n:05}", add_special_tokens=False)) for n in range(10_000, 11_000)}
    shipped_kind = tokenizer.bos_token == "<|endoftext|>"
    assert lengths == {6} if shipped_kind else min(lengths) < 5


def test_every_length_is_exact(tokenizer):
    start = shortest(tokenizer, 0)
    for length in (*range(start, start + 60), 256, 300, 512, 1000, 2048, 4097):
        if length < start:
            continue
        for bos_id in (None, tokenizer.bos_token_id):
            prompt = sample(tokenizer, length + (bos_id is not None), bos_id=bos_id)
            assert prompt.input_ids.shape == (length + (bos_id is not None),)
            assert prompt.input_ids.dtype == np.int64


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("length", [200, 777])
def test_the_parts_are_whole_and_in_order(tokenizer, seed, length):
    """Introduction, the key line intact exactly once, the question, and the key at the end."""
    prompt = sample(tokenizer, length, seed)
    text, key = plain(tokenizer, prompt.input_ids), prompt.key
    assert len(key) == 5 and key.isdigit()
    line, end = squeezed(KEY_LINE.format(key)), squeezed(QUESTION) + key
    assert text.startswith(squeezed(INTRODUCTION))
    assert text.endswith(end)
    assert text.count(line) == 1 and text.count(key) == 3
    assert text.index(line) < len(text) - len(end)


def test_key_start_is_the_lines_first_token(tokenizer):
    for seed in range(20):
        prompt = sample(tokenizer, 300, seed)
        before = plain(tokenizer, prompt.input_ids[: prompt.key_start])
        after = plain(tokenizer, prompt.input_ids[prompt.key_start :])
        assert prompt.key not in before and after.startswith(squeezed(KEY_LINE.format(prompt.key)))


def test_the_answer_is_the_key_and_nothing_else(tokenizer):
    for seed in range(50):
        prompt = sample(tokenizer, 300, seed)
        answer = prompt.input_ids[len(prompt.input_ids) - prompt.num_answer :]
        assert plain(tokenizer, answer) == prompt.key
        assert plain(tokenizer, prompt.input_ids[: -prompt.num_answer]).endswith(squeezed(QUESTION))


def test_the_end_is_tokenised_as_in_running_text(tokenizer):
    """What a model would generate after the question: the tokens of question and key in one piece."""
    for seed in range(50):
        prompt = sample(tokenizer, 300, seed)
        whole = tokenizer.encode(f"\n{QUESTION} {prompt.key}", add_special_tokens=False)
        assert prompt.input_ids[-len(whole) :].tolist() == whole


@pytest.mark.parametrize("introduce", [True, False])
@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_llamas_kind_of_tokenizer_puts_no_space_into_the_text(depth, introduce):
    """Its parts are tokenised as they follow each other: by itself each would begin with a space."""
    tokenizer = sentence_pieces()
    for length in (500, 555, 900):
        prompt = sample(tokenizer, length, 5, depth=depth, introduce=introduce)
        text, line = tokenizer.decode(prompt.input_ids), KEY_LINE.format(prompt.key)
        assert f"{line}\n" in text and text.endswith(f"\n{QUESTION} {prompt.key}") and " \n" not in text
        if introduce:
            assert text.startswith(f" {INTRODUCTION}\n") and "\n " not in text.removesuffix(text[-100:])
            assert tokenizer.encode(text[1:], add_special_tokens=False) == prompt.input_ids.tolist()


@pytest.mark.parametrize("name", ["passkey", "key_value"])
def test_examples_by_llamas_kind_have_no_space_of_their_own(name):
    tokenizer = sentence_pieces()
    task = TASKS[name](tokenizer, [np.array(tokenizer.encode("a" * 3000, add_special_tokens=False)[1:])])
    for seed in range(20):
        tokens, is_answer = task.sample(np.random.default_rng(seed), 600)
        text, answers = tokenizer.decode(tokens), tokenizer.decode(tokens[is_answer])
        if name == "passkey":
            assert re.fullmatch(r" \d{5}\.", answers) and f"is{answers}" in text
        else:
            assert task.end.tolist() == [tokenizer.convert_tokens_to_ids("\n")]
            assert task.middle.tolist() == [tokenizer.convert_tokens_to_ids("▁is")]
            assert answers.isdigit()


@pytest.mark.parametrize("make", [*MAKERS.values(), sentence_pieces])
def test_the_filler_is_tokenised_as_in_running_text(make):
    """However often it is said, and whatever was asked for before."""
    prompts, text = PasskeyPrompts(make()), " ".join([FILLER] * 100)
    first, whole = (make().encode(before, add_special_tokens=False) for before in ("\n", f"\n{text}"))
    whole = whole[len(first) :] if whole[: len(first)] == first else make().encode(text, add_special_tokens=False)
    for num in (0, 1, 30, 1000, 31, 500, 1001):
        assert prompts.filler(num).tolist() == whole[:num]


class LastWordOtherwise:
    """A tokenizer for which the last word of a text is another token."""

    def __call__(self, text, **_):
        return {"input_ids": [*map(len, text.split(" ")[:-1]), -1]}


def test_the_filler_is_never_at_its_end():
    prompts = PasskeyPrompts(LastWordOtherwise())
    period = len(FILLER.split())
    for num in (period, 2 * period, 100 * period, period + 1, 4 * period):
        assert -1 not in prompts.filler(num)


def test_a_prompt_has_the_tokens_of_its_text(lossless):
    """So that no model is asked in pieces that it never sees; what is cut beside the key line is at a word's border."""
    for length in (300, 555, 900):
        prompt = sample(lossless, length, 5, depth=1.0)
        assert lossless.encode(lossless.decode(prompt.input_ids), add_special_tokens=False) == prompt.input_ids.tolist()


def test_exact_text(lossless):
    """Decoded, at both ends of the filler; BOS in front."""
    for length in (200, 400):
        for depth in (0, 1):
            prompt = sample(lossless, length, 3, lossless.bos_token_id, depth=depth)
            assert prompt.input_ids[0] == lossless.bos_token_id
            text = lossless.decode(prompt.input_ids[1:])
            line, question = f"\n{KEY_LINE.format(prompt.key)}\n", f"\n{QUESTION} {prompt.key}"
            head = f"{INTRODUCTION}\n"
            assert text.startswith(head) and text.endswith(question)
            middle = text[len(head) : -len(question)]
            filler = middle.removeprefix(line) if depth == 0 else middle.removesuffix(line)
            assert len(filler) == len(middle) - len(line)
            assert (f"{FILLER} " * 100).startswith(filler) and len(filler) > 50


def test_depth_is_the_place_in_the_filler(tokenizer):
    """Depth d puts round(d * room) tokens of filler before the line, where room is all of it."""
    head = sample(tokenizer, 600, 1, depth=0.0).key_start
    room = sample(tokenizer, 600, 1, depth=1.0).key_start - head
    assert head == len(tokenizer.encode(f"{INTRODUCTION}\n", add_special_tokens=False))
    assert room == 600 - shortest(tokenizer, 1)
    for depth in (0.1, 0.25, 0.5, 0.9):
        assert abs(sample(tokenizer, 600, 1, depth=depth).key_start - head - depth * room) <= 0.5


def test_places_are_drawn_from_all_of_the_filler_with_equal_chance(tokenizer):
    """500 draws into five equal parts, each within five standard deviations; both ends are met."""
    prompts = PasskeyPrompts(tokenizer)
    places = Counter()
    room = 4
    for seed in range(500):
        rng = np.random.default_rng((7, seed))
        key = "".join(map(str, np.random.default_rng((7, seed)).integers(0, 10, 5)))
        line = tokenizer.encode(f"\n{KEY_LINE.format(key)}\n", add_special_tokens=False)
        parts = len(prompts.question) + len(line) + len(tokenizer.encode(f" {key}", add_special_tokens=False))
        prompt = prompts.sample(rng, parts + room, introduce=False)
        places[prompt.key_start] += 1
    assert set(places) == {0, 1, 2, 3, 4}
    assert max(abs(n - 100) for n in places.values()) < 5 * (500 * 0.2 * 0.8) ** 0.5


def test_keys_are_uniform_digits_and_pure_in_the_generator(tokenizer):
    prompts = PasskeyPrompts(tokenizer)
    keys = [prompts.sample(np.random.default_rng(s), 300).key for s in range(800)]
    assert len(set(keys)) > 780
    for place in range(5):
        counts = Counter(key[place] for key in keys)
        assert len(counts) == 10 and max(abs(n - 80) for n in counts.values()) < 5 * (800 * 0.1 * 0.9) ** 0.5
    a, b = (sample(tokenizer, 300, 5) for _ in range(2))
    assert a.key == b.key and np.array_equal(a.input_ids, b.input_ids)


def test_too_short_names_the_shortest_possible(tokenizer):
    """The number in the message is possible, one less is not, and it is the sum of the parts."""
    for seed in range(5):
        limit = shortest(tokenizer, seed)
        key = sample(tokenizer, limit, seed).key
        parts = (f"{INTRODUCTION}\n", f"\n{KEY_LINE.format(key)}\n", f"\n{QUESTION}", f" {key}")
        assert limit == sum(len(tokenizer.encode(part, add_special_tokens=False)) for part in parts)
        for length in (1, limit - 1):
            with pytest.raises(ConfigError, match=f"of {length} tokens.*the shortest has {limit};"):
                sample(tokenizer, length, seed)
        with pytest.raises(ConfigError, match=f"the shortest has {limit + 1};"):
            sample(tokenizer, limit, seed, bos_id=tokenizer.bos_token_id)


def test_without_introduction_and_with_a_given_filler(tokenizer):
    filler = np.arange(10**6, 10**6 + 300)
    prompt = sample(tokenizer, 300, 2, filler=filler, introduce=False, depth=0.5)
    used = prompt.input_ids[prompt.input_ids >= 10**6]
    assert used.tolist() == filler[: len(used)].tolist()
    assert prompt.input_ids[: prompt.key_start].tolist() == filler[: prompt.key_start].tolist()
    introduction = tokenizer.encode(f"{INTRODUCTION}\n", add_special_tokens=False)
    assert len(used) == 300 - (shortest(tokenizer, 2) - len(introduction))
