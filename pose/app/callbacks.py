"""What Hydra calls beside a job (hydra.callbacks in conf/). Nothing heavy is imported before it is needed."""

import atexit
import logging
import os
import signal
import tempfile
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pose.files import REPOSITORY
from pose.training import signals

log = logging.getLogger(__name__)


class Folder(Callback):
    """Names the folder of a run or a sweep, and looks at it before Hydra makes it, whose errors would be tracebacks.

    Hydra turns errors of a callback into warnings, but for SystemExit.

    Args:
        is_named: a job begins by saying where it writes to.
    """

    def __init__(self, is_named: bool = True):
        self.is_named = is_named

    def on_run_start(self, config, **kwargs):
        """Looks at the folder of one run."""
        _check_folder("hydra.run.dir", config)

    def on_multirun_start(self, config, **kwargs):
        """Looks at the folder of a sweep."""
        _check_folder("hydra.sweep.dir", config)

    def on_job_start(self, config, **kwargs):
        """Says where the job writes to, before the seconds in which torch and the like are imported."""
        is_first = all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "SLURM_PROCID"))
        if self.is_named and is_first and config.hydra.output_subdir is not None:  # null: its parent has said so
            folder, here = Path(config.hydra.runtime.output_dir), config.hydra.runtime.cwd
            log.info(f"Folder      {folder.relative_to(here) if folder.is_relative_to(here) else folder}")


def _check_folder(key: str, config):
    try:
        folder = OmegaConf.select(config, key)
    except OmegaConfBaseException:  # Hydra says what cannot be resolved
        return
    reason = None
    if not str(folder or "").strip():  # Hydra would write into the folder that one stands in
        reason = f"{key} is empty: give a folder, or leave it out (is a shell variable in it not set?)"
    else:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = f"{key}={folder} cannot be written to ({error.strerror or error}): give another folder"
    if reason is not None:  # to stderr: the log is in the folder
        raise SystemExit(f"ConfigError: {reason}")


class SweepTable(Callback):
    """sweep.csv after every job of a multirun, and at its end one table and report.html."""

    def on_multirun_start(self, config, **kwargs):
        """Hydra leaves out the end of a sweep in which a job failed: then the end of the process stands for it."""
        atexit.register(self.on_multirun_end, config)

    def on_job_end(self, config, job_return, **kwargs):
        """Adds the job to sweep.csv."""
        if config.hydra.mode.name == "MULTIRUN":
            from pose.reporting.sweep import write_sweep

            write_sweep(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config, **kwargs):
        """Shows all jobs side by side, in the terminal and on a page."""
        from pose.app.report import has_jobs, write_beside
        from pose.reporting.sweep import show_sweep

        atexit.unregister(self.on_multirun_end)
        folder = Path(config.hydra.sweep.dir)
        show_sweep(folder)
        if has_jobs(folder):  # of which none may be complete
            write_beside(folder)
            log.info(f"Page        {folder}/report.html")


class Workers(Callback):
    """The workers of a sweep, on other machines too, find this package from any folder.

    joblib's end by themselves at Ctrl-C, each with a checkpoint, and take no further job: here they are waited for.
    """

    def __init__(self):
        self.requests = signals.Requests(self._announce, self._end_at_once)

    def on_multirun_start(self, config, **kwargs):
        """Adds the repository to the path of the processes that are to come, and lets joblib's end by themselves."""
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
        log.info("Ctrl-C: waiting for the running jobs (Ctrl-C once more: without waiting)")

    def _end_at_once(self):
        raise SystemExit(signals.STATUS_OF_INTERRUPT)
