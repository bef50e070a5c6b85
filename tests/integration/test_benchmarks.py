"""The benchmarks keep one contract: a table, a last line of JSON, options read at once; and measure what they say."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

import benchmarks
from benchmarks import gpu, parts, scaled, smollm2
from pose.errors import PoseError
from pose.files import load_json, sha256, write_json
from pose.modeling.load import build_model, load_config, rope_geometry, scale_config
from pose.rope import Yarn

pytestmark = pytest.mark.slow
FOLDER = Path(benchmarks.__file__).parent
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if "def options(" in file.read_text())


# Inductor's C++ takes a minute, and what is asked of it here is that it is asked
NO_INDUCTOR = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='aot_eager')"


def run(script, name, *arguments, before: str | None = None) -> tuple[str, dict]:
    """The table and the JSON line: all there is on stdout.

    Args:
        before: code that is run first, in the same process.
    """
    command = ("-m", f"benchmarks.{name}")
    if before is not None:
        command = ("-c", f"{before}\nfrom benchmarks import {name}\n{name}.main()")
    result = script(*command, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return read(name, result.stdout)


def read(name: str, printed: str) -> tuple[str, dict]:
    """The table and the JSON line of what a benchmark has printed."""
    *lines, last = printed.splitlines()
    content = json.loads(last)
    assert content["benchmark"] == name and content["complete"] is True
    assert content["hardware"]["cpu"] and content["hardware"]["threads"] >= content["hardware"]["cores"] >= 1
    assert content["hardware"]["gpu"] is None or content["hardware"]["gpu_memory_gib"] > 1
    assert all(content["versions"][package] for package in ("python", "torch", "transformers", "lightning"))
    return "\n".join(lines), content


def check_spread(values, repeats):
    assert 0 < values["min"] <= values["median"] <= values["max"]
    assert values["repeats"] == repeats


# ----- the contract -----


def test_options_are_read_before_torch_is_imported(script):
    """Of every benchmark: help, and a file that cannot be written."""
    code = """
import contextlib, io, json, runpy, sys
found = {}
for name in sys.argv[1:]:
    for arguments in (["--help"], ["--json", "/no/such/folder/x.json"]):
        sys.argv = [name, *arguments]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        found[name] = found.get(name, "") + out.getvalue() + err.getvalue()
        assert "torch" not in sys.modules, (name, arguments)
print(json.dumps(found))
"""
    result = script("-c", code, *NAMES, fresh=True)
    assert result.returncode == 0, result.stderr
    for name, printed in json.loads(result.stdout).items():
        assert "--quick" in printed and "--json FILE" in printed, name
        assert "'/no/such/folder/x.json' is not accepted" in printed, name


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("data", ["--examples", "none"], "--examples: 'none' is not accepted: give a whole number of at least 1"),
        ("loop", ["--steps", "1"], "--steps: '1' is not accepted: give a whole number of at least 2"),
        ("step", ["feet"], "'feet' is no part"),
        ("objectives", ["--parts", "small"], "invalid choice: 'small'"),
        ("evaluation", ["--lengths", "64"], "--lengths is of one part"),
        ("evaluation", ["sweep", "--tokens", "300"], "--tokens 300 is below the longest of --lengths, 2048"),
        ("efficiency", ["--targets", "512"], "--targets 512 is not beyond --train-len 512"),
        ("efficiency", ["--micro-batch", "2"], "--batch 1 is not a multiple of --micro-batch 2"),
        ("speed", ["--target-len", "5"], "--target-len 5 is below --train-len 2048"),
        ("tokenise", ["no/such/file"], "no/such/file is not there"),
        ("fits", ["--length", "5000"], "--length 5000 is beyond the window"),
        ("plan", ["--cases", "none"], "invalid choice: 'none'"),
        ("gpu", ["--minutes", "0"], "--minutes 0.0 is not accepted"),
        ("gpu", ["--only", "plan", "--skip", "plan"], "leave no stage"),
        ("gpu", ["--model", "no/such"], "--model no/such is not there"),
        ("gpu", ["--documents", "no/such"], "--documents no/such is not there"),
        ("gpu", ["--write", "--out", "no/such"], "holds no results"),
    ],
)
def test_bad_options(script, name, arguments, message):
    result = script("-m", f"benchmarks.{name}", *arguments)
    assert result.returncode == 2 and message in result.stderr


def test_quick_leaves_what_was_given(monkeypatch):
    parser = benchmarks.Options("x", "doc", quick={"repeats": 2, "tokens": 10})
    parser.add_argument("--repeats", type=benchmarks.whole(1), default=7)
    parser.add_argument("--tokens", type=benchmarks.whole(1), default=99)
    for arguments, expected in (([], (7, 99)), (["--quick"], (2, 10)), (["--quick", "--repeats", "3"], (3, 10))):
        monkeypatch.setattr("sys.argv", ["x", *arguments])
        args = parser.read()
        assert (args.repeats, args.tokens) == expected


def test_each_way_goes_first_in_turn():
    order, so_far = [], []
    ways = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    found = benchmarks.in_turn(ways, 4, after=lambda seconds: so_far.append(len(seconds["a"])))
    assert "".join(order) == "abc" "bca" "cab" "abc" and so_far == [1, 2, 3, 4]  # fmt: skip
    assert found == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}
    assert benchmarks.ratio(found["b"], found["a"])["max"] == 2


def test_readme_lists_them():
    text = (FOLDER / "README.md").read_text()
    assert [name for name in NAMES if f"| `{name}" not in text] == []


# ----- each -----


def test_data(script, tmp_path):
    file = tmp_path / "data.json"
    arguments = ("--repeats", "2", "--examples", "64", "--train-len", "64", "--target-len", "512", "--json", file)
    table, content = run(script, "data", *arguments)
    assert (content["options"]["train_len"], content["options"]["target_len"]) == (64, 512)
    assert set(content["examples_per_second"]) == {"dataset", "loader_1_worker"}
    for name, speed in content["examples_per_second"].items():
        check_spread(speed, 2)
        assert f"{speed['median']:,.0f}" in table, name
    assert json.loads(file.read_text()) == content


def test_tokenise(script):
    _, content = run(script, "tokenise", "assets/corpora/books.heldout.jsonl.gz")
    assert content["documents"] > 0 and content["tokens"] > 1e5
    for name in ("seconds", "megabytes_per_second", "peak_mib"):
        check_spread(content[name], 1)


@pytest.mark.nightly
def test_fits(script):
    """Frozen weights in bf16 take less than in fp32, in a process of their own each."""
    arguments = ("--quick", "--steps", "1", "--length", "32", "--ways", "lora_fp32", "lora")
    _, content = run(script, "fits", *arguments)
    assert list(content["ways"]) == ["lora_fp32", "lora"]
    wide, narrow = (way["training_bytes"] / content["weights_bytes"] for way in content["ways"].values())
    assert 0.9 < narrow < wide - 0.5  # 1 less for the weights; a head that widens makes its logits again
    assert content["ways"]["lora"]["training"] == narrow and content["ways"]["lora"]["seconds_per_step"] > 0


@pytest.mark.parametrize("precision", [pytest.param("bf16-mixed", marks=pytest.mark.nightly), "32-true"])
def test_loop(script, precision):
    """Both loops end with the same weights, in each repeat: they did the same work."""
    arguments = ("--repeats", "2", "--steps", "3", "--batch", "2", "--length", "32", "--precision", precision)
    _, content = run(script, "loop", *arguments)
    assert content["same_weights"] is True
    seconds = content["seconds_per_step"]
    for values in (content["ratio"], *seconds.values()):
        check_spread(values, 2)


@pytest.mark.nightly
def test_evaluation(script):
    """All ways give the same losses or verdicts, or the benchmark fails."""
    table, content = run(script, "evaluation", "--quick", "--repeats", "1", "--trials", "2", "--tokens", "1100")
    assert {part: list(found["ratios"]) for part, found in content["parts"].items()} == {
        "sweep": ["a pass per length", "plain"],
        "sliding": ["plain"],
        "passkey": ["decoded in batches", "decoded one at a time"],
    }
    for found in content["parts"].values():
        for values in (*found["seconds"].values(), *found["ratios"].values()):
            check_spread(values, 1)
    assert table.count("the losses are equal to 1e-5") == 2 and "of 2 keys found) are equal" in table


def test_evaluation_of_a_long_window(script):
    table, content = run(script, "evaluation", "long", "--lengths", "512", "4500")
    assert table.startswith("long: 4,500 tokens") and content["peak_gib"] >= content["before_gib"] > 0
    assert 3000 < content["ppl@4500"] < 6000, "of random weights: about the vocabulary"


@pytest.mark.nightly
def test_step_of_the_head(script):
    """The loss of this package is that of all logits, in less memory."""
    small = "from benchmarks import step; step.VOCAB = 8192"
    _, content = run(script, "step", "head", "--tokens", "1024", "--repeats", "1", before=small)
    (ways,) = content["parts"].values()
    assert list(ways)[:3] == ["materialised", "pose", "checkpointed chunks"]
    assert ways["materialised"]["memory_ratio"] == ways["materialised"]["times_as_long"]["median"] == 1
    assert 0 < ways["pose"]["memory_ratio"] < 1 and 0.2 < ways["pose"]["times_as_long"]["median"] < 5


@pytest.mark.nightly
def test_step_of_a_model(script):
    """Each lever alone and all together, against transformers' loss and against the loss alone."""
    small = f"{NO_INDUCTOR}; from benchmarks import step; step.VOCAB, step.LAYERS = 512, 2"
    arguments = ("model", "--tokens", "8", "--repeats", "1", "--precision", "bf16-mixed")
    table, content = run(script, "step", *arguments, before=small)
    ways = content["parts"]["model bf16-mixed"]
    assert list(ways) == [
        "transformers' loss", "loss", "loss, eager attention", "loss, recomputed", "loss, selective", "loss, compiled",
        "loss, bf16 residuals", "all",
    ]  # fmt: skip
    loss = ways["loss"]
    for name, way in ways.items():
        assert name in table and way["memory_mib"] > 0
        check_spread(way["seconds"], 1)
        for key in ("times_as_long", "times_as_long_of_loss"):
            check_spread(way[key], 1)
        of_loss = way["times_as_long_of_loss"]["median"]
        assert of_loss == pytest.approx(way["times_as_long"]["median"] / loss["times_as_long"]["median"])
        assert way["memory_ratio_of_loss"] == pytest.approx(way["memory_ratio"] / loss["memory_ratio"])


@pytest.mark.nightly
def test_objectives(script):
    """Two views of the same tokens take longer than one, and a frozen original is a part of the states."""
    arguments = ("--parts", "tiny", "--examples", "4", "--steps", "1", "--repeats", "1", "--compiled")
    table, content = run(script, "objectives", *arguments, "--accumulate", "2", before=NO_INDUCTOR)
    assert "1 steps of 2 x 4 x 256 tokens, 32-true, compiled" in table
    (ways,) = content["parts"].values()
    assert list(ways) == ["lm", "self_distill", "long_short"]
    lm = ways["lm"]
    for name, way in ways.items():
        assert name in table and way["memory_ratio"] == way["memory_mib"] / lm["memory_mib"] > 0
        check_spread(way["seconds"], 1)
        both, of_lm = way["memory_mib"] + way["states_mib"], lm["memory_mib"] + lm["states_mib"]
        assert way["memory_ratio_with_states"] == pytest.approx(both / of_lm)
        both, of_lm = way["process_mib"] + way["states_mib"], lm["process_mib"] + lm["states_mib"]
        assert way["process_ratio_with_states"] == pytest.approx(both / of_lm)
        assert way["process_mib"] > way["memory_mib"] / 2
    assert lm["times_as_long"]["median"] == 1 < ways["self_distill"]["times_as_long"]["median"] < 4
    assert ways["self_distill"]["states_mib"] == lm["states_mib"]
    # Weights and two moments; beside them the original's weights
    assert ways["long_short"]["states_mib"] == pytest.approx(lm["states_mib"] * 4 / 3, rel=1e-4)


@pytest.mark.nightly
def test_efficiency(script, tmp_path):
    """Full-length training of 4 times the length takes longer and more memory; both take the same steps."""
    arguments = ("--shape", "rehearsal", "--train-len", "64", "--targets", "128", "256", "--repeats", "2")
    arguments += ("--steps", "2", "--batch", "4", "--micro-batch", "2", "--plot", tmp_path / "efficiency.png")
    table, content = run(script, "efficiency", *arguments)
    assert [one["target_len"] for one in content["targets"]] == [128, 256] and "time by FLOPs" in table
    for one in content["targets"]:
        check_spread(one["times_as_long"], 2)
        assert one["flop_ratio"] > one["target_len"] / 64, "attention grows with the square"
        assert one["measured_by_flops"] == one["times_as_long"]["median"] / one["flop_ratio"]
        assert one["memory_ratio"] == one["memory_mib"]["full"] / one["memory_mib"]["pose"]
        sequences = [way["micro_batch"] * way["accumulate"] for way in one["settings"].values()]
        assert sequences == [4, 4]
    assert content["targets"][1]["times_as_long"]["median"] > 1 < content["targets"][1]["memory_ratio"]
    assert (tmp_path / "efficiency.png").read_bytes().startswith(b"\x89PNG")


def test_weights_are_held_as_in_a_run():
    """Matrices that do not train in bf16, under 8-bit AdamW all of them; gradients and all else in fp32."""
    import torch

    from benchmarks.training import Setting, Trainee

    for options in ({"rank": 4}, {"optimizer": "adamw8bit"}):
        trainee = Trainee(Setting("rehearsal", 32, 128, 2, 2, **options), torch.device("cpu"), in_bf16=True)
        assert 5 < trainee.step().item() < 8, "about the logarithm of the vocabulary"
        trainee.backward(1)
        for name, parameter in trainee.model.named_parameters():
            is_wide = "norm" in name or "lora_" in name
            assert parameter.dtype == (torch.float32 if is_wide else torch.bfloat16), name
            assert parameter.requires_grad == ("rank" not in options or "lora_" in name), name
            assert parameter.grad is None or parameter.grad.dtype == torch.float32, name


# ----- the GPU programme -----

REHEARSED = (
    "tests", "speed-135m-compiled", "speed-7b-lora", "speed-7b-adamw8bit", "efficiency-135m", "strategy-ddp",
    "strategy-zero3", "smollm2-train", "smollm2-after", "smollm2-before", "smollm2-scale", "smollm2-scaled",
    "smollm2-ruler", "smollm2-100-full",
)  # fmt: skip


@pytest.fixture(scope="module")
def rehearsal(scripts, tmp_path_factory):
    """One stage of each kind, as on a GPU but for the sizes, and in forks: interpreters take minutes to start."""
    out, printed = tmp_path_factory.mktemp("gpu"), io.StringIO()

    def run_within(limit, grace, command, output):
        code = scripts.start(*command[1:], stdout=output, stderr=output, new_session=True).wait(limit)
        return "done" if code == 0 else f"failed with status {code}"

    arguments = ["--rehearse", "--minutes", "30", "--out", str(out), "--only", *REHEARSED]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(gpu, "_run_within", run_within)
        patch.setattr("sys.argv", ["gpu", *arguments])
        gpu.main()
    return out, read("gpu", printed.getvalue())


@pytest.mark.nightly
def test_the_gpu_programme_is_rehearsed(rehearsal):
    out, (table, content) = rehearsal
    stages = content["stages"]
    assert {name: found["status"] for name, found in stages.items()} == dict.fromkeys(REHEARSED, "done") | {
        "strategy-zero3": "needs a GPU"
    }, [found.get("log") for found in stages.values()]  # fmt: skip
    assert json.loads((out / "summary.json").read_text())["stages"] == stages
    for name in REHEARSED:
        if name not in ("strategy-zero3", "smollm2-scale"):
            assert json.loads((out / f"{name}.json").read_text()) == stages[name]["result"]
            assert (out / f"{name}.log").exists()
    assert stages["tests"]["result"]["skipped"] > 40 and stages["tests"]["result"]["failed"] == 0
    assert stages["strategy-ddp"]["result"]["train/loss"] > 0
    speed = stages["speed-7b-lora"]["result"]
    check_spread(speed["tokens_per_second"], 2)
    assert speed["setting"]["rank"] == 16 and speed["mfu"] is None and speed["seconds_to_build"] > 0
    compiled = stages["speed-135m-compiled"]["result"]
    first, later = compiled["warmup_seconds"][0], 128 / compiled["tokens_per_second"]["median"]
    assert first > 10 * later, "it compiles, which is no part of the speed"
    assert (
        "tokens/s" in table
        and "measured by FLOPs" in table
        and f"{stages['tests']['result']['skipped']} skipped" in table
    )
    assert sorted(folder.name for folder in out.glob("run-*")) == sorted(
        f"run-{name}" for name in REHEARSED if name.startswith("smollm2-")
    )


@pytest.mark.nightly
def test_a_real_model_is_measured_before_and_after(rehearsal):
    """The stages of SmolLM2, by the shipped model: trained, rescaled alone, untouched."""
    out, (table, content) = rehearsal
    stages = content["stages"]
    trained = stages["smollm2-train"]["result"]
    assert trained["train/steps"] == 2 and trained["cost/tokens"] == 2 * 2 * 64 and trained["cost/seconds"] > 0
    for stage, model in (("after", "extended"), ("before", "untuned"), ("scaled", "scaled")):
        (found,) = (stages[f"smollm2-{stage}"]["result"],)
        assert list(found) == [model]
        for name in ("tail_ppl@512", "tail_ppl@1024", "passkey@1024", "needle_gain@1024", "needle_gain@256"):
            assert name in found[model]
    untuned, scaled, extended = (
        stages[f"smollm2-{stage}"]["result"][model]["tail_ppl@1024"]
        for stage, model in (("before", "untuned"), ("scaled", "scaled"), ("after", "extended"))
    )
    assert scaled < untuned / 1.1, "the window of the shipped model is 256 tokens"
    assert 1e-6 < abs(extended / scaled - 1) < 0.1, "two steps of training"
    assert json.loads((out / "run-smollm2-scale" / "config.json").read_text())["rope_parameters"]["factor"] == 8
    ruler = stages["smollm2-ruler"]["result"]
    assert list(ruler) == ["untuned", "scaled", "extended"]
    assert set(ruler["scaled"]) == {f"ruler/niah_{t}@{n}" for t in ("single_2", "multikey_1") for n in (512, 1024)}
    full = stages["smollm2-100-full"]["result"]
    assert full["cost/tokens"] == 2 * 2 * 1024 and full["tail_ppl@1024"] == full["extended"]["tail_ppl@1024"]
    ppl = stages["smollm2-before"]["result"]["untuned"]["ppl@1024"]
    assert f"| smollm2-before | SmolLM2, untuned | untuned: ppl@1024 {ppl:.4g}" in table


def test_arms_of_a_real_model_are_told_apart():
    """By what is not usual of the experiment."""
    usual = {
        "pose._target_": "pose.positions.PoSE", "pose.curriculum": "null", "rope._target_": "pose.rope.Yarn",
        "rope.rcd_shift": "false", "objective._target_": "pose.training.objectives.LanguageModel",
    }  # fmt: skip

    def name(**more):
        source = SimpleNamespace(
            cost={"training": {"tokens": 13.1e6}}, config=usual | more, facts={}, window=8192, target=32768
        )
        return smollm2._trained("run", source, {"tokens": 1e6})["model"]

    assert name() == "PoSE, 13.1 M tokens"
    objective = {"objective._target_": "pose.training.objectives.LongShort"}
    assert name(**objective) == "PoSE, LongShort, 13.1 M tokens"
    both = {"rope.rcd_shift": "true", "pose.curriculum": "[[0.5, 512]]"}
    assert name(**both) == "PoSE, rcd_shift, curriculum, 13.1 M tokens"
    worked_out = {"rope.factor": "4.0", "rope.beta_slow": "1.0", "rope.attention_factor": "1.1386294361119891"}
    assert name(**worked_out) == "PoSE, 13.1 M tokens"
    given = {"rope.factor": "8", "rope.beta_slow": "3", "rope.attention_factor": "null"}
    assert name(**given) == "PoSE, factor 8, beta_slow 3, 13.1 M tokens"
    assert name(**given | {"rope.attention_factor": "1.05"}).startswith(
        "PoSE, factor 8, beta_slow 3, attention_factor 1.05,"
    )


def test_untrained_models_are_told_apart_by_their_scaling(tmp_path):
    """A model that was evaluated on another machine is the one of its name beside the evaluation."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "attention_factor": None}
    model, evaluation = tmp_path / "model", tmp_path / "evaluation"
    for folder in (model, evaluation):
        folder.mkdir()
    for more, said in (({}, []), ({"factor": 8, "attention_factor": 1.05}, ["factor 8", "attention_factor 1.05"])):
        write_json(model / "config.json", {"max_position_embeddings": 1024, "rope_parameters": rope | more})
        for place in (model, Path("/elsewhere/model")):
            assert smollm2._scaling_of(place, evaluation) == said
    with pytest.raises(SystemExit, match=r"the config\.json of /elsewhere/gone is needed"):
        smollm2._scaling_of(Path("/elsewhere/gone"), evaluation)


@pytest.mark.nightly
def test_the_tables_of_a_real_model(rehearsal, tmp_path):
    """From the folders that the stages leave: each figure beside what it took; what is missing is said to be."""
    out, (_, content) = rehearsal
    folders = sorted(str(folder) for folder in out.glob("run-smollm2-*") if folder.name != "run-smollm2-scale")
    file, doc = tmp_path / "found.json", tmp_path / "doc.md"
    doc.write_text(f"above\n{smollm2.BEGIN}\n{smollm2.END}\nbelow\n")
    arguments = ["--found", str(file), "--doc", str(doc)]
    smollm2.main(arguments)
    assert doc.read_text().count("Not run yet.") == 2, "no number without a run"
    smollm2.main([*folders, "--hardware", "a rehearsal", *arguments])
    rows = {row["model"]: row for row in json.loads(file.read_text())["rows"]}
    own = "factor 8, beta_slow 3, attention_factor 1.05"
    assert set(rows) == {
        "untuned", f"scaled, {own}", f"PoSE, {own}, 0.000256 M tokens", f"Full, {own}, 0.0041 M tokens"
    }  # fmt: skip
    stages = content["stages"]
    pose = rows[f"PoSE, {own}, 0.000256 M tokens"]
    assert set(pose["measuring"]) == {"run-smollm2-after", "run-smollm2-ruler"}
    assert (pose["tokens"], pose["steps"], pose["target"], pose["hardware"]) == (256, 2, 1024, "a rehearsal")
    assert pose["seconds"] == pytest.approx(stages["smollm2-train"]["result"]["cost/seconds"])
    assert "smollm2_32k" in pose["commands"]["run-smollm2-train"] and rows["untuned"]["target"] is None
    after, ruler = (stages[f"smollm2-{name}"]["result"]["extended"] for name in ("after", "ruler"))
    for name, value in (after | ruler).items():
        assert pose["metrics"][name][0] == pytest.approx(value, nan_ok=True), name
    text = doc.read_text()
    assert text.startswith("above\n") and text.endswith(f"{smollm2.END}\nbelow\n")
    assert f"| scaled, {own}, to 1,024 | {stages['smollm2-scaled']['result']['scaled']['tail_ppl@512']:.2f}" in text
    assert text.count("| ShortPI | not run yet") == text.count("**Needle gain, nats per token**") * 9
    assert f"- **PoSE, {own}, 0.000256 M tokens, to 1,024**: perplexity of the last tokens at 1,024 is" in text
    assert str(out) not in text + file.read_text(), "no folder of one machine"
    assert "passkeys at 1,024 " in text.split(f"**PoSE, {own}, 0.000256 M tokens, to 1,024**")[1].splitlines()[0]
    assert (tmp_path / smollm2.PICTURE).stat().st_size > 10_000, "perplexity by position"
    smollm2.main([*folders, "--hardware", "a rehearsal", *arguments])
    assert doc.read_text() == text, "the same folders again change nothing"
    smollm2.main(arguments)
    assert doc.read_text() == text
    with pytest.raises(SystemExit, match="is no run, sweep or evaluation"):
        smollm2.main([str(tmp_path), *arguments])


def test_numbers_that_cannot_be_read_are_not_replaced(tmp_path):
    """A conflict of a merge in the file, say."""
    (tmp_path / "found.json").write_text('<<<<<<< {"rows": []}')
    doc = tmp_path / "doc.md"
    doc.write_text(f"{smollm2.BEGIN}\nkept\n{smollm2.END}\n")
    with pytest.raises(PoseError, match=r"found\.json"):
        smollm2.main(["--found", str(tmp_path / "found.json"), "--doc", str(doc)])
    assert "kept" in doc.read_text() and (tmp_path / "found.json").read_text().startswith("<<<")


def row(model, setup, target=1024, **metrics):
    found = {name.replace("_at_", "@"): [value, None, None, 3] for name, value in metrics.items()}
    return {"hardware": "a CPU", "on_gpu": False, "model": model, "setup": setup, "target": target, "versions": "1",
            "commit": "c", "commands": {}, "measuring": {}, "metrics": found}  # fmt: skip


def test_the_untuned_model_decides_on_the_same_tokens_alone():
    trained = row("PoSE", "lr=1", tail_ppl_at_1024=10.0) | {"measured_on": "windows=4"}
    on = [{"measured_on": f"windows={n}"} for n in (1, 4)]
    untuned = [row("untuned", each["measured_on"], None, tail_ppl_at_1024=1.0) | each for each in on]
    assert smollm2._untuned(untuned, trained) is untuned[1]
    assert smollm2._untuned(untuned[:1], trained) is None
    on_a_gpu = [one | {"hardware": "a GPU"} for one in untuned]
    assert smollm2._untuned([*on_a_gpu, *untuned], trained) is untuned[1], "the same machine where there are two"
    assert smollm2._untuned(on_a_gpu, trained) is on_a_gpu[1]
    assert smollm2._untuned([row("untuned", "", None, tail_ppl_at_1024=1.0)], trained) is None, "of which tokens?"


def test_the_verdicts_of_the_results_are_those_of_the_machines_tables():
    """RESULTS.md has them of all rows, SMOLLM2.md by machine: a model is compared with the same untuned one in both."""
    rows = load_json(smollm2.FOUND, required={"rows": list})["rows"]
    by_machine: list[str] = []
    for hardware in {one["hardware"] for one in rows}:
        by_machine += smollm2.verdicts([one for one in rows if one["hardware"] == hardware])
    by_machine = [line for part in by_machine for line in part.splitlines()]
    found = [line for part in smollm2.verdicts(rows) for line in part.splitlines()]
    assert found and sorted(found) == sorted(by_machine)


def test_runs_that_differ_are_rows_of_their_own(monkeypatch):
    """And the untuned model of a longer target, whose perplexity is of other tokens, decides over its runs alone."""
    rows = smollm2.merge(
        [],
        [
            row("untuned", "up to 1,024", None, tail_ppl_at_256=10.0, tail_ppl_at_1024=300.0),
            row("untuned", "up to 2,048", None, tail_ppl_at_256=8.0, tail_ppl_at_2048=400.0),
            row("untuned", "", None, passkey_at_256=1.0),  # was measured without perplexity: goes with the first
            row("PoSE, 1 M tokens", "lr=1", tail_ppl_at_256=10.0, tail_ppl_at_1024=10.4),
            row("PoSE, 1 M tokens", "lr=2", tail_ppl_at_256=11.0, tail_ppl_at_1024=11.0),
            row("PoSE, 1 M tokens", "lr=1", passkey_at_1024=1.0),
        ],
    )
    assert [(one["model"], one["setup"]) for one in rows] == [
        ("untuned", "up to 1,024"), ("untuned", "up to 2,048"), ("PoSE, 1 M tokens", "lr=1"),
        ("PoSE, 1 M tokens", "lr=2"),
    ]  # fmt: skip
    assert set(rows[0]["metrics"]) == {"tail_ppl@256", "tail_ppl@1024", "passkey@256"}
    later = [row("PoSE, 1 M tokens", "lr=1", needle_gain_at_1024=1.0) | {"commit": commit} for commit in ("b", "b")]
    assert smollm2.merge([rows[2] | {"commit": "a"}], later)[0]["commit"] == "a, b", "of training and evaluation"
    text = smollm2.tables(rows)
    drawn = {}
    monkeypatch.setattr("pose.reporting.plots.plot_results", lambda results, *how: drawn.update(results))
    for one in rows:
        one["metrics"]["position_ppl@0-128"] = [5.0, None, None, 3]
    smollm2.draw(rows, Path("unused.png"))
    assert len(drawn) == len(rows) and "PoSE, 1 M tokens, to 1,024 (lr=2)" in drawn, "none takes another's place"
    assert "| untuned (up to 1,024) |" in text and "| PoSE, 1 M tokens, to 1,024 (lr=2) |" in text
    assert "(lr=1)**: perplexity of the last tokens at 1,024 is 4.0% above the untuned model's at 256" in text


def test_a_training_that_did_not_end_has_cost_what_it_logged(tmp_path):
    assert smollm2._logged(tmp_path) == {}
    for none in (math.nan, None):  # as it is made, and as JSON gives it back
        assert smollm2._cell({"metrics": {"kept": [none, None, None, 5]}}, "kept", ".2f") == "–"
    (tmp_path / "metrics.csv").write_text(
        "cost/seconds,cost/tokens,step,val/ppl@8\n,,-1,9\n3.5,1024,9,\n7.5,2048,19,\n,,19,8\n"
    )
    assert smollm2._logged(tmp_path) == {"tokens": 2048.0, "seconds": 7.5, "steps": 20}


def test_an_evaluation_belongs_to_the_training_of_its_folder(tmp_path):
    """Of two of the same name; by the name alone where the evaluation was made elsewhere."""
    one, other = (tmp_path / name / "run" for name in "ab")
    for folder in (one, other):
        folder.mkdir(parents=True)
    assert smollm2._training_of(other / "model", [one, other]) == other
    assert smollm2._training_of(one / "model.rejected", [one, other]) == one
    assert smollm2._training_of(Path("/elsewhere/run/model"), [one]) == one
    assert smollm2._training_of(Path("/elsewhere/run"), [one, other]) is None
    assert [smollm2._label(each, [one, other]) for each in (one, other)] == ["a/run", "b/run"]


def test_the_documents_tables_are_those_of_its_file():
    """docs/SMOLLM2.md was written by the command, from docs/smollm2.json."""
    rows = json.loads(smollm2.FOUND.read_text())["rows"] if smollm2.FOUND.exists() else []
    text = smollm2.DOC.read_text()
    assert text.split(smollm2.BEGIN)[1].split(smollm2.END)[0].strip("\n") == smollm2.tables(rows)


@pytest.mark.nightly
def test_what_is_done_is_not_done_again(script, rehearsal):
    out, _ = rehearsal
    before = json.loads((out / "summary.json").read_text())
    _, content = run(script, "gpu", "--rehearse", "--out", out, "--only", "speed-7b-lora", "smollm2-train")
    assert content["stages"] == before["stages"]


def test_stages_of_a_real_model_are_the_papers_run():
    """What is asked for on a GPU: all 131 M tokens, a folder that a training goes on in, the user's own documents."""
    stages = {stage.name: stage for stage in gpu.STAGES}
    train = stages["smollm2-train"].arguments(Path("OUT"), False, "MODEL", "TEXTS")
    assert train == [
        "train.py", "experiment=smollm2_32k", "model.path=MODEL", "data.documents=TEXTS", "eval=none", "resume=auto",
        "hydra.run.dir=OUT/run-smollm2-train",
    ]  # fmt: skip
    assert "data.documents=" not in " ".join(stages["smollm2-train"].arguments(Path("OUT"), False, "MODEL"))
    fewer = stages["smollm2-train"].arguments(Path("OUT"), False, "MODEL", None, 400)
    assert "trainer.max_steps=400" in fewer and "trainer.max_steps" not in " ".join(train)
    after = stages["smollm2-after"].arguments(Path("OUT"), False, "MODEL")
    assert after[1] == "ckpt={extended:OUT/run-smollm2-train}" and "eval.lengths=[8192,16384,32768]" in after
    assert stages["smollm2-before"].arguments(Path("OUT"), False, "MODEL")[1] == "ckpt={untuned:MODEL}"
    assert {stage.limit for stage in gpu.SMOLLM2} == {540, 240, 300, None} and gpu.LIMIT < 540 < 600


@pytest.mark.nightly
def test_a_rehearsal_is_not_written(script, rehearsal):
    refused = script("-m", "benchmarks.gpu", "--write", "--out", rehearsal[0])
    assert refused.returncode == 1 and "a rehearsal" in refused.stderr


@pytest.mark.nightly
def test_results_go_into_the_document(rehearsal, tmp_path):
    """Those of a card stand between the marks, and nothing else changes."""
    out, _ = rehearsal
    summary = json.loads((out / "summary.json").read_text()) | {"rehearsal": False, "card": "NVIDIA H100"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    doc = tmp_path / "doc.md"
    doc.write_text(f"above\n{gpu.BEGIN}\nxyz\n{gpu.END}\nbelow\n")
    gpu.write(tmp_path, doc)
    text = doc.read_text()
    assert text.startswith(f"above\n{gpu.BEGIN}\nNVIDIA H100, 2") and text.endswith(f"{gpu.END}\nbelow\n")
    assert "xyz" not in text and summary["versions"]["torch"] in text and "| speed-7b-lora | 7B LoRA, eager | " in text
    gpu.write(tmp_path, doc)
    assert doc.read_text() == text
    doc.write_text("no marks")
    with pytest.raises(SystemExit, match="has no place for it"):
        gpu.write(tmp_path, doc)


def fake(name, code, **options):
    return gpu.Stage(name, ("-c", code), (), name, **options)


def go_through(monkeypatch, out, *stages, limit=10, card="cpu", minutes=5):
    facts = {"card": card, "versions": {"torch": "2"}, "hardware": {}}
    monkeypatch.setattr(gpu, "seen", lambda: dict(facts))
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "LIMIT", limit)
    monkeypatch.setattr(gpu, "GRACE", 1)
    args = Namespace(out=out, rehearse=True, only=[], skip=[], minutes=minutes, model=None, documents=None, steps=None)
    return gpu.go_through(args)["stages"]


def test_a_stage_that_fails_takes_no_other_with_it(monkeypatch, tmp_path):
    stages = (
        fake("breaks", "print('began', flush=True); raise ValueError('so it is')"),
        fake("lacks", "pass", needs=("json", "no_such_package")),
        fake("fine", "print('well')"),
    )
    found = go_through(monkeypatch, tmp_path, *stages)
    assert found["breaks"]["status"] == "failed with status 1"
    assert "began" in found["breaks"]["log"] and "ValueError: so it is" in found["breaks"]["log"]
    assert found["lacks"]["status"] == "not installed: no_such_package"
    assert found["fine"]["status"] == "done" and (tmp_path / "fine.log").read_text() == "well\n"


def test_a_stage_waits_for_what_it_follows_and_for_its_model(monkeypatch, tmp_path):
    """What it follows leaves a folder to it; a training that was ended finds its own."""
    keep = "import pathlib; folder = pathlib.Path(r'{out}/run-{name}'); folder.mkdir(exist_ok=True)"
    goes_on = keep + "; tries = folder / 'tries'; tries.open('a').write('x'); assert len(tries.read_text()) > 1"
    stages = (
        gpu.Stage("first", ("-c", goes_on, "resume=auto"), (), "first", keeps=True),
        gpu.Stage("second", ("-c", keep + "; print(open(r'{out}/run-first/tries').read())"), (), "second", keeps=True,
                  follows=("first",)),
    )  # fmt: skip
    found = go_through(monkeypatch, tmp_path, *stages)
    assert found["first"]["status"] == "failed with status 1" and "second" not in found
    found = go_through(monkeypatch, tmp_path, *stages)
    assert found["first"]["status"] == found["second"]["status"] == "done"
    assert (tmp_path / "second.log").read_text() == "xx\n" and (tmp_path / "run-second").is_dir()
    monkeypatch.setattr(gpu, "find_model", lambda given, rehearse: None)
    found = go_through(monkeypatch, tmp_path / "other", gpu.Stage("real", ("-c", "print(r'{model}')"), (), "real"))
    assert found["real"]["status"] == "no model: give --model"


def test_a_stage_that_takes_too_long_is_ended_with_all_it_started(monkeypatch, tmp_path):
    """What it had found is kept; a process of its own that ignores SIGTERM is ended too."""
    code = f"""
import json, signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
open({str(tmp_path / "pid")!r}, "w").write(str(process.pid))
json.dump({{"warmup_seconds": [1.0]}}, open({str(tmp_path / "slow.json")!r}, "w"))
print("at work", flush=True)
time.sleep(60)
"""
    found = go_through(monkeypatch, tmp_path, fake("slow", code), limit=3)["slow"]
    assert found["status"] == "ended after 3 s" and "at work" in found["log"]
    assert found["result"] == {"warmup_seconds": [1.0]} and found["seconds"] < 15
    assert is_gone(int((tmp_path / "pid").read_text()))
    assert gpu._in_words(found).startswith("1 steps of the warm-up; ended after 3 s")


def is_gone(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_programme_that_is_ended_ends_its_stage(tmp_path):
    code = f"""
import sys
from benchmarks import gpu
stage = "import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(60)"
gpu.STAGES = (gpu.Stage("slow", ("-c", stage), (), "slow"),)
gpu.seen = lambda: {{"card": "cpu", "versions": {{}}, "hardware": {{}}}}
sys.argv = ["gpu", "--rehearse", "--out", {str(tmp_path)!r}]
gpu.main()
"""
    programme = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(FOLDER.parent)})
    try:
        for _ in range(300):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.1)
        pid = int((tmp_path / "pid").read_text())
        programme.send_signal(signal.SIGTERM)
        assert programme.wait(20) == 128 + signal.SIGTERM
    finally:
        programme.kill()
    assert is_gone(pid)


def test_results_of_two_cards_are_not_mixed(monkeypatch, tmp_path):
    go_through(monkeypatch, tmp_path, fake("fine", "pass"), card="one card")
    with pytest.raises(SystemExit, match="holds results of card one card, and now it is another: give another --out"):
        go_through(monkeypatch, tmp_path, fake("fine", "pass"), card="another")


def test_the_time_left_ends_the_programme(monkeypatch, tmp_path, capsys):
    stages = (fake("first", "import time; time.sleep(3)"), fake("second", "pass"))
    assert list(go_through(monkeypatch, tmp_path, *stages, minutes=0.1)) == ["first"]
    assert "second: no time left" in capsys.readouterr().out


# ----- a file in parts -----


def test_a_file_travels_in_parts(tmp_path, capsys):
    """Byte for byte, in any order; what is missing, or another, is said."""
    file, folder, back = tmp_path / "model.gguf", tmp_path / "parts", tmp_path / "there" / "back.gguf"
    file.write_bytes(bytes(range(256)) * 1000 + b"end")
    parts.main(["split", str(file), str(folder), "--mib", "0.1"])
    found = sorted(folder.iterdir())
    assert len(found) == 3 and max(part.stat().st_size for part in found) == 104_857
    parts.main(["join", str(folder), str(back)])
    assert back.read_bytes() == file.read_bytes() and "256,003 bytes" in capsys.readouterr().out
    away = found[1].rename(tmp_path / found[1].name)
    with pytest.raises(SystemExit, match=rf"lacks {found[1].name}"):
        parts.main(["join", str(folder), str(back)])
    found[1].write_bytes(b"x" + away.read_bytes()[1:])
    with pytest.raises(SystemExit, match=r"are not those of model\.gguf: copy them again"):
        parts.main(["join", str(folder), str(tmp_path / "broken")])
    assert not (tmp_path / "broken").exists()
    parts.main(["split", str(away), str(folder)])
    with pytest.raises(SystemExit, match="the parts of one file"):
        parts.main(["join", str(folder), str(back)])
    with pytest.raises(SystemExit, match="is no file"):
        parts.main(["split", str(tmp_path / "none"), str(folder)])


def test_a_model_that_is_rescaled_alone(tmp_path):
    """The frequencies are those that train.py measures under `scaled`; the weights are untouched."""
    scaled.main(["assets/tiny", str(tmp_path / "scaled"), "--target-len", "2048"])
    config = load_config(str(tmp_path / "scaled"))
    wanted = load_config("assets/tiny")
    scale_config(wanted, Yarn(), 2048)
    assert config.rope_parameters == wanted.rope_parameters and config.max_position_embeddings == 2048
    assert rope_geometry(config).window == 256
    assert sha256(tmp_path / "scaled" / "model.safetensors") == sha256("assets/tiny/model.safetensors")
    with pytest.raises(SystemExit):
        scaled.main(["assets/tiny", str(tmp_path / "scaled"), "--target-len", "2048"])
    with pytest.raises(SystemExit, match="below the model's own window"):
        scaled.main(["assets/tiny", str(tmp_path / "other"), "--target-len", "128"])
    assert not (tmp_path / "other").exists()


def test_a_model_of_another_form_that_is_rescaled_alone(tmp_path):
    """GPT-J's weights have names of their own, and its folder becomes one of Phi, as when it is trained."""
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=4096, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
    for file in Path("assets/tiny").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "gptj")
    scaled.main([str(tmp_path / "gptj"), str(tmp_path / "scaled"), "--target-len", "1024"])
    made = load_config(str(tmp_path / "scaled"))
    assert made.model_type == "phi" and made.max_position_embeddings == 1024
    wanted = load_config(str(tmp_path / "gptj"))
    scale_config(wanted, Yarn(), 1024)
    tokens = torch.arange(300)[None] % 4096
    with torch.no_grad():
        got, same = (
            build_model(one, str(tmp_path / name), "sdpa")(tokens).logits
            for one, name in ((made, "scaled"), (wanted, "gptj"))
        )
    assert torch.allclose(got, same, atol=1e-4)


def test_a_folder_without_weights_is_not_rescaled(tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy("assets/tiny/config.json", tmp_path / "bare")
    with pytest.raises(SystemExit, match="bare"):
        scaled.main([str(tmp_path / "bare"), str(tmp_path / "scaled"), "--target-len", "1024"])
    assert not (tmp_path / "scaled").exists()


def test_a_scaled_model_has_the_method_of_an_experiment(tmp_path):
    scaled.main(["assets/tiny", str(tmp_path / "scaled"), "--target-len", "1024", "experiment=smollm2_32k"])
    assert smollm2._scaling_of(tmp_path / "scaled", tmp_path) == ["factor 8", "beta_slow 3", "attention_factor 1.05"]
    scaled.main(["assets/tiny", str(tmp_path / "other"), "--target-len", "1024", "rope=linear"])
    assert smollm2._scaling_of(tmp_path / "other", tmp_path) == ["linear"], "which is not YaRN's default"


def test_a_model_that_is_rescaled_by_another_method(tmp_path, capsys):
    others = ["rope=yarn", "rope.factor=16", "rope.rcd_shift=true"]
    scaled.main(["assets/tiny", str(tmp_path / "scaled"), "--target-len", "2048", *others])
    wanted = load_config("assets/tiny")
    scale_config(wanted, Yarn(factor=16.0, rcd_shift=True), 2048)
    assert load_config(str(tmp_path / "scaled")).rope_parameters == wanted.rope_parameters
    for given, words in (
        ("pose.target_len=64", "the group rope alone"), ("rope=yarm", "yarm"), ("rope.factro=2", "factro"),
        ("rope.factor=-1", "rope.factor=-1"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            scaled.main(["assets/tiny", str(tmp_path / "other"), "--target-len", "2048", given])
        assert words in str(ended.value) + capsys.readouterr().err
    assert not (tmp_path / "other").exists()
