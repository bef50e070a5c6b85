"""pose.tasks.synthetic: every answer can be looked up earlier in the same example."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from pose.errors import ConfigError
from pose.tasks import passkey
from pose.tasks.synthetic import TASKS

ASSETS = Path(__file__).resolve().parents[3] / "assets"
LENGTHS = [64, 128, 255, 256, 1000]


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(ASSETS / "tiny")


@pytest.fixture(scope="module")
def documents(tokenizer):
    """Text that is read-only, as that of a cache is: one longer than any example, one shorter."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, len(tokenizer), n).astype(np.uint16) for n in (5000, 50)]
    for document in documents:
        document.flags.writeable = False
    return documents


@pytest.fixture(scope="module", params=TASKS)
def task(request, tokenizer, documents):
    task = TASKS[request.param](tokenizer, documents)
    task.name = request.param
    return task


def draws(task, length, num=40):
    for seed in range(num):
        yield task.sample(np.random.default_rng((length, seed)), length)


def runs(mask) -> list[tuple[int, int]]:
    """The (start, end) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def find(tokens, pattern) -> list[int]:
    """Every place of pattern in tokens."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(pattern))
    return np.flatnonzero((windows == pattern).all(1)).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_shapes_dtypes_and_token_range(task, length, tokenizer):
    for tokens, is_answer in draws(task, length):
        assert tokens.shape == is_answer.shape == (length,)
        assert tokens.dtype == np.int64 and is_answer.dtype == bool
        assert tokens.min() >= 0 and tokens.max() < len(tokenizer)
        assert is_answer.any() and not is_answer[0]


def test_pure_in_the_generator_and_varied(task):
    first, again = ([tokens.tolist() for tokens, _ in draws(task, 256)] for _ in range(2))
    assert first == again
    assert len({tuple(tokens) for tokens in first}) == len(first)


@pytest.mark.parametrize("length", LENGTHS)
def test_key_value_answers_stand_after_the_same_key_before(tokenizer, documents, length):
    """The key is two tokens, then " is"; what is asked for are the pairs of the list, all of them before one again."""
    task = TASKS["key_value"](tokenizer, documents)
    middle = tokenizer.encode(" is", add_special_tokens=False)
    digits = {tokenizer.encode(str(d), add_special_tokens=False)[0] for d in range(10)}
    value_lengths, list_lengths, orders = set(), set(), []
    for tokens, is_answer in draws(task, length):
        answers = runs(is_answer)
        list_end = answers[0][0] - len(middle) - 2
        value_len = answers[0][1] - answers[0][0]
        num_pairs, left = divmod(list_end, 2 + len(middle) + value_len + 1)
        assert num_pairs >= 1 and left == 0
        places = []
        for start, end in answers:
            assert tokens[start - len(middle) : start].tolist() == middle
            question = tokens[start - len(middle) - 2 : end]
            in_list = [place for place in find(tokens, question) if place < list_end]
            assert len(in_list) == 1, "the pair must stand once in the list"
            places += in_list
        assert {end - start for start, end in answers[:-1]} <= {value_len}  # the last may be cut
        assert set(tokens[is_answer].tolist()) <= digits
        for i in range(0, len(places) - num_pairs + 1, num_pairs):
            assert len(set(places[i : i + num_pairs])) == num_pairs
        value_lengths.add(value_len)
        list_lengths.add(num_pairs)
        orders.append(num_pairs > 2 and places[:num_pairs] == sorted(places[:num_pairs]))
    assert value_lengths == {3, 4, 5, 6, 7}
    assert min(list_lengths) <= length // 64 and max(list_lengths) >= length // 28, "long lists and short ones"
    assert sum(orders) < len(orders) / 2, "the questions are in another order"


def test_every_key_value_example_has_an_answer(tokenizer, documents):
    task = TASKS["key_value"](tokenizer, documents)
    assert all(is_answer.any() for _, is_answer in draws(task, task.least, 200))
    with pytest.raises(ConfigError, match=f"data.synthetic.key_value needs {task.least} tokens"):
        task.sample(np.random.default_rng(0), task.least - 1)


def test_key_value_fills_the_example(tokenizer, documents):
    """The last answer is cut, or less than a question is left over."""
    for _, is_answer in draws(TASKS["key_value"](tokenizer, documents), 256):
        assert runs(is_answer)[-1][1] > 256 - 11


@pytest.mark.parametrize("length", LENGTHS)
def test_copy_answers_repeat_an_earlier_span(tokenizer, documents, length):
    """The answer and at least two tokens of cue before it stand earlier, without overlap."""
    task = TASKS["copy"](tokenizer, documents)
    for tokens, is_answer in draws(task, length, 100):
        ((start, end),) = runs(is_answer)
        repeated = tokens[start - 3 : end]
        assert any(place + len(repeated) <= start - 3 for place in find(tokens, repeated))


def test_copy_takes_text_and_random_tokens_half_and_half(tokenizer):
    """A document of one token only tells them apart; 400 draws, five standard deviations."""
    task = TASKS["copy"](tokenizer, [np.full(5000, 77, np.uint16)])
    text = sum(bool((tokens == 77).all()) for tokens, _ in draws(task, 64, 400))
    assert abs(text - 200) < 5 * 10


@pytest.mark.parametrize("length", LENGTHS)
def test_passkey_answer_is_the_key_of_the_text_with_a_full_stop(tokenizer, documents, length):
    task = TASKS["passkey"](tokenizer, documents)
    ends = set()
    for tokens, is_answer in draws(task, length):
        ((start, end),) = runs(is_answer)
        answer = tokenizer.decode(tokens[start:end])
        key = answer.split(".")[0].strip()
        assert len(key) == 5 and key.isdigit() and answer == f" {key}."
        ends.add(end)
        text = tokenizer.decode(tokens[:start])
        assert f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n" in text
        assert text.endswith("\nWhat is the pass key? The pass key is")
        assert text.startswith("There is an important info") == (length >= 128)
    assert len(ends) > 3, "a fixed place would let a model read digits off positions"


def test_passkey_filler_is_the_papers_or_real_text_half_and_half(tokenizer):
    task = TASKS["passkey"](tokenizer, [np.full(5000, 77, np.uint16)])
    real = sum(tokens[: np.argmax(is_answer)].tolist().count(77) > 0 for tokens, is_answer in draws(task, 256, 400))
    assert abs(real - 200) < 5 * 10


def test_passkey_filler_begins_at_any_word(tokenizer, documents, monkeypatch):
    """Else a prompt of one length would always end in the same words."""
    monkeypatch.setattr(passkey, "IS_TEXT_FILLER", 0)
    task, rng = TASKS["passkey"](tokenizer, documents), np.random.default_rng(0)
    texts = [tokenizer.decode(task.sample(rng, 1000)[0]) for _ in range(60)]
    assert len({text.split("there.\n")[1][:12] for text in texts}) > 10


def test_tasks_of_a_document_never_change_it(task, documents):
    before = [document.copy() for document in documents]
    for _ in draws(task, 256, 100):
        pass
    assert all(np.array_equal(a, b) for a, b in zip(before, documents, strict=True))


def test_real_text_is_a_stretch_of_one_document(tokenizer):
    """Tokens that run on by one, or start over where the document is shorter than the example."""
    documents = [np.arange(1000, 1400, dtype=np.uint16), np.arange(2000, 2030, dtype=np.uint16)]
    task = TASKS["copy"](tokenizer, documents)
    seen = set()
    for tokens, is_answer in draws(task, 64, 200):
        ((start, _),) = runs(is_answer)
        before = tokens[: start - 3]
        if not (np.isin(before, documents[0]).all() or np.isin(before, documents[1]).all()):
            continue  # random tokens
        steps = set(np.diff(before).tolist())
        assert steps <= {1} or steps <= {1, -29}
        seen.add(int(before[0]) // 1000)
    assert seen == {1, 2}


def test_no_special_token_is_drawn_as_a_word(tokenizer):
    """End of text, token 0, is never part of a key or of a copied span of random tokens."""
    documents = [np.full(5000, 77, np.uint16)]
    for name in ("key_value", "copy"):
        for tokens, is_answer in draws(TASKS[name](tokenizer, documents), 256, 300):
            last = runs(is_answer)[-1][1]
            assert (tokens[: last - 1] != tokenizer.eos_token_id).all()
