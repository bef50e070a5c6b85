"""train.py and evaluate.py as a user runs them, on the shipped model."""

import csv
import gzip
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer
from wandb_run import read_run

from pose.data.tokenizer import tokenizer_digest
from pose.modeling.load import load_tokenizer

pytestmark = pytest.mark.slow
FAST = ("experiment=smoke", "eval=none")


def train(script, folder, *overrides):
    result = script("train.py", *overrides, f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_a_run_leaves_everything(smoke_run, load_json):
    for name in (
        "metrics.json",
        "config.yaml",
        "provenance.json",
        "metrics.csv",
        "coverage.csv",
        "documents.npy",
        "results.csv",
        "report.html",
    ):
        assert (smoke_run / name).stat().st_size > 0
    for name in ("training.png", "evaluation.png", "coverage.png"):
        assert (smoke_run / "plots" / name).read_bytes().startswith(b"\x89PNG")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in (smoke_run / "model").iterdir()}
    metrics = load_json(smoke_run / "metrics.json")
    assert {"untuned", "scaled", "extended"} <= set(metrics)
    for name, value in metrics["extended"].items():
        assert metrics[name] == value, "the top level describes RUN/model"
    assert {"tail_ppl@256", "tail_ppl@512", "passkey@256", "passkey@512"} <= set(metrics)
    # PoSE with two chunks, 256 -> 512: a distance d of 256 or more needs a skip in {d-255..min(d-1, 256)}.
    beyond = sum(min(255, 512 - d) for d in range(256, 512)) / 256 / 257
    assert metrics["coverage/probability_beyond_window"] == pytest.approx(beyond)
    provenance = load_json(smoke_run / "provenance.json")
    assert "experiment=smoke" in provenance["command"] and provenance["packages"]["torch"]
    assert provenance["tokenizer"] == tokenizer_digest(load_tokenizer("assets/tiny"))
    # The log file has what the terminal has shown
    log = (smoke_run / "train.log").read_text()
    for words in (
        "Data        ",
        "Checked     ",
        "Measuring the untuned model ...",
        f"Run folder  {smoke_run}",
        "@512",
    ):
        assert words in log
    assert f"{metrics['tail_ppl@512']:.1f}" in log, "a cell of the table"
    config = load_json(smoke_run / "model" / "config.json")
    assert config["max_position_embeddings"] == 512
    assert config["rope_parameters"]["rope_type"] == "yarn" and config["rope_parameters"]["factor"] == 2.0
    card = (smoke_run / "model" / "README.md").read_text()
    assert "| Attention factor | 1.06931, which engines work out themselves |" in card


def test_evaluate_measures_the_run_folder_as_training_did(smoke_run, script, load_json, tmp_path):
    """And what training has measured is not measured again, unless that is asked for."""
    trained = load_json(smoke_run / "metrics.json")["extended"]
    for name, reuse in (("anew", "reuse=false"), ("known", "reuse=true")):
        result = script(
            "evaluate.py", f"ckpt={smoke_run}", "eval.windows=1", "eval.trials=2", reuse,
            f"hydra.run.dir={tmp_path}/{name}",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        assert "passkey" in result.stdout and smoke_run.name in result.stdout
        assert ("results reused from the cache" in result.stdout) == (reuse == "reuse=true")
        assert load_json(tmp_path / name / "metrics.json") == pytest.approx(trained, rel=1e-6)


def test_perplexity_of_own_documents_equals_a_plain_loop(script, load_json, tmp_path):
    """The contract of evaluate.py, against transformers alone, one window at a time."""
    with gzip.open("assets/corpora/books.heldout.jsonl.gz", "rt", encoding="utf8") as lines:
        text = json.loads(next(lines))["text"]
    documents = [text[50_000:60_000], text[90_000:105_000]]
    file = tmp_path / "own.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf8") as out:
        out.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    result = script(
        "evaluate.py", "ckpt=assets/tiny", "eval=perplexity", f"eval.documents={file}", "eval.lengths=[256,1024]",
        "eval.windows=1", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = load_json(tmp_path / "run" / "metrics.json")

    tokenizer = AutoTokenizer.from_pretrained("assets/tiny")
    model = AutoModelForCausalLM.from_pretrained("assets/tiny", dtype=torch.float32).eval()
    tokens = [tokenizer(d, add_special_tokens=False, return_tensors="pt").input_ids[0] for d in documents]

    @torch.no_grad()
    def losses(window):
        logits = model(window[None]).logits[0]
        return torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")

    for n in (256, 1024):
        whole = torch.cat([losses(t[:n]) for t in tokens])
        tail = torch.cat([losses(t[1024 - n : 1024])[-128:] for t in tokens])
        assert metrics[f"ppl@{n}"] == pytest.approx(math.exp(whole.mean()), rel=1e-5)
        assert metrics[f"tail_ppl@{n}"] == pytest.approx(math.exp(tail.mean()), rel=1e-5)


def test_own_data_and_a_local_folder(smoke_run, script, tmp_path):
    """data=jsonl and model.path: here the exported run itself, kept at its own frequencies."""
    with gzip.open("assets/corpora/reports.heldout.jsonl.gz", "rt", encoding="utf8") as lines:
        (tmp_path / "own.jsonl").write_text("".join(next(lines) for _ in range(3)), encoding="utf8")
    train(
        script, tmp_path / "run", *FAST, "data=jsonl", f"data.documents={tmp_path}/own.jsonl",
        f"model.path={smoke_run}/model", "rope=none", "trainer.max_steps=1",
    )  # fmt: skip
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn" and config["rope_parameters"]["factor"] == 2.0


@pytest.mark.parametrize("pose", ["sentence_skip", "mix"])
def test_samplers_that_are_more_than_positions_train(script, tmp_path, pose):
    train(script, tmp_path, *FAST, f"pose={pose}", "trainer.max_steps=1", "data=reports")


def test_self_distillation_of_weight_0_trains_as_plain_positions(script, tmp_path):
    """Bit for bit, from the first step to the export: micro-batches are those of objective=lm too."""
    few = ("trainer.max_steps=3", "trainer.global_batch=4", "trainer.micro_batch=4")
    for name, objective in {
        "lm": ("objective=lm", "pose=short_pi"),
        "pose": ("objective=self_distill", "objective.weight=0", "pose.content=contiguous"),
        "plain": ("objective=self_distill", "objective.weight=0", "pose=short_pi"),
    }.items():
        train(script, tmp_path / name, *FAST, *few, *objective)
    lm, *others = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("lm", "pose", "plain"))
    for weights in others:
        assert weights.keys() == lm.keys() and all(torch.equal(weights[key], lm[key]) for key in lm)


def test_text_alone_and_tensorboard(script, tmp_path):
    shares = [f"data.synthetic.{name}=0" for name in ("passkey", "copy", "key_value")]
    train(script, tmp_path, *FAST, *shares, "logger=tensorboard", "trainer.max_steps=2")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/lr", "train/grad_norm", "train/loss"} <= set(events.Tags()["scalars"])
    assert "train/loss_text" not in events.Tags()["scalars"], "the same curve twice"
    assert events.Scalars("train/lr")[-1].value > 0
    assert set(events.Tags()["images"]) == {"figures/coverage", "figures/training"}
    assert events.Scalars("cost/tokens")[-1].value == 2 * 4 * 256 and "hp_metric" not in events.Tags()["scalars"]


def test_wandb_offline(script, load_json, tmp_path):
    """What the run has measured and logged is what W&B has stored; tests/unit/reporting/test_dashboard.py has more."""
    train(
        script, tmp_path, "experiment=smoke", "logger=wandb", "trainer.max_steps=2", "eval.lengths=[256,512]",
        "eval.tasks=[perplexity,passkey]", "eval.before=false", "watch.every_n_steps=2", "watch.tasks=[passkey]",
        "watch.lengths=[256]", "watch.trials=1",
    )  # fmt: skip
    found, metrics = read_run(tmp_path), load_json(tmp_path / "metrics.json")
    method = {"sampler": "pose", "rope": "yarn", "objective": "lm", "model": "assets/tiny", "target_len": 512}
    assert (method | {"train_len": 256, "seed": 0}).items() <= found.config.items()
    assert found.config["cfg"]["trainer"]["max_steps"] == 2 and found.config["cfg"]["rope"]["factor"] == 2.0
    assert (found.run.display_name, found.run.job_type) == ("assets/tiny 512: pose + yarn", "train")
    groups = {name.partition("/")[0] for row in found.history for name in row if "/" in name}
    assert groups == {"train", "val", "eval", "cost", "coverage", "tables", "figures", "trainer"}
    with open(tmp_path / "metrics.csv") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert [row["train/loss"] for row in found.history if "train/loss" in row] == pytest.approx(losses)
    for name in ("tail_ppl", "passkey"):
        value = metrics[f"{name}@512"]
        assert found.summary[f"eval/{name}@512"] == found.summary[f"eval/target/{name}"] == pytest.approx(value)
        by_length = {row["eval/length"]: row[f"eval/{name}"] for row in found.history if f"eval/{name}" in row}
        assert by_length == {256: metrics[f"{name}@256"], 512: value}
    assert found.summary["cost/tokens"] == metrics["cost/tokens"] == 2 * 4 * 256
    assert found.summary["cost/flops"] == metrics["cost/flops"] > 1e6
    assert {"figures/evaluation", "figures/training", "figures/coverage", "tables/coverage"} <= found.summary.keys()
    assert [row[:3] for row in found.table("tables/by_length")[1] if row[1] == "passkey"] == [
        ["extended", "passkey", 256], ["extended", "passkey", 512],
    ]  # fmt: skip
    (results,) = (artifact for artifact in found.artifacts if artifact.type == "results")
    assert {"README.md", "metrics.json"} <= {entry.path for entry in results.manifest.contents}


def test_a_sweep_ends_with_one_table(script, tmp_path):
    result = script(
        "train.py", "-m", "experiment=smoke", "rope=linear,ntk", "trainer.max_steps=1", "eval.lengths=[256]",
        "eval.tasks=[perplexity]", "logger=wandb", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "sweep.csv" in result.stdout and f"{tmp_path}/report.html" in result.stdout
    page = (tmp_path / "report.html").read_text()
    assert all(f'data-line="rope={rope}"' in page for rope in ("linear", "ntk"))
    with open(tmp_path / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [("rope=linear" in row["overrides"], "rope=ntk" in row["overrides"]) for row in rows] == [
        (True, False),
        (False, True),
    ]
    assert all(float(row["tail_ppl@256"]) > 1 for row in rows)
    runs = [read_run(tmp_path / job) for job in ("0", "1")]
    assert {run.run.run_group for run in runs} == {tmp_path.name}, "in W&B one group"
    assert [run.run.display_name for run in runs] == ["rope=linear", "rope=ntk"]
    assert [run.config["rope"] for run in runs] == ["linear", "ntk"]


def test_a_sweep_goes_on_after_a_job_that_cannot_work(script, tmp_path):
    result = script(
        "train.py", "-m", *FAST, "pose.target_len=128,512", "trainer.max_steps=1", f"hydra.sweep.dir={tmp_path}"
    )
    assert result.returncode != 0 and "pose.target_len=128" in result.stderr
    assert not (tmp_path / "0" / "metrics.json").exists() and (tmp_path / "1" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train.py", "pose.target_len=128"), ("pose.target_len=128", "256")),
        (("train.py", "pose.target_lenn=4096"), ("target_lenn",)),
        (("train.py", "trainer.max_steps=many"), ("many", "trainer.max_steps")),
        (("evaluate.py", "ckpt=nowhere"), ("nowhere",)),
    ],
)
def test_bad_input_ends_in_one_message_and_a_status(script, tmp_path, arguments, words):
    result = script(*arguments, f"hydra.run.dir={tmp_path}")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words)
    assert not (tmp_path / "metrics.json").exists() and not (tmp_path / "model").exists()


def test_a_run_goes_on_from_another_and_says_what_it_starts_from(script, smoke_run, load_json, tmp_path):
    """model.path=RUN, its scaling kept; without the measurements before training."""
    train(
        script, tmp_path, "experiment=smoke", f"model.path={smoke_run}", "rope=none", "pose.target_len=300",
        "trainer.max_steps=1", "eval.before=false",
    )  # fmt: skip
    metrics = load_json(tmp_path / "metrics.json")
    assert "extended" in metrics and not {"untuned", "scaled"} & set(metrics)
    assert load_json(tmp_path / "model" / "config.json")["max_position_embeddings"] == 512
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| Window | 512 tokens |" in card and "scaled already" in card
