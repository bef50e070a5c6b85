"""A run of train.py: what it measures once, for itself and for others."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import LlamaConfig

from pose.app import compare, run, schema
from pose.app.preflight import plan_training
from pose.errors import ConfigError, DataError, TrainingError
from pose.evaluation.task import Estimate
from pose.reporting.results_csv import read_results
from pose.rope import Linear, Yarn
from pose.training import micro_batch

CONF = Path(__file__).resolve().parents[3] / "conf"
COMMON = ("eval.tasks=[passkey]", "eval.lengths=[256]", "eval.trials=2")
schema.register()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a run, and measures the untuned and the scaled model; counts the models that are loaded for it."""
    loaded = []
    build_model = run.build_model

    def counted(config, path, *arguments, **options):
        loaded.append(path)
        return build_model(config, path, *arguments, **options)

    monkeypatch.setattr(run, "build_model", counted)

    def start_(name, *overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(
                "train",
                ["experiment=smoke", f"cache_dir={tmp_path}/cache", "trainer.accelerator=cpu", *COMMON, *overrides],
            )
        one = run.Run(cfg, tmp_path / name)
        one.plan = plan_training(cfg, one.folder)
        loaded.clear()
        one.measure_before()
        return one.results, len(loaded)

    return start_


def test_a_run_that_begins_has_no_curves_of_another(tmp_path):
    """Of one in the same folder that left no checkpoint."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["experiment=smoke", "eval=none", "trainer.accelerator=cpu"])
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
    one = run.Run(cfg, tmp_path)
    one.plan = plan_training(cfg, tmp_path)
    assert (tmp_path / "metrics.csv").exists(), "planning loses nothing"
    one.go_on()
    assert not (tmp_path / "metrics.csv").exists()


def test_the_untuned_model_is_measured_once_for_all_jobs(start, tmp_path):
    """Of a sweep over methods and seeds; and evaluate.py finds it."""
    first, num = start("a")
    assert set(first) == {"untuned", "scaled"} and num == 2
    again, num = start("b", "seed=1", "pose=stratified")
    assert again == first and num == 0
    other, num = start("c", "rope=linear")
    assert other["untuned"] == first["untuned"] and num == 1, "another scaling is another model"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", ["ckpt=assets/tiny", f"cache_dir={tmp_path}/cache", "device=cpu", *COMMON])
    (candidate,) = compare.plan_evaluation(cfg)
    units = {task: task.units() for task in candidate.suite.tasks}
    kept = compare.Outcomes(cfg.cache_dir).find(candidate.under, *units.popitem())
    assert set(kept) == {"256"}


def test_a_benchmark_may_fill_the_window_of_the_model_that_is_measured(start, monkeypatch):
    """The untuned model's own, where what does not fit is left out, and the target after scaling."""
    seen = []

    def measure(suite, **options):
        seen.append((suite.max_length, options["skip_too_long"]))
        return {}

    monkeypatch.setattr("pose.evaluation.suite.Suite.run", measure)
    start("run")
    assert seen == [(256, True), (512, False)]


def test_questions_that_cannot_be_had_are_found_before_the_training(start, monkeypatch):
    """Where nothing is measured before it, too."""

    def prepare(suite):
        raise DataError("the questions cannot be loaded")

    monkeypatch.setattr(run.Suite, "prepare", prepare)
    with pytest.raises(DataError, match="the questions cannot be loaded"):
        start("a", "eval.before=false")


def test_what_was_measured_belongs_to_the_weights_and_the_text(start, tmp_path):
    """Replaced before a run goes on, they are measured again: old and new figures do not mix."""
    shutil.copytree(CONF.parent / "assets" / "tiny", tmp_path / "base")
    text = tmp_path / "held.txt"
    text.write_text("The grass is green. " * 300)
    overrides = (
        f"model.path={tmp_path}/base", "rope=none", "eval.tasks=[perplexity]", f"eval.documents={text}",
        "eval.windows=1",
    )  # fmt: skip
    before, num = start("a", *overrides)
    assert num == 1 and start("a", *overrides) == (before, 0)
    text.write_text("The sky is blue and the sun is yellow. " * 300)
    other_text, num = start("a", *overrides)
    assert num == 1 and other_text != before
    from safetensors.torch import save_file

    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 0.5
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    other_weights, num = start("a", *overrides)
    assert num == 1 and other_weights != other_text


def test_the_dtype_of_what_is_measured(start, tmp_path):
    """Half the bits on request; another model than the one in fp32, for whoever looks for what was measured before."""
    text = ("eval.tasks=[perplexity]", "eval.windows=1", "eval.max_documents=1", "rope=none")
    wide, num = start("a", *text)
    narrow, also = start("b", *text, "eval_dtype=bfloat16")
    assert num == also == 1
    wide, narrow = wide["untuned"]["ppl@256"].value, narrow["untuned"]["ppl@256"].value
    assert 1e-6 < abs(narrow / wide - 1) < 0.02
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", ["ckpt=assets/tiny", f"cache_dir={tmp_path}/cache", "device=cpu", *COMMON, *text[:3]])
    for dtype, found in (("bfloat16", narrow), ("float32", wide)):
        cfg.dtype = dtype
        (candidate,) = compare.plan_evaluation(cfg)
        metrics, took = compare.measure(cfg, candidate)
        assert metrics["ppl@256"].value == found and took["seconds"] >= 0, "evaluate.py takes it over"
    with pytest.raises(ConfigError, match=r"eval_dtype='half' is unknown: choose float32, bfloat16, float16"):
        start("c", "eval_dtype=half")


def test_memory_that_runs_out_names_what_helps(tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["trainer.micro_batch=4", "pose.train_len=64"])
    with (
        pytest.raises(TrainingError, match=r"trainer\.micro_batch \(it is 4"),
        run.runtime.explained_memory_errors(cfg),
    ):
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.nightly
def test_the_micro_batch_that_is_found_stands_in_the_config_and_is_taken_again(tmp_path, monkeypatch, capsys):
    """The run and its continuation are those of the number given, to the bit; a run that goes on does not search."""
    monkeypatch.setattr(run.runtime, "provenance", dict)
    around = []  # what each training is done under: the order of the kernels of attention
    preferred_kernels = run.preferred_kernels
    monkeypatch.setattr(run, "preferred_kernels", lambda device: around.append(device) or preferred_kernels(device))

    def train(name, *overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(
                "train",
                [
                    "experiment=smoke", "eval=none", f"cache_dir={tmp_path}/cache", "trainer.accelerator=cpu",
                    "resume=auto", "trainer.precision=32-true", "trainer.checkpoint_every_n_steps=1", *overrides,
                ],
            )  # fmt: skip
        one = run.Run(cfg, tmp_path / name)
        one.plan = plan_training(cfg, one.folder)
        run.plan.say(cfg, one.plan)
        run.runtime.save_config(cfg, one.folder, one.plan.settings, one.plan.step)
        before = OmegaConf.load(one.folder / "config.yaml").trainer.micro_batch
        one.train()
        after = OmegaConf.load(one.folder / "config.yaml").trainer.micro_batch
        assert one.plan.trainer.accumulate_grad_batches == 4 // after
        return before, after, load_file(one.folder / "model" / "model.safetensors")

    def rehearse(trainer, module, batch, passes):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        honest(trainer, module, batch, passes)

    honest = micro_batch.rehearse
    monkeypatch.setattr(micro_batch, "DEVICES", ("cpu",))
    monkeypatch.setattr(micro_batch, "rehearse", rehearse)
    auto = "trainer.micro_batch=auto"
    assert train("found", auto, "trainer.max_steps=2")[:2] == ("auto", 2)
    assert "Micro-batch 2, the largest divisor of 4 that fits" in capsys.readouterr().out
    shutil.copytree(tmp_path / "found", tmp_path / "copy")
    monkeypatch.setattr(micro_batch, "rehearse", None)
    train("given", "trainer.micro_batch=2", "trainer.max_steps=2")
    capsys.readouterr()
    before, after, weights = train("found", auto, "trainer.max_steps=4")
    assert before == after == 2 and "Micro-batch 2, as this run found it before" in capsys.readouterr().out
    wanted = train("given", "trainer.micro_batch=2", "trainer.max_steps=4")[2]
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)
    original = load_file(CONF.parent / "assets" / "tiny" / "model.safetensors")
    assert not all(torch.equal(weights[name], original[name].float()) for name in wanted)
    assert train("copy", "trainer.micro_batch=4", "trainer.max_steps=3")[:2] == (4, 4), "what is given is taken"
    assert around == [torch.device("cpu")] * 5


ESTIMATES = {"passkey@8": Estimate(0.0, 0.0, 0.25, 20), "tail_ppl@8": Estimate(3.0, 2.5, 3.5, 4)}
REMARK = "passkey: 0 at every length inside the model's own window of 8 tokens"


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run whose results are there, and what its plots are given."""
    drawn = []
    monkeypatch.setattr(run, "plot_measured", lambda *given: drawn.append(given))
    monkeypatch.setattr(run, "plot_training", lambda *_: None)
    monkeypatch.setattr(run.Run, "write_card", lambda _: None)
    suite = SimpleNamespace(document_ids=["a book"], metrics=dict)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        one = run.Run(compose("train", ["experiment=smoke"]), tmp_path)
    one.plan = SimpleNamespace(
        geometry=SimpleNamespace(window=8), config=LlamaConfig(max_position_embeddings=32), suite=suite, watch=None,
        scaling=SimpleNamespace(name="yarn"), sampler=SimpleNamespace(name="pose", target_len=32, example_len=8),
        trainer=SimpleNamespace(loggers=[], callback_metrics={}, global_step=5),
    )  # fmt: skip
    one.results = {"untuned": ESTIMATES, "extended": ESTIMATES | {"passkey@8": Estimate(1.0)}}
    return one, drawn


@pytest.mark.parametrize(
    ("scaling", "versions"),
    [
        (Yarn(factor=4.0), "any transformers"), (Yarn(factor=8.0), "transformers 4.56 or newer"),
        (Yarn(factor=8.0, rcd_shift=True), "any transformers"),  # exported as longrope
        (Linear(factor=8.0), "any transformers"),
    ],
)  # fmt: skip
def test_the_versions_that_read_the_factor_are_named(finished, capsys, scaling, versions):
    """transformers 4.51 to 4.55 take target / window, 4 here, for the factor of YaRN."""
    one, _ = finished
    one.plan.scaling = scaling
    one.print_results()
    assert f"({versions} loads it)" in capsys.readouterr().out


def test_intervals_window_and_target_reach_the_plots(finished, tmp_path):
    one, drawn = finished
    one.flops_per_token = 1e6
    one.report()
    ((results, folder, window, target),) = drawn
    assert results["untuned"]["tail_ppl@8"] == Estimate(3.0, 2.5, 3.5, 4), "with its interval"
    assert (folder, window, target) == (tmp_path / "plots", 8, 32)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["passkey@8"] == 1.0 and metrics["untuned"]["tail_ppl@8"] == 3.0 and metrics["train/steps"] == 5
    assert metrics["cost/tokens"] == 5 * 4 * 8 and metrics["cost/flops"] == 1.6e8
    assert read_results(tmp_path / "results.csv") == results, "of all models, with their intervals"


def test_a_page_that_cannot_be_written_is_a_warning(finished, tmp_path, monkeypatch, capsys):
    """The run is finished: what was found is there, and its command ends well."""
    one, _ = finished
    (tmp_path / "report.html").mkdir()
    one.report()
    said = capsys.readouterr().out
    assert f"Warning: {tmp_path}/report.html was not written" in said and "python -m pose.report" in said
    assert json.loads((tmp_path / "metrics.json").read_text())["passkey@8"] == 1.0


def test_what_goes_wrong_in_a_dashboard_is_a_warning(finished, tmp_path, monkeypatch, capsys):
    """It comes last: the run is finished, and its command ends well."""
    one, _ = finished

    def fail(loggers, found):
        assert (tmp_path / "metrics.json").is_file() and (tmp_path / "report.html").is_file()
        assert (found.folder, found.step, found.window, found.target) == (tmp_path, 5, 8, 32)
        assert found.results == one.results and found.with_weights is False
        raise OSError("no route to host")

    monkeypatch.setattr(run, "log_finished", fail)
    one.report()
    assert f"Warning: logger=csv lacks results of {tmp_path}: no route to host" in capsys.readouterr().out


def test_a_task_that_the_untuned_model_cannot_do_is_remarked_on(finished, capsys):
    one, _ = finished
    one.print_results()
    said = capsys.readouterr().out
    assert f"The untuned model: {REMARK}" in said and "3.0" in said and f"Run folder  {one.folder}" in said
    one.results["untuned"] = one.results["extended"]
    one.print_results()
    assert REMARK not in capsys.readouterr().out


def test_an_evaluation_remarks_on_a_task_that_a_model_cannot_do(tmp_path, capsys):
    suite = SimpleNamespace(document_ids=["a book"], metrics=dict)
    candidates = [SimpleNamespace(name=name, window=8, suite=suite) for name in ("mine", "base")]
    compare.show(tmp_path, candidates, {"mine": ESTIMATES | {"passkey@8": Estimate(1.0)}, "base": ESTIMATES})
    said = capsys.readouterr().out
    assert f"base: {REMARK}" in said and f"mine: {REMARK}" not in said and f"{tmp_path}/results.csv" in said
