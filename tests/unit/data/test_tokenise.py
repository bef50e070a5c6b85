"""pose.data.tokenise: pieces have the tokens of the whole, for any tokenizer, and memory stays bounded."""

import base64
import gzip
import json
import os
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pose.data import tokenise
from pose.data.cache import TokenCache
from pose.data.tokenise import Tokeniser, all_cores

ASSETS = Path(__file__).resolve().parents[3] / "assets"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def corpus(num: int) -> str:
    with gzip.open(ASSETS / "corpora" / "books.heldout.jsonl.gz", "rt", encoding="utf8") as lines:
        return json.loads(next(lines))["text"][:num]


def bpe(pre_tokenizer=None, normalizer=None, sample=None, **options) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", **options))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample or [corpus(100_000)], trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def llama() -> PreTrainedTokenizerFast:
    """A space before every text, spaces as ▁, no pre-tokenizer: merges may go anywhere."""
    tokenizer = bpe(pre_tokenizers.Metaspace(), sample=[corpus(100_000).replace("\n", " ")]).backend_tokenizer
    rules = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def trained(model, trainer, pre_tokenizer, unk=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    options = {} if unk is None else {"unk_token": unk}
    trainer = trainer(vocab_size=800, special_tokens=["<unk>"], show_progress=False, **options)
    tokenizer.train_from_iterator([corpus(50_000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "gpt2": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama": llama,
    "llama3": lambda: bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "strips": lambda: bpe(
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        normalizers.Sequence([normalizers.NFC(), normalizers.Strip(), normalizers.Lowercase()]),
    ),
    "over spaces": lambda: bpe(sample=[corpus(20_000)[i : i + 100] for i in range(0, 20_000, 100)]),
    "shipped": lambda: PreTrainedTokenizerFast.from_pretrained(ASSETS / "tiny"),
    "unigram": lambda: trained(models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace(), "<unk>"),
    "wordpiece": lambda: trained(
        models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, pre_tokenizers.BertPreTokenizer()
    ),
}


def texts() -> list[str]:
    rng = random.Random(0)
    parts = ["word", "a", " ", "\n", "\n\n", "  ", ".", "é", "中文", "é", "́", "'s", "\t", "\r\n", "123", "😀"]
    return [
        corpus(40_000),
        "".join(rng.choice(parts) for _ in range(20_000)),
        "x" * 5_000,
        "中文字符\n" * 2_000,
        "one two " * 2_000,
        "".join(rng.choices("ABCXYZabcxyz0123456789+/", k=5_000)),
        "".join(rng.choices("中文字符日本語", k=5_000)),
        "".join(rng.choices("0123456789", k=5_000)),
        "".join(rng.choices("０１２３４５", k=3_000)),
        "".join(rng.choice("xyXY1- \n") * rng.randint(1, 700) for _ in range(20)),
        corpus(5_000).replace("\n", "").replace(" ", ""),
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_have_the_tokens_of_the_whole(name, monkeypatch):
    """Against the bare tokenizers library, with a cut every few hundred characters."""
    monkeypatch.setattr(tokenise, "PIECE", 500)
    tokenizer = TOKENIZERS[name]()
    tokeniser, num_pieces = Tokeniser(tokenizer), []
    for text in texts():
        pieces = list(tokeniser.pieces(text))
        rows = tokeniser.encode([piece for piece, _ in pieces])
        tokens = np.concatenate([row[left_out:] for row, (_, left_out) in zip(rows, pieces, strict=True)])
        assert tokens.tolist() == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        num_pieces.append(len(pieces))
    assert num_pieces[0] > 50 and (num_pieces[4] > 20 or name == "over spaces")
    if name == "gpt2":  # text without spaces and line breaks too
        assert min(num_pieces[5], num_pieces[6], num_pieces[10]) > 5


def test_a_cut_that_changes_the_tokens_is_not_made(monkeypatch):
    """A pre-tokenizer that looks past a space: no token of its vocabulary lies across, and yet no cut is right."""
    monkeypatch.setattr(tokenise, "PIECE", 500)
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "one!": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"one(?= one one)"), "one!")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokeniser = Tokeniser(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert len(list(tokeniser.pieces("one " * 2_000))) == 1


def long_text(kind: str, num: int) -> str:
    rng = np.random.default_rng(0)
    if kind == "no line breaks":
        return (corpus(100_000).replace("\n", " ") * (num // 100_000 + 1))[:num]
    if kind == "base64":
        return base64.b64encode(rng.bytes(num * 3 // 4)).decode()
    return "".join(map(chr, rng.integers(0x4E00, 0x5E00, num)))  # Chinese, one sentence


@pytest.mark.parametrize("kind", ["no line breaks", "base64", "Chinese"])
def test_text_of_one_line_is_cut_too_and_in_time_that_grows_with_it(kind):
    """Looking to the end of the text for each cut took 16 s for 8 MB, and text without spaces was one piece."""
    tokeniser = Tokeniser(PreTrainedTokenizerFast.from_pretrained(ASSETS / "tiny"))
    text = long_text(kind, 8_000_000 if kind == "no line breaks" else 1_000_000)
    begin = time.process_time()
    longest = max(len(piece) for piece, _ in tokeniser.pieces(text))
    assert time.process_time() - begin < 5
    assert longest <= 3 * tokenise.PIECE


def test_a_number_is_not_cut_where_tokens_take_digits_in_groups(monkeypatch):
    """Where a group of three begins follows from where the number begins, further away than is looked at."""
    monkeypatch.setattr(tokenise, "PIECE", 500)
    numbers = " ".join(str(i) for i in range(0, 999, 7))
    split = [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer = bpe(pre_tokenizers.Sequence(split), sample=[numbers])
    number = "1" + "007" * 1000
    assert "07" not in tokenizer.get_vocab(), "a cut inside of 007 would be made"
    assert [piece for piece, _ in Tokeniser(tokenizer).pieces(number)] == [number]


def test_memory_does_not_grow_with_a_document(tmp_path, monkeypatch):
    """A line of 12 MB is 4 M tokens. Whole, tokenizers would hold some 400 MB for them."""
    monkeypatch.setattr(tokenise, "PIECE", 1 << 14)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # in a fork
    text = (corpus(100_000).encode("ascii", "ignore").decode() * 130)[: 12 << 20]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}))
    num = len(text)
    del text
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "tiny")

    def build(result):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cache = TokenCache.build(path, tokenizer, tmp_path / "cache")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(result, json.dumps([peak - before, int(cache.ends[-1])]).encode())
        os._exit(0)

    read, write = os.pipe()
    if os.fork() == 0:  # its peak is its own
        build(write)
    kib, num_tokens = json.loads(os.read(read, 1000))
    os.wait()
    assert num_tokens > num / 6
    assert kib < 200 * 1024


def test_what_the_user_says_of_threads_stays(monkeypatch):
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.setenv(name, "true")
    with all_cores():
        assert os.environ[name] == "true"
    assert os.environ[name] == "true"
    monkeypatch.delenv(name)
    for _ in range(2):
        with all_cores():
            assert name not in os.environ
        assert os.environ[name].lower() == "false"  # for the processes that are forked from here
