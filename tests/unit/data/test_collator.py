"""The collator: right tokens at right positions, drawn anew each time, repeatable."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pose.data.collator import PoseCollator
from pose.errors import ConfigError, DataError
from pose.positions import EndAnchor, Full, PoSE, RandPos, SentenceSkip

L, T = 32, 256
SAMPLER = PoSE(L, T, num_chunks=2)


def document(length=100, start=0):
    return {"input_ids": list(range(start, start + length))}


def layouts(batches):
    """What was drawn, of documents whose tokens are their own places."""
    return [tuple(map(tuple, torch.cat([b["input_ids"], b["position_ids"]], 1).tolist())) for b in batches]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda x: np.array(x, np.uint16)])
def test_a_batch(kind):
    features = [{"input_ids": kind(list(range(start, start + n))), "id": n} for start, n in ((0, L), (1000, 5 * L))]
    batch = PoseCollator(SAMPLER)(features)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    for tensor in batch.values():
        assert tensor.shape == (2, L) and tensor.dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["input_ids"][0].tolist() == list(range(L)), "a document of train_len has one reading"
    places, positions = batch["input_ids"][1] - 1000, batch["position_ids"]
    assert places.min() >= 0 and places.max() < 5 * L
    assert positions.min() >= 0 and positions.max() < T
    for row in (places, *positions):  # two chunks: one step at most that is not 1
        steps = row.diff()
        assert (steps >= 1).all() and (steps > 1).sum() <= 1


def test_layouts_have_the_samplers_law():
    """N = 2: the skip is uniform on 0..T-L, so its mean over n draws is (T-L)/2 within 4 standard errors."""
    n = 4000
    batch = PoseCollator(SAMPLER, seed=3)([document()] * n)
    skips = (batch["position_ids"][:, -1] - (L - 1)).double()
    assert skips.min() == 0 and skips.max() == T - L
    assert abs(skips.mean() - (T - L) / 2) < 4 * (T - L) / 12**0.5 / n**0.5


def test_the_seed_decides_and_nothing_is_frozen():
    a, b, other = (PoseCollator(SAMPLER, seed) for seed in (1, 1, 2))
    drawn = {name: layouts([c([document()]) for _ in range(4)]) for name, c in {"a": a, "b": b, "other": other}.items()}
    assert drawn["a"] == drawn["b"] and drawn["a"] != drawn["other"]
    assert len(set(drawn["a"])) == 4, "each time another layout"


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_and_epochs_draw_for_themselves(persistent):
    def two_epochs():
        torch.manual_seed(5)
        loader = DataLoader(
            [document()] * 4, batch_size=1, collate_fn=PoseCollator(SAMPLER), num_workers=2,
            persistent_workers=persistent,
        )  # fmt: skip
        return layouts(batch for _ in range(2) for batch in loader)

    first = two_epochs()
    assert len(first) == 8 and len(set(first)) == 8
    assert two_epochs() == first


def test_ranks_draw_for_themselves(monkeypatch):
    drawn = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        drawn.append(layouts([PoseCollator(SAMPLER)([document()])]))
    assert drawn[0] != drawn[1]


def test_labels_go_with_their_tokens():
    feature = document() | {"labels": [-100 if i % 3 else i for i in range(100)]}
    batch = PoseCollator(SAMPLER)([feature])
    tokens, labels = batch["input_ids"], batch["labels"]
    assert torch.equal(labels, torch.where(tokens % 3 == 0, tokens, -100))


@pytest.mark.parametrize("sampler", [Full(L, T), RandPos(L, T), PoSE(L, T, content="aligned")])
def test_other_samplers(sampler):
    batch = PoseCollator(sampler)([document(T), document(2 * T)])
    assert batch["input_ids"].shape == (2, sampler.example_len)
    if not isinstance(sampler, RandPos):
        assert torch.equal(batch["position_ids"][0], batch["input_ids"][0])


def test_sentences_are_split_where_they_end():
    """Only the token after an end (id 9 of ten) begins a chunk, but for one: the end of LongRecipe's unmoved head."""
    sentence_end = np.arange(10) == 9
    tokens = np.arange(400) % 10
    batch = PoseCollator(SentenceSkip(L, T), sentence_end=sentence_end)([{"input_ids": tokens}] * 50)
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        begins = ids[1:][positions.diff() > 1]
        assert len(begins) >= 2 and (begins != 0).sum() <= 1


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (document(L - 1), rf"item 1 of the batch has {L - 1} tokens, and PoSE with train_len={L} and target_len={T} "),
        ({"text": "words"}, r"item 1 of the batch has no input_ids, only \['text'\]"),
        ({"input_ids": [[1, 2], [3, 4]]}, r"item 1 of the batch: input_ids has shape \[2, 2\]"),
        ({"input_ids": [0.5] * 100}, r"type float64"),
        (document() | {"labels": [1, 2]}, r"item 1 of the batch has 100 input_ids and labels of shape \[2\]"),
    ],
)
def test_bad_documents_are_named(feature, message):
    with pytest.raises(DataError, match=message):
        PoseCollator(SAMPLER)([document(), feature])


def test_what_a_collator_cannot_do_is_refused():
    """Other trainers take their loss from labels, and do not say how far the run is."""
    with pytest.raises(ConfigError, match=r"EndAnchor weighs the tokens of an example.*cue_weight=1"):
        PoseCollator(EndAnchor(L, T))
    with pytest.raises(ConfigError, match="does not know how far the run is"):
        PoseCollator(PoSE(L, T, curriculum=[(0.5, 2 * L)]))
    batch = PoseCollator(EndAnchor(L, T, cue_len=2, cue_weight=1))([document()])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"][0].tolist() == [*range(L - 2), T - 2, T - 1]
