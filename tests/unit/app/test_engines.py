"""Engines are asked in processes of their own; what they answer is compared with pose."""

import json
import math
import shutil
import sys

import pytest
from engine_pythons import interpreter
from transformers import LlamaConfig

from pose.app import engines
from pose.app.engines import Verdict, ask, compare, describe, judge, main, table
from pose.modeling.export import export_model
from pose.modeling.load import build_model, load_config, load_tokenizer, scale_config
from pose.rope import (
    NTK,
    Cope,
    Drope,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    NTKByParts,
    Theta,
    Unscaled,
    Yarn,
    YarnRevised,
)

RISING = [1 + 7 * i / 31 for i in range(32)]
STATIC = {
    "none": Unscaled(),
    "linear": Linear(),
    "ntk": NTK(),
    "theta": Theta(),
    "yarn": Yarn(),
    "yarn without its factor": Yarn(attention_factor=1.0),
    "yarn_revised": YarnRevised(),
    "ntk_by_parts": NTKByParts(),
    "llama3": Llama3(),
    "drope": Drope(attention_factor=1.2),
    "cope": Cope(),
    "yarn shifted": Yarn(rcd_shift=True),
    "ntk shifted": NTK(rcd_shift=True),
    "longrope of one list": LongRope(long_factor=RISING, short_factor=RISING),
}


DAILY = ("linear", "yarn", "longrope of one list")  # the others are made by the same code


def make_folder(folder, scaling, target=2048):
    """The shipped model with another RoPE, untrained: what it says is poor, and the same in every engine."""
    config = load_config("assets/tiny")
    scale_config(config, scaling, target)
    build_model(config, "assets/tiny", "sdpa").save_pretrained(folder)
    load_tokenizer("assets/tiny").save_pretrained(folder)
    return str(folder)


def stand_in(tmp_path, answer):
    """An interpreter that writes an answer in place of an engine's."""
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys, pathlib\npathlib.Path(sys.argv[4]).write_text({answer!r})\n")
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DAILY else pytest.mark.nightly) for name in STATIC]
)
def test_llama_cpp_serves_every_static_method_right(tmp_path, monkeypatch, name):
    python = interpreter("llama.cpp")
    monkeypatch.setattr(engines, "SCORED", 16)
    label, (verdict,) = compare(make_folder(tmp_path / "m", STATIC[name]), ["llama.cpp"], {"llama.cpp": python}, 600)
    assert (verdict.outcome, verdict.why) == ("right", ""), verdict
    assert set(verdict.difference) == ({600} if name == "none" else {256, 600})
    assert label.startswith(name.split()[0])


@pytest.mark.slow
def test_llama_cpp_serves_the_full_window(tmp_path):
    python = interpreter("llama.cpp")
    _, (verdict,) = compare(make_folder(tmp_path / "m", YarnRevised()), ["llama.cpp"], {"llama.cpp": python})
    assert verdict.outcome == "right" and set(verdict.difference) == {256, 2047}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "mlx"])
@pytest.mark.parametrize("name", STATIC)
def test_what_is_exported_is_served_right(tmp_path, engine, name):
    python = interpreter(engine)
    config = load_config("assets/tiny")
    scale_config(config, STATIC[name], 2048)
    export_model(build_model(config, "assets/tiny", "sdpa"), load_tokenizer("assets/tiny"), tmp_path / "m")
    _, (verdict,) = compare(str(tmp_path / "m"), [engine], {engine: python}, 600)
    assert (verdict.outcome, verdict.why) == ("right", ""), verdict


@pytest.mark.parametrize("scaling", [YarnRevised(), Dynamic()])
def test_plain_transformers_is_right(tmp_path, scaling):
    _, (verdict,) = compare(make_folder(tmp_path / "m", scaling, 512), ["transformers"], {})
    assert verdict.outcome == "right" and max(verdict.difference.values()) < 1e-4
    assert verdict.version and set(verdict.difference) == {256, 511}


@pytest.mark.nightly
def test_a_folder_that_another_model_is_served_from_is_wrong(tmp_path, monkeypatch):
    """The engine gets a folder whose scaling is gone, as several engines read it."""
    folder = make_folder(tmp_path / "m", Yarn(), 512)
    shutil.copytree(folder, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    asked = engines.ask
    monkeypatch.setattr(
        engines, "ask", lambda e, p, request, *rest: asked(e, p, request | {"folder": str(tmp_path / "plain")}, *rest)
    )
    _, (verdict,) = compare(folder, ["transformers"], {})
    assert verdict.outcome == "wrong" and verdict.difference[511] > 0.1
    assert str(verdict).startswith("wrong by ")


@pytest.mark.nightly
def test_an_export_that_is_refused_is_no_failure_of_the_others(tmp_path):
    folder = make_folder(tmp_path / "m", Dynamic(), 512)
    label, found = compare(folder, ["llama.cpp", "transformers"], {}, tokens=64)
    assert label == "dynamic" and [one.outcome for one in found] == ["refused", "right"]
    assert "depend on the length" in found[0].why


@pytest.mark.parametrize(
    ("answer", "outcome", "words"),
    [
        ({"missing": "vllm"}, "missing", "pip install vllm"),
        ({"missing": "numba"}, "refused", "the module numba is not there"),
        ({"error": "ValueError: no such rope"}, "refused", "ValueError: no such rope"),
        ({"version": "1", "logprobs": [[-1.0, -2.0]]}, "right", "right"),
        ({"version": "1", "logprobs": [[-1.0, -2.25]]}, "wrong", "wrong by 0.25"),
        ({"version": "1", "logprobs": [[-1.0, math.nan]]}, "wrong", "not finite"),
        ({"version": "1", "logprobs": [[-1.0, -math.inf]]}, "wrong", "not finite"),
    ],
)
def test_verdicts(answer, outcome, words):
    verdict = judge("vllm", answer, [[5, 6, 7]], [[-1.0, -2.0]])
    assert verdict.outcome == outcome and words in str(verdict)


def test_an_engine_that_ends_without_an_answer_is_refused_with_its_last_line(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho loading\necho Illegal instruction\nexit 132\n")
    python.chmod(0o755)
    assert ask("vllm", str(python), {}, tmp_path, 30) == {"error": "it ended with status 132: Illegal instruction"}


def test_an_engine_that_hangs_is_stopped(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    assert ask("vllm", str(python), {}, tmp_path, 0.5) == {"error": "no answer after 0.5 seconds"}


def test_an_engine_that_is_not_installed_is_named(tmp_path):
    """By the real worker, in an interpreter without its packages."""
    request = {"folder": "", "gguf": "", "texts": [], "scored": 1, "window": 8, "vocab_size": 8}
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    for engine in engines.ENGINES:
        verdict = judge(engine, ask(engine, str(bare), request, tmp_path, 60), [], [])
        assert (verdict.outcome, verdict.why.split()[:2]) == ("missing", ["pip", "install"]), (engine, verdict)


@pytest.mark.nightly
def test_command_line(tmp_path, capsys):
    folder = make_folder(tmp_path / "run" / "model", Linear(), 512)
    python = stand_in(tmp_path, json.dumps({"missing": "vllm"}))
    out = tmp_path / "out.json"
    arguments = ["--engines", "vllm,transformers", "--python", f"vllm={python}", "--tokens", "64", "--json", str(out)]
    main([str(tmp_path / "run"), *arguments])
    shown = capsys.readouterr().out
    assert "linear" in shown and "pip install vllm" in shown and "right" in shown
    (written,) = json.loads(out.read_text())
    assert [one["outcome"] for one in written["verdicts"]] == ["missing", "right"]
    main([folder, str(tmp_path / "run"), "--table", *arguments])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith("| `rope=` | vllm | transformers ") and lines[1] == "|---|---|---|"
    assert lines[2] == lines[3] and lines[2].startswith("| linear | missing (1) | right")
    assert lines[-1].startswith("(1) pip install vllm")


def test_a_table_marks_what_is_wrong():
    right, missing = Verdict("vllm", "right", version="1"), Verdict("mlx", "missing", "pip install x*y")
    wrong = Verdict("vllm", "wrong", version="1", difference={5: 0.0, 9: 0.5})
    rows = [("a", [right, missing]), ("b", [wrong, Verdict("mlx", "right", version="2")]), ("c", [right, missing])]
    assert table(rows).splitlines() == [
        "| `rope=` | vllm 1 | mlx 2 |",
        "|---|---|---|",
        "| a | right | missing (1) |",
        "| b | **wrong by 0.5 at 9 tokens** | right |",
        "| c | right | missing (1) |",
        "",
        "(1) pip install x\\*y",
    ]


def test_the_worst_difference_is_shown():
    assert str(Verdict("vllm", "wrong", difference={5: 0.25, 9: 0.5})) == "wrong by 0.5"
    assert str(Verdict("vllm", "wrong", difference={5: 0.25, 9: math.nan})) == "not finite"
    assert str(Verdict("vllm", "wrong", difference={5: 0.0, 9: math.nan})) == "not finite at 9 tokens"


def test_numbers_that_json_cannot_hold_are_null():
    assert Verdict("vllm", "wrong", difference={9: math.nan, 5: 0.5}).as_json()["difference"] == {9: None, 5: 0.5}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engines", "vllm,tgi"], "--engines has 'tgi': choose from transformers, vllm"),
        (["--python", "vllm=/no/python"], "--python vllm=/no/python is not accepted"),
        (["--python", "tgi=/bin/sh"], "--python tgi=/bin/sh is not accepted"),
        (["--tokens", "1"], "--tokens=1 is not accepted: give an integer of at least 2"),
        (["--engines", "transformers"], "RUN=nowhere is no folder"),
        (["--engines", ","], "--engines ',' names none: choose from transformers, vllm"),
        (["--json", "no/such/x.json"], "--json no/such/x.json is in a folder that is not there"),
        (["--json", "tests"], "--json tests is a folder"),
    ],
)
def test_what_cannot_be_asked_is_named(capsys, arguments, words):
    with pytest.raises(SystemExit):
        main(["nowhere", *arguments])
    assert words in capsys.readouterr().err


def test_every_run_is_looked_for_before_the_first_is_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pose.app.engines.compare", lambda *_: pytest.fail("an engine was asked"))
    with pytest.raises(SystemExit):
        main([make_folder(tmp_path / "m", Linear(), 512), "nowhere"])
    assert "RUN=nowhere is no folder" in capsys.readouterr().err


def test_what_was_found_is_kept_when_a_later_run_fails(tmp_path, monkeypatch):
    folder, out = make_folder(tmp_path / "m", Linear(), 512), tmp_path / "out.json"
    outcomes = iter([("linear", [Verdict("vllm", "right")]), KeyboardInterrupt()])

    def compare(*_):
        if isinstance(found := next(outcomes), BaseException):
            raise found
        return found

    monkeypatch.setattr("pose.app.engines.compare", compare)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([folder, folder, "--json", str(out)])
    assert [one["run"] for one in json.loads(out.read_text())] == ["linear"]


def test_too_little_text_is_named(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("One line.")
    with pytest.raises(SystemExit):
        main([make_folder(tmp_path / "m", Linear(), 512), "--text", str(tmp_path / "short.txt")])
    assert "short.txt has" in capsys.readouterr().err


def test_a_model_is_named_by_its_method():
    def named(scaling):
        config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=64, rope_theta=500.0)
        scale_config(config, scaling, 512)
        return describe(config)

    assert named(Unscaled()) == "none"
    assert named(NTK()) == "ntk"
    assert named(Yarn()) == "yarn, attention factor 1.21"
    assert named(LongRope(long_factor=RISING, attention_factor=1.0)) == "longrope, unequal lists"
