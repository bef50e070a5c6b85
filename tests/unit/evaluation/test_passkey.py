"""The teacher-forced passkey verdict against greedy decoding, scripted and with a real model."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pose.data.tokenizer import train_tokenizer
from pose.errors import ConfigError
from pose.evaluation import generation
from pose.evaluation.passkey import Passkey, found, written
from pose.evaluation.scoring import Scorer
from pose.modeling.load import build_model, load_config
from pose.tasks import passkey as prompt_texts
from pose.tasks.passkey import FILLER, INTRODUCTION, KEY_LINE, QUESTION, PasskeyPrompts
from pose.tasks.tokens import ids_after

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"


def passkey_prompts(prompts, length, trials, seed, depths):
    return Passkey(prompts, [length], trials=trials, seed=seed, depths=depths).drawn(length)


def passkey_accuracy(scorer, prompts, lengths, *, trials, seed, generate=False):
    """The metrics alone, as an evaluation would have them."""
    task = Passkey(prompts, lengths, trials=trials, seed=seed, generate=generate)
    estimates = task.summarise({unit: task.measure(scorer, unit) for unit in task.units()})
    return {name: estimate.value for name, estimate in estimates.items()}


@pytest.fixture(scope="module")
def tokenizer():
    """Digits one by one, as the shipped model's; the prompt's words are whole tokens."""
    text = INTRODUCTION + FILLER + KEY_LINE.format(key="0123456789") + QUESTION
    return train_tokenizer([text] * 3, 500, 256)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return PasskeyPrompts(tokenizer)


class Script:
    """Stands in for a scorer: next_token(prefix) is the model's greedy choice after a prefix."""

    def __init__(self, next_token):
        self.next_token, self.windows = next_token, []
        self.model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))

    def batches(self, windows):
        for window in windows:
            yield window[None]

    def predictions(self, windows, num):
        self.windows += list(windows)
        length = windows.shape[1]
        return np.array([[self.next_token(row[: i + 1]) for i in range(length - num, length)] for row in windows])


def greedy_text(tokenizer, next_token, prefix, num: int) -> str:
    """num tokens generated greedily, as text."""
    tokens = list(prefix)
    for _ in range(num):
        tokens.append(int(next_token(np.array(tokens))))
    return tokenizer.decode(tokens[len(prefix) :])


def leading_digits(text: str) -> str:
    text = text.lstrip(" ")
    return text[: next((i for i, c in enumerate(text) if c not in "0123456789"), len(text))]


def answers_with(prompt, continuation):
    """A model that gives these tokens, one after the other, once the question is asked."""
    question_end = len(prompt.input_ids) - prompt.num_answer

    def next_token(prefix):
        return continuation[len(prefix) - question_end]

    return next_token


ENDINGS = {  # what is generated in place of the key K: (text, whether it is the key)
    "the key, then a word": (lambda k: f" {k} is", True),
    "the key, then a full stop": (lambda k: f" {k}.", True),
    "the key, then a new line": (lambda k: f" {k}\n", True),
    "the key, then another number": (lambda k: f" {k} 7", True),
    "one digit more": (lambda k: f" {k}7", False),
    "the last digit twice": (lambda k: f" {k}{k[-1]}", False),
    "a wrong first digit": (lambda k: f" {(int(k[0]) + 1) % 10}{k[1:]}.", False),
    "a wrong digit in the middle": (lambda k: f" {k[:2]}{(int(k[2]) + 1) % 10}{k[3:]}.", False),
    "a wrong last digit": (lambda k: f" {k[:-1]}{(int(k[-1]) + 1) % 10}.", False),
    "a digit too few": (lambda k: f" {k[:-1]}..", False),
    "no number": (lambda k: " the sky is blue. The grass is green.", False),
    "a new line before the key": (lambda k: f"\n{k}.", False),
    "more spaces before the key": (lambda k: f"  {k}.", True),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("length", [100, 161])
def test_verdict_on_what_is_generated(monkeypatch, tokenizer, prompts, ending, length):
    """The verdict is that of reading the digits of the greedily generated text."""
    text, is_key = ENDINGS[ending]
    prompt = passkey_prompts(prompts, length, 1, 0, None)[0]
    continuation = tokenizer(text(prompt.key), add_special_tokens=False)["input_ids"]
    assert len(continuation) > prompt.num_answer
    model = answers_with(prompt, continuation)
    generated = greedy_text(tokenizer, model, prompt.input_ids[: -prompt.num_answer], prompt.num_answer + 1)
    assert (leading_digits(generated) == prompt.key) is is_key
    monkeypatch.setattr(generation, "greedy", lambda model, batch, num, ends: [np.array(continuation[:num])])
    for generate in (False, True):
        accuracy = passkey_accuracy(Script(model), prompts, [length], trials=1, seed=0, generate=generate)
        assert accuracy == {f"passkey@{length}": float(is_key)}


def test_accuracy_is_the_share_of_prompts(tokenizer, prompts):
    """A model that knows the keys of three of eight prompts."""
    drawn = passkey_prompts(prompts, 120, 8, 5, None)
    full_stop = tokenizer(".", add_special_tokens=False)["input_ids"][0]
    known = {prompt.input_ids.tobytes() for prompt in drawn[2:5]}

    class KnowsThree(Script):
        def predictions(self, windows, num):
            following = np.column_stack([windows, np.full(len(windows), full_stop)])[:, -num:]
            return np.array([f if w.tobytes() in known else f + 1 for w, f in zip(windows, following, strict=True)])

    accuracy = passkey_accuracy(KnowsThree(None), prompts, [120], trials=8, seed=5)
    assert accuracy == {"passkey@120": 3 / 8}


def test_prompts_of_a_length_do_not_depend_on_the_other_lengths(prompts):
    def asked(lengths, trials=3, seed=0):
        script = Script(lambda prefix: 0)
        result = passkey_accuracy(script, prompts, lengths, trials=trials, seed=seed)
        assert set(result) == {f"passkey@{n}" for n in lengths}
        return {n: [w.tolist() for w in script.windows if len(w) == n] for n in lengths}

    both = asked([100, 130])
    assert asked([130, 100]) == both
    assert asked([130])[130] == both[130]
    assert asked([130], trials=5)[130][:3] == both[130]
    assert asked([130], seed=1)[130] != both[130]


def test_prompts_differ_from_each_other_and_from_those_of_another_length(prompts):
    drawn = passkey_prompts(prompts, 140, 20, 0, None)
    assert len({prompt.key for prompt in drawn}) == 20
    assert {prompt.key for prompt in drawn}.isdisjoint(p.key for p in passkey_prompts(prompts, 141, 20, 0, None))
    assert len({prompt.key_start for prompt in drawn}) > 10
    assert all(len(prompt.input_ids) == 140 for prompt in drawn)


def test_depths_are_taken_in_turn(prompts):
    drawn = passkey_prompts(prompts, 160, 5, 0, [0.0, 1.0])
    begin, end = len(prompts.introduction), 160 - len(prompts.question)
    starts = [prompt.key_start for prompt in drawn]
    assert starts == [begin, starts[1], begin, starts[3], begin]
    for prompt in drawn[1::2]:
        line = len(ids_after(prompts.tokenizer, ".", KEY_LINE.format(key=prompt.key)))
        assert prompt.key_start == end - line - prompt.num_answer


class FewSymbols:
    """A tokenizer of four symbols: a digit is its parity, and all else is one of two letters.

    Random models then give right keys, and right keys with one digit more, often enough to be counted.
    """

    SYMBOLS = "01ab"
    eos_token_id = None

    def __call__(self, text, add_special_tokens=False, verbose=True):
        return {"input_ids": [int(c) % 2 if c.isdigit() else 2 + ord(c) % 2 for c in text if c != " "]}

    def get_vocab(self):
        return {symbol: i for i, symbol in enumerate(self.SYMBOLS)}

    def decode(self, ids):
        return "".join(self.SYMBOLS[i] for i in ids)


class ParityPrompts(PasskeyPrompts):
    """Prompts whose key is what `FewSymbols` keeps of it."""

    def sample(self, *args):
        prompt = super().sample(*args)
        return prompt._replace(key=self.tokenizer.decode(prompt.input_ids[-prompt.num_answer :]))


def test_verdicts_are_those_of_greedy_generation(monkeypatch):
    """Short prompts, random models: each verdict is that of `generate` on the prompt without its key."""
    monkeypatch.setattr(prompt_texts, "INTRODUCTION", "info\n")
    monkeypatch.setattr(prompt_texts, "FILLER", "The grass is green. ")
    monkeypatch.setattr(prompt_texts, "KEY_LINE", "\nkey {key}.\n")
    monkeypatch.setattr(prompt_texts, "QUESTION", "\nkey")
    monkeypatch.setattr(prompt_texts, "KEY_DIGITS", 2)
    tokenizer = FewSymbols()
    prompts, trials, length = ParityPrompts(tokenizer), 150, 30
    config = LlamaConfig(
        vocab_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.8, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    seen = {"the key": 0, "one digit more": 0, "something else": 0}
    for seed in range(10):
        torch.manual_seed(seed)
        model = build_model(config, None, "sdpa").eval()
        drawn = passkey_prompts(prompts, length, trials, seed, None)
        asked = torch.tensor(np.stack([prompt.input_ids[:-2] for prompt in drawn]))
        generated = model.generate(asked, max_new_tokens=3, do_sample=False)[:, -3:].tolist()
        verdicts = []
        for prompt, tokens in zip(drawn, generated, strict=True):
            key, text = tokenizer.decode(prompt.input_ids[-2:]), tokenizer.decode(tokens)
            verdicts.append(leading_digits(text) == key)
            kind = "the key" if verdicts[-1] else "one digit more" if text.startswith(key) else "something else"
            seen[kind] += 1
            if seen[kind] <= 10:
                assert found(Scorer(model, 1), tokenizer, [prompt]) == [verdicts[-1]]
        for generate in (False, True):
            task = Passkey(prompts, [length], trials=trials, seed=seed, generate=generate)
            assert task.measure(Scorer(model, 1000), str(length))["found"] == verdicts
    assert min(seen.values()) >= 10, seen


@pytest.mark.parametrize("lengths", [[160, 250], [256, 300]])
def test_the_shipped_model_is_judged_alike_by_both(lengths):
    """Inside its window of 256 and beyond it, where some keys are found and some are not."""
    model = build_model(load_config(str(TINY)), str(TINY))
    prompts = PasskeyPrompts(PreTrainedTokenizerFast.from_pretrained(TINY))
    verdicts = []
    for length in lengths:
        tasks = [Passkey(prompts, [length], trials=12, seed=3, generate=generate) for generate in (False, True)]
        forced, decoded = (task.measure(Scorer(model, 2000), str(length))["found"] for task in tasks)
        assert forced == decoded
        verdicts += forced
    assert 1 in verdicts


class DigitPairs:
    """A tokenizer with all numbers of one and of two digits: it takes pairs, and decodes either."""

    eos_token_id = 110

    def decode(self, ids):
        return "".join(
            str(i) if i < 10 else f"{i - 10:02}" if i < 110 else {110: "</s>", 112: " "}.get(i, ".") for i in ids
        )


PIECES = [  # the key 1234 is [22, 44]; what is written, and whether that is it
    ([22, 44, 111], True),
    ([1, 2, 3, 4, 111], True),
    ([22, 3, 4, 111], True),
    ([1, 33, 4, 111], True),
    ([22, 44, 5, 111], False),
    ([1, 2, 3, 4, 5], False),
    ([22, 3, 5, 111], False),
    ([22, 44, 110], True),
    ([22, 3, 110], False),
    ([1, 111, 22, 44], False),
    ([22, 54, 111], False),
    ([112, 22, 44, 111], True),
    ([112, 1, 2, 3, 4, 111], True),
    ([112, 22, 44, 5, 111], False),
    ([112, 1, 2, 3, 4, 5], False),
]


@pytest.mark.parametrize(("continuation", "is_key"), PIECES)
def test_other_tokens_for_the_same_digits_are_the_same_key(monkeypatch, continuation, is_key):
    """Both ways judge the digits; teacher forcing decodes where its one pass does not show them."""
    prompt = SimpleNamespace(input_ids=np.array([111, 111, 22, 44]), num_answer=2, key="1234")
    end = 110 if 110 in continuation else None
    writes = [*continuation, 111, 111, 111, 111, 111]

    def greedy(model, prompts, max_new_tokens, eos_ids):
        assert prompts.tolist() == [[111, 111]] and list(eos_ids) == [110]
        text = writes[:max_new_tokens]
        return [np.array(text[: text.index(end)] if end in text else text)]

    monkeypatch.setattr(generation, "greedy", greedy)
    script = Script(lambda prefix: writes[len(prefix) - 2] if prefix[2:].tolist() == writes[: len(prefix) - 2] else 0)
    assert written(script, DigitPairs(), [prompt]) == [is_key]
    assert found(script, DigitPairs(), [prompt]) == [is_key]


def test_what_follows_the_right_tokens_is_not_what_follows_others_of_the_same_digits(monkeypatch):
    """The model writes 1 in place of 12, and would go on rightly after 12."""
    prompt = SimpleNamespace(input_ids=np.array([111, 111, 22, 44]), num_answer=2, key="1234")
    after = {(): 1, (1,): 2, (1, 2): 44, (22,): 44, (22, 44): 111, (1, 2, 44): 111}

    def greedy(model, prompts, max_new_tokens, eos_ids):
        return [np.array([1, 2, 44, 111])]

    monkeypatch.setattr(generation, "greedy", greedy)
    script = Script(lambda prefix: after[tuple(prefix[2:].tolist())])
    assert written(script, DigitPairs(), [prompt]) == found(script, DigitPairs(), [prompt]) == [True]


def test_keys_of_different_numbers_of_tokens_are_asked_for_without_a_token_of_theirs(monkeypatch):
    prompts = [
        SimpleNamespace(input_ids=np.array([111, *ids]), num_answer=len(ids), key="1234")
        for ids in ([22, 3, 4], [22, 44], [1, 2, 3, 4], [1, 33, 4], [22, 44])
    ]
    asked = []

    def greedy(model, batch, max_new_tokens, eos_ids):
        asked.extend(batch.tolist())
        return [np.array([1, 2, 3, 4, 111])] * len(batch)

    monkeypatch.setattr(generation, "greedy", greedy)
    assert written(Script(None), DigitPairs(), prompts) == [True] * 5
    assert asked == [[111]] * 5


def test_prompts_of_keys_with_different_numbers_of_tokens_are_decoded_from_their_own_ends():
    """A tokenizer that joins digits, and a random model: the verdicts of both, prompt by prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "0123456789" for b in "02468"]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    tokenizer.model = models.BPE(vocabulary, pairs)
    prompts = PasskeyPrompts(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    drawn = passkey_prompts(prompts, 420, 12, 0, None)
    assert len({prompt.num_answer for prompt in drawn}) > 1
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    scorer = Scorer(build_model(config, None, "sdpa"), 2000)
    calls = []
    for prompt, verdict in zip(drawn, written(scorer, prompts.tokenizer, drawn), strict=True):
        question = torch.tensor(prompt.input_ids[None, : -prompt.num_answer])
        row = scorer.model.generate(question, max_new_tokens=8, do_sample=False, eos_token_id=None)[
            0, question.shape[1] :
        ]
        calls.append(leading_digits(prompts.tokenizer.decode(row)) == prompt.key)
        assert calls[-1] == verdict
    assert found(scorer, prompts.tokenizer, drawn) == calls


def test_places_and_intervals_are_reported(prompts):
    task = Passkey(prompts, [130, 100], trials=4, seed=0)
    assert list(task.units()) == ["100", "130"]
    outcome = task.measure(Script(lambda prefix: 0), "130")
    assert outcome["found"] == [0, 0, 0, 0]
    assert outcome["depths"] == [prompt.key_start / 130 for prompt in task.drawn(130)]
    estimate = task.summarise({"130": {"found": [1, 1, 1, 0], "depths": []}})["passkey@130"]
    assert estimate.value == 0.75 and estimate.num == 4 and 0.30 < estimate.low < 0.75 < estimate.high < 0.96


def test_units_tell_evaluations_apart(prompts):
    def unit(**change):
        return Passkey(prompts, [130], **{"trials": 4, "seed": 0, "depths": None, "generate": False} | change).units()[
            "130"
        ]

    changes = [{"trials": 5}, {"seed": 1}, {"depths": [0.5]}, {"generate": True}]
    assert len({str(unit(**change)) for change in [{}, *changes]}) == 5
    with_bos = PasskeyPrompts(prompts.tokenizer, prompts.tokenizer.bos_token_id)
    assert Passkey(with_bos, [130], trials=4, seed=0).units()["130"] != unit()
    assert Passkey(prompts, [131], trials=4, seed=0).units()["131"] != unit()
    other = train_tokenizer([INTRODUCTION + FILLER] * 3, 300, 256)
    assert Passkey(PasskeyPrompts(other), [400], trials=4, seed=0).units()["400"]["tokenizer"] != unit()["tokenizer"]


def test_a_length_that_is_too_short_is_refused_at_once(prompts):
    with pytest.raises(ConfigError, match=r"of 20 tokens is not possible.*the shortest has"):
        Passkey(prompts, [130, 20], trials=1, seed=0)
