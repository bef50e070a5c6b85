"""pose.data.cache: the cache is the tokens, is built once, and survives damage, kills and company."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pose import files as memo
from pose.data import cache as cache_module
from pose.data import tokenise
from pose.data.cache import TokenCache
from pose.data.documents import Files, Keys
from pose.data.tokenise import Tokeniser
from pose.errors import ConfigError, DataError

ASSETS = Path(__file__).resolve().parents[3] / "assets"
NUM_DOCUMENTS = 40  # more than two batches of the tokeniser


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(ASSETS / "tiny")


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    words = ["the", "pass", "key", "is", "12345", "grass", "–", "☃", "été\n"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 200))) for _ in range(NUM_DOCUMENTS)]
    return texts


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


@pytest.fixture
def tokenised(monkeypatch):
    """The texts that are given to a tokenizer by the code under test."""
    texts = []
    encode = Tokeniser.encode
    monkeypatch.setattr(Tokeniser, "encode", lambda self, batch: texts.extend(batch) or encode(self, batch))
    return texts


def folders(cache_dir):
    """The caches, whole or not, in a folder."""
    return [entry for entry in cache_dir.iterdir() if entry.name not in (".memo", ".locks")]


def read_with(monkeypatch, change):
    """Has the documents pass through change(documents) while they are read."""
    read = Files.read
    monkeypatch.setattr(Files, "read", lambda self, broken: change(read(self, broken)))


def assert_holds(cache, texts, tokenizer):
    """The cache is what the bare tokenizers library makes of each text, in order."""
    assert len(cache) == len(texts)
    assert list(cache.ids) == [f"d{i}" for i in range(len(texts))]
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


def test_second_build_tokenises_nothing(path, texts, tokenizer, tmp_path, tokenised):
    first = TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert tokenised == texts
    stamp = (first.folder / "tokens.bin").stat().st_mtime_ns
    second = TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert len(tokenised) == len(texts)
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


def rewrite_index(**changes):
    def change(folder):
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | changes))

    return change


def flip(name, place):
    """Another value in one byte, as a disk that forgets has it: the time of the file stays."""

    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        stat = (folder / name).stat()
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return change


def cut(name, by):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - by)


DAMAGE = {
    "tokens cut": cut("tokens.bin", 2),
    "tokens empty": lambda folder: os.truncate(folder / "tokens.bin", 0),
    "tokens longer": lambda folder: (folder / "tokens.bin").open("ab").write(b"xx"),
    "tokens gone": lambda folder: (folder / "tokens.bin").unlink(),
    "ids cut": cut("ids.bin", 1),
    "ids gone": lambda folder: (folder / "ids.bin").unlink(),
    "ends cut": cut("index.bin", 16),
    "ends in zeros": lambda folder: (folder / "index.bin").write_bytes(bytes(16 * NUM_DOCUMENTS)),
    "ends gone": lambda folder: (folder / "index.bin").unlink(),
    "index cut": lambda folder: os.truncate(folder / "index.json", 20),
    "index empty": lambda folder: os.truncate(folder / "index.json", 0),
    "index gone": lambda folder: (folder / "index.json").unlink(),
    "index not text": lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe\x00"),
    "index without a key": lambda folder: (folder / "index.json").write_text('{"kept": 1}'),
    "index a list": lambda folder: (folder / "index.json").write_text("[]"),
    "index of no type": rewrite_index(dtype="no such"),
    "index of a wrong type": rewrite_index(dtype="uint32"),
    "index of objects": rewrite_index(dtype="O"),
    "index of floats": rewrite_index(dtype="f8"),
    "index of signed numbers": rewrite_index(dtype="int16"),
    "index of a dtype that is none": rewrite_index(dtype=None),
    "index of another count": rewrite_index(too_short=1),
    "index of a smaller id": rewrite_index(max_id=1),
    "index of documents that are true": rewrite_index(kept=True),
    "index of no list": rewrite_index(first_broken="x"),
    "index without checksums": rewrite_index(checksums={}),
    "index a folder": lambda folder: [(folder / "index.json").unlink(), (folder / "index.json").mkdir()],
    "a token": flip("tokens.bin", 100),
    "the last token": flip("tokens.bin", -1),
    "an end": flip("index.bin", 0),
    "an id": flip("ids.bin", 1),
    "everything gone": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_rebuilt(path, texts, tokenizer, tmp_path, damage, capsys):
    """With a warning: it is only a memory."""
    folder = TokenCache.build(path, tokenizer, tmp_path / "cache").folder
    DAMAGE[damage](folder)
    cache_module._checked.clear()  # as in another process
    capsys.readouterr()
    cache = TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert re.search(rf"Warning: .*{folder.name}.*; it is made again", capsys.readouterr().out)
    assert cache.folder == folder
    assert_holds(cache, texts, tokenizer)
    assert folders(tmp_path / "cache") == [folder]


@pytest.mark.parametrize("dtype", ["O", "f8", "int64", "U9"])
def test_tokens_are_of_two_types_whatever_an_index_says(path, tokenizer, tmp_path, dtype):
    """Also when all else is made to fit: the bytes of a file would be read as the pointers of an array of objects."""
    folder = TokenCache.build(path, tokenizer, tmp_path / "cache").folder
    index = json.loads((folder / "index.json").read_text()) | {"dtype": dtype}
    index["checksum"] = cache_module._checksum_of_index(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(cache_module.DamagedCache, match=rf"dtype '{dtype}', and not uint16 or uint32"):
        TokenCache(folder)


def test_checksums_are_compared_once_in_a_process(path, tokenizer, tmp_path, monkeypatch):
    """By training, evaluation and watch alike, and not by readers."""
    cache, read = TokenCache.build(path, tokenizer, tmp_path / "cache"), []
    monkeypatch.setattr(cache_module, "_checksum", lambda file: read.append(file.name))
    TokenCache.build(path, tokenizer, tmp_path / "cache")
    cache_module._checked.clear()
    pickle.loads(pickle.dumps(cache))
    assert read == []
    with pytest.raises(cache_module.DamagedCache, match=r"tokens\.bin is not what was written"):
        TokenCache(cache.folder)
    assert read == ["tokens.bin"]


def test_a_broken_documents_file_leaves_nothing(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 20 + "broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 21"):
        TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


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
    """SIGKILL before the first document, between two batches, and once all tokens are made; its lock goes with it."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def killing(documents):
        for number, document in enumerate(documents):
            if number == after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        read_with(patch, killing)
        codes = in_processes(1, lambda _: TokenCache.build(path, tokenizer, tmp_path / "cache"))
    assert codes == [-signal.SIGKILL]
    left = folders(tmp_path / "cache")
    assert left, "the build was killed before it began"
    for folder in left:
        with pytest.raises(cache_module.DamagedCache):
            TokenCache(folder)
    cache = TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert cache.folder not in left
    assert_holds(cache, texts, tokenizer)
    assert folders(tmp_path / "cache") == [cache.folder]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("locks", [True, False])
def test_what_killed_builds_left_is_removed(path, texts, tokenizer, tmp_path, monkeypatch, locks, same):
    """By who holds the lock; where there are none a day later, for another job may be at it. Of other documents too."""
    folder = TokenCache.build(path, tokenizer, tmp_path / "cache").folder
    fresh, old = (folder.with_name(f".{folder.name}.{name}") for name in ("fresh_12", "older_12"))
    backup = folder.with_name(f"{folder.name}.backup-of-mine")
    for left in (fresh, old, backup):
        left.mkdir()
    (old / "tokens.bin").write_bytes(b"x")
    for name in (old / "tokens.bin", old, backup):
        os.utime(name, (0, 0))
    if not locks:
        monkeypatch.setattr(cache_module.fcntl, "flock", no_locks)
    if same:
        (folder / "index.json").unlink()
    documents = path if same else write(tmp_path / "other.jsonl", ["x"])
    built = TokenCache.build(documents, tokenizer, tmp_path / "cache").folder
    assert set(folders(tmp_path / "cache")) == {folder, built, backup} | (set() if locks else {fresh})


def test_what_another_job_is_building_is_left_alone(path, tokenizer, tmp_path):
    """However old it is: its lock is held."""
    folder = TokenCache.build(path, tokenizer, tmp_path / "cache").folder
    building = folder.with_name(f".{folder.name}.building")
    building.mkdir()
    with open(tmp_path / "cache" / ".locks" / folder.name, "a") as lock:
        cache_module.fcntl.flock(lock, cache_module.fcntl.LOCK_EX)
        TokenCache.build(write(tmp_path / "b.jsonl", ["x"]), tokenizer, tmp_path / "cache")
        assert building.exists()
    TokenCache.build(write(tmp_path / "c.jsonl", ["y"]), tokenizer, tmp_path / "cache")
    assert not building.exists()


def no_locks(*_):
    raise OSError("no locks here")


@pytest.mark.parametrize("damaged", [False, True])
def test_of_two_jobs_at_once_one_tokenises_and_the_other_waits(
    path, texts, tokenizer, tmp_path, monkeypatch, capfd, damaged
):
    """Also when both have found the cache damaged: the first waits in its work until the second has come."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    if damaged:
        DAMAGE["tokens cut"](TokenCache.build(path, tokenizer, tmp_path / "cache").folder)
    barrier, lock = multiprocessing.get_context("fork").Barrier(2), cache_module._lock

    def together(*arguments):
        barrier.wait(30)  # both have found no whole cache
        return lock(*arguments)

    def slowly(documents):
        time.sleep(0.5)
        with open(tmp_path / "builds", "a") as builds:
            builds.write("x")
        yield from documents

    def build(_):
        assert_holds(TokenCache.build(path, tokenizer, tmp_path / "cache"), texts, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_lock", together)
        read_with(patch, slowly)
        assert in_processes(2, build) == [0, 0]
    assert (tmp_path / "builds").read_text() == "x"
    assert "waiting for it" in capfd.readouterr().out
    (folder,) = folders(tmp_path / "cache")
    assert_holds(TokenCache(folder), texts, tokenizer)


@pytest.mark.parametrize("damaged", [False, True])
def test_without_locks_two_jobs_both_end_right(path, texts, tokenizer, tmp_path, monkeypatch, damaged):
    """On a file system that refuses locks; a barrier holds both in the middle of their work."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    if damaged:
        DAMAGE["ids gone"](TokenCache.build(path, tokenizer, tmp_path / "cache").folder)
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def refused(*_):
        raise OSError(95, "Operation not supported")

    def together(documents):
        yield from documents
        barrier.wait(30)

    def build(_):
        assert_holds(TokenCache.build(path, tokenizer, tmp_path / "cache"), texts, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.fcntl, "flock", refused)
        read_with(patch, together)
        assert in_processes(2, build) == [0, 0]
    (folder,) = folders(tmp_path / "cache")
    assert_holds(TokenCache(folder), texts, tokenizer)


def test_pickling_carries_no_tokens_and_reads_the_same(path, texts, tokenizer, tmp_path):
    """As workers get it: also after it has been read from."""
    cache = TokenCache.build(path, tokenizer, tmp_path / "cache")
    cache[0]
    data = pickle.dumps(cache)
    assert_holds(pickle.loads(data), texts, tokenizer)
    os.truncate(cache.folder / "tokens.bin", 0)
    with pytest.raises(cache_module.DamagedCache):
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


def test_home_paths_ids_and_counts_are_read_back(tmp_path, capsys):
    """What is left out is said in numbers, once, and holds for a cache that is only opened too."""
    cache_module._reported.clear()
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "w1 w2 w3"}', '{"text": ""}', '{"text": null}', '{"text": "w4"}', '{"text": "w5 w6", "id": "é"}']
    path.write_text("\n".join(lines))
    build = lambda: TokenCache.build(path, word_tokenizer(10), tmp_path / "cache", min_tokens=2)  # noqa: E731
    for cache in (build(), build()):
        assert [cache[i].tolist() for i in range(len(cache))] == [[1, 2, 3], [5, 6]]
        assert list(cache.ids) == ["a.jsonl:1", "é"] and cache.lengths.tolist() == [3, 2]
    said = "a.jsonl: 2 documents of 5 tokens; left out: 1 shorter than 2 tokens, 2 without text\n"
    assert capsys.readouterr().out == said


def test_max_documents_counts_those_that_are_long_enough_and_reads_no_further(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "PIECE", 1)  # a batch is one document
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"text": "w1"}\n{"text": "w2 w2"}\n')
    second.write_text('{"text": "w3 w3"}\n{"text": "w4 w4"}\n' + '{"text": "w5 w5 w5"}\n' * 5 + "broken")
    build = lambda most: TokenCache.build(  # noqa: E731
        [first, second], word_tokenizer(10), tmp_path / "cache", min_tokens=2, max_documents=most
    )
    for most, expected in ((1, [2]), (3, [2, 3, 4])):
        cache = build(most)
        assert [int(cache[i][0]) for i in range(len(cache))] == expected
        assert (cache.folder / "tokens.bin").stat().st_size == 2 * 2 * most
    with pytest.raises(DataError, match=r"b\.jsonl, line 8"):
        build(99)


@pytest.mark.parametrize("on_broken", ["error", "skip"])
def test_what_is_broken_beyond_max_documents_does_not_count(tmp_path, on_broken):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\nbroken\n{"text": "w2"}\n{"text": "w3"}\nbroken\n' if on_broken == "skip" else
                    '{"text": "w1"}\n{"text": "w2"}\nbroken\n')  # fmt: skip
    cache = TokenCache.build(path, word_tokenizer(9), tmp_path / "cache", max_documents=2, on_broken=on_broken)
    assert len(cache) == 2 and cache.info["broken"] == (on_broken == "skip") == len(cache.info["first_broken"])


def test_tokens_of_what_is_left_out_last_are_not_in_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", ["w1 w1 w1", "w2 w2"])
    cache = TokenCache.build(path, word_tokenizer(9), tmp_path / "cache", min_tokens=3)
    assert (cache.folder / "tokens.bin").stat().st_size == 2 * 3 and list(cache[0]) == [1, 1, 1]


def test_a_renamed_file_is_another_cache_and_a_tokenizers_state_is_not(path, tokenizer, tmp_path):
    """The ids of documents name the file; truncation is set by a call, and no matter here."""
    first = TokenCache.build(path, tokenizer, tmp_path / "cache").folder
    tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    assert TokenCache.build(path, tokenizer, tmp_path / "cache").folder == first
    assert TokenCache.build(path.rename(tmp_path / "b.jsonl"), tokenizer, tmp_path / "cache").folder != first


def test_files_in_a_list_or_folder_are_one_set_in_order(tmp_path):
    for name, text in (("b.txt", "w1"), ("a.jsonl", '{"text": "w2"}'), ("c.jsonl", '{"text": "w3"}')):
        (tmp_path / name).write_text(text)
    tokens = lambda documents: [  # noqa: E731
        int(row[0]) for row in TokenCache.build(documents, word_tokenizer(10), tmp_path / "cache")
    ]
    assert tokens(tmp_path) == [2, 1, 3]
    assert tokens([tmp_path / "c.jsonl", tmp_path / "b.txt", tmp_path / "c.jsonl"]) == [3, 1, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tokens": 0}, r"data\.min_tokens=0.*at least 1"),
        ({"max_documents": 0}, r"data\.max_documents=0.*at least 1"),
        ({"on_broken": "ignore"}, r"data\.on_broken='ignore'.*error or skip"),
    ],
)
def test_options_that_cannot_be_meant(path, tokenizer, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        TokenCache.build(path, tokenizer, tmp_path / "cache", **options)


def test_broken_lines_are_counted_and_never_all(tmp_path, capsys):
    cache_module._reported.clear()
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\nbroken\n[]\n{"text": "w2"}')
    cache = TokenCache.build(path, word_tokenizer(10), tmp_path / "cache", on_broken="skip")
    assert [int(cache[i][0]) for i in range(2)] == [1, 2] and cache.info["broken"] == 2
    out = capsys.readouterr().out
    assert "2 broken" in out and f"{path}, line 2: not valid JSON" in out and f"{path}, line 3: a list" in out
    path.write_text("broken\n{}\n")
    with pytest.raises(DataError, match=r"(?s)holds no document.*2 broken.*line 1.*line 2"):
        TokenCache.build(path, word_tokenizer(10), tmp_path / "cache", on_broken="skip")
    assert len(folders(tmp_path / "cache")) == 1


def test_a_large_files_digest_is_remembered_until_the_file_changes(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(memo, "BYTES_TO_REMEMBER", 1)
    path = write(tmp_path / "a.jsonl", ["w1"])
    build = lambda: TokenCache.build(path, word_tokenizer(10), tmp_path / "cache")[0].tolist()  # noqa: E731
    assert build() == [1]
    assert not list((tmp_path / "cache" / ".memo").glob("*")), "a file this young may change without a trace"
    now = time.time()
    monkeypatch.setattr(memo.time, "time", lambda: now + 10)
    build()
    with monkeypatch.context() as patch:
        patch.setattr(memo.hashlib, "file_digest", None)  # it is not read again
        assert build() == [1]
    stat = path.stat()
    write(path, ["w2"])  # as large, and as old
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert build() == [2]


def test_a_full_disk_is_named_and_nothing_is_left(path, tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_tokenise", full)
        with pytest.raises(DataError, match=r"cache_dir=.*No space left.*room"):
            TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


# Documents that change while they are read

OTHER = ["w9 w9"] * NUM_DOCUMENTS


def append(path):
    with path.open("a") as file:
        file.write(json.dumps({"text": "w9"}) + "\n")


def replace(path):
    other = write(path.with_name("new"), OTHER)
    os.replace(other, path)


def rewrite_in_place(path):
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content.replace(b"12345", b"54321"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size and age


def cut_off(path):
    os.truncate(path, 900)


CHANGES = {"longer": append, "replaced": replace, "in place": rewrite_in_place, "cut": cut_off}


@pytest.mark.parametrize("after", [0, 20, NUM_DOCUMENTS])
@pytest.mark.parametrize("change", CHANGES)
def test_a_text_that_changes_while_it_is_tokenised_gives_no_cache(
    path, texts, tokenizer, tmp_path, monkeypatch, change, after
):
    """At the first document, in the middle, after the last: never the tokens of one under the name of the other."""
    before = path.read_bytes()

    def changing(documents):
        for number, document in enumerate(documents):
            if number == after:
                CHANGES[change](path)
            yield document
        if after == NUM_DOCUMENTS:
            CHANGES[change](path)

    with monkeypatch.context() as patch:
        read_with(patch, changing)
        with pytest.raises(DataError, match=r"docs\.jsonl changed while it was read: start again"):
            TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []
    path.write_bytes(before)
    assert_holds(TokenCache.build(path, tokenizer, tmp_path / "cache"), texts, tokenizer)


def test_a_text_that_is_another_only_while_it_is_read_gives_no_cache(path, texts, tokenizer, tmp_path, monkeypatch):
    """Of a link that leads to another file for that time, neither file changes."""
    first, second = path.rename(tmp_path / "first"), write(tmp_path / "second", OTHER)
    path.symlink_to(first)
    read = Files.read

    def exchanged(self, broken):
        path.unlink()
        path.symlink_to(second)
        try:
            yield from read(self, broken)
        finally:
            path.unlink()
            path.symlink_to(first)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "read", exchanged)
        with pytest.raises(DataError, match=r"docs\.jsonl changed while it was read"):
            TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert_holds(TokenCache.build(path, tokenizer, tmp_path / "cache"), texts, tokenizer)


def test_a_line_that_is_broken_because_its_file_changes_is_called_so(path, tokenizer, tmp_path, monkeypatch):
    def changing(documents):
        yield next(documents)
        path.write_text("half a li")
        raise DataError("line 2 is broken")

    read_with(monkeypatch, changing)
    with pytest.raises(DataError, match=r"docs\.jsonl changed while it was read"):
        TokenCache.build(path, tokenizer, tmp_path / "cache")


# Other users, and what is too much


def as_another_user(function):
    """Whether function() succeeds in a process that may not write what is not its own."""

    def run(_):
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        cache_module._checked.clear()
        function()

    return in_processes(1, run) == [0]


@pytest.fixture
def shared():
    """A folder that others can read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_whole_cache_of_another_user_is_used_without_writing(shared, tokenizer, texts, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(memo, "BYTES_TO_REMEMBER", 1)  # digests would be remembered
    path, cache_dir = write(shared / "docs.jsonl", texts), shared / "cache"
    TokenCache.build(path, tokenizer, cache_dir)
    files = {file: file.stat().st_mtime_ns for file in shared.rglob("*")}
    if os.geteuid() != 0:
        cache_dir.chmod(0o555)
    assert as_another_user(lambda: assert_holds(TokenCache.build(path, tokenizer, cache_dir), texts, tokenizer))
    assert {file: file.stat().st_mtime_ns for file in shared.rglob("*")} == files
    cache_dir.chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
def test_what_another_user_has_closed_is_named_with_a_remedy(shared, tokenizer, texts, monkeypatch):
    """The cache, its folder, the place for a new one; the lock that another user has made can be held all the same."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    path, cache_dir = write(shared / "docs.jsonl", texts), shared / "cache"
    folder = TokenCache.build(path, tokenizer, cache_dir).folder

    def refused(message, documents=path, cache_dir=cache_dir):
        def build():
            with pytest.raises(DataError, match=message):
                TokenCache.build(documents, tokenizer, cache_dir)

        return as_another_user(build)

    assert refused(r"cache_dir=.*cannot be written to.*Permission.*give another folder", shared / ".." / shared.name)
    (shared / "closed").mkdir(mode=0o700)
    assert refused(r"the token cache .*closed/.*cannot be read.*another cache_dir", cache_dir=shared / "closed" / "x")
    for closed, mode in ((folder / "index.json", 0o600), (folder / "tokens.bin", 0o600), (folder, 0o700)):
        before = closed.stat().st_mode
        closed.chmod(mode)
        assert refused(r"the token cache .*cannot be read \(Permission denied\).*another cache_dir")
        closed.chmod(before)
    lock = cache_dir / ".locks" / folder.name

    def held(expected):
        with cache_module._lock(lock) as is_held:
            assert is_held is expected

    assert as_another_user(lambda: held(True))
    with cache_module._lock(lock):
        assert as_another_user(lambda: held(False))
    shutil.rmtree(folder)
    cache_dir.chmod(0o777)  # a folder of a group: what one has begun another may end
    assert as_another_user(lambda: assert_holds(TokenCache.build(path, tokenizer, cache_dir), texts, tokenizer))


@pytest.mark.parametrize("on_broken", ["error", "skip"])
def test_running_out_of_memory_is_said_and_never_skipped(path, tokenizer, tmp_path, monkeypatch, on_broken):
    def full(documents):
        yield next(documents)
        raise MemoryError("malloc of size 9 failed")

    with monkeypatch.context() as patch:
        read_with(patch, full)
        with pytest.raises(DataError, match=r"memory ran out.*\(malloc of size 9 failed\).*data\.max_document_chars"):
            TokenCache.build(path, tokenizer, tmp_path / "cache", on_broken=on_broken)
    assert folders(tmp_path / "cache") == []


def test_a_document_that_is_too_long_is_refused_or_left_out_by_choice(tmp_path):
    path = write(tmp_path / "a.jsonl", ["w1 w2", "w3 " * 40, "w4"])
    build = lambda **options: TokenCache.build(path, word_tokenizer(9), tmp_path / "cache", **options)  # noqa: E731
    assert len(build()) == 3
    cache = build(max_document_chars=100, on_broken="skip")
    assert [row.tolist() for row in cache] == [[1, 2], [4]] and cache.info["broken"] == 1
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the document has more than 100 characters"):
        build(max_document_chars=100)


# The model's vocabulary


def test_a_token_beyond_the_embedding_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", ["w1 w2", "w3 w8 w7", "w9 w9"])
    tokenizer = word_tokenizer(10)
    cache = TokenCache.build(path, tokenizer, tmp_path / "cache")
    assert cache.max_id == 9
    cache.check_vocabulary(tokenizer, 10)
    cache.check_vocabulary(tokenizer, 9, [0, 1])  # the documents that are used
    with pytest.raises(DataError, match=r"document d1 has the token 'w8' of id 8, .* 8 rows, for ids 0 to 7"):
        cache.check_vocabulary(tokenizer, 8)


def test_a_token_of_a_document_that_was_left_out_does_not_count(tmp_path):
    path = write(tmp_path / "a.jsonl", ["w1 w2", "w9", "w3 w4"])
    assert TokenCache.build(path, word_tokenizer(10), tmp_path / "cache", min_tokens=2).max_id == 4


def test_files_with_their_own_field_are_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "w1", "text": "w2"}')
    documents = [tmp_path / "a.jsonl", {"path": str(tmp_path / "a.jsonl"), "text_field": "body"}]
    cache = TokenCache.build(documents, word_tokenizer(9), tmp_path / "cache")
    assert [row.tolist() for row in cache] == [[2], [1]]


def test_advice_when_memory_runs_out_is_of_keys_that_are_there(tmp_path, monkeypatch):
    def no_memory(*args):
        raise MemoryError
        yield

    monkeypatch.setattr(Files, "read", no_memory)
    path = tmp_path / "a.txt"
    path.write_text("a b")
    with pytest.raises(DataError, match=r"Split long ones, or refuse them with a lower data\.max_document_chars"):
        TokenCache.build(path, word_tokenizer(9), tmp_path / "cache")
    with pytest.raises(DataError, match=r"Split long ones$"):
        TokenCache.build(
            path, word_tokenizer(9), tmp_path / "cache", keys=Keys("eval.documents", max_document_chars=None)
        )


def test_a_name_with_control_characters_does_not_reach_the_terminal(tmp_path, capsys):
    path = tmp_path / "a\x1b[2Jb\nc.txt"
    path.write_text("a b")
    TokenCache.build(path, word_tokenizer(9), tmp_path / "cache")
    said = capsys.readouterr()
    assert "Tokenising a[2Jb c" in said.err and "\x1b[2J" not in said.err + said.out
