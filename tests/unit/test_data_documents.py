"""pose.data.documents: what is read, and that every error names file and line."""

import gzip
import json

import pytest

from pose.data.documents import Document, read_documents
from pose.errors import DataError

TEXTS = ["one\ntwo", "Ωmega – ☃ 𝔸", "", "  spaces kept  "]


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def lines(*records) -> bytes:
    return b"\n".join(record if isinstance(record, bytes) else json.dumps(record).encode() for record in records)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
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
    "null": (b'{"text": null}', "no text under 'text'"),
}


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_line_is_named(tmp_path, name, kind):
    """File and line, blank lines counted, and nothing but a DataError."""
    line, message = BROKEN[kind]
    path = write(tmp_path / name, lines({"text": "x"}, b"", {"text": "y"}, line, {"text": "z"}))
    with pytest.raises(DataError, match=message) as error:
        list(read_documents(path))
    assert str(error.value).startswith(f"{path}, line 4: ")


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.jsonl.gz", "folder.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError) as error:
        list(read_documents(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.gz", "a.json.gz", "jsonl"])
def test_a_wrong_suffix_is_refused(tmp_path, name):
    path = write(tmp_path / name, lines({"text": "x"}))
    with pytest.raises(DataError, match=r"\.jsonl or \.jsonl\.gz") as error:
        list(read_documents(path))
    assert str(path) in str(error.value)


def numbered_archive(num: int = 4000) -> bytes:
    return gzip.compress(lines(*({"text": f"{i}{'abcdefgh'[i % 8] * (i % 50)}"} for i in range(num))))


@pytest.mark.parametrize("keep", [0.3, 0.99])
def test_a_truncated_archive_names_the_last_line_read(tmp_path, keep):
    whole = numbered_archive()
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(whole[: int(keep * len(whole))])
    read = []
    with pytest.raises(DataError) as error:
        for document in read_documents(path):
            read.append(document)
    assert f"{path} cannot be read past line {len(read)}:" in str(error.value)


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
