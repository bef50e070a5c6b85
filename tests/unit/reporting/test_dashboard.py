"""What a finished run leaves in W&B and TensorBoard, read back from what they store."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from wandb_run import read_run

from pose.evaluation.task import Estimate
from pose.reporting.dashboard import Finished, curves, log_finished, log_settings, summary, tables
from pose.training.loggers import build_loggers, closing

wandb = pytest.importorskip("wandb")
UNTUNED = {"ppl@256": Estimate(3.0, 2.5, 3.5, 4), "tail_ppl@512": Estimate(math.inf, None, None, 1)}
EXTENDED = {
    "ppl@256": Estimate(3.125, 2.5, 3.75, 4),
    "tail_ppl@512": Estimate(4.0, 3.5, 4.5, 4),
    "tail_ppl@1024": Estimate(5.0, 4.5, 5.5, 4),
    "passkey@1024": Estimate(1.0, 0.75, 1.0, 10),
    "position_ppl@0-512": Estimate(4.5, 4.0, 5.0, 4),
    "position_ppl@512-1024": Estimate(5.5, 5.0, 6.0, 4),
    "needle@1024": Estimate(0.5, 0.25, 0.75, 8),
    "needle@1024/0.0": Estimate(1.0, 0.5, 1.0, 4),
    "needle@1024/0.5": Estimate(0.0, 0.0, 0.5, 4),
    "ruler/niah_single_1@1024": Estimate(0.75, 0.5, 1.0, 8),
    "ruler/niah_multikey_1@1024": Estimate(0.25, 0.0, 0.5, 8),
    "harness/boolq": Estimate(0.625, 0.5, 0.75, 100),
}
SETTINGS = {
    "method": "pose + yarn",
    "sampler": "pose",
    "rope": "yarn",
    "target_len": 1024,
    "cfg": {"rope": {"factor": 4}},
}
NUMBERS = {
    "train/loss": 2.0,
    "cost/seconds": 9.5,
    "cost/tokens": 4096,
    "coverage/pair_share": 0.5,
    "tail_ppl@1024": 5.0,
}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run with its files: two plots, one of which is red, and a picture of somebody else."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    folder = tmp_path / "run"
    for name in ("plots", "model"):
        (folder / name).mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(NUMBERS | {"extended": {"tail_ppl@1024": 5.0}}))
    (folder / "coverage.csv").write_text(
        "distance,probability,pair_share\n" + "".join(f"{d},{0.25 if d > 400 else 1},0.00125\n" for d in range(1, 801))
    )
    for name in ("results.csv", "config.yaml", "model/README.md", "model/model.safetensors"):
        (folder / name).write_text(name)
    for name, color in (("needle", (255, 0, 0, 255)), ("coverage", (0, 255, 0, 255)), ("mine", (0, 0, 255, 255))):
        Image.new("RGBA", (8, 4), color).save(folder / "plots" / f"{name}.png")
    return Finished(folder, 20, SETTINGS, {"untuned": UNTUNED, "extended": EXTENDED}, window=256, target=1024)


def left_by(run, name="wandb", **options):
    """Logs a run as a training does."""
    options = {"project": "pose", "offline": True} | options if name == "wandb" else {}
    loggers = build_loggers(name, run.folder, options=options)
    with closing(loggers):
        log_settings(loggers, run.settings)
        for logger in loggers:
            logger.log_metrics({"train/loss": 2.0, "cost/tokens": 2048.0}, step=9)
        log_finished(loggers, run)


def test_single_numbers_are_grouped(finished):
    found = summary(finished)
    assert found == {
        "cost/seconds": 9.5, "cost/tokens": 4096, "coverage/pair_share": 0.5,
        "eval/untuned/ppl@256": 3.0, "eval/untuned/window/ppl": 3.0, "eval/untuned/tail_ppl@512": math.inf,
        "eval/ppl@256": 3.125, "eval/window/ppl": 3.125, "eval/tail_ppl@512": 4.0,
        "eval/tail_ppl@1024": 5.0, "eval/target/tail_ppl": 5.0, "eval/passkey@1024": 1.0, "eval/target/passkey": 1.0,
        "eval/needle@1024": 0.5, "eval/target/needle": 0.5,
        "eval/ruler/niah_single_1@1024": 0.75, "eval/target/ruler/niah_single_1": 0.75,
        "eval/ruler/niah_multikey_1@1024": 0.25, "eval/target/ruler/niah_multikey_1": 0.25,
        "eval/harness/boolq": 0.625,
    }  # fmt: skip


def test_a_model_whose_target_is_its_window_has_both_names(finished):
    """As that of an evaluation which was not extended: it is compared with others at their windows."""
    found = summary(dataclasses.replace(finished, window=1024))
    assert found["eval/window/passkey"] == found["eval/target/passkey"] == found["eval/passkey@1024"]


def test_curves_have_a_row_for_each_length_and_position(finished):
    found = curves(finished.results)
    assert found["eval/length"] == {
        256: {"eval/untuned/ppl": 3.0, "eval/ppl": 3.125},
        512: {"eval/untuned/tail_ppl": math.inf, "eval/tail_ppl": 4.0},
        1024: {"eval/tail_ppl": 5.0, "eval/passkey": 1.0, "eval/needle": 0.5, "eval/ruler": 0.5},
    }
    assert found["eval/position"] == {256: {"eval/position_ppl": 4.5}, 768: {"eval/position_ppl": 5.5}}


def test_nothing_measured_leaves_no_table_of_it(finished):
    (finished.folder / "coverage.csv").unlink()
    run = Finished(finished.folder, 1, SETTINGS, {"extended": {"ppl@256": Estimate(3.0)}}, 256, 1024)
    assert tables(run) == {
        "tables/by_length": (
            ["model", "metric", "length", "value", "low", "high", "num"],
            [["extended", "ppl", 256, 3.0, None, None, 1]],
        )
    }


def test_a_stored_run_of_wandb_has_everything(finished):
    left_by(finished)
    found = read_run(finished.folder)
    assert found.config["method"] == "pose + yarn" and found.config["cfg"] == {"rope": {"factor": 4}}
    assert found.run.project == "pose" and found.run.job_type == "train" and not found.run.run_group
    # metrics of the training, under its steps
    assert [row["trainer/global_step"] for row in found.history if "train/loss" in row] == [9]
    # single numbers
    for name, value in summary(finished).items():
        assert found.summary[name] == value, name
    assert found.summary["cost/tokens"] == 4096, "the last value that was logged"
    # curves: a row for each length, drawn over it
    rows = [row for row in found.history if "eval/length" in row]
    assert [(row["eval/length"], row.get("eval/tail_ppl")) for row in rows] == [(256, None), (512, 4.0), (1024, 5.0)]
    assert found.metrics["eval/tail_ppl"].step_metric == "eval/length" and found.metrics["eval/tail_ppl"].summary.none
    assert found.metrics["eval/position_ppl"].step_metric == "eval/position"
    assert "eval/tail_ppl" not in found.summary
    # tables
    columns, lengths = found.table("tables/by_length")
    assert columns == ["model", "metric", "length", "value", "low", "high", "num"]
    assert ["extended", "tail_ppl", 512, 4.0, 3.5, 4.5, 4] in lengths and len(lengths) == 9
    assert ["untuned", "tail_ppl", 512, None, None, None, 1] in lengths, "JSON has no infinity"
    assert ["extended", "ruler/niah_single_1", 1024, 0.75, 0.5, 1.0, 8] in lengths
    assert found.table("tables/by_depth") == (
        ["model", "metric", "length", "depth", "value", "low", "high", "num"],
        [
            ["extended", "needle", 1024, 0.0, 1.0, 0.5, 1.0, 4],
            ["extended", "needle", 1024, 0.5, 0.0, 0.0, 0.5, 4],
        ],
    )
    assert found.table("tables/by_position")[1][1] == ["extended", 512, 1024, 5.5, 5.0, 6.0, 4]
    assert found.table("tables/benchmarks")[1] == [["extended", "harness/boolq", 0.625, 0.5, 0.75, 100]]
    columns, bins = found.table("tables/coverage")
    assert columns == ["from", "to", "probability", "pair_share"] and len(bins) == 400
    assert bins[0] == [1, 2, 1.0, 0.0025] and bins[-1] == [799, 800, 0.25, 0.0025]
    # figures
    for name, color in (("needle", (255, 0, 0)), ("coverage", (0, 255, 0))):
        image = found.summary[f"figures/{name}"]
        assert (image["width"], image["height"]) == (8, 4)
        assert Image.open(found.folder / "files" / image["path"]).convert("RGB").getpixel((0, 0)) == color
    assert "figures/mine" not in found.summary


def test_wandb_that_is_disabled_takes_everything_and_keeps_nothing(finished, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    left_by(finished)
    assert not (finished.folder / "wandb").exists() and wandb.run is None


def artifacts(run):
    found = [one for one in read_run(run.folder).artifacts if one.type in ("results", "model")]
    return {one.type: (one, {entry.path: entry.local_path for entry in one.manifest.contents}) for one in found}


def test_the_model_card_and_the_metrics_are_an_artifact_and_the_weights_on_request(finished):
    left_by(finished)
    ((kind, (artifact, files)),) = artifacts(finished).items()
    assert kind == "results" and set(files) == {"README.md", "metrics.json", "results.csv", "config.yaml"}
    assert json.loads(artifact.metadata) == {name: SETTINGS[name] for name in SETTINGS if name != "cfg"}
    with open(files["README.md"]) as card:
        assert card.read() == "model/README.md"


def test_weights_are_not_copied(finished):
    run = Finished(**(vars(finished) | {"with_weights": True}))
    left_by(run, log_weights=True)
    _, files = artifacts(run)["model"]
    assert files["model.safetensors"] == str(run.folder / "model" / "model.safetensors")
    assert set(files) == {"README.md", "model.safetensors"}


def test_tensorboard_has_figures_and_hparams(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    left_by(finished, "tensorboard")
    events = accumulator.EventAccumulator(str(finished.folder / "tensorboard")).Reload()
    for name, value in summary(finished).items():
        (*_, last) = events.Scalars(name)
        assert (last.step, last.value) == (20, pytest.approx(value)), name
    (image,) = events.Images("figures/needle")
    assert (image.step, image.width, image.height) == (20, 8, 4)
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    assert (pixels == (255, 0, 0)).all()
    stored = events.summary_metadata
    data = HParamsPluginData.FromString(stored["_hparams_/session_start_info"].plugin_data.content)
    hparams = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in data.session_start_info.hparams.items()
    }
    assert hparams["method"] == "pose + yarn" and hparams["target_len"] == 1024 and hparams["cfg/rope/factor"] == 4
    experiment = HParamsPluginData.FromString(stored["_hparams_/experiment"].plugin_data.content).experiment
    columns = {info.name.tag for info in experiment.metric_infos}
    assert {"eval/target/tail_ppl", "eval/window/ppl", "eval/untuned/window/ppl", "cost/seconds"} <= columns
    assert "hp_metric" not in columns | set(events.Tags()["scalars"]) and "eval/tail_ppl@512" not in columns


def test_metrics_csv_is_as_it_was_logged(finished):
    """It has what was logged step by step; results.csv has the rest."""
    left_by(finished, "csv")
    assert (finished.folder / "metrics.csv").read_text().splitlines()[1:] == ["2048.0,9,2.0"]
    assert isinstance(build_loggers("csv", finished.folder)[0], CSVLogger)
