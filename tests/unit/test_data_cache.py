"""pose.data.cache: the cache is the tokens, is built once, and survives damage, kills and company."""

import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pose.data import cache as cache_module
from pose.data.cache import TokenCache
from pose.errors import DataError

ASSETS = Path(__file__).resolve().parents[2] / "assets"
NUM_DOCUMENTS = 40  # more than two batches of the tokeniser


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(ASSETS / "tiny")


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    words = ["the", "pass", "key", "is", "12345", "grass", "–", "☃", "été\n"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 200))) for _ in range(NUM_DOCUMENTS)]
    return [*texts[:7], "", *texts[8:]]  # an empty one


@pytest.fixture
def path(tmp_path, texts):
    return write(tmp_path / "docs.jsonl", texts)


def write(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": f"d{i}", field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def word_tokenizer(num: int):
    """A word w0 .. w(num-1) is the token of its number."""
    model = models.WordLevel({f"w{i}": i for i in range(num)}, unk_token="w0")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __len__(self):
        return len(self.tokenizer)

    def __call__(self, texts, **kwargs):
        self.texts += len(texts)
        return self.tokenizer(texts, **kwargs)


def assert_holds(cache, texts, tokenizer):
    """The cache is what the bare tokenizers library makes of each text, in order."""
    assert len(cache) == len(texts)
    assert cache.ids == [f"d{i}" for i in range(len(texts))]
    for i, text in enumerate(texts):
        expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert cache[i].tolist() == expected
        assert cache.lengths[i] == len(expected)


def test_equals_tokenising_each_document(path, texts, tokenizer, tmp_path):
    cache = TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert_holds(cache, texts, tokenizer)
    assert cache[0].dtype == np.uint16
    assert (cache.folder / "tokens.bin").stat().st_size == 2 * sum(cache.lengths)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_width_of_a_token_follows_the_vocabulary(tmp_path, size, dtype):
    """The highest id of each vocabulary survives."""
    path = write(tmp_path / "a.jsonl", [f"w1 w{size - 1} w2", f"w{size - 2}"])
    cache = TokenCache.build(path, word_tokenizer(size), tmp_path / "cache")
    assert cache[0].dtype == dtype
    assert [cache[0].tolist(), cache[1].tolist()] == [[1, size - 1, 2], [size - 2]]


def test_no_special_tokens_are_added(tmp_path):
    tokenizer = word_tokenizer(10)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("w1")["input_ids"] == [tokenizer.bos_token_id, 1]
    cache = TokenCache.build(write(tmp_path / "a.jsonl", ["w1"]), tokenizer, tmp_path / "cache")
    assert cache[0].tolist() == [1]


def test_second_build_tokenises_nothing(path, texts, tokenizer, tmp_path):
    counting = Counting(tokenizer)
    first = TokenCache.build(path, counting, tmp_path / "cache")
    assert counting.texts == len(texts)
    stamp = (first.folder / "tokens.bin").stat().st_mtime_ns
    second = TokenCache.build(path, counting, tmp_path / "cache")
    assert counting.texts == len(texts)
    assert second.folder == first.folder and (second.folder / "tokens.bin").stat().st_mtime_ns == stamp
    assert_holds(second, texts, tokenizer)


def test_the_same_bytes_elsewhere_are_the_same_cache(path, tokenizer, tmp_path):
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / path.name
    copy.write_bytes(path.read_bytes())
    os.utime(copy, (0, 0))
    folders = {TokenCache.build(p, tokenizer, tmp_path / "cache").folder for p in (path, copy)}
    assert len(folders) == 1


def test_another_content_tokenizer_or_field_is_another_cache(tmp_path, tokenizer):
    """Each changed alone, and each time the right tokens come back."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1 w2", "body": "w3"}')
    small, large = word_tokenizer(10), word_tokenizer(11)
    build = lambda tokenizer, field: TokenCache.build(path, tokenizer, tmp_path / "cache", field)  # noqa: E731
    caches = [build(small, "text"), build(small, "body"), build(large, "text")]
    path.write_text('{"text": "w1 w9", "body": "w3"}')  # the same size
    caches.append(build(small, "text"))
    assert len({cache.folder for cache in caches}) == 4
    assert [cache[0].tolist() for cache in caches] == [[1, 2], [3], [1, 2], [1, 9]]


def test_tokenizers_that_differ_in_merges_alone_have_two_caches(tmp_path):
    """The vocabulary is the same; only the rules differ."""
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc"])}

    def bpe(*merges):
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, list(merges))))

    path = write(tmp_path / "a.jsonl", ["abc"])
    caches = [
        TokenCache.build(path, bpe(*merges), tmp_path / "cache")
        for merges in ([("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")])
    ]
    assert [cache[0].tolist() for cache in caches] == [[3, 2], [0, 4]]


DAMAGE = {
    "tokens cut": lambda folder: os.truncate(folder / "tokens.bin", (folder / "tokens.bin").stat().st_size - 2),
    "tokens empty": lambda folder: os.truncate(folder / "tokens.bin", 0),
    "tokens longer": lambda folder: (folder / "tokens.bin").open("ab").write(b"xx"),
    "tokens gone": lambda folder: (folder / "tokens.bin").unlink(),
    "index cut": lambda folder: os.truncate(folder / "index.json", 20),
    "index empty": lambda folder: os.truncate(folder / "index.json", 0),
    "index gone": lambda folder: (folder / "index.json").unlink(),
    "index not text": lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe\x00"),
    "index without a key": lambda folder: (folder / "index.json").write_text('{"ids": []}'),
    "index a list": lambda folder: (folder / "index.json").write_text("[]"),
    "index of no type": lambda folder: (folder / "index.json").write_text(
        '{"ids": [], "lengths": [], "dtype": "no such"}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_rebuilt(path, texts, tokenizer, tmp_path, damage):
    folder = TokenCache.build(path, tokenizer, tmp_path / "cache").folder
    DAMAGE[damage](folder)
    cache = TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert cache.folder == folder
    assert_holds(cache, texts, tokenizer)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_broken_documents_file_leaves_nothing(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 20 + "broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 21"):
        TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_errors_of_the_file_itself(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        TokenCache.build(tmp_path / "gone.jsonl", tokenizer, tmp_path / "cache")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no document"):
        TokenCache.build(tmp_path / "empty.jsonl", tokenizer, tmp_path / "cache")


def in_processes(num: int, function):
    """Runs function(rank) in forked processes; returns their exit codes."""
    processes = [multiprocessing.get_context("fork").Process(target=function, args=(rank,)) for rank in range(num)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("after", [0, 20, NUM_DOCUMENTS])
def test_a_killed_build_leaves_nothing_that_looks_whole(path, texts, tokenizer, tmp_path, monkeypatch, after):
    """SIGKILL before the first document, between two batches, and once all tokens are made."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    read_documents = cache_module.read_documents

    def killing(*arguments):
        for number, document in enumerate(read_documents(*arguments)):
            if number == after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "read_documents", killing)
        codes = in_processes(1, lambda _: TokenCache.build(path, tokenizer, tmp_path / "cache"))
    assert codes == [-signal.SIGKILL]
    left = list((tmp_path / "cache").iterdir())
    assert left, "the build was killed before it began"
    for folder in left:
        with pytest.raises((OSError, ValueError, KeyError)):
            TokenCache(folder)
    cache = TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert cache.folder not in left
    assert_holds(cache, texts, tokenizer)


def test_two_builds_at_once_both_end_right(path, texts, tokenizer, tmp_path, monkeypatch):
    """A barrier holds both in the middle of their work, so neither finds the other's result first."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    read_documents = cache_module.read_documents
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def together(*arguments):
        yield from read_documents(*arguments)
        barrier.wait(30)

    def build(_):
        assert_holds(TokenCache.build(path, tokenizer, tmp_path / "cache"), texts, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "read_documents", together)
        assert in_processes(2, build) == [0, 0]
    (folder,) = (tmp_path / "cache").iterdir()
    assert_holds(TokenCache(folder), texts, tokenizer)


def test_a_build_that_began_too_early_spares_the_other_jobs_files(path, texts, tokenizer, tmp_path, monkeypatch):
    """Another job finishes while this one, which found no cache, tokenises; its files must stay readable."""
    read_documents, other = cache_module.read_documents, []

    def overtaken(*arguments):
        if not other:
            other.append(None)
            other[0] = TokenCache.build(path, tokenizer, tmp_path / "cache")
        yield from read_documents(*arguments)

    monkeypatch.setattr(cache_module, "read_documents", overtaken)
    assert_holds(TokenCache.build(path, tokenizer, tmp_path / "cache"), texts, tokenizer)
    assert_holds(other[0], texts, tokenizer)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_pickling_carries_no_tokens_and_reads_the_same(path, texts, tokenizer, tmp_path):
    """As workers get it: also after it has been read from."""
    cache = TokenCache.build(path, tokenizer, tmp_path / "cache")
    cache[0]
    data = pickle.dumps(cache)
    assert_holds(pickle.loads(data), texts, tokenizer)
    os.truncate(cache.folder / "tokens.bin", 0)
    with pytest.raises(ValueError):
        pickle.loads(data)[0]  # the tokens were not in the pickle


def test_reading_maps_the_file_and_cannot_change_it(path, tokenizer, tmp_path):
    cache = TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert isinstance(cache[0], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        cache[0][0] = 1


def test_home_is_expanded(path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache = TokenCache.build(path, tokenizer, "~/cache")
    assert cache.folder.parent == tmp_path / "home" / "cache"
