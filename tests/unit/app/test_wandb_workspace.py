"""The command that saves a view of a project in W&B. Nothing here has network: the view is read as it would be sent."""

import importlib.util
import json
from pathlib import Path

import pytest

from pose.app import wandb_workspace
from pose.evaluation.task import Estimate
from pose.reporting.dashboard import Finished, curves, summary
from pose.training.objectives import LongShort, SelfDistill

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None, reason="wandb-workspaces is not installed"
)


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    file = tmp_path_factory.mktemp("view") / "view.json"
    wandb_workspace.main(["long", "--entity", "team", "--json", str(file)])
    return json.loads(file.read_text())[0]


@pytest.fixture
def panels(view):
    """Type and settings of each panel, by section."""
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    return {one["name"]: [(panel["viewType"], panel["config"]) for panel in one["panels"]] for one in sections}


@needs_package
def test_the_view_is_of_the_project(view):
    assert {name: view[name] for name in ("entity", "project", "name")} == {
        "entity": "team", "project": "long", "name": "PoSE",
    }  # fmt: skip


@needs_package
def test_curves_are_drawn_over_what_is_logged(panels, tmp_path):
    """A panel for every family that `curves` logs, over its own axis."""
    drawn = {(config["xAxis"], *config["metrics"]) for kind, config in panels["Curves by length"]}
    families = ("tail_ppl", "ppl", "passkey", "needle", "needle_gain", "sliding_ppl", "ruler/a", "needle_gain_kept")
    estimates = {f"{family}@512": Estimate(1.0) for family in families} | {"position_ppl@0-512": Estimate(1.0)}
    logged = {(x, name) for x, rows in curves({"extended": estimates}).items() for row in rows.values() for name in row}
    assert len(logged) == len(families) + 1 and logged <= drawn
    by_title = {config["chartTitle"]: config for _, config in panels["Curves by length"]}
    length = by_title["Perplexity of the last tokens"]
    assert length["xLogScale"] and length["yLogScale"] and not by_title["Passkey accuracy"]["yLogScale"]


@needs_package
def test_methods_are_compared_by_the_keys_that_runs_have(panels, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"cost/seconds": 1.0}))
    estimates = {f"{family}@512": Estimate(1.0) for family in ("tail_ppl", "passkey", "needle_gain")}
    logged = summary(Finished(tmp_path, 1, {}, {"extended": estimates}, window=256, target=512))
    bars = [config for kind, config in panels["Sampler x method"] if kind == "Bar Chart"]
    assert [config["metrics"] for config in bars] == [[name] for name in logged if name.startswith("eval/target/")]
    assert all(
        (bar["groupBy"], bar["groupAgg"], bar["groupArea"]) == ("method.value", "mean", "minmax") for bar in bars
    )
    (parallel,) = (config for kind, config in panels["Sampler x method"] if kind == "Parallel Coordinates Plot")
    accessors = [column["accessor"] for column in parallel["columns"]]
    assert accessors[:5] == [f"config:{key}.value" for key in ("model", "target_len", "sampler", "rope", "objective")]
    assert accessors[5:] == [f"summary:{name}" for name in logged if name.startswith("eval/target/")]


@needs_package
def test_costs_figures_and_tables_have_panels(panels):
    bars = {config["metrics"][0] for kind, config in panels["Cost"] if kind == "Bar Chart"}
    assert bars == {"cost/seconds", "cost/tokens", "cost/flops", "cost/peak_memory_gib"}
    assert ("cost/flops", ["train/loss"]) in [(c.get("xAxis"), c.get("metrics")) for _, c in panels["Cost"]]
    shown = {key for _, config in panels["Figures"] for key in config["mediaKeys"]}
    assert {"figures/evaluation", "figures/needle", "figures/coverage"} <= shown
    tables = json.dumps(panels["Tables"])
    assert all(f'"tables/{name}"' in tables for name in ("by_length", "by_depth", "by_position", "coverage"))
    watched = [config["metricRegex"] for _, config in panels["While it trains"] if "metricRegex" in config]
    assert "^val/tail_ppl@[0-9]+$" in watched


@needs_package
def test_every_loss_that_is_logged_has_a_panel(panels):
    """Under its own name, with a title that holds for every objective."""
    titles = {
        config["metrics"][0]: config["chartTitle"] for _, config in panels["While it trains"] if config.get("metrics")
    }
    parts = {f"train/loss_{part}" for objective in (SelfDistill, LongShort) for part in objective.parts}
    found = {name for name in titles if name.startswith("train/loss")}
    assert found == parts | {"train/loss", "train/loss_text", "train/loss_retrieval"}
    assert {name for name, title in titles.items() if "nats" in title} == {"train/loss_lm", "train/loss_kl"}
    assert titles["train/loss"] == "Training objective (what is minimised)"


@needs_package
def test_the_table_of_runs_begins_with_method_and_result(view):
    (runs,) = view["spec"]["section"]["runSets"]
    columns = runs["runFeed"]["columnOrder"]
    assert columns[0] == "run:displayName" and columns[3:5] == ["config:sampler.value", "config:rope.value"]
    assert "summary:eval/target/tail_ppl" in columns and columns[-1] == "summary:cost/seconds"
    assert runs["grouping"] == []


@needs_package
def test_the_matrix_is_a_view_of_its_own(tmp_path):
    """A table by sampler and method, within one model and target: means over others would say nothing."""
    wandb_workspace.main(["long", "--name", "Mine", "--json", str(tmp_path / "views.json")])
    first, matrix = json.loads((tmp_path / "views.json").read_text())
    assert (first["name"], matrix["name"]) == ("Mine", "Mine, matrix")
    (runs,) = matrix["spec"]["section"]["runSets"]
    assert [key["name"] for key in runs["grouping"]] == [
        "model.value", "target_len.value", "sampler.value", "rope.value",
    ]  # fmt: skip
    names = [
        [one["name"] for one in each["spec"]["section"]["panelBankConfig"]["sections"]] for each in (first, matrix)
    ]
    assert names[0] == names[1] and "Sampler x method" in names[1]


@needs_package
def test_runs_are_grouped_by_keys_of_their_config(tmp_path):
    wandb_workspace.main(
        ["long", "--group-by", "sampler", "cfg.pose.num_chunks", "--json", str(tmp_path / "view.json")]
    )
    (one,) = json.loads((tmp_path / "view.json").read_text())
    (runs,) = one["spec"]["section"]["runSets"]
    assert [(key["section"], key["name"]) for key in runs["grouping"]] == [
        ("config", "sampler.value"), ("config", "cfg.value.pose.num_chunks"),
    ]  # fmt: skip


def says(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        wandb_workspace.main(list(arguments))
    assert end.value.code == 1
    return capsys.readouterr().err


@needs_package
def test_without_an_account_it_says_how_to_get_one(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "wandb login" in says(capsys, "long")


@needs_package
def test_what_wandb_does_not_take_is_one_line(monkeypatch, capsys):
    import wandb_workspaces.workspaces as ws

    def refuse(self):
        assert (self.project, self.entity) == ("long", "team")
        raise RuntimeError("permission denied\nlong trace")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(ws.Workspace, "save", refuse)
    said = says(capsys, "long", "--entity", "team")
    assert "DataError: W&B has not taken the view of long: permission denied" in said and "long trace" not in said


@needs_package
@pytest.mark.parametrize(("given", "names"), [((), ["PoSE", "PoSE, matrix"]), (("--group-by", "seed"), ["PoSE"])])
def test_each_view_is_saved(monkeypatch, given, names):
    import wandb_workspaces.workspaces as ws

    saved = []
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(ws.Workspace, "save", lambda self: saved.append(self.name) or self)
    monkeypatch.setattr(ws.Workspace, "url", "https://wandb.ai/x", raising=False)
    wandb_workspace.main(["long", "--entity", "team", *given])
    assert saved == names


@needs_package
def test_a_file_that_cannot_be_written_is_named(capsys, tmp_path):
    assert f"--json {tmp_path} cannot be written" in says(capsys, "long", "--json", str(tmp_path))


def test_a_package_that_is_missing_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = says(capsys, "long", "--json", str(tmp_path / "x.json"))
    assert "pip install wandb-workspaces" in said and not Path(tmp_path / "x.json").exists()


def test_a_project_without_a_name_is_refused(capsys):
    assert "the project is empty" in says(capsys, " ")
