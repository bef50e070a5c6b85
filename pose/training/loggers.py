"""Where a run's metrics go: metrics.csv always, TensorBoard or W&B beside it."""

import configparser
import contextlib
import csv
import importlib.util
import inspect
import logging
import netrc
import os
import re
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from pose.errors import ConfigError, first_line, require_choice
from pose.files import atomic_file, short_name
from pose.training.compat import without_anonymous

log = logging.getLogger(__name__)

NAMES = ("csv", "tensorboard", "wandb")
WANDB_ID = re.compile("[A-Za-z0-9_-]{1,64}")
OWN_OPTIONS = {"run_name", "offline", "log_weights"}  # of logger=wandb beside those of wandb.init
REFUSED = re.compile(r"returned error 40[134]\b")  # by W&B, not by a proxy before it
BEFORE = -1  # the step of what is measured before the first one
MAX_NAME = 128  # characters of a name or a group in W&B


class MetricsWriter(ExperimentWriter):
    """Writes metrics.csv. What it holds is never lost: it is replaced in one step, where Lightning removes it first.

    Where a new metric gives it another column it is written again; else rows are added to it.
    """

    def __init__(self, log_dir: str):
        super().__init__(log_dir)
        self._columns: list[str] | None = None  # of the file; None while it is of a run before

    def _check_log_dir_exists(self):
        """Lightning's removes the file."""

    def save(self):
        """Writes the rows that have been logged since the last time."""
        if not self.metrics:
            return
        self._record_new_keys()
        if self.metrics_keys != self._columns:
            rows: list[dict] = []
            if self._columns is not None:
                with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
            with atomic_file(self.metrics_file_path, newline="") as file:
                writer = csv.DictWriter(file, self.metrics_keys)
                writer.writeheader()
                writer.writerows([*rows, *self.metrics])
            self._columns = list(self.metrics_keys)
        else:
            with open(self.metrics_file_path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
        self.metrics = []


class MetricsLogger(CSVLogger):
    """Lightning's CSVLogger with `MetricsWriter`."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = MetricsWriter(self.log_dir)
        return self._experiment


class WandbRunLogger(WandbLogger):
    """Lightning's WandbLogger. Where W&B's server cannot be reached when its run begins, the run is an offline one.

    So are those of later jobs of the process, each of which would wait as long.
    """

    unreachable = ""  # why, once it was

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        import wandb
        from wandb.errors import AuthenticationError, CommError, UsageError

        try:
            if self._experiment is None and WandbRunLogger.unreachable and self._wandb_init.get("mode") is None:
                self._go_offline()
            return super().experiment
        except (AuthenticationError, UsageError, CommError, TimeoutError) as error:
            if isinstance(error, AuthenticationError | UsageError) or REFUSED.search(str(error)):
                raise ConfigError(
                    f"logger=wandb cannot begin a run: {first_line(error)}. `wandb login` sets up an account, "
                    "logger.entity and logger.project are to be its own; logger.offline=true needs none"
                ) from error
            WandbRunLogger.unreachable = first_line(error)
            wandb.teardown()  # of the process that holds the run's id
            self._go_offline()
            return super().experiment

    def _go_offline(self):
        log.warning(
            f"W&B cannot be reached ({WandbRunLogger.unreachable}): the run is logged offline, and `wandb sync "
            f"{self.save_dir}/wandb/offline-run-*` sends it later"
        )
        self._wandb_init["mode"] = "offline"


def build_loggers(
    name: str,
    run_dir: Path,
    step: int = 0,
    *,
    goes_on: bool = False,
    options: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> list[Logger]:
    """metrics.csv always, and what the group `logger` adds.

    Args:
        name: csv (adds nothing), tensorboard or wandb.
        run_dir: of the run.
        step: from which training goes on; what TensorBoard has from there on is hidden. At 0 that is all it has, of a
            run that left no checkpoint.
        goes_on: whether the run may have one of W&B already.
        options: of `wandb.init`, and `offline`, `run_name`, `log_weights`. A job of a sweep is of the sweep's group.
        title: of a run of W&B that has no `run_name` and is no job of a sweep, which are called by their overrides.

    Raises:
        ConfigError: an unknown name or option, options of a logger that takes none, a value that is not accepted, or
            one id of W&B for the jobs of a sweep.
    """
    options = _checked(name, options)
    loggers: list[Logger] = [MetricsLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)]
    if name == "tensorboard":
        loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=step or BEFORE))
    elif name == "wandb":
        group, job = _of_sweep(run_dir)
        if options.get("id") and group:
            raise ConfigError(f"logger.id={options['id']} is one run of W&B for all jobs of a sweep: leave it out")
        run_id = _kept_id(run_dir / ".wandb_id") if goes_on else None
        # One that goes on keeps its name, which may have been changed in W&B
        named = {"group": group, "job_type": "train", "run_name": (job or title) if run_id is None else None}
        if run_id is None or options.get("id"):
            run_id = _keep_id(run_dir, options.get("id"))
        loggers.append(_wandb(options, named, run_dir, run_id))
    return loggers


def dashboards_of(
    name: str, run_dir: Path, models: Sequence[str], options: Mapping[str, Any] | None = None
) -> dict[str, list[Logger]]:
    """What the group `logger` adds for an evaluation: of each model a run of its own; none for csv.

    Args:
        name: csv, tensorboard or wandb.
        run_dir: of the evaluation.
        models: their names, by which the runs are called. Several are a group, which has the name of the folder.
        options: of `wandb.init`, `offline` and `run_name`.

    Raises:
        ConfigError: as of `build_loggers`; a name or an id for several runs, or weights, of which an evaluation leaves
            none.
    """
    options = _checked(name, options)
    if name == "tensorboard":
        found: dict[str, list[Logger]] = {}
        taken: Counter[str] = Counter()
        for model in models:
            folder = model.replace("/", " ").strip(". ") or "model"
            taken[folder] += 1
            if taken[folder] > 1:  # of ../run and run
                folder += f" ({taken[folder]})"
            found[model] = [TensorBoardLogger(run_dir, name="tensorboard", version=folder)]
        return found
    if name != "wandb":
        return {m: [] for m in models}
    if options.get("log_weights"):
        raise ConfigError("logger.log_weights=true is not accepted: an evaluation leaves no weights")
    if options.get("run_name") and len(models) > 1:
        raise ConfigError(
            f"logger.run_name={options['run_name']} is one name for {len(models)} checkpoints: give them names in ckpt "
            "('ckpt={base:assets/tiny,mine:RUN}')"
        )
    sweep = _of_sweep(run_dir)[0]
    if (run_id := options.get("id")) and (sweep or len(models) > 1):
        raise ConfigError(f"logger.id={run_id} is one run of W&B for several checkpoints: leave it out")
    group = sweep or (short_name(run_dir).replace("/", " ") if len(models) > 1 else None)
    named = {"group": group, "job_type": "evaluate"}
    return {m: [_wandb(options, named | {"run_name": m[-MAX_NAME:]}, run_dir, run_id or _random_id())] for m in models}


def _checked(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a logger that may have them."""
    require_choice("logger.name", name, NAMES)
    if options and name != "wandb":
        raise ConfigError(f"logger.{next(iter(options))} is not accepted: logger={name} takes name alone")
    given = dict(options or {})
    require_choice("logger.log_weights", given.get("log_weights", False), (True, False))
    for key in ("project", "entity", "group", "run_name", "job_type", "notes", "id"):
        if given.get(key) is not None and not isinstance(given[key], str):
            raise ConfigError(f"logger.{key}={given[key]!r} is not accepted: give text (a number in quotes: '\"5\"')")
    if given.get("id") and not WANDB_ID.fullmatch(given["id"]):
        raise ConfigError(f"logger.id={given['id']} is not accepted: give up to 64 letters, digits, - and _")
    tags = given.get("tags")
    if tags is not None and (isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags)):
        raise ConfigError(f"logger.tags={tags!r} is not accepted: give a list of texts, 'logger.tags=[one,two]'")
    package = {"wandb": "wandb", "tensorboard": "tensorboard"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(f"logger={name} needs the package {package}: pip install {package}, or choose logger=csv")
    if name == "wandb":
        import wandb

        accepted = (OWN_OPTIONS | inspect.signature(wandb.init).parameters.keys()) - {"dir", "name"}
        for key in sorted(given.keys() - accepted):
            raise ConfigError(f"logger.{key} is not accepted: logger=wandb takes {', '.join(sorted(accepted))}")
    return given


@contextlib.contextmanager
def closing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Around a job: its loggers are finished however it ends, so that the next job of a sweep has its own.

    Lightning's WandbLogger would log into whatever W&B run is open.
    """
    try:
        yield
    except BaseException:
        for logger in loggers:
            try:
                _finish(logger, "failed")
            except Exception as error:  # of a disk or a network that may be what has stopped the job
                log.warning(f"{type(logger).__name__} could not be finished: {first_line(error)}")
        raise
    for logger in loggers:
        _finish(logger, "success")


def _finish(logger: Logger, status: str):
    logger.finalize(status)
    wandb = sys.modules.get("wandb")
    run = None if wandb is None else wandb.run
    if isinstance(logger, WandbLogger) and run is not None and run.id == logger.version:
        run.finish(exit_code=0 if status == "success" else 1)


def _wandb(given: Mapping[str, Any], named: Mapping[str, str | None], run_dir: Path, run_id: str) -> Logger:
    """W&B's logger.

    Args:
        given: the group `logger`.
        named: group, job_type and run_name, where they are not given.
        run_dir: where it writes.
        run_id: of its run.
    """
    options = {"resume": "allow"} | dict(given) | {key: given.get(key) or name for key, name in named.items()}
    options["id"] = run_id
    options.pop("log_weights", None)  # at the end of the run
    options["name"] = options.pop("run_name")
    offline = options.pop("offline", None)
    if offline is None:
        offline = not has_wandb_account()
    is_disabled = os.environ.get("WANDB_MODE") == "disabled"
    # Not by Lightning's `offline`: it sets the environment for good, which wandb may have read before
    options.setdefault("mode", "disabled" if is_disabled else "offline" if offline else None)
    return without_anonymous(WandbRunLogger(save_dir=run_dir, **options))


def _random_id() -> str:
    return uuid.uuid4().hex[:8]


def _keep_id(run_dir: Path, given: str | None) -> str:
    """Of a run of W&B, a new one if none is given, kept in its folder, so that it goes on under it."""
    run_id = given or _random_id()
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # then the next start is another run of W&B
        rank_zero_only((run_dir / ".wandb_id").write_text)(run_id)
    return run_id


def _of_sweep(run_dir: Path) -> tuple[str | None, str | None]:
    """Group and name of a job of a sweep; None where it is none, and for a name of nothing.

    The sweep's folder is known by the file that Hydra writes into it, also to the processes of a job, and where a job
    goes on alone. The name is what the job was given and not all jobs were.
    """
    sweep, name = run_dir.absolute().parent, None
    if not (sweep / "multirun.yaml").is_file():
        return None, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        of_all = yaml.safe_load((sweep / "multirun.yaml").read_text(encoding="utf-8"))["hydra"]["overrides"]["task"]
        given = yaml.safe_load((run_dir / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
        name = " ".join(override for override in given if override not in of_all)[:MAX_NAME]
    return short_name(sweep).replace("/", " ")[:MAX_NAME], name or None


def _kept_id(file: Path) -> str | None:
    if not file.exists():
        return None
    with contextlib.suppress(OSError, ValueError):
        if WANDB_ID.fullmatch(text := file.read_text(encoding="utf-8").strip()):
            return text
    log.warning(f"{file} does not hold the id of a W&B run: the run gets a new one")
    return None


def has_wandb_account() -> bool:
    """Whether a key of W&B is in the environment, or in netrc for its server, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    given = os.environ.get("NETRC")
    try:
        known = netrc.netrc(None if given is None else os.path.expanduser(given))
    except (OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urlsplit(_wandb_server()).netloc) is not None


def _wandb_server() -> str:
    """The address of the server: of the environment, of wandb's settings file, where `wandb login --host` notes it."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(folder / "settings")
    noted = settings.get("default", "base_url", fallback="https://api.wandb.ai")
    return os.environ.get("WANDB_BASE_URL") or noted
