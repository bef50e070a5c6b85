"""What evaluate.py plans: checkpoints, their identity, lengths for all, and what is refused."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from wandb_run import read_runs

from pose.app import compare, runtime, schema
from pose.app.trained import FILE, note_trained, warn_of_trained
from pose.data.datamodule import PoseDataModule
from pose.data.tokenizer import tokenizer_digest
from pose.errors import CheckpointError, ConfigError, PoseError
from pose.evaluation.task import Estimate
from pose.modeling.load import load_tokenizer
from pose.positions import PoSE
from pose.training.folder import check_kind
from pose.training.loggers import dashboards_of

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "assets" / "tiny"
LONG = LlamaConfig(max_position_embeddings=32)  # the config of a model that was extended
TOKENIZER = load_tokenizer(str(TINY))
SUITE = SimpleNamespace(tasks=[], tokenizer=TOKENIZER)
schema.register()


def composed(tmp_path, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("evaluate", [f"cache_dir={tmp_path}/cache", *overrides])


def plan(tmp_path, *overrides):
    return compare.plan_evaluation(composed(tmp_path, *overrides))


@pytest.fixture
def longer(tmp_path):
    """The shipped model, as one of a longer window."""
    folder = tmp_path / "run" / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder.parent


def test_checkpoints_are_measured_at_the_same_lengths(tmp_path, longer):
    candidates = plan(tmp_path, f"ckpt=[assets/tiny,{longer}]", "eval=passkey")
    assert [c.name for c in candidates] == ["assets/tiny", str(longer)]
    assert [c.window for c in candidates] == [256, 1024]
    assert [c.suite.lengths for c in candidates] == [[256, 512, 1024]] * 2
    assert candidates[0].under["checkpoint"] != candidates[1].under["checkpoint"]


def texts(path, *numbers) -> Path:
    """Documents that begin and end alike for all numbers, and differ between."""

    def text(n) -> str:
        return " ".join(["the grass"] * 400 + [f"is {n}"] * 20 + ["green"] * 400)

    path.write_text("\n".join(json.dumps({"id": f"d{n}", "text": text(n)}) for n in numbers))
    return path


def test_documents_that_the_run_has_trained_on_are_warned_of(tmp_path, longer, capsys):
    """By their text, in whatever file; of the run's folder, not of a model that was taken out of it."""
    own = texts(tmp_path / "own.jsonl", 1, 22, 333)
    data = PoseDataModule(
        str(own), load_tokenizer(str(TINY)), PoSE(256, 1024), num_examples=4, micro_batch=1, global_batch=1, seed=0,
        cache_dir=tmp_path / "cache", leave_out=str(texts(tmp_path / "left.jsonl", 22)),
    )  # fmt: skip
    data.setup()
    note_trained(longer, data)

    def warning(documents, ckpt=longer) -> str:
        plan(tmp_path, f"ckpt={{mine:{ckpt}}}", "eval=perplexity", f"eval.documents={documents}", "eval.lengths=[256]")
        return capsys.readouterr().out

    out = " ".join(warning(texts(tmp_path / "both.jsonl", 22, 333, 4444)).split())
    assert "Warning: mine has trained on 1 of the 3 documents that its perplexity is measured on (d333)" in out
    assert "Warning" not in warning(texts(tmp_path / "other.jsonl", 22, 4444))
    shutil.copytree(longer / "model", tmp_path / "taken" / "model")
    assert "Warning" not in warning(own, tmp_path / "taken" / "model")
    suite = plan(tmp_path, f"ckpt={longer}", "eval=perplexity", f"eval.documents={own}", "eval.lengths=[256]")[0].suite
    suite.keep_documents({"d1"})
    warn_of_trained("mine", str(longer / "model"), suite)
    assert "mine has trained on 1 of the 1 documents" in " ".join(capsys.readouterr().out.split())
    (longer / FILE).write_bytes(b"\x93NUMPY")
    assert "documents.npy is damaged" in warning(own)


@pytest.mark.parametrize(("dtype", "is_warned_of"), [("bfloat16", True), ("float32", False), ("auto", False)])
def test_bf16_that_a_cpu_emulates_is_warned_of(tmp_path, capsys, monkeypatch, dtype, is_warned_of):
    monkeypatch.setattr("pose.modeling.speed.cpu_computes_bf16", lambda: False)
    plan(tmp_path, "ckpt=assets/tiny", "eval=passkey", f"dtype={dtype}", "device=cpu")
    assert ("Warning: dtype=bfloat16: this CPU has no instructions for bf16" in capsys.readouterr().out) is is_warned_of


def test_tokenizers_that_differ_are_measured_on_the_same_documents(tmp_path, longer, capsys):
    """A tokenizer of single bytes makes long what is short for the shipped one."""
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (longer / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    documents = tmp_path / "documents.jsonl"
    lines = [{"id": f"d{size}", "text": "The grass is green. " * size} for size in (20, 400, 40, 300)]
    documents.write_text("\n".join(map(json.dumps, lines)))
    common = (f"ckpt=[assets/tiny,{longer}]", "eval=perplexity", f"eval.documents={documents}")
    candidates = plan(tmp_path, *common, "eval.lengths=[256]")
    assert [c.suite.document_ids for c in candidates] == [["d400", "d300"]] * 2
    assert [len(c.suite.tasks[0].units()) for c in candidates] == [2, 2]
    assert "Perplexity on the 2 documents" in (out := capsys.readouterr().out) and "compare bits per byte" in out
    with pytest.raises(
        ConfigError, match=r"no document of eval\.documents was chosen for all.*larger eval\.max_documents"
    ):
        plan(tmp_path, *common, "eval.lengths=[256]", "eval.max_documents=1")
    documents.write_text("\n".join(json.dumps(line | {"id": "same"}) for line in lines))
    with pytest.raises(ConfigError, match=r"two documents of the name 'same'.*one checkpoint at a time"):
        plan(tmp_path, *common, "eval.lengths=[256]")
    plan(tmp_path, "ckpt=[assets/tiny,assets/tiny/]", *common[1:], "eval.lengths=[256]")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention=foo", "attention='foo' .*sdpa"),
        ("attention=flash_attention_2", "attention=flash_attention_2 .*use sdpa"),
        ("device=cuda:99", "device=cuda:99 is not there"),
        ("cache_dir=/dev/null", "cache_dir=/dev/null cannot be written to"),
    ],
)
def test_what_cannot_run_here_is_named_at_once(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, "ckpt=assets/tiny", "eval=passkey", override)


def test_outcomes_belong_to_the_weights_wherever_they_lie(tmp_path, longer):
    """Replaced in a subfolder, and behind a link, they are measured anew."""
    stored = tmp_path / "stored" / "a.safetensors"
    stored.parent.mkdir()
    weights = load_file(longer / "model" / "model.safetensors")
    (longer / "model" / "model.safetensors").rename(stored)
    (longer / "model" / "parts").symlink_to(stored.parent)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "parts/a.safetensors")}
    (longer / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    common = (f"ckpt={longer}", "eval=passkey", "eval.lengths=[256]")
    before = plan(tmp_path, *common)[0].under
    assert plan(tmp_path, *common)[0].under == before
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    assert plan(tmp_path, *common)[0].under != before


def test_outcomes_belong_to_dtype_and_attention_too(tmp_path):
    common = ("ckpt=assets/tiny", "eval=passkey", "eval.lengths=[256]")
    under = [plan(tmp_path, *common, *o)[0].under for o in ((), ("dtype=bfloat16",), ("attention=eager",), ())]
    assert under[0] == under[3]
    assert under[0] != under[1] != under[2] != under[0]


def test_each_checkpoint_is_measured_with_its_own_tokenizer(tmp_path, longer):
    candidates = plan(tmp_path, f"ckpt=[assets/tiny,{longer}]", "eval=passkey", "eval.lengths=[256]")
    assert [Path(c.suite.tokenizer.name_or_path).resolve() for c in candidates] == [TINY, longer / "model"]


class FakeSuite:
    """Gives a metric, and notes how it was asked."""

    def __init__(self):
        self.asked, self.tasks, self.document_ids = [], [], []
        self.took = [(1.25, 0.5), (2.5, 0.75), (0.0, 0.5)]

    def run(self, load, outcomes, under):
        self.asked.append((load(), outcomes.folder, under, outcomes.reuse))
        return {"ppl@8": Estimate(3.0)}


@pytest.mark.parametrize("reuse", [True, False])
def test_a_checkpoint_is_loaded_as_it_was_planned(tmp_path, monkeypatch, reuse):
    """Its config, folder, dtype and revision; outcomes are kept in the cache under what tells it from others."""
    built = []
    monkeypatch.setattr(compare, "build_model", lambda *given: built.append(given) or torch.nn.Linear(1, 1))
    monkeypatch.setattr(compare, "check_computing", lambda *_: None)
    monkeypatch.setattr(compare, "check_unchanged", lambda *_: None)
    cfg = composed(tmp_path, "ckpt=x", f"reuse={str(reuse).lower()}", "attention=eager", "revision=v1")
    suite, config = FakeSuite(), object()
    under = {"checkpoint": "x"}
    candidate = compare.Candidate("x", "folder", config, 8, suite, torch.device("cpu"), torch.bfloat16, under)
    metrics, took = compare.measure(cfg, candidate)
    assert metrics == {"ppl@8": Estimate(3.0)} and took == {"seconds": 3.8, "peak_memory_gib": 0.75}
    assert built == [(config, "folder", "eager", torch.bfloat16, "v1")]
    ((_, folder, *rest),) = suite.asked
    assert folder == tmp_path / "cache" / ".outcomes" and rest == [under, reuse]


def test_a_checkpoint_that_changes_after_the_plan_is_not_measured(tmp_path, longer):
    """Its outcomes would be kept under the digests of the earlier one."""
    cfg = composed(tmp_path, f"ckpt={longer}/model", "eval=passkey", "eval.lengths=[256]", "eval.trials=1")
    (candidate,) = compare.plan_evaluation(cfg)
    weights = load_file(longer / "model" / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, longer / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model was changed since this command began"):
        compare.measure(cfg, candidate)
    assert not list((tmp_path / "cache" / ".outcomes").rglob("*.json"))
    (again,) = compare.plan_evaluation(cfg)
    compare.measure(cfg, again)


def test_what_is_saved_has_every_estimate_under_its_checkpoint(tmp_path, monkeypatch):
    """Of one checkpoint in a list too, and while others are still to come; the plots have all windows marked once."""
    windows = []
    monkeypatch.setattr(compare, "plot_measured", lambda results, folder, *marks: windows.append(marks[:2]))
    cfg = composed(tmp_path, "ckpt=[b,a]", "eval=passkey", "eval.trials=7")
    (tmp_path / "provenance.json").write_text('{"commit": "c0"}')
    candidates, results, took = [], {}, {}
    for i, name in enumerate("ba"):
        task = SimpleNamespace(name="passkey", units=lambda i=i: {"8": {"seed": i}})
        suite = SimpleNamespace(tasks=[task], tokenizer=TOKENIZER)
        candidates.append(
            compare.Candidate(name, f"in/{name}", LONG, 8 - i, suite, torch.device("cpu"), None, {"checkpoint": i})
        )
    for i, name in enumerate("ba"):
        results[name] = {"passkey@8": Estimate(0.5 + i / 4, 0.25, 0.875, 4 + i), "ppl@8": Estimate(3.0 + i)}
        took[name] = {"seconds": float(i), "peak_memory_gib": 1.0}
        compare.save(cfg, tmp_path, candidates, results, took)
        metrics = {"b": {"passkey@8": 0.5, "ppl@8": 3.0}, "a": {"passkey@8": 0.75, "ppl@8": 4.0}}
        assert json.loads((tmp_path / "metrics.json").read_text()) == {key: metrics[key] for key in results}
        with open(tmp_path / "results.csv", newline="") as file:
            rows = [list(row) for row in csv.reader(file)]
        assert rows[0] == ["checkpoint", "metric", "value", "low", "high", "num"]
        assert rows[1:3] == [["b", "passkey@8", "0.5", "0.25", "0.875", "4"], ["b", "ppl@8", "3.0", "", "", "1"]]
        assert [row[:3] for row in rows[3:]] == [["a", "passkey@8", "0.75"], ["a", "ppl@8", "4.0"]] * i
        saved = json.loads((tmp_path / "results.json").read_text())
        assert saved["eval"]["trials"] == 7 and saved["provenance"] == {"commit": "c0"}
        assert list(saved["checkpoints"]) == list(results)
    for i, name in enumerate("ba"):
        assert saved["checkpoints"][name] == {
            "path": f"in/{name}", "window": 8 - i, "target": 32, "identity": {"checkpoint": i},
            "tokenizer": tokenizer_digest(TOKENIZER),
            "measured": {"passkey": {"8": {"seed": i}}}, "took": {"seconds": float(i), "peak_memory_gib": 1.0},
            "metrics": {
                "passkey@8": {"value": 0.5 + i / 4, "low": 0.25, "high": 0.875, "num": 4 + i},
                "ppl@8": {"value": 3.0 + i, "low": None, "high": None, "num": 1},
            },
        }  # fmt: skip
    assert windows == [(7, 32), (7, 32)] and not list(tmp_path.glob("*.partial"))


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Logs two measured checkpoints as evaluate.py does."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    extended = SimpleNamespace(
        max_position_embeddings=32, rope_parameters={"rope_type": "longrope"}, pose={"rope": "searched"}
    )
    suite = SimpleNamespace(tasks=[], metrics=dict, document_ids=[], tokenizer=TOKENIZER)

    def two_(logger, *overrides):
        folder = tmp_path / "2026-11-27" / "10-00-00"
        folder.mkdir(parents=True)
        cfg = composed(tmp_path, "ckpt={base:a,mine:b}", f"logger={logger}", *overrides)
        candidates = [
            compare.Candidate(name, path, config, 8, suite, torch.device("cpu"), None, {})
            for name, path, config in (("base", "a", LONG), ("mine", "b", extended))
        ]
        results = {"base": {"ppl@32": Estimate(9.0)}, "mine": {"ppl@8": Estimate(3.0), "ppl@32": Estimate(4.0)}}
        options = OmegaConf.to_container(cfg.logger)
        dashboards = dashboards_of(options.pop("name"), folder, list(results), options)
        compare.save(cfg, folder, candidates, results, {name: {} for name in results})
        compare.fill_dashboards(cfg, folder, candidates, results, dashboards)
        return folder

    return two_


def test_each_checkpoint_is_a_run_of_wandb(two):
    """Of one group, with the names of metrics that trainings have."""
    base, mine = read_runs(two("wandb", "logger.project=long"))
    assert [run.run.display_name for run in (base, mine)] == ["base", "mine"]
    where = {(run.run.project, run.run.job_type, run.run.run_group) for run in (base, mine)}
    assert where == {("long", "evaluate", "2026-11-27 10-00-00")}
    assert (mine.config["rope"], mine.config["window"], mine.config["target_len"]) == ("searched", 8, 32)
    assert base.config["rope"] == "default" and mine.config["cfg"]["ckpt"] == {"base": "a", "mine": "b"}
    assert mine.summary["eval/target/ppl"] == 4.0 and mine.summary["eval/window/ppl"] == 3.0
    assert base.summary["eval/target/ppl"] == 9.0 and "eval/window/ppl" not in base.summary
    assert [row["eval/ppl"] for row in mine.history if "eval/ppl" in row] == [3.0, 4.0]
    assert mine.table("tables/by_length")[1][1][:4] == ["extended", "ppl", 32, 4.0]


def test_each_checkpoint_is_a_run_of_tensorboard(two):
    folder = two("tensorboard")
    assert sorted(one.name for one in (folder / "tensorboard").iterdir()) == ["base", "mine"]
    assert all(list(one.glob("events.*")) for one in (folder / "tensorboard").iterdir())


def test_a_checkpoint_that_is_called_as_a_folder_above_stays_below(tmp_path):
    """ckpt=.. would be logged into the folder of the evaluation."""
    (logger,) = dashboards_of("tensorboard", tmp_path, [".."])[".."]
    assert Path(logger.log_dir) == tmp_path / "tensorboard" / "model"


def test_without_a_dashboard_nothing_is_left(two):
    folder = two("csv")
    assert not list(folder.glob("wandb")) + list(folder.glob("tensorboard")) + list(folder.glob("metrics.csv"))


def test_a_dashboard_that_fails_is_a_warning(two, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(compare, "log_finished", fail)
    folder = two("tensorboard")
    assert "Warning: logger=tensorboard lacks results of mine: no route to host" in capsys.readouterr().out
    assert (folder / "results.csv").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"log_weights": True}, "logger.log_weights=true is not accepted: an evaluation leaves no weights"),
        ({"run_name": "x"}, "logger.run_name=x is one name for 2 checkpoints"),
    ],
)
def test_settings_of_a_dashboard_that_no_evaluation_can_have(tmp_path, options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        dashboards_of("wandb", tmp_path, ["a", "b"], {"offline": True, **options})
    with pytest.raises(ConfigError, match=r"logger.name='comet' .*csv"):
        dashboards_of("comet", tmp_path, ["a"])


def test_a_table_that_could_not_be_finished_leaves_the_one_before(tmp_path, monkeypatch):
    cfg = composed(tmp_path, "ckpt=a")
    candidate = compare.Candidate("a", "a", LONG, 8, SUITE, torch.device("cpu"), None, {})
    compare.save(cfg, tmp_path, [candidate], {"a": {"harness/x": Estimate(0.5)}}, {"a": {}})
    before = (tmp_path / "results.csv").read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    with pytest.raises(KeyboardInterrupt):
        compare.save(cfg, tmp_path, [candidate], {"a": {"harness/x": Estimate(0.75)}}, {"a": {}})
    assert (tmp_path / "results.csv").read_text() == before


def test_a_checkpoint_is_saved_before_the_next_is_measured(tmp_path, monkeypatch):
    def measure(cfg, candidate):
        if candidate.name == "b":
            raise KeyboardInterrupt
        return {}, {}

    saved = []
    for name, made in (("run_folder", tmp_path), ("set_up", None), ("save_config", None)):
        monkeypatch.setattr(runtime, name, lambda *_, made=made: made)
    monkeypatch.setattr(compare, "plan_evaluation", lambda cfg: [SimpleNamespace(name=name) for name in cfg.ckpt])
    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(compare, "save", lambda cfg, run_dir, candidates, results, took: saved.append(list(results)))
    with pytest.raises(KeyboardInterrupt):
        compare.evaluate(composed(tmp_path, "ckpt=[a,b]"))
    assert saved == [["a"]]


@pytest.mark.parametrize("left", ["model", "checkpoints", "best", "search.csv"])
def test_the_folder_of_a_training_or_a_search_is_left_alone(tmp_path, monkeypatch, left):
    for name, made in (("run_folder", tmp_path), ("set_up", None)):
        monkeypatch.setattr(runtime, name, lambda *_, made=made: made)
    (tmp_path / left).mkdir()
    (tmp_path / "config.yaml").write_text("of the training")
    with pytest.raises(SystemExit):
        compare.evaluate(composed(tmp_path, "ckpt=assets/tiny"))
    assert (tmp_path / "config.yaml").read_text() == "of the training"
    with pytest.raises(ConfigError, match=rf"holds what a (training|search) has left \({left}\)"):
        check_kind(tmp_path, "an evaluation")


def test_two_evaluations_do_not_meet_in_one_folder(tmp_path, monkeypatch, caplog):
    for name, made in (("run_folder", tmp_path), ("set_up", None)):
        monkeypatch.setattr(runtime, name, lambda *_, made=made: made)
    code = (
        f"from pathlib import Path; from pose.training.folder import alone_in; import time\n"
        f"with alone_in(Path({str(tmp_path)!r})): print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(SystemExit):
            compare.evaluate(composed(tmp_path, "ckpt=assets/tiny"))
        other.kill()
    assert "another run is at work" in caplog.text


def test_metrics_of_one_checkpoint_are_not_under_its_name(tmp_path):
    cfg = composed(tmp_path, "ckpt=a")
    suite = SUITE
    candidate = compare.Candidate("a", "a", LONG, 8, suite, torch.device("cpu"), None, {})
    compare.save(cfg, tmp_path, [candidate], {"a": {"harness/x": Estimate(0.5)}}, {"a": {}})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"harness/x": 0.5}


def test_checkpoints_are_called_as_they_are_named(tmp_path, longer):
    candidates = plan(tmp_path, f"ckpt={{base:assets/tiny,mine:{longer},again:assets/tiny}}", "eval=passkey")
    assert [c.name for c in candidates] == ["base", "mine", "again"]
    assert candidates[0].under == candidates[2].under and candidates[1].path == f"{longer}/model"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+evl=3", "ckpt=assets/tiny"], ["evl is no key", "eval"]),
        (["eval.seed=-3", "ckpt=assets/tiny"], ["eval.seed=-3", "0 to 4294967295"]),
        (["ckpt={}"], ["ckpt={}", "names"]),
        ([], ["ckpt is not set", "'ckpt=[assets/tiny,RUN]'"]),
        (["ckpt={base:null}"], ["ckpt.base=None", "hub id"]),
        (["ckpt=[[assets/tiny]]"], ["ckpt[0]=['assets/tiny']"]),
        (["ckpt=mine:RUN"], ["ckpt=mine:RUN", "'ckpt={base:assets/tiny,mine:RUN}', with its quotes"]),
        (["ckpt=assets/tiny", "device=meta"], ["device=meta is not there", "cuda:N"]),
        (["ckpt=[assets/tiny,assets/tiny]"], ["each stands once"]),
        (["ckpt=assets/tiny", "eval.tasks=[perplexty]"], ["perplexty", "needle", "ruler/TASK"]),
        (["ckpt=assets/tiny", "eval=ruler", "eval.tasks=[niah_single_9]"], ["niah_single_9", "niah_single_1"]),
        (["ckpt=assets/tiny", "eval=harness", "eval.tasks=[bolq]"], ["bolq", "boolq"]),
        (["ckpt=assets/tiny", "eval=ruler", "eval.tasks=[vt]", "eval.lengths=[64]"], ["ruler/vt with 64 tokens"]),
        (["ckpt=assets/tiny", "device=cuda:99"], ["device=cuda:99", "GPUs"]),
        (["ckpt=assets/tiny", "device=abacus"], ["device='abacus'"]),
        (["ckpt=assets/tiny", "dtype=int8"], ["dtype='int8'"]),
        (["ckpt=nowhere/at/all"], ["nowhere/at/all"]),
    ],
)
def test_what_is_refused_says_so_before_any_model_is_loaded(tmp_path, overrides, words):
    with pytest.raises(PoseError) as error:
        plan(tmp_path, *overrides)
    for word in words:
        assert word in str(error.value)


def test_text_that_is_not_ones_own_is_named(tmp_path, longer, capsys):
    own = tmp_path / "own.txt"
    own.write_text("The grass is green. " * 300)
    words = (
        "Perplexity is measured on assets/corpora/books.heldout.jsonl.gz, which comes with this repository. Your own"
    )
    common = ("eval.lengths=[256]", "eval.max_documents=1")
    for overrides, is_said in (
        ((f"ckpt={longer}",), True),
        (("ckpt=assets/tiny",), False),
        ((f"ckpt={longer}", f"eval.documents={own}"), False),
        ((f"ckpt={longer}", "eval.tasks=[passkey]"), False),
    ):
        plan(tmp_path, *common, *overrides)
        said = " ".join(capsys.readouterr().out.split())
        assert (words in said) == is_said == ("comes with this repository" in said)
