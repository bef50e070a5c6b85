"""The command that writes RULER's prompts: its arguments, what it refuses, and the file."""

import json
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from pose.app.ruler import Command, parse, write_prompts
from pose.errors import ConfigError
from pose.tasks.ruler import RulerPrompts

TINY = Path(__file__).resolve().parents[3] / "assets" / "tiny"
PLACES = ["north", "the old mill", "a river", "nowhere at all", "the sea and its islands", "unbelievable heights"]
HAYSTACK = "\n\n".join(f"Sentence {i} speaks of {PLACES[i % 6]}. Has it an end? Yes!" for i in range(120))


@cache
def shipped():
    return PreTrainedTokenizerFast.from_pretrained(TINY)


def write(out, task="niah_single_2", length=900, num=3, **options):
    command = Command(tokenizer="t", task=task, length=length, num=num, out=str(out), **options)
    write_prompts(command, shipped(), HAYSTACK)
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
        with pytest.raises(ConfigError, match=rf"out={place} cannot be written.*give a file"):
            write(place, task="vt")
    assert out.read_text() == before and list(out.parent.iterdir()) == [out]


WHOLE = ["tokenizer=t", "task=vt", "length=900", "num=3", "out=o.jsonl"]


def test_arguments_of_the_command():
    assert parse(WHOLE) == Command(
        tokenizer="t", task="vt", length=900, num=3, out="o.jsonl", seed=0, depth=None,
        haystack="assets/corpora/books.heldout.jsonl.gz", add_bos=False,
    )  # fmt: skip
    given = parse([*WHOLE, "task=niah_single_1", "depth=0.25", "seed=7", "add_bos=true", "haystack=a=b.txt"])
    assert (given.depth, given.seed, given.add_bos, given.haystack) == (0.25, 7, True, "a=b.txt")
    assert parse([*WHOLE, "depth=null"]).depth is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (WHOLE[:-1], r"out must be given too, as in\npython -m pose\.evaluation\.ruler tokenizer=FOLDER"),
        ([], "length, num, out, task, tokenizer must be given too"),
        ([*WHOLE, "lenght=3"], r"'lenght=3' is not known: give key=value, as in\npython -m"),
        ([*WHOLE, "900"], "'900' is not known"),
        ([*WHOLE, "length=1e3"], "length=1e3 is not accepted: .*Integer"),
        ([*WHOLE, "length=null"], "length=null is not accepted: .*not Optional"),
        ([*WHOLE, "num=0"], "num=0 is not accepted: give an integer of at least 1"),
        ([*WHOLE, "seed=-1"], "seed=-1 is not accepted: give an integer of at least 0"),
        ([*WHOLE, "depth=1.5"], "depth=1.5 is not accepted: give a place from 0 to 1"),
        ([*WHOLE, "depth=nan"], "depth=nan is not accepted"),
        ([*WHOLE, "depth=deep"], "depth=deep is not accepted"),
        ([*WHOLE, "depth=0.5"], "depth=0.5 does not go with task=vt, which has no needles"),
        ([*WHOLE, "add_bos=maybe"], "add_bos=maybe is not accepted: .*not a valid bool"),
        ([*WHOLE, "haystack="], "haystack is empty"),
        ([*WHOLE, "out="], "out is empty"),
    ],
)
def test_what_the_command_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(arguments)


def test_the_command(tmp_path, script):
    out = tmp_path / "p.jsonl"
    arguments = ("tokenizer=assets/tiny", "task=niah_single_1", "length=4096", "num=2", f"out={out}")
    result = script("-m", "pose.evaluation.ruler", *arguments)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    sizes = [len(shipped().encode(line["prompt"], add_special_tokens=False)) for line in lines]
    assert sizes == [4096, 4096] == [line["length"] for line in lines]


def test_errors_of_the_prompts_name_the_command_s_keys(tmp_path):
    with pytest.raises(ConfigError, match=r"^task: ruler has no task 'niah', choose from niah_single_1"):
        write(tmp_path / "a.jsonl", task="niah")
    command = Command(tokenizer="t", task="niah_single_2", length=900, num=1, out=str(tmp_path / "a.jsonl"))
    with pytest.raises(ConfigError, match=r"^haystack is empty: give a text"):
        write_prompts(command, shipped(), "\n")
