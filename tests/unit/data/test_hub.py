"""pose.data.hub: datasets are read, from folders in the hub's form, and failures in between are borne."""

import gzip
import json
import sys

import datasets
import huggingface_hub
import pyarrow
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from omegaconf import OmegaConf
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pose.app.documents import find_documents
from pose.data import hub
from pose.data.cache import TokenCache, check_documents
from pose.data.documents import Broken, Keys
from pose.data.hub import HubDataset, say_other_splits
from pose.errors import ConfigError, DataError
from pose.files import Memo

README = """---
configs:
- config_name: reports
  data_files:
  - {split: train, path: "reports/train-*"}
  - {split: test, path: "reports/test-*"}
---
"""


@pytest.fixture
def tokenizer():
    model = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model)


@pytest.fixture
def repository(tmp_path):
    """Two files of Parquet with two row groups each, one file of a test split, and a packed JSON file beside them."""
    folder = tmp_path / "repository"
    (folder / "reports").mkdir(parents=True)
    (folder / "README.md").write_text(README)
    for split, texts in (("train-0", range(1, 21)), ("train-1", range(21, 31)), ("test-0", range(31, 33))):
        table = pyarrow.table({"report": [f"w{i}" for i in texts], "summary": ["x"] * len(texts)})
        parquet.write_table(table, folder / "reports" / f"{split}.parquet", row_group_size=10)
    (folder / "more").mkdir()
    for i in range(2):
        rows = "".join(json.dumps({"text": f"w{40 + 5 * i + j}", "meta": {"n": j}}) + "\n" for j in range(5))
        (folder / "more" / f"{i}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return folder


def numbers(dataset: HubDataset, broken=None, **options) -> list[int]:
    return [int(document.text[1:]) for document in dataset.read(broken or Broken(), **options)]


def test_configurations_splits_and_files(repository):
    path = str(repository)
    assert numbers(HubDataset(path, "reports", text_field="report")) == list(range(1, 31))
    assert numbers(HubDataset(path, split="test", text_field="report")) == [31, 32]
    assert numbers(HubDataset(path, format="json", data_files="more/*.jsonl.gz")) == list(range(40, 50))


def test_frames_of_an_archive_are_all_read(tmp_path):
    frames = (json.dumps({"text": f"w{i}"}).encode() + b"\n" for i in range(5))
    packed = b"".join(pyarrow.Codec("zstd").compress(frame, asbytes=True) for frame in frames)
    (tmp_path / "train.jsonl.zst").write_bytes(packed)
    assert numbers(HubDataset(str(tmp_path))) == [0, 1, 2, 3, 4]


class Wrapped:
    """A builder of `datasets` whose rows pass through `rows`, and whose files have other names."""

    def __init__(self, builder, rows=lambda rows: rows, root: tuple[str, str] = ("", "")):
        self.builder, self.rows = builder, rows
        files = {split: [file.replace(*root) for file in files] for split, files in builder.config.data_files.items()}
        self.config = type("Config", (), {"data_files": files})

    def as_streaming_dataset(self, split):
        return self.rows(self.builder.as_streaming_dataset(split))


class Failing:
    """Rows of `datasets` that break off where they are told to."""

    def __init__(self, rows, failures: list):
        self.rows, self.failures = rows, failures

    def __getattr__(self, name):
        return getattr(self.rows, name)

    def __iter__(self):
        for row in self.rows:
            if self.failures and self.failures[0][0] in row["report"].split():
                raise self.failures.pop(0)[1]
            yield row


@pytest.fixture
def fail(monkeypatch):
    """fail([(word, error), ...]): the row with a word is not reached, but an error, once each."""

    def fail(failures):
        load, failing = datasets.load_dataset_builder, lambda rows: Failing(rows, failures)
        monkeypatch.setattr(
            datasets, "load_dataset_builder", lambda *args, **kwargs: Wrapped(load(*args, **kwargs), failing)
        )

    return fail


@pytest.mark.parametrize("word", ["w1", "w2", "w11", "w21", "w30"])
def test_after_a_failure_it_goes_on_without_repeating_or_losing(repository, fail, capsys, word):
    """At the first row, inside of and between row groups and files, and at the last row, up to the last attempt."""
    waits = []
    fail([(word, ConnectionError("reset by peer"))] * hub.RETRIES + [("w25", TimeoutError("slow"))])
    got = numbers(HubDataset(str(repository), "reports", text_field="report"), sleep=waits.append)
    assert got == list(range(1, 31))
    assert waits[: hub.RETRIES] == [1, 2, 4, 8, 16]
    said = capsys.readouterr().out
    assert f"after row {int(word[1:]) - 1} failed (reset by peer): attempt 1 of 5 to go on from there, in 1 s" in said


def test_in_the_end_it_says_which_dataset_and_what_to_do_and_leaves_nothing(
    repository, fail, monkeypatch, tokenizer, tmp_path
):
    monkeypatch.setattr("pose.data.network.FIRST_WAIT", 0)
    fail([("w12", ConnectionError("gone"))] * (hub.RETRIES + 1))
    documents = {"path": str(repository), "name": "reports", "text_field": "report"}
    with pytest.raises(DataError, match=r"\(reports, train\) failed 6 times .* row 11 \(gone\).*hf download"):
        TokenCache.build(documents, tokenizer, tmp_path / "cache")
    assert [entry for entry in (tmp_path / "cache").iterdir() if not entry.name.startswith(".")] == []
    assert len(TokenCache.build(documents, tokenizer, tmp_path / "cache")) == 30


def test_what_no_second_attempt_can_mend_is_an_error_at_once(repository, fail):
    never = lambda seconds: pytest.fail("waited")  # noqa: E731
    read = lambda **fields: numbers(HubDataset(str(repository), **fields), sleep=never)  # noqa: E731
    with pytest.raises(DataError, match=r"cannot be read past row 0: Bad split: dev.*Check name, split"):
        read(name="reports", split="dev")
    with pytest.raises(DataError, match=r"row 1: no text under 'text'.*\['report', 'summary'\].*text_field"):
        read(name="reports")
    (repository / "more" / "1.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(DataError, match=r"cannot be read past row \d: .*FOLDER"):
        read(format="json", data_files="more/*.jsonl.gz")


def test_a_loading_script_is_never_run(repository):
    (repository / "repository.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DataError, match=r"never run: name its files with data_files and their format"):
        numbers(HubDataset(str(repository), "reports"))
    assert numbers(HubDataset(str(repository), format="json", data_files="more/0.jsonl.gz")) == [40, 41, 42, 43, 44]


def test_rows_without_a_text_are_skipped_by_choice(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "w1"}\n{"text": null}\n{"text": "w2"}\n')
    documents = list(HubDataset(str(tmp_path)).read(Broken()))
    assert documents == [("train:1", "w1"), ("train:2", ""), ("train:3", "w2")]
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "train.parquet")
    broken = Broken("skip")
    dataset = HubDataset(str(tmp_path), format="parquet", data_files="train.parquet")
    assert list(dataset.read(broken)) == [] and broken.count == 2


def test_the_cache_follows_a_folders_content_and_what_is_taken_of_it(repository, tokenizer, tmp_path):
    def build(**fields):
        documents = {"path": str(repository), "text_field": "report"} | fields
        cache = TokenCache.build(documents, tokenizer, tmp_path / "cache")
        return cache.folder, [int(row[0]) for row in cache]

    first, again, test = build(), build(), build(split="test")
    assert first == again and test[0] != first[0] and test[1] == [31, 32]
    parquet.write_table(pyarrow.table({"report": ["w77"]}), repository / "reports" / "train-1.parquet")
    changed = build()
    assert changed[0] != first[0] and changed[1] == [*range(1, 21), 77]


def httpx_error() -> Exception:
    """What the hub's client raises without a network: no OSError."""
    client = sys.modules[huggingface_hub.get_session().__class__.__module__.split(".")[0]]
    return client.ConnectError("Name or service not known")


class Api:
    """The hub, as far as it is asked which commit is meant."""

    answer = "a" * 40

    def dataset_info(self, path, revision, timeout):
        if isinstance(self.answer, Exception):
            raise self.answer
        return type("Info", (), {"sha": self.answer})


def test_the_commit_is_pinned_and_remembered_for_when_the_hub_is_away(
    repository, tokenizer, tmp_path, monkeypatch, capsys
):
    """With the commit's cache there, the hub is not needed at all."""
    asked, load = [], datasets.load_dataset_builder

    def load_builder(path, name, **kwargs):
        asked.append((path, revision := kwargs.pop("revision")))
        return Wrapped(
            load(str(repository), name, **kwargs), root=(str(repository), f"hf://datasets/{path}@{revision}")
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    documents = {"path": "owner/reports", "name": "reports", "text_field": "report"}
    build = lambda: TokenCache.build(documents, tokenizer, tmp_path / "cache").folder  # noqa: E731
    first = build()
    assert asked == [("owner/reports", "a" * 40)]
    monkeypatch.setattr(Api, "answer", ConnectionError("no route"))
    assert build() == first and len(asked) == 1
    assert "owner/reports is taken at aaaaaaaaaaaa" in capsys.readouterr().out
    monkeypatch.setattr(Api, "answer", "b" * 40)
    assert build() != first and asked[-1] == ("owner/reports", "b" * 40)
    monkeypatch.setattr(Api, "answer", httpx_error())
    documents["path"] = "owner/other"
    with pytest.raises(DataError, match=r"does not answer, and owner/other was not read here.*its folder"):
        build()
    response = type("Response", (), {"status_code": 404, "headers": {}, "request": None})()
    monkeypatch.setattr(Api, "answer", RepositoryNotFoundError("404", response=response))
    with pytest.raises(DataError, match=r"owner/other \(revision main\) is not on the hub"):
        build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "json"}, "neither a folder nor a hub id"),
        ({"path": "https://x.y/z"}, "neither a folder nor a hub id"),
        ({"path": "a/b", "split": ""}, "split=''"),
        ({"path": "a/b", "format": "pandas", "data_files": "x"}, "format='pandas'.*json, parquet"),
        ({"path": "a/b", "format": "json"}, "needs data_files"),
        ({"path": "a/b", "data_files": "../x"}, "globs inside"),
        ({"path": "a/b", "data_files": "/x/y.jsonl"}, "globs inside"),
        ({"path": "a/b", "data_files": "hf://datasets/c/d/x"}, "globs inside"),
        ({"path": "a/b", "trust_remote_code": True}, r"\['trust_remote_code'\].*its fields are path"),
        ({"name": "x"}, "without a path"),
        ({"path": "a/b", "name": 2023}, r"name=2023 of the dataset a/b is not accepted: give a string"),
        ({"path": "a/b", "revision": 1234567}, "revision=1234567 of the dataset a/b is not accepted"),
        ({"path": "a/b", "split": ["train"]}, r"split=\['train'\] of the dataset a/b is not accepted"),
        ({"path": "a/b", "format": ["json"]}, r"format=\['json'\] of the dataset a/b is not accepted"),
        ({"path": "a/b", "text_field": 5}, "text_field=5 of the dataset a/b is not accepted"),
        ({"path": "a/b", "data_files": 5}, "data_files=5 .* give a file or glob in it, or a list"),
        ({"path": "a/b", "data_files": {"train": "x"}}, "data_files={'train': 'x'} .* give a file or glob"),
    ],
)
def test_fields_that_cannot_be_meant(fields, message, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=message):
        TokenCache.build(fields, tokenizer, tmp_path / "cache")


def test_a_config_names_datasets_as_files():
    find = lambda value: find_documents("data.documents", OmegaConf.create({"x": value}).x)  # noqa: E731
    assert find(["assets/corpora", {"path": "a/b", "split": "test"}])[1] == {"path": "a/b", "split": "test"}
    assert find("assets/tiny/config.json").endswith("assets/tiny/config.json")
    with pytest.raises(ConfigError, match=r"data\.documents\.path is not set.*owner/name"):
        find({"path": "???", "split": "train"})
    for path in (2024, True, ["a", "b"]):
        with pytest.raises(ConfigError, match=r"data\.documents\.path=.* is not accepted: give a folder"):
            find([{"path": path}])


# Files that are not the dataset's own


@pytest.mark.parametrize("where", ["../secret.jsonl", "{outside}/secret.jsonl", "reports/../../secret.jsonl"])
@pytest.mark.parametrize("key", ["data_files", "data_dir"])
def test_a_readme_cannot_name_what_lies_outside(tmp_path, tokenizer, where, key):
    folder = tmp_path / "repository"
    (folder / "reports").mkdir(parents=True)
    (folder / "reports" / "a.jsonl").write_text('{"text": "w2"}\n')
    (tmp_path / "secret.jsonl").write_text('{"text": "w1"}\n')
    where = where.format(outside=tmp_path)
    where = where if key == "data_files" else where.removesuffix("secret.jsonl")
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {key}: {where!r}\n---\n")
    with pytest.raises(DataError, match=r"names the file .*\.jsonl, which is not in it.*README"):
        TokenCache.build({"path": str(folder)}, tokenizer, tmp_path / "cache")


def test_splits_that_are_made_up_by_names_are_said_once(tmp_path, tokenizer, capsys):
    """`datasets` takes test.jsonl for the split test of a folder that says nothing of itself."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("part-0", "train", "test"):
        (folder / f"{name}.jsonl").write_text('{"text": "w1"}\n')
    for spec in ({"path": str(folder)}, {"path": str(folder)}, {"path": str(folder), "split": "test"}):
        check_documents(spec)
        TokenCache.build(spec, tokenizer, tmp_path / "cache")
    printed = capsys.readouterr().out
    assert printed.count("only files of the split train are read, since others are named for test") == 1
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n")
    other = folder.rename(tmp_path / "other")
    say_other_splits(HubDataset(str(other)))
    assert capsys.readouterr().out == ""
    other = other.rename(tmp_path / "words")
    (other / "README.md").write_text("# My data\n\nThe configs: none.")
    say_other_splits(HubDataset(str(other)))
    assert "named for test" in capsys.readouterr().out, "these words say nothing of files"


@pytest.mark.parametrize("file", ["https://elsewhere.org/a.jsonl", "hf://datasets/other/name@a/x", "/etc/x.jsonl"])
def test_a_dataset_of_the_hub_cannot_name_what_lies_outside(repository, monkeypatch, file):
    builder = Wrapped(datasets.load_dataset_builder(str(repository), "reports"))
    builder.config.data_files["train"].append(file)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(DataError, match=r"owner/reports \(train\) names the file .*, which is not in it"):
        HubDataset("owner/reports").rows("a" * 40)


def test_a_change_behind_a_link_is_a_change(tmp_path, tokenizer):
    """Of a file, and of a folder in which there are others."""
    folder, blobs = tmp_path / "repository", tmp_path / "blobs"
    for place in (folder, blobs / "more"):
        place.mkdir(parents=True)
    (blobs / "a").write_text('{"text": "w1"}\n')
    (blobs / "more" / "b.jsonl").write_text('{"text": "w2"}\n')
    (folder / "a.jsonl").symlink_to(blobs / "a")
    (folder / "more").symlink_to(blobs / "more")
    (folder / "up").symlink_to(folder)  # no end
    documents = {"path": str(folder), "format": "json", "data_files": ["a.jsonl", "more/b.jsonl"]}
    build = lambda: [int(row[0]) for row in TokenCache.build(documents, tokenizer, tmp_path / "cache")]  # noqa: E731
    assert build() == [1, 2]
    (blobs / "a").write_text('{"text": "w3"}\n')
    assert build() == [3, 2]
    (blobs / "more" / "b.jsonl").write_text('{"text": "w4"}\n')
    assert build() == [3, 4]


def test_a_folder_that_changes_while_it_is_read_gives_no_cache(repository, tokenizer, tmp_path, monkeypatch):
    read = HubDataset.read

    def changing(self, *arguments):
        for number, document in enumerate(read(self, *arguments)):
            if number == 5:
                (repository / "reports" / "train-2.parquet").write_bytes(b"x")
            yield document

    documents = {"path": str(repository), "name": "reports", "text_field": "report"}
    with monkeypatch.context() as patch:
        patch.setattr(HubDataset, "read", changing)
        with pytest.raises(DataError, match=r"train-2\.parquet changed while it was read"):
            TokenCache.build(documents, tokenizer, tmp_path / "cache")
    assert [entry for entry in (tmp_path / "cache").iterdir() if not entry.name.startswith(".")] == []


@pytest.mark.parametrize("error", [MemoryError("no"), pyarrow.ArrowMemoryError("malloc of size 9 failed")])
def test_running_out_of_memory_is_no_fault_of_a_dataset(repository, fail, error):
    fail([("w3", error)])
    with pytest.raises(MemoryError):
        numbers(HubDataset(str(repository), "reports", text_field="report"), Broken("skip"))


def test_a_long_row_is_refused_or_skipped(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "w1"}\n{"text": "w22222222222"}\n')
    broken = Broken("skip", max_document_chars=10)
    assert numbers(HubDataset(str(tmp_path)), broken) == [1] and broken.count == 1


@pytest.mark.parametrize("known", [{"a": 1}, 7, "no commit", ""])
def test_a_remembered_commit_that_is_none_is_not_taken(monkeypatch, tmp_path, known):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "answer", ConnectionError("no route"))
    memo = Memo(tmp_path)
    memo.set(["commit", "owner/x", None], known)
    with pytest.raises(DataError, match="does not answer"):
        HubDataset("owner/x").commit(memo)


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_token_that_is_refused_names_the_dataset_and_the_remedy(monkeypatch, tmp_path, status):
    response = type("Response", (), {"status_code": status, "headers": {}, "request": None})()
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "answer", HfHubHTTPError(f"{status} Client Error", response=response))
    with pytest.raises(DataError, match=rf"refuses the dataset owner/x \({status} Client Error\).*hf auth login"):
        HubDataset("owner/x").commit(Memo(tmp_path))


def test_a_line_longer_than_a_block_of_the_reader(tmp_path):
    """`datasets` reads JSON in blocks of 10 MiB."""
    rows = [json.dumps({"text": "w1" + " w2" * 5_500_000}), json.dumps({"text": "w3"})]
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode(), 1))
    documents = list(HubDataset(str(tmp_path)).read(Broken()))
    assert [len(document.text) for document in documents] == [2 + 3 * 5_500_000, 2]


def test_what_cannot_be_read_names_the_key_that_asks(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "w1"}\n{broken\n')
    with pytest.raises(DataError, match=r"eval\.documents=FOLDER$"):
        list(HubDataset(str(tmp_path)).read(Broken(keys=Keys("eval.documents"))))
