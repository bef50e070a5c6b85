"""The dashboard of a project in W&B: a saved view (docs/WANDB.md), built with the package wandb-workspaces.

Its panels read the names that `pose.reporting.dashboard` and the training log.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pose.evaluation.task import describe
from pose.reporting import plots
from pose.reporting.charts import better, capital
from pose.reporting.dashboard import CURVE_NAMES, CURVES, FIGURES

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

METHOD = ("model", "target_len", "sampler", "rope", "objective")  # keys of the config that runs differ in
COMPARED = ("tail_ppl", "passkey", "needle_gain")  # families, at the target, that methods are compared by
COSTS = {  # at the end of a run
    "cost/seconds": "Seconds of training",
    "cost/tokens": "Tokens",
    "cost/flops": "FLOPs",
    "cost/peak_memory_gib": "Peak memory (GiB)",
}
SPEED = {  # while it trains
    "cost/tokens_per_second": "Tokens per second",
    "cost/step_seconds": "Seconds of an optimizer step",
    "cost/mfu": "Model FLOPs utilisation",
    "cost/data_seconds": "Seconds of a step that wait for data",
}
TRAINING = {  # of what is logged, titles that hold for every objective
    key: title
    for key, title in plots.TRAINING.items()
    if key == "train/loss_lm" or key not in plots.CROSS_ENTROPY.values()
}
TABLES = ("by_length", "by_depth", "by_position", "benchmarks", "coverage")
MAX_RUNS = 50  # drawn in a panel


def dashboard(project: str, entity: str, name: str = "PoSE", group_by: Sequence[str] = ()) -> "Workspace":
    """The view, not saved yet.

    Args:
        project: that runs are logged to.
        entity: of the project; "" where it is not to be saved.
        name: of the view.
        group_by: keys of the config by which the table of runs is grouped, the outermost first; then panels have a mean
            and a range for each group.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import Config

    def over(x: str, y: str, title: str, **options: Any):
        return wr.LinePlot(title=title, x=x, y=[y], max_runs_to_show=MAX_RUNS, **options)

    def curve(x: str, panel: str):
        across = plots.PANELS[panel]
        scale = {"log_x": panel != "position", "log_y": "ppl" in panel or panel == "position"}
        return over(x, f"eval/{CURVE_NAMES.get(panel, panel)}", _title(panel), title_x=across, **scale)

    def at_target(family: str):
        return wr.BarPlot(
            title=f"{_title(family)} at the target; {better(describe(family).higher_is_better)}",
            metrics=[f"eval/target/{family}"],
            groupby=wr.Config("method"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=MAX_RUNS,
        )

    def axis(metric: Any, name: str):
        return wr.ParallelCoordinatesPlotColumn(metric, display_name=name)

    sections = {
        "Curves by length": [curve(x, panel) for x, panels in CURVES.items() for panel in panels],
        "Sampler x method": [
            *(at_target(family) for family in COMPARED),
            wr.ParallelCoordinatesPlot(
                title="Model, target, sampler, method, and what came of them",
                columns=[
                    *(axis(wr.Config(key), key) for key in METHOD),
                    *(axis(wr.SummaryMetric(f"eval/target/{family}"), family) for family in COMPARED),
                ],
            ),
        ],
        "Cost": [
            *(wr.BarPlot(title=title, metrics=[key], max_runs_to_show=MAX_RUNS) for key, title in COSTS.items()),
            *(over("trainer/global_step", key, title) for key, title in SPEED.items()),
            over("cost/flops", "train/loss", "Training objective by FLOPs", log_x=True),
            *(
                wr.ScatterPlot(
                    title=f"{_title(family)} at the target by seconds of training",
                    x=wr.SummaryMetric("cost/seconds"),
                    y=wr.SummaryMetric(f"eval/target/{family}"),
                )
                for family in COMPARED
            ),
        ],
        "While it trains": [
            *(over("trainer/global_step", key, capital(title)) for key, title in TRAINING.items()),
            *(
                wr.LinePlot(
                    title=f"{_title(family)}, while it trains",
                    x="trainer/global_step",
                    metric_regex=f"^val/{family}@[0-9]+$",
                    max_runs_to_show=MAX_RUNS,
                )
                for family in ("tail_ppl", "ppl", "passkey", "needle_gain")
            ),
            over("trainer/global_step", "val/short_ppl_increase", _title("short_ppl_increase")),
        ],
        "Figures": [wr.MediaBrowser(title=name, media_keys=[f"figures/{name}"], num_columns=2) for name in FIGURES],
        "Tables": [wr.WeavePanelSummaryTable(table_name=f"tables/{name}") for name in TABLES],
    }
    columns = [f"config:{key}.value" for key in METHOD] + [f"summary:eval/target/{family}" for family in COMPARED]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, panels=panels, is_open=i < 3, layout_settings=ws.SectionLayoutSettings(rows=3))
            for i, (title, panels) in enumerate(sections.items())
        ],
        settings=ws.WorkspaceSettings(max_runs=MAX_RUNS, group_by_prefix="first"),
        runset_settings=ws.RunsetSettings(
            pinned_columns=[*columns, "summary:cost/seconds"], groupby=[Config(key) for key in group_by]
        ),
    )


def as_json(workspaces: Sequence["Workspace"]) -> str:
    """What `save` sends of each: entity, project, name, and the specification of the view."""
    contents = []
    for workspace in workspaces:
        view = workspace._to_model()  # the package has no public name for it
        spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
        contents.append({"entity": view.entity, "project": view.project, "name": view.display_name, "spec": spec})
    return json.dumps(contents, indent=1) + "\n"


def _title(family: str) -> str:
    return capital(plots.title_of(family))
