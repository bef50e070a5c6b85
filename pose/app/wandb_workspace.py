"""The command `python -m pose.wandb_workspace PROJECT`: saved views of a project in W&B."""

import argparse
import importlib.util
import logging
from collections.abc import Sequence

from pose.app import command
from pose.errors import ConfigError, DataError, first_line
from pose.files import atomic_file

log = logging.getLogger("pose.app.wandb_workspace")

USAGE = """\
Saves two views of a project's runs in W&B: of each run (curves by length, sampler x method, training, cost), and the
matrix, whose runs are grouped by model, target, sampler and method (docs/WANDB.md). With --group-by one view, of these
groups. Each call saves new ones; older ones are deleted in W&B.

  python -m pose.wandb_workspace pose --entity TEAM
  python -m pose.wandb_workspace pose --entity TEAM --name Seeds --group-by seed
  python -m pose.wandb_workspace pose --json views.json        # what would be sent; needs no network"""
MATRIX = ("model", "target_len", "sampler", "rope")
PACKAGE = "wandb-workspaces"


def main(arguments: list[str] | None = None):
    """Saves the view that the arguments name, or writes what would be sent.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        "python -m pose.wandb_workspace", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("project", help="as in logger.project")
    parser.add_argument("--entity", help="your team, as in logger.entity (default: your default)")
    parser.add_argument("--name", default="PoSE", help="of the view (default: PoSE)")
    parser.add_argument(
        "--group-by", nargs="+", default=[], metavar="KEY",
        help="keys of the runs' config, such as sampler rope or cfg.pose.num_chunks: panels have a mean and a range of "
        "each group of runs",
    )  # fmt: skip
    parser.add_argument("--json", type=command.path, metavar="FILE", help="writes the views into a file, and ends")
    given = parser.parse_args(arguments)
    with command.running():
        if not given.project.strip():
            raise ConfigError("the project is empty: give the name that runs were logged to, such as pose")
        if importlib.util.find_spec("wandb_workspaces") is None:
            raise ConfigError(f"this needs the package {PACKAGE}, which is not installed: pip install {PACKAGE}")
        from pose.reporting.workspace import as_json, dashboard

        views = {given.name: given.group_by} if given.group_by else {given.name: (), f"{given.name}, matrix": MATRIX}
        if given.json is not None:
            try:
                with atomic_file(given.json) as file:
                    file.write(as_json([dashboard(given.project, given.entity or "", *view) for view in views.items()]))
            except OSError as error:
                raise DataError(f"--json {given.json} cannot be written: {error.strerror or error}") from error
            log.info(given.json)
            return
        for view in views.items():
            log.info(save(given.project, given.entity, *view))


def save(project: str, entity: str | None, name: str, group_by: Sequence[str] = ()) -> str:
    """Saves the view, and returns its address.

    Raises:
        ConfigError: there is no account.
        DataError: W&B does not take it; has its message.
    """
    from pose.reporting.workspace import dashboard
    from pose.training.loggers import has_wandb_account

    if not has_wandb_account():
        raise ConfigError(
            "no account of W&B is set up: run `wandb login`, or set WANDB_API_KEY; --json FILE needs none"
        )
    import wandb

    try:
        return dashboard(project, entity or str(wandb.Api().default_entity), name, group_by).save().url
    except Exception as error:  # of the network, the account, the project, the package
        raise DataError(f"W&B has not taken the view of {project}: {first_line(error)}") from error
