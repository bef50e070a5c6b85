"""pose.data.documents: what is read, and that every error names file and line."""

import errno
import gzip
import json
import os
import re
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pose.data import documents as module
from pose.data.documents import Broken, Document, Files, find_files, open_files, out_of_memory, read_documents
from pose.errors import ConfigError, DataError
from pose.files import Memo

CORPORA = Path(__file__).resolve().parents[3] / "assets" / "corpora"

TEXTS = ["one\ntwo", "Ωmega – ☃ 𝔸", "", "  spaces kept  "]


def write(path, content: bytes):
    if path.suffix == ".zst":  # in two frames, as large archives have them
        half = len(content) // 2
        content = b"".join(zstd(part) for part in (content[:half], content[half:]))
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def skipped(path, field="text"):
    """The documents of a file where broken places are skipped, and these places."""
    broken = Broken("skip")
    return list(Files(find_files(path), "x", field).read(broken)), broken


def lines(*records) -> bytes:
    return b"\n".join(record if isinstance(record, bytes) else json.dumps(record).encode() for record in records)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_texts_come_back_as_written(tmp_path, name, end):
    content = lines(*({"text": text, "id": f"id{i}", "title": "x"} for i, text in enumerate(TEXTS))) + end
    documents = list(read_documents(write(tmp_path / name, content)))
    assert documents == [Document(f"id{i}", text) for i, text in enumerate(TEXTS)]


def test_a_string_path_and_another_field(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"body": "b", "text": "t", "id": 7}))
    assert list(read_documents(str(path), "body")) == [("7", "b")]


def test_blank_lines_are_passed_over_and_still_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\n  \t\n{"text": "x"}\n\r\n{"text": "y"}\n\n')
    assert list(read_documents(path)) == [("a.jsonl:3", "x"), ("a.jsonl:5", "y")]


def test_utf8_is_read_whatever_the_locale_and_with_a_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + '{"text": "é☃"}'.encode())
    assert [document.text for document in read_documents(path)] == ["é☃"]


def test_reading_is_lazy(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"text": "x"}, b"broken"))
    documents = read_documents(path)
    assert next(documents).text == "x"
    with pytest.raises(DataError):
        next(documents)


BROKEN = {
    "not json": (b'{"text": "x"', "not valid JSON"),
    "two objects": (b'{"text": "x"} {"text": "y"}', "not valid JSON"),
    "not utf-8": (b'{"text": "caf\xe9"}', "not valid JSON.*utf-8"),
    "a list": (b'["text"]', "a list where a JSON object was expected"),
    "a string": (b'"text"', "a str where a JSON object was expected"),
    "no field": (b'{"body": "x", "author": "y"}', r"no text under 'text'.*\['author', 'body'\].*data.text_field"),
    "not a string": (b'{"text": ["x"]}', "no text under 'text' but a value of type list"),
    "a number": (b'{"text": 3}', "no text under 'text' but a value of type int"),
    "half a character": (b'{"text": "ab\\ud800"}', "half a character .* at 2"),
    "deep": (b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz", "docs.jsonl.zst"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_line_is_named(tmp_path, name, kind):
    """File and line, blank lines counted, and nothing but a DataError."""
    line, message = BROKEN[kind]
    path = write(tmp_path / name, lines({"text": "x"}, b"", {"text": "y"}, line, {"text": "z"}))
    with pytest.raises(DataError, match=message) as error:
        list(read_documents(path))
    assert str(error.value).startswith(f"{path}, line 4: ")
    documents, broken = skipped(path)
    assert [document.text for document in documents] == ["x", "y", "z"]
    assert broken.count == 1 and broken.first == [str(error.value)]


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.jsonl.gz", "folder.jsonl", "*.jsonl.zst"])
def test_a_missing_file_is_named(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError) as error:
        list(read_documents(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.gz", "a.json.gz", "jsonl", "a.parquet.gz", "a.jsonl.bz2"])
def test_a_wrong_suffix_is_refused(tmp_path, name):
    path = write(tmp_path / name, lines({"text": "x"}))
    with pytest.raises(DataError, match=r"\.jsonl or \.txt, each also as \.gz or \.zst, or \.parquet") as error:
        list(read_documents(path))
    assert str(path) in str(error.value)


def numbered_archive(num: int = 4000) -> bytes:
    return gzip.compress(lines(*({"text": f"{i}{'abcdefgh'[i % 8] * (i % 50)}"} for i in range(num))))


@pytest.mark.parametrize("keep", [0.3, 0.999])
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_truncated_archive_names_the_last_line_read(tmp_path, keep, kind):
    archive = numbered_archive(4000 if kind == "gz" else 20_000)
    whole_lines = gzip.decompress(archive).splitlines()
    whole = archive if kind == "gz" else zstd(gzip.decompress(archive))
    path = tmp_path / f"cut.jsonl.{kind}"
    path.write_bytes(whole[: int(keep * len(whole))])
    read = []
    with pytest.raises(DataError) as error:
        for document in read_documents(path):
            read.append(document)
    assert f"{path} cannot be read past line {len(read)}:" in str(error.value)
    documents, broken = skipped(path)
    assert documents == read and broken.first == [str(error.value)]
    if keep > 0.9:
        assert len(documents) > 0.9 * len(whole_lines), "what came before the last block is kept"


def test_a_damaged_archive_is_a_data_error(tmp_path):
    content = bytearray(numbered_archive())
    content[len(content) // 2] ^= 0xFF
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"bad\.jsonl\.gz"):
        list(read_documents(path))


def test_plain_text_named_gz_is_a_data_error(tmp_path):
    path = tmp_path / "plain.jsonl.gz"
    path.write_bytes(lines({"text": "x"}))
    with pytest.raises(DataError, match=r"plain\.jsonl\.gz cannot be read past line 0"):
        list(read_documents(path))


def test_null_and_nothing_are_documents_without_text(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"text": None}, {"text": ""}, {"text": "x", "id": None}))
    assert [document.text for document in read_documents(path)] == ["", "", "x"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_a_text_file_is_one_document(tmp_path, name):
    text = "first\n\nsecond – ☃\r\n"
    assert list(read_documents(write(tmp_path / name, text.encode()))) == [Document(name, text)]
    path = write(tmp_path / f"broken_{name}", b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(DataError, match=rf"broken_{name}, line 3: not UTF-8"):
        list(read_documents(path))
    assert skipped(path)[0] == []


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_rows_across_row_groups(tmp_path, kind):
    path = tmp_path / "a.parquet"
    texts = [*TEXTS, None, "x" * 5000] * 3
    table = pyarrow.table({"n": range(18), "body": pyarrow.array(texts, kind)})
    parquet.write_table(table, path, row_group_size=4)
    expected = [Document(f"a.parquet:{i}", text or "") for i, text in enumerate(texts, 1)]
    assert list(read_documents(path, "body")) == expected
    parquet.write_table(table.append_column("id", pyarrow.array(range(18))), path)
    assert [document.id for document in read_documents(path, "body")] == [str(i) for i in range(18)]


def test_names_that_utf8_cannot_encode_are_ids_all_the_same(tmp_path):
    """Of Linux, whose names of files are any bytes."""
    texts = {"one": b"text", "rows": b'{"text": "text"}\n'}
    for (name, content), suffix in zip(texts.items(), (b".txt", b".jsonl"), strict=True):
        folder = tmp_path / name
        folder.mkdir()
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe" + suffix)).write_bytes(content)
        (document,) = read_documents(folder)
        assert document.text == "text" and document.id.encode().startswith(b"??")


def test_parquet_with_two_columns_of_ids_has_its_places(tmp_path):
    columns = [pyarrow.array(["a text"]), pyarrow.array([1]), pyarrow.array([2])]
    table = pyarrow.Table.from_arrays(columns, ["text", "id", "id"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == [Document("a.parquet:1", "a text")]


def test_parquet_that_is_broken(tmp_path):
    path = tmp_path / "a.parquet"
    bad = pyarrow.array([b"x", b"caf\xe9", b"y"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad, "n": [1, 2, 3]}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: not UTF-8"):
        list(read_documents(path))
    documents, broken = skipped(path)
    assert [document.text for document in documents] == ["x", "y"] and broken.count == 1
    for field in ("body", "n"):
        with pytest.raises(
            DataError, match=rf"no single column of text named '{field}'.*text \(string\), n \(int64\).*data.text_field"
        ):
            skipped(path, field)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read past row 0"):
        list(read_documents(path))


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string"])
def test_parquet_columns_of_text_in_other_forms(tmp_path, kind):
    text = pyarrow.array(["a b", "c", "a b"])
    text = text.dictionary_encode() if kind == "dictionary" else text.cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    assert [document.text for document in read_documents(tmp_path / "a.parquet")] == ["a b", "c", "a b"]


def test_two_columns_of_one_name(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no single column of text named 'text'"):
        list(read_documents(tmp_path / "a.parquet"))


def test_a_byte_order_mark_before_a_blank_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf\n{"text": "a"}\n')
    assert [document.text for document in read_documents(tmp_path / "a.jsonl")] == ["a"]


def test_linked_folders_and_capital_suffixes_are_read_and_circles_end(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    write(other / "A.JSONL", lines({"text": "x"}))
    (folder / "link").symlink_to(other)
    (other / "back").symlink_to(folder)
    assert "A.JSONL" in {path.name for path in find_files(folder)} and len(find_files(folder)) == 1


def test_folders_and_globs_are_sorted_and_leave_out_what_is_not_read_here(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    names = ["b.jsonl", "a.jsonl.gz", "sub/c.txt", "x.md", ".hidden.jsonl", ".git/d.txt"]
    for name in names:
        write(tmp_path / name, lines({"text": name}))
    inside = [str(path.relative_to(tmp_path)) for path in find_files(tmp_path)]
    assert inside == ["a.jsonl.gz", "b.jsonl", "sub/c.txt"]
    assert [path.name for path in find_files(f"{tmp_path}/**/*.jsonl*")] == ["a.jsonl.gz", "b.jsonl"]
    spark = tmp_path / "sub" / "d.parquet"  # a folder, as Spark and Dask write one
    spark.mkdir()
    write(spark / "part-0.jsonl", lines({"text": "x"}))
    of_glob = [str(path.relative_to(tmp_path)) for path in find_files(f"{tmp_path}/s*")]
    assert (
        of_glob
        == ["sub/c.txt", "sub/d.parquet/part-0.jsonl"]
        == [str(path.relative_to(tmp_path)) for path in find_files(f"{tmp_path}/sub/**")]
    )
    assert [path.name for path in find_files(f"{tmp_path}/*/*.parquet")] == ["part-0.jsonl"]
    with pytest.raises(DataError, match=r"x\.md is not a file that is read here"):
        find_files(f"{tmp_path}/*.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder .*empty holds no file"):
        find_files(tmp_path / "empty")


def test_files_of_other_kinds_beside_those_that_are_read_are_said(tmp_path, capsys):
    for name in ("a.jsonl", "b.json", "sub/c.json", "d.csv", "README.md", "LICENSE", ".hidden.bz2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, lines({"text": name}))
    for _ in range(2):
        assert [path.name for path in find_files(tmp_path)] == ["a.jsonl"]
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("Warning") == 1, "a folder is opened several times"
    assert f"data.documents: {tmp_path} has files of other kinds, which are left out (2 .json, 1 .csv)" in out


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    path = write(tmp_path / "a[1].jsonl", lines({"text": "x"}))
    assert find_files(str(path)) == [path]


def test_what_is_done_about_broken_places_is_one_of_two():
    with pytest.raises(ConfigError, match=r"data\.on_broken='warn'.*error or skip"):
        Broken("warn")


# What is too long


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.parquet"])
@pytest.mark.parametrize("letter", ["x", "é", "中", "😀"])
def test_a_document_has_at_most_so_many_characters(tmp_path, name, letter):
    """100 are a document, and 101 are too many, of however many bytes; the others are read as before."""
    texts, path = [letter * 100, letter * 101, "y"], tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.table({"text": texts}), path)
    elif ".txt" in name:
        texts = texts[:2]
        path = write(tmp_path / f"0{name}", texts[0].encode()).parent
        write(path / f"1{name}", texts[1].encode())
    else:
        write(path, b"\n".join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts))
    broken = Broken("skip", max_document_chars=100)
    read = [document.text for document in Files(find_files(path), "x").read(broken)]
    assert read == [text for text in texts if len(text) != 101]
    message = r"(1a\.txt.*|, (line|row) 2): the document has more than 100 characters: split it, or allow more"
    assert broken.count == 1 and re.search(message, broken.first[0])
    with pytest.raises(DataError, match=message):
        list(Files(find_files(path), "x").read(Broken(max_document_chars=100)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_an_archive_of_one_long_line_does_not_fill_memory(tmp_path, name):
    """16 MB, of which two are read at a time; the line behind it is there."""
    path = write(tmp_path / name, b"x" * (16 << 20) + (b'\n{"text": "y"}' if "jsonl" in name else b""))
    broken = Broken("skip", max_document_chars=1000)
    tracemalloc.start()
    read = [document.text for document in Files([path], "x").read(broken)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == (["y"] if "jsonl" in name else []) and broken.count == 1
    assert peak < 8 << 20


def test_lines_longer_than_a_block_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    texts = ["x" * n for n in (0, 1, 3, 4, 5, 15, 16, 17, 100)]
    for end in (b"", b"\n"):
        path = write(tmp_path / "a.jsonl", lines(*({"text": text} for text in texts)) + end)
        assert [document.text for document in read_documents(path)] == texts
        assert [document.text for document in read_documents(write(tmp_path / "a.txt", b"ab\n" * 30))] == ["ab\n" * 30]


def test_a_parquet_file_that_says_one_text_in_many_rows_does_not_fill_memory(tmp_path):
    """400 rows of 1 MB in a file of some hundred bytes."""
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 400, pyarrow.int32()), ["x" * (1 << 20)])
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": text}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2000
    before, held = pyarrow.total_allocated_bytes(), []
    for document in read_documents(path):
        held.append(pyarrow.total_allocated_bytes() - before)
        assert len(document.text) == 1 << 20
    assert len(held) == 400 and max(held) < 50 << 20


def test_values_of_max_document_chars(tmp_path):
    for value in (0, -1, 1.5, "many"):
        with pytest.raises(ConfigError, match=r"data\.max_document_chars=.*at least 1"):
            Broken("skip", value)


class ZstdError(Exception):
    """As backports.zstd names it."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"), OSError(errno.ENOMEM, "Cannot allocate memory"), pyarrow.ArrowMemoryError("malloc failed"),
        ZstdError("Unable to decompress: Allocation error : not enough memory"),
    ],
)  # fmt: skip
def test_running_out_of_memory_is_never_a_broken_document(tmp_path, monkeypatch, error):
    """Nothing is skipped for it, in a file of any kind."""

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(module, "_unpack", fails)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", fails)
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        path = tmp_path / name
        if not path.exists():
            write(path, b"{}")
        broken = Broken("skip")
        with pytest.raises(type(error)):
            list(Files([path], "x").read(broken))
        assert broken.count == 0 and out_of_memory(error)
    assert not out_of_memory(OSError(errno.EIO, "x")) and not out_of_memory(ValueError("memory"))


# What cannot be read


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """Three files, of which one is in a folder that cannot be read; root may read everything, so the system says so."""
    for name in ("a.jsonl", "open/b.jsonl", "closed/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, lines({"text": name}))
    scandir = os.scandir

    def refusing(path="."):
        if Path(os.fspath(path)).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/*/*.jsonl", "/closed/*.jsonl", "/clo*/*.jsonl"])
def test_a_folder_that_cannot_be_read_is_not_passed_over(closed, pattern):
    with pytest.raises(DataError, match=r"closed.* cannot be read \(Permission denied\): give this user the right"):
        find_files(f"{closed}{pattern}")
    assert [path.name for path in find_files(f"{closed}/o*/*.jsonl")] == ["b.jsonl"]


def test_a_hidden_folder_may_be_closed(closed):
    (closed / "closed").rename(closed / ".closed")
    assert [path.name for path in find_files(closed)] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("pattern", ["", "/*.jsonl"])
def test_a_link_to_nowhere_is_not_passed_over(tmp_path, pattern):
    write(tmp_path / "a.jsonl", lines({"text": "x"}))
    (tmp_path / "lock").symlink_to(tmp_path / "nowhere")  # no documents
    assert len(find_files(f"{tmp_path}{pattern}")) == 1
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"b\.jsonl is a link to .*gone, and nothing is there"):
        find_files(f"{tmp_path}{pattern}")


def test_files_of_a_closed_folder_are_a_data_error(monkeypatch, tmp_path):
    def refused(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    path = write(tmp_path / "a.jsonl", b"{}")
    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read \(Permission denied\)"):
        find_files(path)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read \(Permission denied\)"):
        Files([path], "x")


@pytest.mark.parametrize("nothing", ["", " "])
def test_an_empty_name_is_not_the_folder_one_stands_in(nothing):
    with pytest.raises(DataError, match="is empty"):
        find_files(nothing)


def test_a_link_to_a_folder_above_ends_and_adds_nothing(tmp_path):
    write(tmp_path / "a.jsonl", lines({"text": "x"}))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    assert [path.name for path in find_files(tmp_path)] == ["a.jsonl"]


# Whose field is whose


def test_a_field_belongs_to_its_file(tmp_path):
    """A list of files, of which one names its own; the shipped text has its own, whatever others have."""
    mine, other = (write(tmp_path / name, lines({"body": "b", "story": "s"})) for name in ("a.jsonl", "b.jsonl"))
    documents = [mine, {"path": str(other), "text_field": "story"}, {"path": f"{tmp_path}/b*", "text_field": None}]
    assert [document.text for document in read_documents(documents, "body")] == ["b", "s", "b"]
    folder = {"path": str(tmp_path), "text_field": "story"}
    assert [document.text for document in read_documents(folder)] == ["s", "s"], "of a haystack"
    assert open_files(folder) is None, "elsewhere it is a dataset"
    shipped = CORPORA / "proofs.heldout.jsonl.gz"
    assert list(read_documents(shipped, "body")) == list(read_documents(shipped))
    with pytest.raises(DataError, match="no text under 'body'"):
        next(read_documents({"path": str(shipped), "text_field": "body"}))
    copy = tmp_path / "copy.jsonl.gz"
    copy.write_bytes(shipped.read_bytes())
    with pytest.raises(DataError, match="no text under 'body'"):
        next(read_documents(copy, "body"))


@pytest.mark.parametrize("spec", [None, 3, {"path": "owner/name"}, {"path": "a.jsonl", "split": "train"}, {}])
def test_what_names_no_file(spec):
    assert open_files(spec) is None
    with pytest.raises(ConfigError, match="names no file to read"):
        list(read_documents([spec]))


# Files that change


def test_a_file_is_the_one_that_was_digested(tmp_path):
    """Another one of that name, though its content and age are the same; found before a document is read."""
    path = write(tmp_path / "a.jsonl", lines({"text": "x"}))
    files = Files([path], "a")
    files.state(Memo(tmp_path / "memo"))
    assert len(list(files.read(Broken()))) == 1
    stat, content = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read: start again"):
        next(files.read(Broken()))


def test_advice_is_of_the_keys_that_are_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"body": "x" * 11}))
    own = r"\(choose one with eval\.text_field, or 'eval\.documents=\{path: FILE, text_field: FIELD\}'\)$"
    keys = module.Keys("eval.documents", "eval.text_field", max_document_chars=None)
    with pytest.raises(DataError, match=own):
        list(read_documents(path, keys=keys))
    with pytest.raises(DataError, match=r"more than 10 characters: split it$"):
        list(Files([path], "x", "body").read(Broken(max_document_chars=10, keys=keys)))
    with pytest.raises(DataError, match=r"split it, or allow more with data\.max_document_chars$"):
        list(Files([path], "x", "body").read(Broken(max_document_chars=10)))


@pytest.mark.parametrize("kind", ["beyond the years", "an unknown time zone"])
def test_an_id_that_python_cannot_hold_is_broken(tmp_path, kind):
    unit, zone = ("s", None) if kind == "beyond the years" else ("us", "No/Where")
    ids = pyarrow.array([2**50 if unit == "s" else 0, None], pyarrow.timestamp(unit, zone))
    table = pyarrow.table({"text": ["a", "b"], "id": ids})
    parquet.write_table(table, tmp_path / "a.parquet", store_schema=True)
    documents, broken = skipped(tmp_path / "a.parquet")
    assert [document.text for document in documents] == ["b"]
    assert [re.sub(r"\(.*", "", place) for place in broken.first] == [
        f"{tmp_path}/a.parquet, row 1: the id cannot be read "
    ]


def test_a_column_whose_name_is_not_utf8_breaks_its_file(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "nameXY": ["b"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"nameXY", b"name\xff\xfe"))
    with pytest.raises(DataError, match=r"a\.parquet cannot be read past row 0: .*utf-8"):
        list(read_documents(path))
