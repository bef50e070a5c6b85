"""A model card: its head is YAML that the hub reads, its facts are those given, and no folder of a machine shows."""

import json
import os
import re
from dataclasses import replace

import pytest
import yaml

from pose.evaluation.task import Metric
from pose.positions import Full, PoSE
from pose.reporting.card import Card, license_of, without_folders
from pose.rope import Linear, LongRope, RopeGeometry, Unscaled, Yarn

GEOMETRY = RopeGeometry(10_000.0, 8, 2048)
CARD = Card(
    base="owner/name",
    license="apache-2.0",
    model_type="llama",
    window=2048,
    target_len=16_384,
    sampler=PoSE(2048, 16_384, num_chunks=3),
    scaling=Yarn().resolve(GEOMETRY, 16_384),
    rope_base=10_000.0,
    data=["/data/somewhere/pile.jsonl.gz", "20% passkey examples"],
    training={"Steps": "1,000 of 64 examples: 131,072,000 tokens"},
    results={
        "untuned": {"ppl@2048": 9.04, "passkey@2048": 1.0, "ppl@16384": 12345.6, "position_ppl@0-256": 4.0},
        "extended": {"ppl@2048": 9.26, "ppl@16384": 9.51, "passkey@2048": 0.95, "bits_per_byte@2048": 0.71234},
    },
    measured_on=["persuasion"],
    command="python train.py model.path=owner/name",
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
    commit="abc123",
)


def head_of(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n\n# ", text, re.DOTALL)[1])


def table(text, heading):
    """{first cell: other cells} of the table under a heading."""
    rows = re.search(rf"## {heading}\n\n(.*?)\n\n", text, re.DOTALL)[1].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: row[1:] for row in cells if row[0] != "---"}


@pytest.mark.parametrize("place", ["mine/model", "mine/best", "mine"])
def test_a_base_of_this_machine_is_called_as_its_run(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    assert head_of(replace(CARD, base=str(tmp_path / place)).text())["base_model"] == "mine"


def test_the_head_is_the_hubs():
    assert head_of(CARD.text()) == {
        "base_model": "owner/name",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["pose", "long-context", "rope", "yarn"],
    }
    assert "license" not in head_of(replace(CARD, license=None).text())
    assert "base_model" not in head_of(replace(CARD, base=None).text())


def test_the_hub_library_reads_it():
    from huggingface_hub import ModelCard

    data = ModelCard(CARD.text()).data
    assert (data.base_model, data.library_name, data.license) == ("owner/name", "transformers", "apache-2.0")


def test_a_base_that_was_scaled_already_is_said_to_be():
    assert table(replace(CARD, rope_base=None).text(), "How it was made")["RoPE"][0].endswith("; scaled already")


def test_how_it_was_made():
    made = table(CARD.text(), "How it was made")
    assert made["Base model"] == ["owner/name, window 2,048 tokens"]
    assert made["Window"] == ["16,384 tokens"] and made["Length in training"] == ["2,048 tokens"]
    assert made["Position ids"][0].startswith("`PoSE` (num_chunks=3, content=random): Positional skip-wise")
    assert made["RoPE"][0].startswith("`yarn` (factor=8, ") and made["RoPE"][0].endswith("base 10,000 before scaling")
    assert made["Data"] == ["pile.jsonl.gz, 20% passkey examples"]
    assert made["Steps"] == ["1,000 of 64 examples: 131,072,000 tokens"]
    assert "# owner/name, extended from 2,048 to 16,384 tokens\n" in CARD.text() and " 8 times as many" in CARD.text()


def test_full_length_training_says_its_length():
    made = table(replace(CARD, sampler=Full(2048, 16_384)).text(), "How it was made")
    assert made["Length in training"] == ["16,384 tokens"]


def test_a_model_from_random_weights_was_not_extended():
    text = replace(CARD, base=None, target_len=2048, sampler=PoSE(2048, 2048), scaling=Unscaled()).text()
    assert head_of(text)["tags"] == ["pose", "long-context", "rope"]
    assert "# A llama model from random weights: window 2,048 tokens\n" in text and "extended from" not in text


def test_documents_read_several_times_are_counted():
    made = table(replace(CARD, data=["/a/b.jsonl", "c.jsonl", "/a/b.jsonl"]).text(), "How it was made")
    assert made["Data"] == ["b.jsonl (2 times), c.jsonl"]


def test_long_lists_are_not_written_out():
    factors = tuple(range(1, 65))
    text = replace(CARD, scaling=LongRope(long_factor=factors)).text()
    assert "long_factor=64 values" in text


def test_a_factor_that_transformers_warns_of_is_explained():
    """Of yarn alone, where the factor is not target / window; whoever follows the warning breaks the model."""
    assert "Change nothing" not in CARD.text()
    text = replace(CARD, scaling=Yarn(factor=16.0).resolve(GEOMETRY, 16_384)).text()
    assert "the factor (16) is not the ratio of the two windows (8)" in text and "Change nothing" in text
    assert "transformers 4.55 and older take 8 all the same" in text
    assert "Change nothing" not in replace(CARD, scaling=Linear(factor=16.0).resolve(GEOMETRY, 16_384)).text()


def test_how_it_is_served():
    """The window, the cache of it, a command for each engine; none for one that would serve it wrong, but why."""
    assert "## Serve it" not in CARD.text()
    text = replace(CARD, cache_bytes=131_072, misread={}).text()
    assert "take 2 GiB in 16 bits (131,072 bytes a token)" in text and "Not with" not in text
    for command in (
        "vllm serve model --max-model-len 16384",
        "--context-length 16384",
        "llama-server -m model-f16.gguf -c 16384",
        "num_ctx 16384\\n' > Modelfile",
        "mlx_lm.server --model model",
    ):
        assert command in text
    text = replace(CARD, misread={"vllm": "it has *another* scale"}).text()
    assert "vllm serve" not in text and "llama-server" in text
    assert "**Not with vllm**: it has \\*another\\* scale." in text


def test_the_metrics_table():
    rows = table(CARD.text(), "What was measured")
    assert list(rows) == ["", "ppl@2048", "ppl@16384", "passkey@2048", "bits_per_byte@2048"]
    assert rows[""] == ["untuned: as it was", "extended: this model"]
    assert rows["ppl@2048"] == ["9.04", "9.26"] and rows["ppl@16384"] == ["1.2e+04", "9.51"]
    assert rows["passkey@2048"] == ["100%", "95%"] and rows["bits_per_byte@2048"] == ["", "0.712"]
    assert "persuasion" in CARD.text()
    assert "What was measured" not in replace(CARD, results={}).text()


def test_a_perplexity_of_a_benchmark_is_no_percentage():
    """The task says what it is; its name alone says it of the paper's benchmarks."""
    results = {"extended": {"harness/wikitext": 0.9, "harness/boolq": 0.7512, "harness/mine": 0.5}}
    card = replace(CARD, results=results, described={"harness/mine": Metric("mine", True, ".1%")})
    rows = table(card.text(), "What was measured")
    assert rows["harness/wikitext"] == ["0.900"] and rows["harness/boolq"] == ["75.1%"]
    assert rows["harness/mine"] == ["50.0%"]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("python train.py model.path=/home/me/llama seed=1", "python train.py model.path=llama seed=1"),
        ("data.documents=[/a/b/x.jsonl,/c/y.jsonl.gz]", "data.documents=[x.jsonl,y.jsonl.gz]"),
        ("'data.documents=/a/b c'", "'data.documents=b c'"),
        ("~/models/llama/", "llama"),
        ("model.path=huggyllama/llama-7b", "model.path=huggyllama/llama-7b"),
        ("data.documents=assets/corpora/x.jsonl", "data.documents=assets/corpora/x.jsonl"),
        ("a / b", "a / b"),
    ],
)
def test_folders_of_a_machine_are_cut(text, cut):
    assert without_folders(text) == cut


@pytest.mark.parametrize(("place", "name"), [("somewhere/llama", "llama"), ("outputs/run-7/model", "run-7")])
def test_a_local_base_is_named_without_its_place(tmp_path, monkeypatch, place, name):
    (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base in (str(tmp_path / place), place, "."):
        if base == ".":
            monkeypatch.chdir(place)
        text = replace(CARD, base=base).text()
        assert head_of(text)["base_model"] == name and f"# {name}, extended" in text
        assert str(tmp_path) not in text and "somewhere" not in text and "outputs" not in text


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\nlanguage: en\n---\n", None),
        ("# no head\n---\nlicense: mit\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: {broken\n---\n", None),
        (None, None),
    ],
)
def test_the_license_is_that_of_the_bases_card(tmp_path, card, license):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) == license


def test_a_card_appears_whole(tmp_path, monkeypatch):
    CARD.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == CARD.text() and os.listdir(tmp_path) == ["README.md"]
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)  # killed before the last step
    with pytest.raises(ZeroDivisionError):
        replace(CARD, license=None).write(tmp_path)
    assert (tmp_path / "README.md").read_text() == CARD.text()


@pytest.mark.slow
def test_a_run_writes_it_and_its_lines_load_the_model(smoke_run, script, load_json):
    text = (smoke_run / "model" / "README.md").read_text()
    assert "## Serve it" in text and "--max-model-len" in text
    head, made, measured = head_of(text), table(text, "How it was made"), table(text, "What was measured")
    assert (head["base_model"], head["license"]) == ("tiny", "apache-2.0")
    assert made["Steps"] == ["4 of 4 examples: 4,096 tokens"] and made["Trained"] == ["all weights"]
    metrics = load_json(smoke_run / "metrics.json")
    for i, name in enumerate(("untuned", "scaled", "extended")):
        assert float(measured["tail_ppl@512"][i]) == pytest.approx(metrics[name]["tail_ppl@512"], abs=0.06)
    assert "python train.py experiment=smoke\n" in text
    for private in (str(smoke_run), os.getcwd(), os.path.expanduser("~")):
        assert private not in text
    lines = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    assert len(lines.splitlines()) == 3
    check = "assert model.config.max_position_embeddings == tokenizer.model_max_length == 512"
    result = script("-c", f"{lines}\n{check}", cwd=smoke_run)
    assert result.returncode == 0, result.stderr
    assert json.loads((smoke_run / "provenance.json").read_text())["commit"] in text


def test_position_ids_are_those_that_were_drawn():
    """Of a model that was extended before, training may reach less far than the model does."""
    text = replace(CARD, target_len=32_768).text()
    assert "extended from" in text and "position ids lie between 0 and 16,383" in " ".join(text.split())
