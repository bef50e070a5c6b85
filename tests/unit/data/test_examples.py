"""pose.data.examples: examples are pure, fresh, really from the documents, and the same for any set-up."""

import pickle
from collections import Counter
from dataclasses import dataclass
from inspect import signature
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerFast

from pose.app.schema import DataConfig
from pose.data.datamodule import PoseDataModule
from pose.data.examples import IGNORE, Curriculum, PoseDataset, collate, collate_scored
from pose.errors import DataError
from pose.positions import (
    EndAnchor,
    Full,
    Layout,
    Mix,
    PoSE,
    PositionSampler,
    RandPos,
    SentenceSkip,
    ShortPI,
    SingleShift,
)
from pose.tasks.synthetic import TASKS

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"
BASE = 10_000  # token t of document d is d * BASE + t + 1: a token says where it is from
BOS = 9_999_999
LENGTHS = (100, 37, 16, 260, 15, 64)  # the fifth is too short for 16 tokens
POSE = PoSE(train_len=16, target_len=64, num_chunks=2)


def documents(lengths=LENGTHS):
    return [np.arange(1, n + 1, dtype=np.uint32) + d * BASE for d, n in enumerate(lengths)]


def dataset(sampler=POSE, lengths=LENGTHS, num_examples=200, seed=0, **kwargs):
    return PoseDataset(documents(lengths), sampler, num_examples=num_examples, seed=seed, **kwargs)


def origin(example) -> tuple[int, np.ndarray]:
    """The document of an example, and the index in it of each token (BOS left out)."""
    tokens = example["input_ids"].numpy()
    tokens = tokens[tokens != BOS]
    (document,) = set(tokens // BASE)
    return int(document), tokens % BASE - 1


def as_tuple(example):
    return tuple(tuple(example[name].tolist()) for name in ("input_ids", "labels", "position_ids"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@dataclass(frozen=True)
class Ends(PositionSampler):
    """Shows the first three tokens of x, its last, and says how long x was by the last position id."""

    def _sample(self, rng, document_len):
        return Layout(np.array([0, 1, 2, document_len]), np.array([0, 1, 2, document_len - 1]))


@dataclass(frozen=True)
class Breaks(PositionSampler):
    """Keeps the breaks it is given; shows all of x up to train_len tokens."""

    uses_breaks = True
    seen = []  # noqa: RUF012

    def _sample(self, rng, document_len, breaks=None):
        self.seen.append(breaks)
        return Layout(np.arange(self.train_len), np.arange(self.train_len))


@dataclass
class Constant:
    """A retrieval task whose examples are one token, with the loss on the second and last."""

    token: int
    question_len: int = 1

    def sample(self, rng, length):
        is_answer = np.zeros(length, bool)
        is_answer[[1, -1]] = True
        return np.full(length, self.token), is_answer

    def __hash__(self):
        return self.token


# Purity


def test_an_example_is_a_function_of_seed_epoch_and_index():
    """In any order, from any object, after a pickle."""
    first, again = dataset(window_len=20), pickle.loads(pickle.dumps(dataset(window_len=20)))
    wanted = {(e, i): first.example(e, i) for e in range(5) for i in range(first.epoch_len)}
    for e, i in reversed(wanted):
        assert same(again.example(e, i), wanted[e, i])
    for item in (0, 1, first.epoch_len, 3 * first.epoch_len + 2):
        assert same(first[item], wanted[divmod(item, first.epoch_len)])


def test_global_random_state_is_neither_read_nor_changed():
    np.random.seed(0), torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    example = dataset()[3]
    assert np.array_equal(np.random.get_state()[1], before[0]) and torch.equal(torch.get_rng_state(), before[1])
    np.random.seed(1), torch.manual_seed(1)
    assert same(dataset()[3], example)


def test_another_seed_gives_other_examples():
    a, b = dataset(seed=0), dataset(seed=1)
    assert sum(same(a[i], b[i]) for i in range(100)) < 5


def test_every_epoch_is_drawn_anew():
    """One document, seen 50 times: its positions and its text are not those of an earlier epoch."""
    data = dataset(lengths=(500,), num_examples=50)
    assert data.epoch_len == 1
    assert len({tuple(data[i]["position_ids"].tolist()) for i in range(50)}) > 45
    assert len({tuple(data[i]["input_ids"].tolist()) for i in range(50)}) > 45


def test_examples_of_an_epoch_differ_from_each_other():
    """Visits to one document in one epoch are not copies."""
    data = dataset(lengths=(2000,), window_len=100)
    assert len({as_tuple(data[i]) for i in range(data.epoch_len)}) == data.epoch_len == 20


# Visits


@pytest.mark.parametrize("window_len", [None, 16, 20, 64, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_visits_of_an_epoch(window_len, epoch):
    """Once a document, or once for every window_len tokens it has; never one that is too short."""
    data = dataset(window_len=window_len)
    expected = {
        d: 1 if window_len is None else max(1, n // window_len) for d, n in enumerate(LENGTHS) if n >= POSE.train_len
    }
    assert data.epoch_len == sum(expected.values())
    seen = Counter(origin(data.example(epoch, i))[0] for i in range(data.epoch_len))
    assert seen == expected


def test_order_differs_between_epochs():
    data = dataset(lengths=(20,) * 30)
    orders = {tuple(origin(data.example(e, i))[0] for i in range(30)) for e in range(5)}
    assert len(orders) == 5


def test_length_is_that_of_the_run():
    data = dataset(num_examples=13)
    assert len(data) == 13
    assert len([None for _ in data]) == 13  # iteration ends
    for i in (-1, 13):
        with pytest.raises(IndexError):
            data[i]


def test_no_document_long_enough_is_named_with_the_numbers():
    with pytest.raises(DataError, match=r"none of the 3 documents.*longest has 15 tokens.*PoSE.*needs 16"):
        dataset(lengths=(3, 15, 9))
    with pytest.raises(DataError, match=r"train_len=16.*target_len=64.*needs 64"):
        dataset(Full(16, 64), lengths=(63,))
    with pytest.raises(DataError, match="none of the 0 documents is long enough: the longest has 0"):
        dataset(lengths=())


def test_bos_counts_towards_the_length_needed():
    assert dataset(lengths=(15,), bos_id=BOS).epoch_len == 1
    with pytest.raises(DataError):
        dataset(lengths=(14,), bos_id=BOS)


# Text


def test_dtypes_and_shapes():
    example = dataset()[0]
    assert set(example) == {"input_ids", "labels", "position_ids"}
    assert all(tensor.dtype == torch.int64 and tensor.shape == (16,) for tensor in example.values())


@pytest.mark.parametrize("bos_id", [None, BOS])
@pytest.mark.parametrize("window_len", [None, 20, 50])
def test_text_is_the_document_at_the_samplers_indices(bos_id, window_len):
    """Reconstruction: with x = [BOS] + document (or a stretch of it), tokens are x[content_ids]."""
    sampler = Ends(train_len=4, target_len=1000)
    data = dataset(sampler, bos_id=bos_id, window_len=window_len)
    texts = documents()
    starts = set()
    for i in range(200):
        example = data[i]
        document, index = origin(example)
        start = index[0]
        end = len(texts[document]) if window_len is None else start + window_len - (bos_id is not None)
        x = ([] if bos_id is None else [bos_id]) + texts[document][start:end].tolist()
        assert example["input_ids"].tolist() == [x[0], x[1], x[2], x[-1]]
        assert example["position_ids"].tolist() == [0, 1, 2, len(x)]
        assert torch.equal(example["labels"], example["input_ids"])
        starts.add((document, int(start)))
    if window_len is None:
        assert {start for _, start in starts} == {0}


def test_windows_start_anywhere_with_equal_chance():
    """Four places, both ends among them, 4,000 draws: each within five standard deviations."""
    data = dataset(lengths=(23,), window_len=20, num_examples=4000)
    starts = Counter()
    for i in range(4000):
        _, index = origin(data[i])
        first = index[0]  # v_0 = 0: the first token of the window
        assert index.max() < first + 20
        starts[int(first)] += 1
    assert set(starts) == {0, 1, 2, 3}
    assert max(abs(n - 1000) for n in starts.values()) < 5 * sqrt(4000 * 0.25 * 0.75)


def test_a_document_of_just_the_window_is_whole():
    data = dataset(Ends(4, 1000), lengths=(20, 7), window_len=20)
    for i in range(20):
        document, index = origin(data[i])
        assert (index[0], index[-1]) == (0, (20, 7)[document] - 1)


@pytest.mark.parametrize("bos_id", [None, BOS])
def test_pose_shows_two_stretches_of_one_document(bos_id):
    """Text and positions each run on by one but at one place, the same for both; BOS is x[0]."""
    data, texts = dataset(lengths=(300, 400), bos_id=bos_id, num_examples=300), documents((300, 400))
    skipped = 0
    for example in data:
        document, index = origin(example)
        if bos_id is not None:
            assert example["input_ids"][0] == BOS and (example["input_ids"] != BOS).sum() == 15
            index = np.concatenate([[-1], index])  # BOS comes before the first token
        assert index[0] == (0 if bos_id is None else -1)
        positions = example["position_ids"].numpy()
        text_skips, position_skips = np.flatnonzero(np.diff(index) != 1), np.flatnonzero(np.diff(positions) != 1)
        assert len(text_skips) <= 1 and len(position_skips) <= 1
        assert len(text_skips) + len(position_skips) < 2 or text_skips == position_skips
        assert positions[0] == 0 and positions[-1] < 64
        assert index[-1] < len(texts[document])
        skipped += len(position_skips)
    assert skipped > 250


def test_last_token_of_a_document_is_reached():
    """Equation 5's upper end, Lx - L, holds with and without BOS."""
    for bos_id in (None, BOS):
        data = dataset(lengths=(20,), bos_id=bos_id, num_examples=200)
        assert max(origin(example)[1][-1] for example in data) == 19


# Sentences


@pytest.mark.parametrize("bos_id", [None, BOS])
@pytest.mark.parametrize("window_len", [None, 15, 16])
def test_samplers_that_use_breaks_get_the_sentences_of_x(bos_id, window_len):
    """A sentence begins after each token that ends one; x begins with BOS, and is the window, not the document."""
    vocabulary = np.zeros(BASE * 3, bool)
    vocabulary[[5, 8, 9, 16, 20, BASE + 3, BASE + 17]] = True  # token t is at index t - 1
    sampler = Breaks(15, 64)
    data = dataset(
        sampler, lengths=(20, 17), bos_id=bos_id, window_len=window_len, num_examples=60, sentence_end=vocabulary
    )
    sampler.seen.clear()
    for example in data:
        x = example["input_ids"].tolist()
        found = [int(i) for i in sampler.seen.pop() if i < len(x)]
        assert found == [i for i in range(1, len(x)) if x[i - 1] < BOS and vocabulary[x[i - 1]]]
    assert not sampler.seen


def test_breaks_of_a_whole_document():
    vocabulary = np.zeros(BASE, bool)
    vocabulary[[5, 8, 20]] = True  # the last token ends a sentence, and none begins after it
    sampler = Breaks(16, 64)
    data = dataset(sampler, lengths=(20,), sentence_end=vocabulary, num_examples=1)
    sampler.seen.clear()
    assert data[0]["input_ids"][0] == 1 and sampler.seen.pop().tolist() == [5, 8]


@pytest.mark.parametrize("synthetic", [{}, {Constant(7): 1.0}])
def test_no_text_or_no_sentence_ends_mean_no_breaks(synthetic):
    sampler = Breaks(16, 64)
    sampler.seen.clear()
    ends = np.ones(BASE * 10, bool) if synthetic else None
    assert len(dataset(sampler, synthetic=synthetic, sentence_end=ends)[0]["input_ids"]) == 16
    assert sampler.seen.pop() is None


def test_sentence_skip_skips_after_sentences_alone():
    """But for the border of the head, which may fall within one."""
    vocabulary = np.zeros(BASE, bool)
    vocabulary[[40, 47, 55]] = True
    data = dataset(SentenceSkip(64, 4096), lengths=(64,), sentence_end=vocabulary, num_examples=50)
    for example in data:
        jumps = np.flatnonzero(np.diff(example["position_ids"].numpy()) > 1) + 1
        assert {40, 47, 55} >= set(jumps[jumps > 32].tolist())
        assert len(jumps) >= 2


# Retrieval examples


def test_synthetic_shares():
    """4,000 examples: each share within five standard deviations of the binomial."""
    n, shares = 4000, {Constant(1_000_001): 0.1, Constant(1_000_002): 0.25}
    data = dataset(synthetic=shares, num_examples=n)
    counts = Counter(int(data[i]["input_ids"][0]) for i in range(n))
    drawn = 0
    for task, share in shares.items():
        assert abs(counts[task.token] - n * share) < 5 * sqrt(n * share * (1 - share))
        drawn += counts[task.token]
    assert abs(n - drawn - n * 0.65) < 5 * sqrt(n * 0.65 * 0.35)


@pytest.mark.parametrize("sampler", [POSE, RandPos(16, 64), Full(16, 64)])
def test_synthetic_examples_carry_loss_on_answers_alone_and_the_samplers_positions(sampler):
    data = dataset(sampler, synthetic={Constant(7): 1.0}, num_examples=50)
    for example in data:
        n = sampler.example_len
        assert example["input_ids"].tolist() == [7] * n
        assert example["labels"].tolist() == [-100, 7, *[-100] * (n - 3), 7]
        positions = example["position_ids"]
        assert positions.shape == (n,) and (positions.diff() > 0).all() and positions[-1] < 64
    assert max(int(example["position_ids"][-1]) for example in data) > 40


def test_documents_carry_loss_everywhere():
    for example in dataset(num_examples=20):
        assert torch.equal(example["labels"], example["input_ids"])


# Workers and processes


def batches(data, micro_batch, **kwargs):
    return list(DataLoader(data, micro_batch, shuffle=False, collate_fn=collate, **kwargs))


def test_workers_change_nothing():
    """0 and 2 worker processes: the same batches in the same order."""
    data = dataset(num_examples=64, synthetic={Constant(7): 0.2}, window_len=20)
    alone, workers = batches(data, 4), batches(data, 4, num_workers=2)
    assert len(alone) == len(workers) == 16
    assert all(same(a, b) for a, b in zip(alone, workers, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_hold_the_same_examples_for_any_number_of_processes(world):
    """As Lightning deals them: DistributedSampler(shuffle=False). 12 steps of 8 examples."""
    data = dataset(num_examples=96, window_len=20)
    dealt = [
        batches(data, 8 // world, sampler=DistributedSampler(data, world, rank, shuffle=False)) for rank in range(world)
    ]
    for step in range(12):
        rows = [row for rank in range(world) for row in zip(*dealt[rank][step].values(), strict=True)]
        rows = sorted(tuple(tuple(tensor.tolist()) for tensor in row) for row in rows)
        assert rows == sorted(as_tuple(data[8 * step + i]) for i in range(8))


# Weights


def test_weights_of_a_sampler_reach_the_batch_and_retrieval_answers_weigh_alike():
    """Rows of a cue, of a plain text, and of a task whose first answer stands before the cue and the other in it."""
    sampler = Mix(16, 64, EndAnchor(16, 64, cue_len=4, cue_weight=0.25), plain_share=0.4)
    data = dataset(sampler, synthetic={Constant(7): 0.4}, num_examples=40)
    items = [data[i] for i in range(40)]
    batch = collate_scored(items)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "scored_at", "scored_weights"}
    at, weights = batch["scored_at"], batch["scored_weights"].view(torch.float32)
    seen = Counter()
    for row in range(40):
        got = weights[at // 16 == row] * 40
        is_task, is_plain = bool((batch["labels"][row] == IGNORE).any()), int(batch["position_ids"][row, -1]) == 15
        if is_task:
            wanted = [1 / 2] * 2
        elif is_plain:
            wanted = [1 / 15] * 15
        else:  # 11 tokens of weight 1, 4 of a quarter
            wanted = [1 / 12] * 11 + [1 / 48] * 4
        assert got.tolist() == pytest.approx(wanted)
        seen[is_task, is_plain] += 1
    assert len(seen) == 4


def asked_at(name: str, tokenizer, item: dict) -> int:
    """Where the first question of a retrieval example begins, found in its tokens; what it asks for is all before."""
    ids, scored = item["input_ids"].tolist(), (item["labels"] != IGNORE).nonzero().ravel().tolist()
    first = scored[0]
    if name == "passkey":
        begin = first - next(n for n in range(1, 99) if "\nWhat is" in tokenizer.decode(ids[first - n : first]))
        assert tokenizer.decode(ids[begin:first]).strip() == "What is the pass key? The pass key is"
        assert tokenizer.decode(ids[first : scored[-1]]).strip() in tokenizer.decode(ids[:begin])
        return begin
    if name == "copy":
        answer = ids[first - 3 : scored[-1] + 1]  # with the three tokens that say what is repeated
        assert any(ids[j : j + len(answer)] == answer for j in range(first - 3 - len(answer) + 1))
        return first - 3
    key = ids[first - 3 : first]  # two tokens, and " is"
    assert any(ids[j : j + 3] == key and ids[j + 3 : j + 6] == ids[first : first + 3] for j in range(first - 8))
    return first - 3


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("train_len", [256, 1024])
@pytest.mark.parametrize(("bos_id", "cue_len"), [(None, 20), (0, 20), (None, 4)])
def test_the_answers_of_an_end_anchor_are_asked_for_from_afar(name, train_len, bos_id, cue_len):
    """Each scored token, and the question before it, beyond the skip; what is asked for before it, plain."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
    documents = [np.arange(4096) % 4000 for _ in range(3)]
    task, target_len = TASKS[name](tokenizer, documents), 16 * train_len
    sampler = EndAnchor(train_len, target_len, cue_len=cue_len)
    data = PoseDataset(documents, sampler, num_examples=20, seed=0, bos_id=bos_id, synthetic={task: 1.0})
    for i in range(20):
        item = data[i]
        positions = item["position_ids"]
        begin = asked_at(name, tokenizer, item)
        assert positions.tolist() == [j if j < begin else j + target_len - train_len for j in range(train_len)]
        assert positions[-1] == target_len - 1
    mixed = PoseDataset(documents, Mix(train_len, target_len, sampler), num_examples=40, seed=0, synthetic={task: 1.0})
    ends = set()
    for i in range(40):
        positions, first = mixed[i]["position_ids"], int((mixed[i]["labels"] != IGNORE).nonzero()[0])
        ends.add(int(positions[-1]))
        assert positions[-1] == train_len - 1 or positions[first] == first + target_len - train_len
    assert ends == {train_len - 1, target_len - 1}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("sampler", [PoSE(256, 4096, 2), PoSE(256, 4096, 3), RandPos(256, 4096)], ids=str)
def test_retrieval_examples_may_ask_across_all_that_they_skip(name, sampler):
    """The last id is the one that was drawn; before the question all is plain, and after it too. Text is as it was."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
    texts = [np.arange(4096) % 4000 for _ in range(3)]
    task = TASKS[name](tokenizer, texts)
    make = lambda far: PoseDataset(  # noqa: E731
        texts, sampler, num_examples=40, seed=0, synthetic={task: 0.5}, skip_before_question=far
    )
    plain, far = make(False), make(True)
    kinds = Counter()
    for i in range(40):
        item, other = far[i], plain[i]
        is_task = bool((item["labels"] == IGNORE).any())
        kinds[is_task] += 1
        if not is_task:
            assert same(item, other)
            continue
        start, end = other["position_ids"][[0, -1]].tolist()
        begin = asked_at(name, tokenizer, item)
        assert item["position_ids"].tolist() == [j + start if j < begin else j + end - 255 for j in range(256)]
        assert torch.equal(item["input_ids"], other["input_ids"]) and torch.equal(item["labels"], other["labels"])
    assert min(kinds[True], kinds[False]) > 5


def test_retrieval_examples_ask_across_the_skip_unless_it_is_said_otherwise():
    """The same in the package and under the command line, or a run from Python would be another one."""
    for made in (PoseDataset, PoseDataModule):
        assert signature(made).parameters["skip_before_question"].default is DataConfig().skip_before_question is True


@pytest.mark.parametrize("sampler", [ShortPI(256, 4096), SingleShift(256, 4096)], ids=str)
def test_a_control_without_skips_gets_none(sampler):
    texts = [np.arange(4096) % 4000 for _ in range(3)]
    task = TASKS["key_value"](PreTrainedTokenizerFast.from_pretrained(TINY), texts)
    plain, far = (
        PoseDataset(texts, sampler, num_examples=9, seed=0, synthetic={task: 1.0}, skip_before_question=is_far)
        for is_far in (False, True)
    )
    assert all(same(plain[i], far[i]) for i in range(9))


def test_a_sampler_without_weights_gives_none():
    for sampler in (POSE, EndAnchor(16, 64, cue_len=4, cue_weight=1)):
        assert dataset(sampler)[0].keys() == {"input_ids", "labels", "position_ids"}


# Curriculum and batches


def curriculum():
    """Items 0..9 of 8 tokens, 10..19 of 16, the rest of 32, out of 50."""
    lengths = (300, 500, 900)
    phase = lambda n: dataset(PoSE(n, n, 1), lengths, num_examples=50, window_len=n)  # noqa: E731
    last = dataset(PoSE(32, 64, 2), lengths, num_examples=50)
    return Curriculum([(10, phase(8)), (20, phase(16)), (50, last)])


def test_curriculum_items_have_the_same_tokens_in_shorter_rows():
    data = curriculum()
    assert len(data) == 50
    shapes = [{tuple(tensor.shape) for tensor in data[i].values()} for i in range(50)]
    assert shapes == [{(4, 8)}] * 10 + [{(2, 16)}] * 10 + [{(1, 32)}] * 30


def test_curriculum_rows_are_the_phases_examples_in_a_row():
    """Item i of a phase with r rows is its examples i*r .. i*r + r - 1: none is met twice."""
    data = curriculum()
    for i, rows in ((0, 4), (9, 4), (10, 2), (19, 2), (20, 1), (49, 1)):
        phase = data.phases[{4: 0, 2: 1, 1: 2}[rows]][1]
        for row in range(rows):
            wanted = phase.example(*divmod(i * rows + row, phase.epoch_len))
            assert same({name: tensor[row] for name, tensor in data[i].items()}, wanted)


def test_collate_joins_rows():
    plain = [dataset()[i] for i in range(3)]
    batch = collate(plain)
    assert all(torch.equal(batch[name], torch.stack([item[name] for item in plain])) for name in plain[0])
    short = [curriculum()[i] for i in range(3)]
    batch = collate(short)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(12, 8)}
    assert torch.equal(batch["input_ids"][4:8], short[1]["input_ids"])
