"""What a run leaves behind: coverage, metrics, model card, the loggers' last entries, the table it ends with."""

import csv
import json
import logging
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, SCMode

from pose.app.build import Plan
from pose.coverage import coverage
from pose.evaluation.suite import values
from pose.files import locate, read_json, write_json
from pose.modeling.rotary import target_len_of
from pose.reporting.card import Card, license_of, without_folders
from pose.reporting.coverage import plot_coverage
from pose.reporting.tables import print_table, results_table
from pose.training.processes import from_rank_zero
from pose.training.watch import read_best, short_perplexity, short_warning

log = logging.getLogger(__name__)


@rank_zero_only
def finish_loggers(plan: Plan, cfg: DictConfig, results: dict[str, dict[str, float]]):
    """Gives every logger but the CSV the config and the evaluation."""
    for logger in plan.trainer.loggers:
        if isinstance(logger, CSVLogger):
            continue
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        metrics = {f"{model}/{name}": value for model, found in results.items() for name, value in found.items()}
        logger.log_metrics(metrics, step=plan.trainer.global_step)


@rank_zero_only
def cover(plan: Plan, run_dir: Path) -> dict[str, float]:
    """Writes coverage.csv and plots/coverage.png of the run's sampler, in about a second; returns its summary."""
    samples = min(500, 2**23 // plan.sampler.target_len + 2)
    covered = coverage(plan.sampler, samples)
    covered.save_csv(run_dir / "coverage.csv")
    plot_coverage({plan.sampler.name: covered}, run_dir / "plots" / "coverage.png")
    found = covered.summary()
    if found:
        log.info(
            f"Coverage    of distances >= {covered.train_len}: probability {found['probability_beyond_window']:.2f} "
            f"({found['probability_last_window']:.2f} for the last {covered.train_len}), "
            f"{found['pair_share_beyond_window']:.0%} of the pairs"
        )
    return found


@rank_zero_only
def say_finished(run_dir: Path):
    """What can be done with a run that is complete."""
    log.info(
        f"The run in {run_dir} is finished. A larger trainer.max_steps goes on with it; python evaluate.py "
        f"ckpt={run_dir} measures it again"
    )


def pick_up(cfg: DictConfig, plan: Plan, run_dir: Path) -> dict[str, dict[str, float]]:
    """Makes a run that goes on one with what was before: metrics.csv up to its step, RUN/best, and what was measured.

    Returns:
        The metrics of models that were measured before training, by name, as this run would measure them.
    """
    if plan.checkpoint is not None and rank_zero_only.rank == 0:
        log.info(f"Going on from step {plan.step:,} of {plan.trainer.max_steps:,}")
        source = plan.checkpoint.folder.parents[1]
        rows = logged_rows(source / "metrics.csv")
        experiment = next(logger for logger in plan.trainer.loggers if isinstance(logger, CSVLogger)).experiment
        experiment.metrics = [row for row in rows if int(row["step"]) < plan.step]
        experiment.save()
        best = read_best(source / "best") if plan.watch is not None and source.resolve() != run_dir.resolve() else None
        if best is not None and best["step"] <= plan.step:
            _copy(source / "best", run_dir / "best")
    if plan.suite is None:
        return {}
    under = _measured_under(cfg, plan)
    found = {name: _measured(run_dir, name, under) for name in ("untuned", "scaled")}
    return {name: metrics for name, metrics in found.items() if metrics is not None}


def logged_rows(csv_file: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv, each with what it has; those that are damaged are left out, and counted."""
    if not csv_file.is_file():
        return []
    lines = csv_file.read_text(errors="replace").replace("\0", "").splitlines(keepends=True)
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))  # the last one may be cut off
    # -1 is before the first step
    whole = [row for row in rows if None not in row.values() and (row.get("step") or "").removeprefix("-").isdigit()]
    if missing := max(len(lines) - 1, 0) - len(whole):
        log.warning(f"{missing} rows of {csv_file} are damaged, and left out")
    return [{name: value for name, value in row.items() if name and value} for row in whole]


def measure(
    cfg: DictConfig,
    plan: Plan,
    run_dir: Path,
    results: dict[str, dict[str, float]],
    name: str,
    load: Callable[[], torch.nn.Module],
):
    """Adds the metrics of a model to results, under name, unless they are there; nothing is loaded for eval=none.

    What was measured before training is kept for a run that goes on.
    """
    if plan.suite is None or name in results:
        return

    def run() -> dict[str, float]:
        log.info(f"Measuring the {name} model ...")
        return values(plan.suite.run(load().to(plan.trainer.strategy.root_device)))

    if name != "extended":
        results[name] = _measure_once(run_dir, name, _measured_under(cfg, plan), run)
    elif rank_zero_only.rank == 0:
        results[name] = run()


def measure_short(cfg: DictConfig, plan: Plan, run_dir: Path, load: Callable[[], torch.nn.Module]):
    """Measures the untuned model at its own window, which `watch` compares with; nothing where it does not."""
    if plan.watch is None or plan.watch.short is None:
        return

    def run() -> dict[str, float]:
        log.info("Measuring the untuned model on short texts ...")
        return {"ppl": short_perplexity(plan.watch.short, load().to(plan.trainer.strategy.root_device))}

    under = {"units": [task.units() for task in plan.watch.short.tasks], "settings": plan.settings}
    under |= {"model.path": cfg.model.path}
    plan.watch.untuned = _measure_once(run_dir, "short", json.loads(json.dumps(under)), run)["ppl"]


def _measure_once(run_dir: Path, name: str, under: dict, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What run() gives in process 0, or gave before, in this run's folder, under the same settings."""

    def measured() -> dict[str, float]:
        metrics = _measured(run_dir, name, under)
        if metrics is None:
            metrics, file = run(), run_dir / "measured.json"
            write_json(file, read_json(file) | {name: {"under": under, "metrics": metrics}})
        return metrics

    return from_rank_zero(run_dir, name, measured)


def _measured(run_dir: Path, name: str, under: dict) -> dict[str, float] | None:
    entry = read_json(run_dir / "measured.json").get(name)
    metrics = entry.get("metrics") if isinstance(entry, dict) and entry.get("under") == under else None
    return metrics if isinstance(metrics, dict) else None


def _measured_under(cfg: DictConfig, plan: Plan) -> dict:
    """What the metrics of a model before training depend on."""
    options = OmegaConf.to_container(cfg.eval, resolve=True, structured_config_mode=SCMode.DICT)
    return json.loads(json.dumps({"eval": options, "model.path": cfg.model.path, "settings": plan.settings}))


def _copy(source: Path, folder: Path):
    """A folder under another name, whole or not there."""
    partial = folder.with_name(f".{folder.name}.copy")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(folder)


def warn_of_short(cfg: DictConfig, plan: Plan, results: dict[str, dict[str, float]]):
    """Says whether the trained model is worse at short texts than the untuned one, where both were measured there."""
    window, limit = plan.geometry.window, cfg.watch.max_short_increase
    before, after = (results.get(name, {}).get(f"ppl@{window}") for name in ("untuned", "extended"))
    if None not in (before, after, limit) and after / before - 1 > limit:
        log.warning(short_warning(window, "after the training", before, after / before - 1, limit))


def save_metrics(run_dir: Path, plan: Plan, results: dict[str, dict[str, float]], covered: dict[str, float]):
    """metrics.json: the metrics of RUN/model by name, as evaluate.py writes them, then every model's.

    It is the last thing a run writes: a folder that has it is complete.
    """
    logged = {f"coverage/{name}": value for name, value in covered.items()}
    for row in logged_rows(run_dir / "metrics.csv"):
        logged |= {name: float(value) for name, value in row.items() if name.startswith("train/")}
    logged |= {k: float(v) for k, v in plan.trainer.callback_metrics.items() if k.startswith("train/")}
    logged["train/steps"] = plan.trainer.global_step
    if plan.watch is not None and plan.watch.found is not None:
        best = plan.watch.found
        logged |= {f"best/{best['metric']}": best["value"], "best/step": best["step"]}
    write_json(run_dir / "metrics.json", results.get("extended", {}) | logged | results)


def print_results(run_dir: Path, plan: Plan, results: dict[str, dict[str, float]]):
    """The table over the models, and where everything is."""
    if results:
        documents = ", ".join(plan.suite.document_ids[:3]) + " ..." * (len(plan.suite.document_ids) > 3)
        title = f"{plan.scaling.name}, {plan.sampler.name}, {plan.geometry.window} -> {plan.sampler.target_len} tokens"
        title += f"; held out: {documents}" if documents else ""
        print_table(results_table(results, title, ("tail_ppl", "passkey")))
    log.info(f"Run folder  {run_dir}\nModel       {run_dir}/model  (any transformers loads it)")
    if plan.watch is not None and plan.watch.found is not None:
        best = plan.watch.found
        log.info(f"Best        {run_dir}/best  ({best['metric']} {best['value']:.4g} at step {best['step']:,})")
    if results:
        log.info(f"Metrics     {run_dir}/metrics.json\nPlots       {run_dir}/plots/")


def write_card(cfg: DictConfig, plan: Plan, results: dict[str, dict[str, float]], run_dir: Path):
    """README.md of RUN/model; reads the provenance that the run has written."""
    provenance = json.loads((run_dir / "provenance.json").read_text())
    commit = provenance["commit"] and provenance["commit"] + " (and changes)" * provenance["uncommitted_changes"]
    base = None if cfg.model.path is None else locate(cfg.model.path)
    tune, steps = cfg.finetune, plan.trainer.global_step
    tokens = steps * cfg.trainer.global_batch * plan.sampler.example_len
    lora = f"adapters of rank {tune.lora.rank} (alpha {tune.lora.alpha:g}), merged" if tune.lora.rank else "all weights"
    lora += ", with embeddings and norms" if tune.lora.train_embeddings_and_norms else ""
    synthetic = [f"{share:.0%} {name} examples" for name, share in cfg.data.synthetic.items() if share]
    documents = cfg.data.documents if OmegaConf.is_list(cfg.data.documents) else [cfg.data.documents]
    documents = [f"{one.path} ({one.get('split', 'train')})" if OmegaConf.is_dict(one) else one for one in documents]
    Card(
        base=base,
        license=None if base is None else license_of(base),
        model_type=plan.base.model_type,
        window=plan.geometry.window,
        target_len=target_len_of(plan.config),
        sampler=plan.sampler,
        scaling=plan.scaling,
        rope_base=plan.geometry.base if plan.geometry.rope_type == "default" else None,
        data=[*documents, *synthetic],
        training={
            "Trained": lora,
            "Steps": f"{steps:,} of {cfg.trainer.global_batch:,} examples: {tokens:,} tokens",
            "Optimizer": f"AdamW, {tune.schedule} schedule, peak learning rate {tune.lr:g}, "
            f"{tune.warmup_steps:,} warm-up steps, weight decay {tune.weight_decay:g}",
            "Precision": f"{plan.trainer.precision} in training, {cfg.model.export_dtype} in this folder",
            "Seed": f"{cfg.seed}",
        },
        results=results,
        measured_on=[] if plan.suite is None else plan.suite.document_ids,
        command=without_folders(shlex.join(["python", "train.py", *provenance["overrides"]])),
        versions={name: provenance["packages"][name] for name in ("torch", "transformers", "lightning")},
        commit=commit,
    ).write(run_dir / "model")
