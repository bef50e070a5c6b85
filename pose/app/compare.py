"""Several checkpoints measured alike: what `evaluate.py` plans, measures and leaves behind."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from transformers import PretrainedConfig

from pose.app import measuring, models, runtime
from pose.app.preflight import SHIPPED, check_config
from pose.app.report import write_beside
from pose.app.schema import DTYPES, EvaluateConfig, to_options
from pose.app.trained import warn_of_trained
from pose.data.tokenizer import tokenizer_digest
from pose.errors import ConfigError, first_line
from pose.evaluation.memo import Outcomes, identity
from pose.evaluation.options import EvalOptions
from pose.evaluation.suite import Suite, default_lengths, out_of_reach, values
from pose.evaluation.task import Estimate
from pose.files import Memo, is_inside, locate, read_json, write_json
from pose.modeling.attention import resolve_backend
from pose.modeling.checkpoints.fingerprint import check_unchanged, fingerprint
from pose.modeling.guards import check_computing
from pose.modeling.layers import check_layers
from pose.modeling.load import build_model, check_weights, load_config, load_tokenizer, rope_geometry
from pose.modeling.rotary import target_len_of
from pose.modeling.speed import warn_of_emulated_bf16
from pose.reporting.dashboard import Finished, log_finished
from pose.reporting.plots import PANELS, plot_measured
from pose.reporting.results_csv import write_results
from pose.reporting.tables import comparison_tables, print_table
from pose.training import signals
from pose.training.folder import alone_in, check_kind
from pose.training.loggers import closing, dashboards_of

log = logging.getLogger(__name__)

Results = dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that has passed every check that needs no weights.

    Attributes:
        name: as it was given, or as it is to be called.
        path: folder or hub id of the model.
        config: of the model, unchanged.
        window: the model's own, before any scaling, in tokens.
        suite: what is measured.
        device, dtype: of the model.
        under: plain JSON that tells this model, as it is run, from every other.
    """

    name: str
    path: str
    config: PretrainedConfig
    window: int
    suite: Suite
    device: torch.device
    dtype: torch.dtype
    under: dict[str, Any]


def evaluate(cfg: DictConfig):
    """What `evaluate.py` does with a composed config."""
    with runtime.readable_errors(), signals.ending(lambda: _way_on(cfg)):
        check_config(cfg, EvaluateConfig)
        run_dir = runtime.run_folder()
        runtime.set_up(cfg)
        with alone_in(run_dir):
            check_kind(run_dir, "an evaluation")
            _evaluate(cfg, run_dir)


def _evaluate(cfg: DictConfig, run_dir: Path):
    candidates = plan_evaluation(cfg)
    options: Any = OmegaConf.to_container(cfg.logger)
    dashboards = dashboards_of(options.pop("name", None), run_dir, [c.name for c in candidates], options)
    runtime.save_config(cfg, run_dir)
    results: Results = {}
    took: dict[str, Any] = {}
    for candidate in candidates:
        with runtime.explained_memory_errors(cfg):
            results[candidate.name], took[candidate.name] = measure(cfg, candidate)
        save(cfg, run_dir, candidates, results, took)
    write_beside(run_dir)
    fill_dashboards(cfg, run_dir, candidates, results, dashboards)
    show(run_dir, candidates, results)


def plan_evaluation(cfg: DictConfig) -> list[Candidate]:
    """Checks the whole evaluation and prepares all but the weights.

    Raises:
        PoseError: what cannot work, before any long work.
    """
    check_config(cfg, EvaluateConfig)
    if OmegaConf.is_missing(cfg, "ckpt") or cfg.ckpt is None:
        raise ConfigError(
            "ckpt is not set: give a run folder, a Hugging Face folder, or a hub id (ckpt=assets/tiny), a list of "
            "them ('ckpt=[assets/tiny,RUN]'), or some with names ('ckpt={base:assets/tiny,mine:RUN}')"
        )
    to_options(cfg.eval, EvalOptions)
    named = _named(cfg.ckpt)
    device = _device(cfg.device)
    dtype = _dtype(cfg.dtype, device)
    warn_of_emulated_bf16(device, {"dtype": cfg.dtype}, "dtype=float32")
    attention = resolve_backend(models.attention_on(cfg.attention, device))
    outcomes = Outcomes(cfg.cache_dir, cfg.reuse)
    outcomes.require_writable()
    memo = Memo(Path(cfg.cache_dir).expanduser() / ".memo")
    found = []
    for name, given in named.items():
        given = models.convert_gguf(given, cfg.cache_dir) if given.endswith(".gguf") else given
        path = models.open_checkpoint(given)
        config = load_config(path, cfg.revision)
        check_layers(config)
        tokenizer = load_tokenizer(path, cfg.revision)
        models.check_vocabulary(tokenizer, config, path)
        check_weights(config, path, cfg.revision)
        found.append((name, path, config, tokenizer))
    windows = [rope_geometry(config).window for _, _, config, _ in found]
    if cfg.eval.lengths is None:  # the same ones for all
        targets = [target_len_of(config) for _, _, config, _ in found]
        cfg.eval.lengths = list(default_lengths(min(windows), max(targets)))
    candidates = []
    for (name, path, config, tokenizer), window in zip(found, windows, strict=True):
        suite = measuring.build_suite(
            to_options(cfg.eval, EvalOptions),
            tokenizer,
            window,
            target_len_of(config),
            cfg.cache_dir,
            config.vocab_size,
        )
        if suite is None:
            raise ConfigError(
                "eval.tasks is empty: choose eval=quick, perplexity, passkey, needle, needle_gain, ruler, harness"
            )
        weights = fingerprint(path, cfg.revision, memo)
        under = identity(weights, config, dtype=dtype, attention=attention, device=device)
        candidates.append(Candidate(name, path, config, window, suite, device, dtype, under))
    _share_documents(candidates)
    _say_whose_text(cfg, candidates)
    for candidate in candidates:
        warn_of_trained(candidate.name, candidate.path, candidate.suite)
    return candidates


def _say_whose_text(cfg: DictConfig, candidates: list[Candidate]):
    """Says where perplexity is of text that comes with this repository, and the models do not."""
    documents = cfg.eval.documents
    is_shipped = isinstance(documents, str) and is_inside(locate(documents), SHIPPED)
    is_measured = any(candidate.suite.document_ids for candidate in candidates)
    if is_measured and is_shipped and not all(is_inside(candidate.path, SHIPPED) for candidate in candidates):
        log.info(
            f"Perplexity is measured on {documents}, which comes with this repository. Your own text: "
            "eval.documents=FILE, a folder or a glob"
        )


def _share_documents(candidates: list[Candidate]):
    """Leaves the documents that are long enough for all: a tokenizer may make short what is long for another."""
    chosen = [c.suite.document_ids for c in candidates]
    differ = len({tokenizer_digest(c.suite.tokenizer) for c in candidates}) > 1
    if differ and any(chosen):
        log.info("The tokenizers differ: compare bits per byte, not perplexity, which is by token")
    repeated = next((name for ids in chosen for name, num in Counter(ids).items() if num > 1), None)
    if repeated is not None and differ:
        raise ConfigError(
            f"eval.documents has two documents of the name {repeated!r}, and checkpoints whose tokenizers differ are "
            "compared on the documents of the same names: give names of their own (the field id, or files of other "
            "names), or one checkpoint at a time"
        )
    if all(ids == chosen[0] for ids in chosen):
        return
    common = set.intersection(*map(set, chosen))
    if not common:
        raise ConfigError(
            "no document of eval.documents was chosen for all checkpoints, whose tokenizers differ: give a larger "
            "eval.max_documents, shorter eval.lengths or longer documents"
        )
    for candidate in candidates:
        candidate.suite.keep_documents(common)
    log.info(f"Perplexity on the {len(common)} documents that are chosen for each tokenizer")


def measure(cfg: DictConfig, candidate: Candidate) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """The metrics of one checkpoint, and what they took when they were measured: seconds and peak memory.

    The checkpoint is loaded if anything is missing.
    """
    if candidate.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(candidate.device)
    log.info(f"Measuring {candidate.name} ...")

    def load():
        attention = models.attention_on(cfg.attention, candidate.device)
        model = build_model(candidate.config, candidate.path, attention, candidate.dtype, cfg.revision)
        memo = Memo(Path(cfg.cache_dir).expanduser() / ".memo")
        check_unchanged(candidate.path, cfg.revision, memo, candidate.under["checkpoint"])
        model.to(candidate.device)  # type: ignore[arg-type]  # transformers wraps torch's method
        check_computing(model, candidate.device)  # scores are taken from hidden states too
        return model

    suite = candidate.suite
    metrics = suite.run(load=load, outcomes=Outcomes(cfg.cache_dir, cfg.reuse), under=candidate.under)
    seconds, peaks = zip(*suite.took, strict=True)
    return metrics, {"seconds": round(sum(seconds), 1), "peak_memory_gib": round(max(peaks), 2)}


def save(cfg: DictConfig, run_dir: Path, candidates: list[Candidate], results: Results, took: Mapping[str, Any]):
    """Writes metrics.json, results.csv, results.json and plots/ of what is measured so far."""
    several = OmegaConf.is_config(cfg.ckpt)
    metrics = {name: values(found) for name, found in results.items()}
    write_json(run_dir / "metrics.json", metrics if several else metrics[candidates[0].name])
    write_results(run_dir / "results.csv", results)
    write_json(
        run_dir / "results.json",
        {
            "checkpoints": {
                c.name: {
                    "path": c.path,
                    "window": c.window,
                    "target": target_len_of(c.config),
                    "tokenizer": tokenizer_digest(c.suite.tokenizer),
                    "identity": c.under,
                    "measured": {task.name: task.units() for task in c.suite.tasks},
                    "took": took[c.name],
                    "metrics": {metric: estimate._asdict() for metric, estimate in results[c.name].items()},
                }
                for c in candidates
                if c.name in results
            },
            "eval": OmegaConf.to_container(cfg.eval, resolve=True),
            "provenance": read_json(run_dir / "provenance.json"),
        },
    )
    window = min(c.window for c in candidates)
    target = max(target_len_of(c.config) for c in candidates)
    plot_measured(results, run_dir / "plots", window, target, tuple(PANELS))


def fill_dashboards(
    cfg: DictConfig,
    run_dir: Path,
    candidates: list[Candidate],
    results: Results,
    dashboards: Mapping[str, Sequence[Logger]],
):
    """Gives W&B or TensorBoard a run for each checkpoint. All is written: what goes wrong here is a warning."""
    for candidate in candidates:
        target = target_len_of(candidate.config)
        settings = {
            "model": candidate.name,
            "rope": _rope_of(candidate.config),
            "window": candidate.window,
            "target_len": target,
            "cfg": OmegaConf.to_container(cfg, resolve=True),
        }
        found = {"extended": results[candidate.name]}
        try:
            with closing(dashboards[candidate.name]):
                log_finished(
                    dashboards[candidate.name], Finished(run_dir, 0, settings, found, candidate.window, target)
                )
        except Exception as error:
            log.warning(f"logger={cfg.logger.name} lacks results of {candidate.name}: {first_line(error)}")


def _rope_of(config: PretrainedConfig) -> str:
    """By the name of the group `rope`, where this package has written the config; else transformers'."""
    noted, parameters = (getattr(config, name, None) or {} for name in ("pose", "rope_parameters"))
    return noted.get("rope") or parameters.get("rope_type", "default")


def show(run_dir: Path, candidates: list[Candidate], results: Results):
    """The tables in the terminal, and where everything is."""
    described = {name: metric for candidate in candidates for name, metric in candidate.suite.metrics().items()}
    for table in comparison_tables(results, "Results", described):
        print_table(table)
    for candidate in candidates:
        if remark := out_of_reach(results[candidate.name], candidate.window):
            log.info(f"{candidate.name}: {remark}")
    documents = candidates[0].suite.document_ids
    lines = []
    if documents:
        lines.append(f"Documents   {', '.join(documents[:3])}{' ...' * (len(documents) > 3)} ({len(documents)})")
    lines += [
        "Intervals   95 %, over documents, prompts or questions; none for a single document (docs/EVALUATION.md)",
        f"Results     {run_dir}/results.csv, results.json, metrics.json",
        f"Plots       {run_dir}/plots/",
        f"Page        {run_dir}/report.html",
    ]
    log.info("\n".join(lines))


def _way_on(cfg: DictConfig) -> str:
    """What is said of an evaluation that was asked to stop."""
    if cfg.reuse:
        return "Given again, the same command goes on where it was"
    return "With reuse=false the same command measures everything again; with reuse=true it goes on where it was"


def _named(ckpt) -> dict[str, str]:
    """Checkpoints by name: given as an object, or called as they are given."""
    with_names = "'ckpt={base:assets/tiny,mine:RUN}', with its quotes, for checkpoints with names"
    if OmegaConf.is_dict(ckpt):
        given = {f"ckpt.{name}": path for name, path in ckpt.items()}
    else:
        given = {f"ckpt[{i}]": path for i, path in enumerate(ckpt)} if OmegaConf.is_list(ckpt) else {"ckpt": ckpt}
    for key, path in given.items():
        if not isinstance(path, str | int | float) or isinstance(path, bool):  # a folder may have a number for a name
            raise ConfigError(f"{key}={path!s} is not accepted: give a run folder, a Hugging Face folder, or a hub id")
        word, sign, rest = f"{path}".partition(":")
        if sign and "/" not in word and not rest.startswith("//") and not Path(locate(f"{path}")).exists():
            raise ConfigError(f"{key}={path} is no folder and no hub id: give {with_names}")
    if OmegaConf.is_dict(ckpt):
        named = {str(name): str(path) for name, path in ckpt.items()}
        if named:
            return named
        raise ConfigError(f"ckpt={{}} is not accepted: give {with_names}")
    names = [str(name) for name in ckpt] if OmegaConf.is_list(ckpt) else [str(ckpt)]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"ckpt={names} is not accepted: give one checkpoint, or a list in which each stands once")
    return {name: name for name in names}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is unknown: give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda") and not (device.type == "mps" and torch.backends.mps.is_available()):
        raise ConfigError(f"device={name} is not there: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name} is not there: this machine has {torch.cuda.device_count()} GPUs; give auto")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name not in ("auto", *DTYPES):
        raise ConfigError(f"dtype={name!r} is unknown: choose auto, {', '.join(DTYPES)}")
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return auto if name == "auto" else getattr(torch, name)
