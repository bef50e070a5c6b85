"""What Hydra calls beside a job (conf/train.yaml). Nothing heavy is imported before it is needed."""

import logging
import os
import signal
from pathlib import Path

from hydra.experimental.callback import Callback

from pose.files import REPOSITORY
from pose.training import signals

log = logging.getLogger(__name__)


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
    """The workers of a sweep, on other machines too, find this package from any folder.

    joblib's end by themselves at Ctrl-C, each with a checkpoint, and take no further job: here they are waited for.
    """

    def __init__(self):
        self.requests = signals.Requests(self._announce, self._end_at_once)

    def on_multirun_start(self, config, **kwargs):
        """Adds the repository to the path of the processes that are to come, and lets joblib's end by themselves.

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
        if signals.are_beside_each_other(config.hydra):
            signals.install(self.requests, (signal.SIGINT,))

    def on_multirun_end(self, config, **kwargs):
        """Ends the sweep where it was asked to stop.

        Raises:
            SystemExit: with the status of Ctrl-C.
        """
        if self.requests.first is not None:
            from pose.training.launch import sweep_command

            log.error(f"Stopped by Ctrl-C. To go on: {sweep_command(['resume=auto'], config.hydra)}")
            raise SystemExit(signals.STATUS_OF_INTERRUPT)

    def _announce(self, number: int):
        log.info("Ctrl-C: waiting for the jobs that are at work (Ctrl-C once more: not)")

    def _end_at_once(self):
        raise SystemExit(signals.STATUS_OF_INTERRUPT)
