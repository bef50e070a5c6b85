"""Several checkpoints measured alike: what `evaluate.py` plans, measures and leaves behind."""

import csv
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from transformers import PretrainedConfig

from pose.app import build
from pose.errors import ConfigError
from pose.evaluation.suite import Suite, default_lengths, values
from pose.evaluation.task import Estimate
from pose.files import PACKAGE, Memo, read_json, write_json
from pose.modeling.attention import resolve_backend
from pose.modeling.checkpoints.fingerprint import fingerprint
from pose.modeling.guards import check_loss
from pose.modeling.load import build_model, load_config, load_tokenizer, rope_geometry
from pose.modeling.rotary import target_len_of
from pose.reporting.plots import PANELS, plot_needle, plot_results, plot_ruler
from pose.reporting.tables import comparison_tables, print_table

log = logging.getLogger(__name__)

Results = dict[str, dict[str, Estimate]]
MEASURING = ("evaluation", "modeling", "data", "tasks", "rope.py")  # the code that outcomes depend on


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that has passed every check that needs no weights.

    Attributes:
        name: as it was given.
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


def plan_evaluation(cfg: DictConfig) -> list[Candidate]:
    """Checks the whole evaluation and prepares all but the weights.

    Raises:
        PoseError: what cannot work, before any long work.
    """
    if OmegaConf.is_missing(cfg, "ckpt"):
        raise ConfigError(
            "ckpt is not set: give a run folder, a Hugging Face folder, or a hub id (ckpt=assets/tiny), or a list of "
            "them (ckpt=[assets/tiny,RUN])"
        )
    names = _names(cfg.ckpt)
    device = _device(cfg.device)
    dtype = _dtype(cfg.dtype, device)
    attention = build.attention_on(cfg.attention, device)
    resolve_backend(attention)
    _check_writable(_outcomes(cfg), cfg.cache_dir)
    memo = Memo(Path(cfg.cache_dir).expanduser() / ".memo")
    found = []
    for name in names:
        given = build.convert_gguf(name, cfg.cache_dir) if name.endswith(".gguf") else name
        path = build.open_checkpoint(given)
        config = load_config(path, cfg.revision)
        tokenizer = load_tokenizer(path, cfg.revision)
        build.check_vocabulary(tokenizer, config, path)
        found.append((name, path, config, tokenizer))
    windows = [rope_geometry(config).window for _, _, config, _ in found]
    if cfg.eval.lengths is None:  # the same ones for all
        targets = [target_len_of(config) for _, _, config, _ in found]
        cfg.eval.lengths = list(default_lengths(min(windows), max(targets)))
    candidates = []
    for (name, path, config, tokenizer), window in zip(found, windows, strict=True):
        suite = build.build_suite(cfg.eval, tokenizer, window, target_len_of(config), cfg.cache_dir)
        if suite is None:
            raise ConfigError("eval.tasks is empty: choose eval=quick, perplexity, passkey, needle, ruler, harness")
        under = {
            "checkpoint": fingerprint(path, cfg.revision, memo),
            "code": _code_print(),
            "packages": {"torch": torch.__version__, "transformers": transformers.__version__},
            "run": [str(dtype), attention, device.type],
        }
        candidates.append(Candidate(name, path, config, window, suite, device, dtype, under))
    _share_documents(candidates)
    return candidates


def _share_documents(candidates: list[Candidate]):
    """Leaves the documents that are long enough for all: a tokenizer may make short what is long for another."""
    chosen = [c.suite.document_ids for c in candidates]
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
    log.info(f"The tokenizers differ: perplexity on the {len(common)} documents that are chosen for each")


def measure(cfg: DictConfig, candidate: Candidate) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """The metrics of one checkpoint, and what they took when they were measured: seconds and peak memory.

    The checkpoint is loaded if anything is missing.
    """
    if candidate.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(candidate.device)
    log.info(f"Measuring {candidate.name} ...")

    def load():
        attention = build.attention_on(cfg.attention, candidate.device)
        model = build_model(candidate.config, candidate.path, attention, candidate.dtype, cfg.revision)
        model = model.to(candidate.device)
        with torch.no_grad():
            check_loss(model, candidate.device)  # scores are taken from hidden states too
        return model

    memo = Memo(_outcomes(cfg))
    suite = candidate.suite
    metrics = suite.run(load=load, memo=memo, under=candidate.under, reuse=cfg.reuse)
    seconds, peaks = zip(*suite.took, strict=True)
    return metrics, {"seconds": round(sum(seconds), 1), "peak_memory_gib": round(max(peaks), 2)}


def save(cfg: DictConfig, run_dir: Path, candidates: list[Candidate], results: Results, took: Mapping[str, Any]):
    """Writes metrics.json, results.csv, results.json and plots/ of what is measured so far."""
    several = OmegaConf.is_list(cfg.ckpt)
    metrics = {name: values(found) for name, found in results.items()}
    write_json(run_dir / "metrics.json", metrics if several else metrics[candidates[0].name])
    rows = [
        {"checkpoint": name, "metric": metric} | estimate._asdict()
        for name, found in results.items()
        for metric, estimate in found.items()
    ]
    partial = run_dir / "results.csv.partial"
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, ["checkpoint", "metric", *Estimate._fields])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, run_dir / "results.csv")
    write_json(
        run_dir / "results.json",
        {
            "checkpoints": {
                c.name: {
                    "path": c.path,
                    "window": c.window,
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
    plots = run_dir / "plots"
    plot_results(results, plots / "evaluation.png", window, tuple(PANELS))
    plot_needle(results, plots / "needle.png")
    plot_ruler(results, plots / "ruler.png")


def show(run_dir: Path, candidates: list[Candidate], results: Results):
    """The tables in the terminal, and where everything is."""
    for table in comparison_tables(results, "Results"):
        print_table(table)
    documents = candidates[0].suite.document_ids
    if documents:
        log.info(f"Documents   {', '.join(documents[:3])}{' ...' * (len(documents) > 3)} ({len(documents)})")
    log.info("Intervals   95 %, over documents, prompts or questions; none for a single document (docs/EVALUATION.md)")
    log.info(f"Results     {run_dir}/results.csv, results.json, metrics.json\nPlots       {run_dir}/plots/")


def _code_print() -> str:
    """SHA-256 of the code that measures: an outcome of other code is not taken over."""
    files = [file for name in MEASURING for file in sorted((PACKAGE / name).rglob("*.py")) or [PACKAGE / name]]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _outcomes(cfg: DictConfig) -> Path:
    return Path(cfg.cache_dir).expanduser() / ".outcomes"


def _check_writable(folder: Path, cache_dir: str):
    """Outcomes that cannot be kept would only be missed when an evaluation has been killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"cache_dir={cache_dir} cannot be written to ({error}): give another folder") from error


def _names(ckpt) -> list[str]:
    names = [str(name) for name in ckpt] if OmegaConf.is_list(ckpt) else [str(ckpt)]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"ckpt={names} is not accepted: give one checkpoint, or a list in which each stands once")
    return names


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is unknown: give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name} is not there: this machine has {torch.cuda.device_count()} GPUs; give auto")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name not in ("auto", *build.DTYPES):
        raise ConfigError(f"dtype={name!r} is unknown: choose auto, {', '.join(build.DTYPES)}")
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    return auto if name == "auto" else build.DTYPES[name]
