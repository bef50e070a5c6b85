"""pose.data.documents: what is read, and that every error names file and line."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from pose.data.documents import Broken, Document, Files, find_files, read_documents
from pose.errors import ConfigError, DataError

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
    "not a string": (b'{"text": ["x"]}', "no text under 'text'"),
    "a number": (b'{"text": 3}', "no text under 'text'"),
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
    with pytest.raises(DataError, match=r"x\.md is not a file that is read here"):
        find_files(f"{tmp_path}/*.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder .*empty holds no file"):
        find_files(tmp_path / "empty")


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    path = write(tmp_path / "a[1].jsonl", lines({"text": "x"}))
    assert find_files(str(path)) == [path]


def test_what_is_done_about_broken_places_is_one_of_two():
    with pytest.raises(ConfigError, match=r"data\.on_broken='warn'.*error or skip"):
        Broken("warn")
