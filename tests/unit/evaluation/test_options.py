"""The options of an evaluation: what is refused, with the key by the name that its group has."""

import json
import math
from pathlib import Path

import pytest

from pose.errors import ConfigError, DataError
from pose.evaluation.options import EvalOptions, read_haystack


@pytest.mark.parametrize(
    "options, key, also",
    [
        ({"tasks": ["perplexty"]}, "eval.tasks", "perplexity, passkey"),
        ({"tasks": ["rules/vt"]}, "eval.tasks has 'rules/vt'", "ruler/TASK"),
        ({"tasks": ["ruler"]}, "eval.tasks has 'ruler'", "ruler/TASK"),
        ({"tasks": ["harness"]}, "eval.tasks has 'harness'", "harness/TASK"),
        ({"prefix": "lm-eval"}, "eval.prefix='lm-eval'", "harness"),
        ({"min_tokens": 0}, "eval.min_tokens=0", "at least 1"),
        ({"limit": 0}, "eval.limit=0", "at least 1"),
        ({"num_fewshot": -1}, "eval.num_fewshot=-1", "at least 0"),
        ({"windows": 0}, "eval.windows=0", "at least 1"),
        ({"windows": -3}, "eval.windows=-3", "at least 1"),
        ({"tail": 0}, "eval.tail=0", "at least 1"),
        ({"bin": -1}, "eval.bin=-1", "at least 1"),
        ({"trials": 0}, "eval.trials=0", "at least 1"),
        ({"batch_tokens": 0}, "eval.batch_tokens=0", "at least 1"),
        ({"stride": 0}, "eval.stride=0", "at least 1"),
        ({"sliding_tokens": -1}, "eval.sliding_tokens=-1", "at least 1"),
        ({"max_documents": 0}, "eval.max_documents=0", "at least 1"),
        ({"lengths": []}, "eval.lengths=[]", "at least 2"),
        ({"lengths": [256, 1]}, "eval.lengths=[256, 1]", "at least 2"),
        ({"depths": []}, "eval.depths=[]", "0 to 1"),
        ({"depths": [0.5, 1.01]}, "eval.depths=[0.5, 1.01]", "0 to 1"),
        ({"depths": [-0.1]}, "eval.depths=[-0.1]", "0 to 1"),
        ({"depths": [0.5, math.nan]}, "eval.depths=[0.5, nan]", "0 to 1"),
        ({"seed": -1}, "eval.seed=-1", "from 0 to 4294967295"),
        ({"seed": 2**32}, "eval.seed=4294967296", "from 0 to 4294967295"),
        ({"tasks": ["ruler/"]}, "eval.tasks has 'ruler/'", "ruler/TASK"),
        ({"tasks": [""]}, "eval.tasks has ''", "perplexity, passkey"),
        ({"prefix": ""}, "eval.prefix=''", "ruler or harness"),
        ({"text_field": ""}, "eval.text_field is empty", "the key of the text"),
        ({"documents": ""}, "eval.documents=''", "a file, folder, glob or dataset"),
        ({"documents": " "}, "eval.documents=' '", "a file, folder, glob or dataset"),
        ({"documents": []}, "eval.documents=[]", "or a list of them"),
        ({"documents": ["a.jsonl", ""]}, "eval.documents=''", "a file, folder, glob or dataset"),
        ({"documents": {"path": ""}}, "eval.documents={'path': ''}", "a file, folder, glob or dataset"),
        ({"documents": 7}, "eval.documents=7", "a file, folder, glob or dataset"),
        ({"haystack": ""}, "eval.haystack=''", "a file, folder or glob"),
        ({"haystack": ["a.txt", ""]}, "eval.haystack=''", "a file, folder or glob"),
        ({"haystack": []}, "eval.haystack=[]", "or a list of them"),
        ({"haystack": {"text_field": "body"}}, "eval.haystack={'text_field': 'body'}", "{path: FILE, text_field: KEY}"),
        ({"haystack": {"path": "a", "split": "b"}}, "eval.haystack=", "{path: FILE, text_field: KEY}"),
        ({"haystack": None, "tasks": ["needle"]}, "eval.haystack=None", "a file, folder or glob"),
        ({"haystack": None, "tasks": ["needle_gain"]}, "eval.haystack=None", "a file, folder or glob"),
        ({"tasks": ["needle_gains"]}, "eval.tasks has 'needle_gains'", "needle, needle_gain, ruler/TASK"),
        ({"include_path": ""}, "eval.include_path=''", "with task YAMLs"),
        ({"include_path": "nowhere"}, "eval.include_path='nowhere' is no folder", "with task YAMLs"),
        ({"include_path": "docs"}, "eval.include_path=docs can run code", "eval.trust_tasks=true"),
    ],
)
def test_option_errors_name_key_value_and_what_is_accepted(options, key, also):
    with pytest.raises(ConfigError) as error:
        EvalOptions(**options)
    assert key in str(error.value)
    assert also in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tasks": ["passkey"]},
        {"windows": 1, "tail": 1, "bin": 1, "trials": 1, "batch_tokens": 1, "stride": 1, "max_documents": 1},
        {"lengths": [2], "depths": [0.0, 1.0], "seed": 0},
        {"tasks": ["perplexity"], "documents": "books.jsonl"},
        {"documents": [{"path": "owner/name", "split": "test"}, "a.jsonl", Path("b")], "seed": 2**32 - 1},
        {"haystack": ["a.txt", {"path": "b.jsonl", "text_field": "body"}]},
        {"haystack": None},
        {"include_path": "docs", "trust_tasks": True},
    ],
)
def test_options_at_their_bounds_are_accepted(options):
    for name, value in options.items():
        assert getattr(EvalOptions(**options), name) == value


def test_a_prefix_goes_before_names_of_its_tasks_alone():
    tasks = EvalOptions(tasks=["vt", "passkey", "harness/boolq"], prefix="ruler").tasks
    assert tasks == ["ruler/vt", "passkey", "harness/boolq"]


def test_an_error_names_the_group_that_the_options_are_of():
    with pytest.raises(ConfigError) as caught:
        EvalOptions(include_path="docs")
    message = str(caught.value.under("watch"))
    assert message.startswith("watch.include_path=docs") and "watch.trust_tasks=true" in message
    assert "eval." not in message


def test_a_haystack_may_be_several_files_each_with_its_own_key(tmp_path):
    (tmp_path / "a.txt").write_text("One.")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ("Two.", "Three.")))
    sources = [str(tmp_path / "a.txt"), {"path": str(tmp_path / "b.jsonl"), "text_field": "body"}]
    assert read_haystack(sources) == "One.\n\nTwo.\n\nThree."
    assert read_haystack(sources[:1]) == read_haystack(tmp_path / "a.txt") == "One."
    with pytest.raises(DataError, match="no text under 'text'"):
        read_haystack(tmp_path / "b.jsonl")


def test_errors_of_a_haystack_name_what_helps_there(tmp_path, monkeypatch):
    (tmp_path / "b.jsonl").write_text('{"body": "Two."}')
    with pytest.raises(
        DataError, match=r"\(choose one with 'eval\.haystack=\{path: FILE, text_field: FIELD\}'\)$"
    ) as error:
        read_haystack(tmp_path / "b.jsonl")
    assert "(choose one with 'watch.haystack={" in str(error.value.under("watch"))
    with pytest.raises(DataError, match=r"\(give text under that name\)$"):
        read_haystack(tmp_path / "b.jsonl", group="")
    (tmp_path / "a.txt").write_text("One. " * 4)

    def no_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("pose.data.documents._join", no_memory)
    with pytest.raises(DataError, match=r"memory ran out while eval\.haystack was read: give a shorter text"):
        read_haystack(tmp_path / "a.txt")
