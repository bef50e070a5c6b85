"""pose.data.datamodule: from files to batches, and settings that cannot work are named."""

import json
import logging
import os
import pickle
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pose.data.cache import same_text
from pose.data.datamodule import PoseDataModule, bos_id, sentence_ends
from pose.data.examples import IGNORE, Targets
from pose.errors import ConfigError, DataError
from pose.positions import EndAnchor, Full, PoSE, RandPos, SentenceSkip
from pose.tasks.tokens import plain_tokens

ASSETS = Path(__file__).resolve().parents[3] / "assets"


def number_tokenizer(size=5000, bos=None, adds_bos=False):
    """The word of a number is the token of that number; a bos is the token `size`."""
    vocab = {str(i): i for i in range(size)} | ({bos: size} if bos else {})
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, size)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)


TOKENIZER = number_tokenizer()
POSE = PoSE(train_len=16, target_len=64, num_chunks=2)


@pytest.fixture
def files(tmp_path):
    """Two files; document d is the numbers d * 1000 + 1, + 2, ..."""
    lengths = ((100, 200), (150,))
    paths, d = [], 0
    for i, documents in enumerate(lengths):
        lines = []
        for n in documents:
            lines.append(json.dumps({"text": " ".join(str(d * 1000 + t) for t in range(1, n + 1)), "body": "1 2"}))
            d += 1
        paths.append(tmp_path / f"{i}.jsonl")
        paths[-1].write_text("\n".join(lines))
    return paths


@pytest.fixture
def make(files, tmp_path):
    def make(documents=files, tokenizer=TOKENIZER, sampler=POSE, **kwargs):
        arguments = {"num_examples": 48, "micro_batch": 4, "seed": 0, "cache_dir": tmp_path / "cache"} | kwargs
        return PoseDataModule(documents, tokenizer, sampler, **arguments)

    return make


def ready(module):
    module.prepare_data()
    module.setup("fit")
    return module


def seen_documents(module):
    return Counter(int(row[0]) // 1000 for batch in module.train_dataloader() for row in batch["input_ids"])


def test_batches(make):
    """As many as the run has, in the order of the dataset, with every file's documents."""
    module = ready(make())
    batches = list(module.train_dataloader())
    assert len(batches) == 12
    for batch in batches:
        assert not any(tensor.is_floating_point() for tensor in batch.values()), "DeepSpeed would round them to bf16"
        index, weights = Targets.of_batch(batch)
        del batch["scored_at"], batch["scored_weights"]
        assert set(batch) == {"input_ids", "labels", "position_ids"}
        assert all(tensor.shape == (4, 16) and tensor.dtype == torch.int64 for tensor in batch.values())
        assert index.tolist() == [i for i in range(64) if i % 16 < 15]
        assert torch.equal(weights, torch.full((60,), 1 / 60))
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(rows, torch.stack([module.dataset[i]["input_ids"] for i in range(48)]))
    assert seen_documents(module) == {0: 16, 1: 16, 2: 16}


def test_a_file_named_twice_counts_twice(make, files):
    assert seen_documents(ready(make([files[0], files[0], files[1]], num_examples=50))) == {0: 20, 1: 20, 2: 10}


def test_window_len_and_seed_reach_the_dataset(make):
    """lengths // window_len visits: 2, 4 and 3 for windows of 50."""
    assert seen_documents(ready(make(window_len=50, num_examples=45))) == {0: 10, 1: 20, 2: 15}
    a, b, c = (ready(make(seed=seed)).dataset[0]["position_ids"].tolist() for seed in (0, 0, 1))
    assert a == b != c


def test_setup_alone_suffices_and_a_second_changes_nothing(make):
    """As in processes other than the first."""
    module = make()
    module.setup("fit")
    dataset = module.dataset
    module.setup("fit")
    assert module.dataset is dataset and len(dataset) == 48


def test_text_field(make, files):
    module = ready(make(files[:1], sampler=PoSE(2, 4, 2), text_field="body"))
    assert {tuple(module.dataset[i]["input_ids"].tolist()) for i in range(10)} == {(1, 2)}


def test_workers_give_the_same_batches(make):
    alone, worker = (list(ready(make(num_workers=n)).train_dataloader()) for n in (0, 1))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(alone, worker, strict=True) for name in a)


@pytest.mark.parametrize("device", ["cpu", "cuda", None])
def test_batches_are_pinned_for_a_gpu_alone(make, device):
    module = ready(make())
    if device is not None:
        strategy = SimpleNamespace(root_device=torch.device(device))
        module.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1, strategy=strategy)
    assert module.train_dataloader().pin_memory is (device == "cuda")


def test_every_part_of_a_batch_moves_without_anybody_waiting(make, monkeypatch):
    """Lightning's way to a device that is no CPU, for which meta stands."""
    (batch, *_), moved, to = ready(make()).train_dataloader(), [], torch.Tensor.to

    def noted(tensor, *args, **kwargs):
        moved.append((tensor, args, kwargs))
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    device = torch.device("meta")
    assert {tensor.device for tensor in move_data_to_device(batch, device).values()} == {device}
    assert {id(tensor) for tensor, _, _ in moved} == {id(tensor) for tensor in batch.values()} and len(batch) == 5
    assert all(args == (device,) and kwargs == {"non_blocking": True} for _, args, kwargs in moved)


def test_curriculum(make):
    """0.25 and 0.5 of 48 examples: 12 items of 4 rows, 12 of 2, then 24 of 1; the tokens of a batch stay 64."""
    module = ready(make(curriculum=[(0.25, 4), (0.5, 8)]))
    batches = list(module.train_dataloader())
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(16, 4)] * 3 + [(8, 8)] * 3 + [(4, 16)] * 6
    for batch in batches[:6]:
        length = batch["position_ids"].shape[1]
        assert (batch["position_ids"] == torch.arange(length)).all()  # nothing to skip to
        assert (batch["input_ids"].diff() == 1).all()  # contiguous text
    assert (batches[0]["input_ids"][:, 0] % 1000 != 1).any()  # from anywhere in a document


def test_the_same_text_in_a_folder_of_another_name(make, files, tmp_path):
    """A run resumes with it: the fingerprint differs in the name of the folder alone; other text is another."""
    found = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file.name).write_text(file.read_text().replace("17", "18" if name == "c" else "17"))
        found.append(ready(make(documents=tmp_path / name)).fingerprint)
    a, b, c = found
    assert a != b and same_text(a) == same_text(b) != same_text(c)
    assert same_text(f"{a}, without 3 of data.leave_out: x-1") == f"{same_text(a)}, without 3 of data.leave_out: x-1"


def test_the_window_of_a_document_has_bos_in_it(make):
    """One token short of the sampler's example is an error before the training; just enough is none."""
    tokenizer = number_tokenizer(bos="<s>", adds_bos=True)
    with pytest.raises(ConfigError, match=r"data.window_len=15 is too short: .* at least 16 tokens, BOS among them"):
        make(window_len=15, tokenizer=tokenizer)
    assert len(ready(make(window_len=16, tokenizer=tokenizer)).dataset[0]["input_ids"]) == 16


def test_examples_of_the_curriculum_have_no_gap_with_bos(make):
    """BOS and n - 1 tokens that follow each other."""
    tokenizer = number_tokenizer(bos="<s>", adds_bos=True)
    module = ready(make(curriculum=[(0.5, 4), (0.9, 8)], sampler=PoSE(16, 16), window_len=16, tokenizer=tokenizer))
    for batch in module.train_dataloader():
        assert (batch["input_ids"][:, 0] == 5000).all()
        assert (batch["position_ids"] == torch.arange(batch["position_ids"].shape[1])).all()
        assert (batch["input_ids"][:, 1:].diff() == 1).all()


@pytest.mark.parametrize("num_examples", [4, 8, 20, 44])
def test_a_batch_is_of_one_phase_of_the_curriculum(make, num_examples):
    """0.3 and 0.6 of the run fall inside batches of 4."""
    batches = list(ready(make(curriculum=[(0.3, 4), (0.6, 8)], num_examples=num_examples)).train_dataloader())
    assert len(batches) == num_examples / 4 and all(batch["input_ids"].numel() == 64 for batch in batches)


def test_an_optimizer_step_is_of_one_phase_of_the_curriculum(make):
    """0.3 and 0.6 of 48 fall inside steps of 12 examples, at places where batches of 4 could end."""
    data = ready(make(curriculum=[(0.3, 4), (0.6, 8)], global_batch=12)).dataset
    lengths = [data[i]["input_ids"].shape[-1] for i in range(48)]
    assert [set(lengths[step * 12 : step * 12 + 12]) for step in range(4)] == [{4}, {8}, {16}, {16}]


def test_curriculum_leaves_the_rest_of_the_run_as_it_is(make):
    plain, with_phase = ready(make()).dataset, ready(make(curriculum=[(0.5, 8)])).dataset
    for i in range(24, 48):
        assert torch.equal(with_phase[i]["input_ids"][0], plain[i]["input_ids"])


def farthest(module):
    """The largest position id of each item, and the items' rows."""
    return [(int(item["position_ids"].max()), len(torch.atleast_2d(item["input_ids"]))) for item in (
        module.dataset[i] for i in range(len(module.dataset))
    )]  # fmt: skip


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 12])
def test_the_target_grows_by_whole_optimizer_steps(make, micro_batch):
    """0.3 and 0.8 of 4 steps of 12 examples are steps 1 and 3, whatever the micro-batch."""
    anchored = EndAnchor(16, 64, cue_len=4, curriculum=[[0.3, 16], [0.8, 32]])
    module = ready(make(sampler=anchored, micro_batch=micro_batch, global_batch=12))
    assert [last for last, _ in farthest(module)] == [15] * 12 + [31] * 24 + [63] * 12
    batches = list(module.train_dataloader())
    assert all(batch["input_ids"].shape == (micro_batch, 16) for batch in batches)
    assert [int(row[-1]) for batch in batches for row in batch["position_ids"]] == [15] * 12 + [31] * 24 + [63] * 12


def test_a_growing_target_changes_the_positions_alone(make):
    """The documents come in the same order, and what follows the phases is as it would be."""
    plain, phased = (ready(make(sampler=RandPos(16, 64, curriculum=c))).dataset for c in (None, [[0.5, 32]]))
    for i in range(48):
        assert torch.equal(phased[i]["input_ids"][0], plain[i]["input_ids"])
        assert torch.equal(phased[i]["position_ids"][0], plain[i]["position_ids"]) == (i >= 24)


def test_a_run_that_goes_on_within_a_phase_meets_the_same_batches(make):
    def batches(step, world=1, rank=0):
        module = ready(make(sampler=PoSE(16, 64, curriculum=[[0.5, 32]]), micro_batch=2, global_batch=4))
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        module.trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=world, strategy=strategy)
        return [batch["position_ids"] for batch in module.train_dataloader()]

    whole = torch.cat(batches(0))
    for step in (1, 4, 9):
        assert torch.equal(torch.cat(batches(step)), whole[4 * step :])
    halves = [torch.cat(batches(3, 2, rank)) for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole[12:])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"sampler": PoSE(16, 64, curriculum=[[0.99, 32]])}, "pose.curriculum"),
        ({"curriculum": [(0.99, 8)]}, "data.curriculum"),
    ],
)
def test_a_curriculum_that_leaves_no_step_to_the_rest_is_said(make, caplog, options, key):
    ready(make(**options))
    assert f"{key} leaves no step of trainer.max_steps=12 to what comes after its last phase" in caplog.messages


def test_a_phase_without_a_step_is_said(make, caplog):
    module = ready(make(sampler=PoSE(16, 64, curriculum=[[0.01, 16], [0.5, 32]])))
    assert (
        "pose.curriculum: a phase has no step, since trainer.max_steps=12 is too few for its share" in caplog.messages
    )
    assert [end for end, _ in module.dataset.phases] == [0, 24, 48]


def test_a_target_that_shorter_examples_leave_no_step_to_is_said(make, caplog):
    """data.curriculum ends at the step at which the nearer target would: its phase is not announced either."""
    with caplog.at_level("INFO"):
        sampler = PoSE(16, 64, curriculum=[[0.54, 32]])
        ready(make(sampler=sampler, curriculum=[(0.5, 8)], num_examples=40, micro_batch=4))
    assert [m.split(":")[0] for m in caplog.messages if "has no step" in m] == ["pose.curriculum"]
    assert "Targets     64 tokens up to step 10" in caplog.messages


def test_of_two_curricula_the_one_whose_phase_has_no_step_is_named(make, caplog):
    ready(make(sampler=PoSE(16, 64, curriculum=[[0.5, 32]]), curriculum=[(0.01, 8)]))
    assert [m.split(":")[0] for m in caplog.messages if "has no step" in m] == ["data.curriculum"]


def test_both_curricula_together(make, caplog):
    """Short plain sequences first, then the nearer target, then all of it."""
    with caplog.at_level(logging.INFO):
        module = ready(make(sampler=EndAnchor(16, 64, 4, curriculum=[[0.5, 32]]), curriculum=[(0.25, 8)]))
    assert farthest(module) == [(7, 2)] * 12 + [(31, 1)] * 12 + [(63, 1)] * 24
    assert "Targets     32 tokens up to step 6, 64 tokens up to step 12" in caplog.messages


def test_synthetic_examples_are_mixed_in(make):
    """0.5 of 400 within five standard deviations; they carry loss on a part of their tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "tiny")
    module = ready(
        make(tokenizer=tokenizer, sampler=PoSE(64, 200, 2), synthetic={"copy": 0.3, "key_value": 0.2}, num_examples=400)
    )
    synthetic = sum(bool((module.dataset[i]["labels"] == -100).any()) for i in range(400))
    assert abs(synthetic - 200) < 5 * 10


# Sentences


def test_tokens_that_end_a_sentence():
    ending = [
        ".",
        "?",
        "!",
        "...",
        '."',
        "?”",
        ".)",
        "!'",
        " .",
        "\n",
        "\n\n",
        ".\n",
        "\n   ",
        "said.",
        "»\n",
        '!"»',
        "。",
        "好！”",
    ]
    going_on = ["a", ",", ":", "e.g", ".5", ". A", '"', "”", "(", " ", "\nThe", "- ", ";", "</s>", "，", "。好"]
    vocab = {text: i for i, text in enumerate([*ending, *going_on])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="a")))
    assert sentence_ends(tokenizer).tolist() == [True] * len(ending) + [False] * len(going_on)


def test_sentences_of_a_byte_level_tokenizer():
    """Its tokens are written with Ġ and Ċ, and are read as the text they stand for."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "tiny")
    ends = sentence_ends(tokenizer)
    ids = tokenizer('He said: "Go!" She went.\nSoon', add_special_tokens=False)["input_ids"]
    assert ends.dtype == bool and ends.shape == (len(tokenizer),)
    assert [tokenizer.decode([i]) for i in ids if ends[i]] == ['!"', ".", "\n"]


def test_sentences_reach_the_sampler(make):
    """Multiples of 10 end a sentence, and but for the head's border ids jump there alone."""
    tokenizer = number_tokenizer()
    tokenizer.batch_decode = lambda ids, **_: [f"{i}." if i % 10 == 0 else f"{i}" for (i,) in ids]
    module = ready(make(tokenizer=tokenizer, sampler=SentenceSkip(32, 4096), curriculum=[(0.25, 8)]))
    for batch in list(module.train_dataloader())[3:]:
        for tokens, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
            before = tokens[:-1][positions.diff() > 1][1:]
            assert (before % 10 == 0).all() and len(before)
    assert ready(make(tokenizer=tokenizer)).dataset.sentence_end is None


# BOS


def test_bos_as_the_tokenizer_does():
    """None follows what the tokenizer itself puts in front."""
    silent, adding = number_tokenizer(bos="<s>"), number_tokenizer(bos="<s>", adds_bos=True)
    wanted = {(silent, None): None, (silent, True): 5000, (silent, False): None}
    wanted |= {(adding, None): 5000, (adding, True): 5000, (adding, False): None}
    wanted |= {(TOKENIZER, None): None, (TOKENIZER, False): None}
    for (tokenizer, add_bos), expected in wanted.items():
        assert bos_id(tokenizer, add_bos, "data.add_bos") == expected


def test_bos_stands_before_every_document(make):
    module = ready(make(tokenizer=number_tokenizer(bos="<s>"), add_bos=True))
    for batch in module.train_dataloader():
        assert (batch["input_ids"][:, 0] == 5000).all()
        assert (batch["input_ids"][:, 1:] != 5000).all()
        assert (batch["position_ids"][:, 0] == 0).all()


@pytest.mark.parametrize("curriculum", [(), ((0.5, 32),)])
def test_bos_stands_before_every_retrieval_example(make, curriculum):
    """And is no answer."""
    shares = {"copy": 0.5, "key_value": 0.5}
    sampler = PoSE(train_len=64, target_len=256, num_chunks=2)
    options = {"sampler": sampler, "synthetic": shares, "curriculum": curriculum}
    module = ready(make(tokenizer=number_tokenizer(bos="<s>"), add_bos=True, **options))
    for batch in module.train_dataloader():
        assert (batch["input_ids"][..., 0] == 5000).all() and (batch["labels"][..., 0] == IGNORE).all()
        assert (batch["input_ids"][..., 1:] != 5000).all() and (batch["labels"] != IGNORE).any(-1).all()


def test_bos_of_a_tokenizer_without_one(make):
    with pytest.raises(ConfigError, match=r"^data\.add_bos is true.*no BOS"):
        make(add_bos=True)


# Settings that cannot work

BAD = {
    "unknown task": ({"synthetic": {"needle": 0.1}}, r"'needle'.*key_value, copy, passkey"),
    "negative share": ({"synthetic": {"copy": -0.1}}, r"data.synthetic.copy=-0.1.*\[0, 1\]"),
    "share above one": ({"synthetic": {"copy": 1.5}}, r"data.synthetic.copy=1.5.*\[0, 1\]"),
    "sum above one": ({"synthetic": {"copy": 0.6, "passkey": 0.5}}, "adds up to more than 1"),
    "phase to the end": ({"curriculum": [(1.0, 8)]}, r"\[1.0, 8\].*below 1"),
    "phase of nothing": ({"curriculum": [(0, 8)]}, r"\[0, 8\].*above 0"),
    "phase length": ({"curriculum": [(0.5, 7)]}, r"\[0.5, 7\].*divisor of 16"),
    "phase of a name": ({"curriculum": [("a", 8)]}, r"data\.curriculum has the phase \['a', 8\]: give"),
    "phase of no number": ({"curriculum": [(0.5, "8")]}, r"data\.curriculum has the phase \[0.5, '8'\]: give"),
    "phase of a share": ({"curriculum": [(0.5, 8.0)]}, r"data\.curriculum has the phase \[0.5, 8.0\]: give"),
    "phase of one token": ({"curriculum": [(0.5, 1)]}, r"data\.curriculum has the phase \[0.5, 1\], and PoSE does not"),
    "phase too short": (
        {"curriculum": [(0.5, 4)], "sampler": PoSE(16, 64, 8)},
        r"phase \[0.5, 4\], and PoSE does not take its length: pose\.num_chunks=8",
    ),
    "target of plain ids": (
        {"curriculum": [(0.5, 8)], "sampler": PoSE(16, 64, curriculum=[[0.5, 32]])},
        r"pose.curriculum has the phase \[0.5, 32\], and data.curriculum goes on to 0.5 of the run",
    ),
    "target of full length": (
        {"sampler": Full(16, 64, curriculum=[[0.5, 32]])},
        r"pose.curriculum has the phase \[0.5, 32\], and Full draws examples as long as the target",
    ),
    "cue too long for a phase": (
        {"curriculum": [(0.5, 4)], "sampler": EndAnchor(16, 64, 4)},
        r"phase \[0.5, 4\], and EndAnchor does not take its length: pose.cue_len=4",
    ),
    "phase too long": ({"curriculum": [(0.5, 32)]}, r"\[0.5, 32\].*divisor of 16"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_setting_is_named_before_anything_is_read(make, tmp_path, kind):
    settings, message = BAD[kind]
    with pytest.raises(ConfigError, match=message):
        make([tmp_path / "gone.jsonl"], **settings)


def test_shares_that_add_up_to_one_are_accepted(make):
    assert make(synthetic={"copy": 0.7, "passkey": 0.2, "key_value": 0.1}).synthetic["copy"] == 0.7


def test_data_errors(make, files, tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        make([*files, tmp_path / "gone.jsonl"]).prepare_data()
    (tmp_path / "bad.jsonl").write_text("broken")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1"):
        make([tmp_path / "bad.jsonl"]).setup()
    with pytest.raises(DataError, match=r"longest has 200 tokens.*needs 300"):
        make(sampler=Full(16, 300)).setup()


LATE = [
    pytest.param({"window_len": 8}, "window_len", id="window"),
    pytest.param({"window_len": 0}, "window_len", id="no window"),
    pytest.param({"curriculum": [(0.5, 0)]}, "curriculum", id="length 0"),
    pytest.param({"curriculum": [(0.5,)]}, "curriculum", id="half a phase"),
    pytest.param(
        {"curriculum": [(0.5, 8), (0.25, 4)]},
        "curriculum",
        id="phases out of order",
    ),
    pytest.param(
        {"synthetic": {"copy": 1.0}, "sampler": PoSE(8, 64, 2)},
        "copy",
        id="no room to copy",
    ),
]


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("settings", "message"), LATE)
def test_a_setting_that_would_fail_while_training_is_named_before(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        ready(make(**settings)).dataset[0]


def test_tokens_of_a_cache_are_not_copied_into_workers(make):
    """A pickled dataset refers to the files: kilobytes, whatever the documents hold."""
    module = ready(make())
    data = pickle.dumps(module.dataset)
    assert len(data) < 10_000
    assert np.array_equal(pickle.loads(data)[5]["input_ids"], module.dataset[5]["input_ids"])


# What is used of the text


def short_and_long(tmp_path, num_short: int):
    path = tmp_path / "short.jsonl"
    texts = [" ".join(map(str, range(n))) for n in [10] * num_short + [100]]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.mark.parametrize("window_len", [None, 50])
@pytest.mark.parametrize(
    ("num_short", "level", "said"),
    [
        (30, logging.WARNING, "1 of 31 documents, 100 of 400 tokens, are used"),
        (3, logging.WARNING, "1 of 4 documents, 100 of 130 tokens, are used"),
        (1, logging.INFO, "1 of 2 documents, 100 of 110 tokens, are used"),
    ],
)
def test_documents_that_are_too_short_are_counted(make, tmp_path, caplog, num_short, level, said, window_len):
    ready(make([short_and_long(tmp_path, num_short)], window_len=window_len))
    (record,) = [record for record in caplog.records if record.name == "pose.data.datamodule"]
    assert record.levelno == level
    assert record.getMessage().startswith(f"short.jsonl: {said}: the others are shorter than the 16 tokens")
    assert "pose.train_len=16" in record.getMessage()


def test_what_is_set_aside_and_what_is_too_short_is_not_counted_as_used(make, tmp_path, caplog):
    """Two of the three long documents are held out; of the three that are left two are too short."""
    path, lengths = tmp_path / "mixed.jsonl", [10, 100, 9, 64, 200]
    path.write_text("\n".join(json.dumps({"text": " ".join(map(str, range(n)))}) for n in lengths))
    module = ready(make([path], heldout_share=0.5))
    held_out = module.set_aside.of(module._open())
    left = [n for i, n in enumerate(lengths) if i not in held_out]
    assert len(held_out) == 2 and (module.num_documents, module.num_tokens) == (1, max(left))
    assert f"1 of 3 documents, {max(left)} of {sum(left)} tokens, are used" in caplog.text


@pytest.mark.parametrize(("synthetic", "num"), [({}, 1), ({"copy": 0.5}, 3)])
def test_documents_that_are_too_short_count_as_trained_for_retrieval_examples_alone(make, tmp_path, synthetic, num):
    path, lengths = tmp_path / "mixed.jsonl", [10, 100, 9]
    path.write_text("\n".join(json.dumps({"text": " ".join(map(str, range(n)))}) for n in lengths))
    module = ready(make([path], synthetic=synthetic))
    cache = module._open()
    assert len(module.trained_digests()) == num == len(module.trains_on([cache[i] for i in range(3)]))


def test_documents_that_are_long_enough_in_a_phase_alone_count_as_trained(make, tmp_path):
    path, lengths = tmp_path / "mixed.jsonl", [10, 100, 4]
    path.write_text("\n".join(json.dumps({"text": " ".join(map(str, range(n)))}) for n in lengths))
    assert len(ready(make([path], curriculum=[(0.5, 8)])).trained_digests()) == 2


def test_documents_that_are_set_aside_or_left_out_may_be_all(make, tmp_path):
    rows = [json.dumps({"text": " ".join(map(str, range(100 * i, 100 * i + 64)))}) for i in range(2)]
    both = tmp_path / "both.jsonl"
    both.write_text("\n".join(rows))
    module = make([both], heldout_share=0.1)
    cache = module._open()
    (held_out,) = module.set_aside.of(cache)
    other = tmp_path / "other.jsonl"
    other.write_text(rows[1 - held_out])
    with pytest.raises(DataError, match=r"leave none to train on: .*data\.heldout_share.* or left out"):
        ready(make([both], heldout_share=0.1, leave_out=str(other), synthetic={"copy": 1.0}))


def test_the_length_that_is_too_short_is_named_by_its_key(make, tmp_path, caplog):
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(map(str, range(n)))}) for n in (32, 100)))
    with caplog.at_level(logging.INFO):
        ready(make([path], sampler=Full(train_len=16, target_len=64)))
    assert "shorter than the 64 tokens that an example needs at pose.target_len=64" in caplog.text


def test_copies_of_what_is_set_aside_do_not_train(make, tmp_path, caplog):
    """Whatever their ids; other documents of their length do."""
    rows = [{"id": f"{i}", "text": " ".join(map(str, range(100 * i, 100 * i + 64)))} for i in range(6)]
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *(row | {"id": "again"} for row in rows)]))
    alone = tmp_path / "once.jsonl"
    alone.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.INFO):
        module = ready(make([path], heldout_share=0.1))
    cache = module._open()
    [held_out] = module.set_aside.of(cache)
    texts = [document[:].tobytes() for document in module.dataset.documents]
    assert len(texts) == 10 and cache[held_out].tobytes() not in texts
    assert "1 of 12 documents (data.heldout_share), and 1 with the same text, which do not train either" in caplog.text
    assert "copies" in module.fingerprint and "copies" not in ready(make([alone], heldout_share=0.2)).fingerprint
    one = tmp_path / "one.jsonl"
    one.write_text((json.dumps(rows[0]) + "\n") * 3)
    with pytest.raises(DataError, match=r"leave none to train on: all have the text of one that is set aside"):
        ready(make([one], heldout_share=0.1))


def test_what_is_left_out_is_read_as_the_documents_are(make, files, tmp_path):
    others = tmp_path / "others.jsonl"
    others.write_text("{broken\n" + files[0].read_text())
    with pytest.raises(DataError, match="not valid JSON"):
        ready(make(files, leave_out=str(others)))
    assert ready(make(files, leave_out=str(others), on_broken="skip")).fingerprint
    others.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"data\.leave_out") as caught:
        ready(make(files, leave_out=str(others)))
    assert "min_tokens" not in str(caught.value)


def test_tokenizers_with_gaps_in_their_ids():
    vocab = {"a": 0, "b.": 2, "<s>": 7, "c": 9}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="a")), bos_token="<s>"
    )
    assert sentence_ends(tokenizer).tolist() == [i == 2 for i in range(10)]
    assert plain_tokens(tokenizer).tolist() == [0, 2, 9] and plain_tokens(tokenizer, 9).tolist() == [0, 2]


def test_reserved_tokens_are_not_plain():
    """Of Llama 3 and Mistral most special tokens have no role yet; other added tokens are as any."""
    tokenizer = number_tokenizer(5)
    before = plain_tokens(tokenizer).tolist()
    tokenizer.add_tokens([AddedToken("<reserved>", special=True), AddedToken("word", special=False)])
    reserved, word = tokenizer.convert_tokens_to_ids(["<reserved>", "word"])
    assert reserved not in tokenizer.all_special_ids
    assert plain_tokens(tokenizer).tolist() == [*before, word]


def test_nothing_is_said_where_every_document_is_used(make, caplog):
    ready(make())
    assert not [record for record in caplog.records if record.name == "pose.data.datamodule"]


# The model's vocabulary


def test_a_token_beyond_the_models_embedding_is_found_before_training(make, tmp_path):
    """In the text, before it, and in the words of retrieval tasks."""
    path = tmp_path / "pad.jsonl"
    path.write_text(json.dumps({"text": "1 2 3 4500 5 " * 20}))
    ready(make([path], vocab_size=4501))
    with pytest.raises(DataError, match=r"document pad\.jsonl:1 has the token '4500' of id 4500, .* has 4500 rows"):
        ready(make([path], vocab_size=4500))
    with pytest.raises(DataError, match=r"add_bos.* has the token '<s>' of id 5000, .* has 5000 rows"):
        make(tokenizer=number_tokenizer(bos="<s>"), add_bos=True, vocab_size=5000)
    make(tokenizer=number_tokenizer(bos="<s>"), add_bos=False, vocab_size=5000)


@pytest.mark.parametrize("task", ["copy", "key_value"])
def test_retrieval_tasks_draw_no_word_beyond_the_embedding(make, task):
    """An added token that is not special, such as `[PAD]` of some tokenizers, may have no row."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "tiny")
    tokenizer.add_tokens([f"new{i}" for i in range(4000)])
    options = {"tokenizer": tokenizer, "sampler": PoSE(64, 200, 2), "synthetic": {task: 1.0}}
    largest = lambda module: max(int(module.dataset[i]["input_ids"].max()) for i in range(20))  # noqa: E731
    assert largest(ready(make(**options))) >= 4096 > largest(ready(make(**options, vocab_size=4096)))


# Reading processes


@pytest.mark.parametrize("num_workers", [-1, 1.5, "two"])
def test_a_number_of_workers_that_cannot_be_meant(make, num_workers):
    with pytest.raises(ConfigError, match=r"data\.num_workers=.*at least 0"):
        make(num_workers=num_workers)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_readers_end_with_the_process_they_read_for(make):
    """At once when it is killed, where torch's own look every five seconds leaves them until then."""
    module = ready(make(num_workers=1))
    read, write = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        batches = iter(module.train_dataloader())
        next(batches)
        os.write(write, str(batches._workers[0].pid).encode())
        time.sleep(60)
        os._exit(0)
    reader = int(os.read(read, 100))
    assert is_running(reader)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    deadline = time.monotonic() + 2
    while is_running(reader) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(reader)


# Documents that are named, and left out


def test_documents_with_a_text_that_is_left_out_are_not_trained_on(make, files, tmp_path, capsys):
    """By the text, not by the name: wherever they stand, as often as they do; one that only begins alike is kept."""
    first, second, third = (json.loads(line)["text"] for path in files for line in path.read_text().splitlines())
    others = tmp_path / "others.jsonl"
    others.write_text(
        "\n".join(json.dumps({"id": "else", "text": text}) for text in (second, first[:-8] + " 4 4", "7"))
    )
    module = ready(make([*files, files[0]], leave_out=str(others)))
    trained = [" ".join(map(str, document[:].tolist())) for document in module.dataset.documents]
    assert trained == [first, third, first]
    assert "Left out    2 of 5 documents" in capsys.readouterr().out
    plain = ready(make([*files, files[0]]))
    assert module.fingerprint != plain.fingerprint == ready(make([*files, files[0]])).fingerprint
    with pytest.raises(DataError, match=r"data\.leave_out leaves no document to train on"):
        ready(make(files, leave_out=list(files)))
    with pytest.raises(DataError, match=r"no/such"):
        ready(make(files, leave_out="no/such.jsonl"))
