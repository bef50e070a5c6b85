"""The command that writes RULER's prompts: its arguments, what it refuses, and the file."""

import importlib
import json
import sys

import pytest
from ruler_texts import HAYSTACK, TINY, shipped
from transformers import PreTrainedTokenizerFast

from pose.app.ruler import main, write_prompts
from pose.errors import ConfigError
from pose.tasks.ruler import RulerPrompts


def write(out, task="niah_single_2", length=900, num=3, **options):
    write_prompts(out, shipped(), HAYSTACK, task=task, length=length, num=num, **options)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_prompts_are_written_out(tmp_path):
    out = tmp_path / "new" / "prompts.jsonl"
    lines = write(out, seed=5, depth=0.5)
    assert [line["index"] for line in lines] == [0, 1, 2] and list(out.parent.iterdir()) == [out]
    prompts = RulerPrompts("niah_single_2", shipped(), HAYSTACK, depths=[0.5])
    for line in lines:
        prompt = prompts.sample(5, 900, line["index"])
        assert (line["prompt"], line["answers"], line["length"]) == (prompt.text, prompt.answers, 900)
        assert (line["task"], line["depths"]) == ("niah_single_2", [0.5])
    lines = write(out, num=2, add_bos=True)
    assert [len(shipped().encode(line["prompt"], add_special_tokens=False)) for line in lines] == [899, 899]
    before = out.read_text()
    with pytest.raises(ConfigError, match="30 tokens is not possible"):
        write(out, length=30)
    for place in (tmp_path, out / "more"):
        with pytest.raises(ConfigError, match=rf"^{place} cannot be written.*give a file"):
            write(place, task="vt")
    assert out.read_text() == before and list(out.parent.iterdir()) == [out]


WHOLE = [str(TINY), "o.jsonl", "--task", "vt", "--length", "900", "--num", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (WHOLE[:-2], "required: --num"),
        ([], "required: tokenizer, out, --task, --length, --num"),
        ([*WHOLE, "--lenght", "3"], "unrecognized arguments: --lenght 3"),
        ([*WHOLE, "--length", "1e3"], "argument --length: invalid int value"),
        ([*WHOLE, "--num", "0"], "--num=0 is not accepted: give an integer of at least 1"),
        ([*WHOLE, "--seed", "-1"], "--seed=-1 is not accepted: give an integer of at least 0"),
        ([*WHOLE, "--depth", "1.5"], "--depth=1.5 is not accepted: give a place from 0 to 1"),
        ([*WHOLE, "--depth", "nan"], "--depth=nan is not accepted"),
        ([*WHOLE, "--depth", "0.5"], "--depth=0.5 does not go with --task=vt, which has no needles"),
        ([*WHOLE, "--task", "qa_1"], "argument --task: invalid choice: 'qa_1'"),
        ([*WHOLE, "--haystack", ""], "argument --haystack: the path is empty"),
    ],
)
def test_what_the_command_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ruler", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (1, 2) and message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ruler", "legacy", "gguf", "tokenizer"])
@pytest.mark.parametrize("paths", [["", "x"], ["x", " "]])
def test_no_command_takes_an_empty_path(name, paths, monkeypatch, capsys):
    """As of a shell variable that is not set."""
    monkeypatch.setattr(sys, "argv", [name, *paths])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"pose.app.{name}").main()
    assert caught.value.code == 2 and "the path is empty" in capsys.readouterr().err


def test_a_bos_that_the_tokenizer_has_not_is_refused_by_its_argument(tmp_path, monkeypatch, capsys):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(
        sys, "argv", ["ruler", str(tmp_path / "tokenizer"), str(tmp_path / "o"), *WHOLE[2:], "--add-bos"]
    )
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("ConfigError: --add-bos is true, but this tokenizer has no BOS token")


def test_the_command(tmp_path, script):
    out = tmp_path / "p.jsonl"
    arguments = ("--task", "niah_single_1", "--length", "4096", "--num", "2")
    result = script("-m", "pose.evaluation.ruler", "assets/tiny", out, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"2 prompts of ruler/niah_single_1 with 4096 tokens each in {out}\n"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    sizes = [len(shipped().encode(line["prompt"], add_special_tokens=False)) for line in lines]
    assert sizes == [4096, 4096] == [line["length"] for line in lines]


def test_errors_of_the_prompts_name_the_command_s_keys(tmp_path):
    with pytest.raises(ConfigError, match=r"^task: ruler has no task 'niah', choose from niah_single_1"):
        write(tmp_path / "a.jsonl", task="niah")
    with pytest.raises(ConfigError, match=r"^haystack is empty: give a text"):
        write_prompts(tmp_path / "a.jsonl", shipped(), "\n", task="niah_single_2", length=900, num=1)
