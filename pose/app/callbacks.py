"""What Hydra calls beside a job (conf/train.yaml). Nothing heavy is imported before it is needed."""

import os
from pathlib import Path

from hydra.experimental.callback import Callback

from pose.files import REPOSITORY


class SweepTable(Callback):
    """sweep.csv after every job of a multirun, and one table at its end."""

    def on_job_end(self, config, job_return, **kwargs):
        """Adds the job to sweep.csv."""
        if config.hydra.mode.name == "MULTIRUN":
            from pose.reporting.sweep import write_sweep

            write_sweep(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config, **kwargs):
        """Shows all jobs side by side."""
        from pose.reporting.sweep import show_sweep

        show_sweep(Path(config.hydra.sweep.dir))


class Workers(Callback):
    """The workers of a sweep, on other machines too, find this package from any folder."""

    def on_multirun_start(self, config, **kwargs):
        """Adds the repository to the path of the processes that are to come.

        Raises:
            SystemExit: hydra.sweep.dir is empty; Hydra would write into the folder that one stands in. It turns other
                errors of a callback into warnings.
        """
        if not str(config.hydra.sweep.dir).strip():
            raise SystemExit(
                "ConfigError: hydra.sweep.dir is empty: give a folder, or leave it out (is a shell variable in it not "
                "set?)"
            )
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
