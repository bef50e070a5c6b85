"""The benchmarks run, print one line to read and one of JSON, and measure what they say."""

import json

import pytest

pytestmark = pytest.mark.slow


def run(script, *arguments) -> tuple[str, dict]:
    """The line to read and the JSON line: all there is on stdout."""
    result = script("-m", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    line, content = result.stdout.splitlines()
    content = json.loads(content)
    assert content["machine"]["cpu_count"] >= 1
    assert content["machine"]["packages"]["torch"]
    return line, content


def check_spread(values, repeats):
    assert 0 < values["min"] <= values["median"] <= values["max"]
    assert values["repeats"] == repeats


def test_data(script):
    arguments = ("--repeats", "2", "--examples", "64", "--train-len", "64", "--target-len", "512")
    line, content = run(script, "benchmarks.data", *arguments)
    assert line.startswith("data: ")
    assert content["benchmark"] == "data"
    assert (content["settings"]["train_len"], content["settings"]["target_len"]) == (64, 512)
    assert set(content["examples_per_second"]) == {"dataset", "loader_1_worker"}
    for name, speed in content["examples_per_second"].items():
        check_spread(speed, 2)
        assert f"{speed['median']:,.0f}" in line, name


def test_tokenise(script):
    line, content = run(script, "benchmarks.tokenise", "assets/corpora/books.heldout.jsonl.gz")
    assert line.startswith("tokenise: ") and content["documents"] > 0 and content["peak_mib"] > 0
    assert content["tokens"] > 1e5 and content["seconds"] > 0


def test_fits(script):
    """Frozen weights in bf16 take less than in fp32, in a process of their own each."""
    arguments = ("--quick", "--steps", "1", "--length", "32", "--ways", "lora_fp32", "lora")
    line, content = run(script, "benchmarks.fits", *arguments)
    assert line.startswith("fits: ") and list(content["ways"]) == ["lora_fp32", "lora"]
    wide, narrow = (way["training_bytes"] / content["weights_bytes"] for way in content["ways"].values())
    assert 0.9 < narrow < wide - 0.5  # 1 less for the weights; a head that widens makes its logits again
    assert content["ways"]["lora"]["training"] == narrow and content["ways"]["lora"]["seconds_per_step"] > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_loop(script, precision):
    """Both loops end with the same weights: they did the same work."""
    arguments = ("--repeats", "1", "--steps", "3", "--batch", "8", "--length", "160", "--precision", precision)
    line, content = run(script, "benchmarks.loop", *arguments)
    assert line.startswith("loop: ")
    assert content["benchmark"] == "loop"
    assert content["same_weights"] is True
    seconds = content["seconds_per_step"]
    for values in (content["ratio"], *seconds.values()):
        check_spread(values, 1)
    assert content["ratio"]["median"] == pytest.approx(seconds["lightning"]["median"] / seconds["bare"]["median"])


@pytest.mark.parametrize(
    ("part", "arguments", "others"),
    [
        ("sweep", ("--lengths", "32", "64", "128", "--tokens", "300"), ["a pass per length", "plain"]),
        ("sliding", ("--lengths", "32", "64", "--tokens", "200", "--stride", "24"), ["plain"]),
        ("passkey", ("--lengths", "128", "--trials", "2"), ["decoded in batches", "decoded one at a time"]),
    ],
)
def test_evaluation(script, part, arguments, others):
    """Both ways give the same losses or verdicts, or the benchmark fails."""
    line, content = run(script, "benchmarks.evaluation", part, "--repeats", "1", *arguments)
    assert line.startswith(f"{part}: ") and content["benchmark"] == "evaluation"
    assert list(content["ratios"]) == others
    for values in (*content["seconds"].values(), *content["ratios"].values()):
        check_spread(values, 1)


def test_evaluation_of_a_long_window(script):
    line, content = run(script, "benchmarks.evaluation", "long", "--lengths", "512", "4500")
    assert line.startswith("long: 4,500 tokens") and content["peak_gib"] >= content["before_gib"] > 0
    assert 3000 < content["ppl@4500"] < 6000, "of random weights: about the vocabulary"


def test_step(script):
    """The loss of this package is that of all logits, in less memory; its cost is a share of theirs."""
    arguments = ("benchmarks.step", "head", "--tokens", "1024", "--repeats", "1")
    result = script("-m", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads(result.stdout.splitlines()[-1])
    ways = content["ways"]
    assert list(ways)[:3] == ["materialised", "pose", "checkpointed chunks"]
    assert ways["materialised"]["memory_ratio"] == ways["materialised"]["times_as_long"]["median"] == 1
    assert 0 < ways["pose"]["memory_ratio"] < 1 and 0.2 < ways["pose"]["times_as_long"]["median"] < 5


def test_the_gpu_programme_is_rehearsed(script, tmp_path):
    """Stage by stage, each of which saves what it found; given again, what is done is not done again."""
    stages = ("speed-135m", "efficiency-135m", "real")
    arguments = ("-m", "benchmarks.gpu", "--rehearse", "--out", tmp_path, "--only", *stages)
    result = script(*arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: found["status"] for name, found in summary["stages"].items()} == {
        "speed-135m": "done", "efficiency-135m": "done", "real": "not there yet"
    }  # fmt: skip
    speed = summary["stages"]["speed-135m"]["result"]
    check_spread(speed["tokens_per_second"], 2)
    assert speed["setting"]["train_len"] == 64 and speed["mfu"] is None
    (one,) = summary["stages"]["efficiency-135m"]["result"]["targets"]
    assert one["flop_ratio"] > 2 and one["measured_by_flops"] == pytest.approx(
        one["times_as_long"]["median"] / one["flop_ratio"]
    )
    assert "tokens/s" in result.stdout and "measured by FLOPs" in result.stdout
    before = summary["stages"]["speed-135m"]
    assert script(*arguments).returncode == 0
    assert json.loads((tmp_path / "summary.json").read_text())["stages"]["speed-135m"] == before
    refused = script("-m", "benchmarks.gpu", "--write", "--out", tmp_path)
    assert refused.returncode == 1 and "a rehearsal" in refused.stderr
