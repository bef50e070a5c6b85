"""One training from its config to what it leaves in its folder: plan, measure, train, report."""

import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf
from transformers import PretrainedConfig, PreTrainedModel

from pose.app import models, plan, runtime
from pose.app.holding import layout_of, layout_of_original
from pose.app.method import method_of
from pose.app.preflight import Plan, check_config, plan_training
from pose.app.report import write_beside
from pose.app.schema import FinetuneConfig, TrainConfig, to_options
from pose.app.trained import note_trained
from pose.coverage import coverage
from pose.data.tokenizer import tokenizer_digest
from pose.errors import first_line
from pose.evaluation.memo import Outcomes, identity
from pose.evaluation.suite import Suite, out_of_reach, values
from pose.evaluation.task import Estimate
from pose.files import Memo, atomic_folder, locate, read_json, same_path, write_json
from pose.modeling import speed
from pose.modeling.attention import preferred_kernels, resolve_backend
from pose.modeling.checkpoints.fingerprint import check_unchanged, fingerprint
from pose.modeling.export.engines import factor_is_not_ratio, misread_by
from pose.modeling.export.rope import where_the_factor_is
from pose.modeling.guards import check_computing
from pose.modeling.layers import cache_width
from pose.modeling.load import build_model, load_config
from pose.modeling.lora import add_lora, count_parameters
from pose.modeling.options import NF4
from pose.modeling.rotary import target_len_of
from pose.modeling.teacher import Teacher, freeze
from pose.reporting.card import Card, license_of, without_folders
from pose.reporting.coverage import plot_coverage
from pose.reporting.dashboard import Finished, log_finished, log_settings
from pose.reporting.metrics_csv import logged_rows
from pose.reporting.plots import plot_measured, plot_training
from pose.reporting.results_csv import write_results
from pose.reporting.tables import print_table, results_table
from pose.training import faults, launch, memory
from pose.training.callbacks import Throughput
from pose.training.folder import alone_in
from pose.training.loggers import closing
from pose.training.module import PoseModule
from pose.training.options import OPTIMIZERS
from pose.training.processes import from_rank_zero
from pose.training.strategies import is_compiled
from pose.training.watch import read_best, short_warning

log = logging.getLogger(__name__)

LOGGED = ("train/", "cost/")  # of what was logged, the groups that metrics.json has the last values of


def train(cfg: DictConfig):
    """What `train.py` does with a composed config."""
    with runtime.readable_errors():
        check_config(cfg, TrainConfig)
        folder = launch.join(runtime.run_folder())
        runtime.set_up(cfg)
        with alone_in(folder), memory.freed(), faults.explained(folder):
            Run(cfg, folder)()


class Run:
    """A run of `train.py`.

    Args:
        cfg: as it was composed; what is worked out is filled in.
        folder: of the run.

    Attributes:
        plan: what the checks have prepared; of `__call__`'s first step.
        results: estimates by model: untuned, scaled, extended.
        took: seconds that measuring each took.
        covered: the summary of the sampler's coverage.
        flops_per_token: of the training; None where they are not known.
    """

    plan: Plan

    def __init__(self, cfg: DictConfig, folder: Path):
        self.cfg, self.folder = cfg, folder
        self.results: dict[str, dict[str, Estimate]] = {}
        self.took: dict[str, float] = {}
        self.covered: dict[str, float] = {}
        self.flops_per_token: float | None = None

    def __call__(self):
        """Plans, measures, trains, reports."""
        self.plan = plan_training(self.cfg, self.folder)
        if self.plan.is_finished:
            goes_on = self.plan.checkpoint is not None and not self.plan.data.has_phases
            longer = " A larger trainer.max_steps goes on with it;" if goes_on else ""
            log.info(
                f"The run in {self.folder} is finished.{longer} python evaluate.py ckpt={self.folder} measures it again"
            )
            return
        if launch.is_needed(self.plan.trainer):
            checkpoint = self.plan.checkpoint
            launch.run(self.plan.trainer.num_devices, self.folder, None if checkpoint is None else checkpoint.folder)
            return
        if (training := plan.say(self.cfg, self.plan)) is not None:
            self.flops_per_token = training.flops_per_token
        for callback in self.plan.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.flops_per_token = self.flops_per_token
        tokenizer = tokenizer_digest(self.plan.tokenizer)
        checkpoint = self.plan.checkpoint
        goes_on_from = None if checkpoint is None else checkpoint.folder.resolve().parents[1]
        runtime.save_config(self.cfg, self.folder, self.plan.settings, self.plan.step, tokenizer, goes_on_from)
        with closing(self.plan.trainer.loggers):
            if self.plan.trainer.is_global_zero:
                log_settings(self.plan.trainer.loggers, self.settings)
                self.cover()
                self.go_on()
            self.measure_before()
            if self.plan.trainer.is_global_zero:
                note_trained(self.folder, self.plan.data)
            with runtime.explained_memory_errors(self.cfg):
                self.train()
            if self.plan.trainer.is_global_zero:
                fewer = max((self.cfg.eval.batch_tokens or 4096) // 2, 1)
                with runtime.explained_memory_errors(self.cfg, [f"eval.batch_tokens={fewer}"]):
                    self.measure_after()
            if self.plan.trainer.is_global_zero:
                self.report()

    def cover(self):
        """Writes coverage.csv and plots/coverage.png of the run's sampler, in about a second."""
        sampler = self.plan.sampler
        covered = coverage(sampler, min(500, 2**23 // sampler.target_len + 2))
        covered.save_csv(self.folder / "coverage.csv")
        plot_coverage({sampler.name: covered}, self.folder / "plots" / "coverage.png")
        self.covered = covered.summary()
        if self.covered:
            beyond, last = (self.covered[f"probability_{name}_window"] for name in ("beyond", "last"))
            log.info(
                f"Coverage    of distances >= {covered.train_len}: probability {beyond:.2f} ({last:.2f} for the last "
                f"{covered.train_len}), {self.covered['pair_share_beyond_window']:.0%} of the pairs"
            )

    def go_on(self):
        """Makes a run that goes on one with what was before: metrics.csv up to its step, and RUN/best.

        A run that begins has no metrics.csv.
        """
        plan = self.plan
        if plan.checkpoint is None:
            (self.folder / "metrics.csv").unlink(missing_ok=True)  # of a run that left no checkpoint
            return
        log.info(f"Going on from step {plan.step:,} of {plan.trainer.max_steps:,}")
        source = plan.checkpoint.folder.parents[1]
        rows = logged_rows(source / "metrics.csv")
        experiment = next(logger for logger in plan.trainer.loggers if isinstance(logger, CSVLogger)).experiment
        experiment.metrics = [row for row in rows if int(row["step"]) < plan.step]
        if not experiment.metrics:
            (self.folder / "metrics.csv").unlink(missing_ok=True)
        experiment.save()
        is_elsewhere = not same_path(source, self.folder)
        best = read_best(source / "best") if plan.watch is not None and is_elsewhere else None
        if best is not None and best["step"] <= plan.step:
            with atomic_folder(self.folder / "best", replace=True) as copy:
                shutil.copytree(source / "best", copy, dirs_exist_ok=True)

    def measure_before(self):
        """The untuned model, and the one whose RoPE is rescaled and nothing else."""
        plan = self.plan
        if plan.watch is not None and plan.watch.short is not None:
            with runtime.explained_memory_errors(self.cfg, ["watch.max_short_increase=null"]):
                plan.watch.untuned = self._measure_short(plan.watch.short)
        if plan.suite is None:
            return
        if self.cfg.model.path is None or not self.cfg.eval.before:
            if plan.trainer.is_global_zero:
                plan.suite.prepare()  # or what is missing would be found after the training
            return
        with runtime.explained_memory_errors(self.cfg, ["eval.before=false"]):
            self.measure("untuned", plan.base)
            if plan.scaling.name != "none":
                self.measure("scaled", plan.config)

    def train(self):
        """Trains, and exports RUN/model at the end."""
        plan, cfg = self.plan, self.cfg
        options = vars(to_options(cfg.finetune, FinetuneConfig)).copy()
        del options["lora"], options["weights_dtype"]  # of the model's
        module = PoseModule(
            self.load_for_training,
            expected=plan.expected,
            target_len=plan.sampler.target_len,
            objective=plan.objective,
            teach=self.load_teacher,
            max_steps=cfg.trainer.max_steps,
            on_nonfinite=cfg.trainer.on_nonfinite,
            seed=cfg.seed,
            **options,
        )
        with preferred_kernels(plan.trainer.strategy.root_device):
            plan.trainer.fit(module, plan.data, ckpt_path=plan.ckpt_path, weights_only=True)

    def load_for_training(self, strategy: Strategy) -> PreTrainedModel:
        """The model of plan.config, with its adapters, in train mode; when the strategy is there."""
        cfg = self.cfg
        torch.manual_seed(cfg.seed)  # of random weights and adapters, whatever was measured before
        lora = to_options(cfg.finetune, FinetuneConfig).lora
        prepare = None if lora.rank is None else lambda model: add_lora(model, lora)
        layout = layout_of(cfg, self.plan.config, self.plan.trainer)
        if cfg.model.path is not None:
            log.info(f"Reading the weights of {cfg.model.path} ...")
        model = models.load_model(cfg, self.plan.config, strategy.root_device, layout, prepare)
        trainable, total = count_parameters(model)
        log.info(f"Training {trainable:,} of {total:,} parameters ({trainable / total:.1%})")
        model.train()  # from_pretrained leaves it in eval mode, and Lightning keeps the mode it finds
        speed.recompute(model, cfg.model.gradient_checkpointing)
        speed.residuals_as_computed(model)
        if is_compiled(cfg.trainer.compile, strategy):
            speed.compile_layers(model)
        return model

    def load_teacher(self, strategy: Strategy, model: PreTrainedModel) -> Teacher:
        """The original beside the model that trains: the same with its adapters off, or a frozen one of plan.base."""
        cfg, plan = self.cfg, self.plan
        if to_options(cfg.finetune, FinetuneConfig).lora.rank is not None:
            return Teacher(model, plan.base)
        layout = layout_of_original(cfg, plan.base, strategy)
        log.info(f"Reading the weights of {cfg.model.path} again: the original stays beside the model that trains ...")
        original = models.load_model(cfg, plan.base, strategy.root_device, layout, prepare=freeze)
        return Teacher(original.eval() if layout is not None else original.eval().to(strategy.root_device))

    def measure_after(self):
        """The exported model, as `evaluate.py` loads it."""
        plan = self.plan
        if plan.suite is not None:
            folder = self.folder / "model"
            self.results["extended"] = self._measure(
                "the extended model", plan.suite, load_config(str(folder)), str(folder)
            )
            self.took["extended"] = plan.suite.seconds

    def measure(self, name: str, config: PretrainedConfig):
        """Adds the metrics of the model that is not trained yet to the results; every process must call this.

        Args:
            name: in the results.
            config: that it is built from.
        """
        suite = self.plan.suite
        assert suite is not None
        found = from_rank_zero(self.folder, name, lambda: self._measure(f"the {name} model", suite, config))
        self.results[name] = {metric: Estimate(*estimate) for metric, estimate in found.items()}
        self.took[name] = suite.seconds

    def _measure_short(self, short: Suite) -> float:
        """Perplexity of the untuned model at its own window, which `watch` compares with."""
        what = "the untuned model on short texts"
        found = from_rank_zero(self.folder, "short", lambda: self._measure(what, short, self.plan.base))
        return found[f"ppl@{short.lengths[0]}"][0]

    def _measure(
        self, what: str, suite: Suite, config: PretrainedConfig, path: str | None = None
    ) -> dict[str, Estimate]:
        """The estimates of a model that is not in memory, of which nothing is measured twice."""
        path = path or locate(self.cfg.model.path)
        device = self.plan.trainer.strategy.root_device
        dtype = getattr(torch, self.cfg.eval_dtype)
        attention = models.attention_on(self.cfg.model.attention, device)
        memo, revision = Memo(Path(self.cfg.cache_dir).expanduser() / ".memo"), self.cfg.model.revision
        weights = fingerprint(path, revision, memo)
        under = identity(
            weights,
            config,
            dtype=dtype,
            attention=resolve_backend(attention),
            device=device,
        )

        def load():
            model = build_model(config, path, attention, dtype, revision)
            check_unchanged(path, revision, memo, weights)
            model.to(device)  # type: ignore[arg-type]  # transformers wraps torch's method
            check_computing(model, device)  # scores are taken from hidden states too
            return model

        log.info(f"Measuring {what} ...")
        max_length = target_len_of(config)
        suite.set_max_length(max_length)
        skip_too_long = max_length < target_len_of(
            self.plan.config
        )  # what the trained model has room for is still measured
        return suite.run(load=load, outcomes=Outcomes(self.cfg.cache_dir), under=under, skip_too_long=skip_too_long)

    def report(self):
        """Model card, plots, results.csv, metrics.json (with it a run is complete), the page, dashboards."""
        plan, folder = self.plan, self.folder
        self.write_card()
        plot_training(folder / "metrics.csv", folder / "plots" / "training.png")
        window, target = plan.geometry.window, target_len_of(plan.config)
        plot_measured(self.results, folder / "plots", window, target)
        metrics = {name: values(found) for name, found in self.results.items()}
        write_results(folder / "results.csv", self.results)
        self.save_metrics(metrics)
        write_beside(folder)
        self.fill_dashboards()
        self.print_results()
        self.warn_of_short(metrics)

    @property
    def settings(self) -> dict[str, Any]:
        """The config of W&B and of TensorBoard's hparams: what runs are told apart by, and under cfg all of it."""
        cfg: Any = OmegaConf.to_container(self.cfg, resolve=True)
        return method_of(self.cfg) | {"cfg": cfg}

    def fill_dashboards(self):
        """Gives W&B or TensorBoard what was found. The run is complete: what goes wrong here is a warning."""
        plan = self.plan
        try:
            log_finished(
                plan.trainer.loggers,
                Finished(
                    self.folder,
                    plan.trainer.global_step,
                    self.settings,
                    self.results,
                    window=plan.geometry.window,
                    target=target_len_of(plan.config),
                    with_weights=bool(self.cfg.logger.get("log_weights")),
                ),
            )
        except Exception as error:
            log.warning(f"logger={self.cfg.logger.name} lacks results of {self.folder}: {first_line(error)}")

    def write_card(self):
        """README.md of RUN/model; reads the provenance that the run has written."""
        cfg, plan = self.cfg, self.plan
        provenance = read_json(self.folder / "provenance.json")
        commit = provenance["commit"] and provenance["commit"] + " (and changes)" * provenance["uncommitted_changes"]
        base = None if cfg.model.path is None else locate(cfg.model.path)
        tune, steps = cfg.finetune, plan.trainer.global_step
        tokens = steps * cfg.trainer.global_batch * plan.sampler.example_len
        trained = "all weights"
        if tune.lora.rank:
            trained = f"adapters of rank {tune.lora.rank} (alpha {tune.lora.alpha:g}), merged"
            trained += " (over weights in 4 bits)" if tune.lora.frozen_dtype == NF4 else ""
        trained += ", with embeddings and norms" if tune.lora.train_embeddings_and_norms else ""
        synthetic = [f"{share:.0%} {name} examples" for name, share in cfg.data.synthetic.items() if share]
        documents = cfg.data.documents if OmegaConf.is_list(cfg.data.documents) else [cfg.data.documents]
        names = [
            one if not OmegaConf.is_dict(one) else f"{one.path} ({one.split})" if one.get("split") else one.path
            for one in documents
        ]
        factor = where_the_factor_is(read_json(self.folder / "model" / "config.json"))
        Card(
            base=base,
            license=None if base is None else license_of(base),
            model_type=plan.base.model_type,
            window=plan.geometry.window,
            target_len=target_len_of(plan.config),
            sampler=plan.sampler,
            scaling=plan.scaling,
            rope_base=plan.geometry.base if plan.geometry.rope_type == "default" else None,
            data=[*names, *synthetic],
            training={
                "Trained": trained,
                "Objective": plan.objective.describe(),
                "Steps": f"{steps:,} of {cfg.trainer.global_batch:,} examples: {tokens:,} tokens",
                "Optimizer": f"{OPTIMIZERS[tune.optimizer]}, {tune.schedule} schedule, peak learning rate {tune.lr:g}, "
                f"{tune.warmup_steps:,} warm-up steps, weight decay {tune.weight_decay:g}",
                "Precision": f"{plan.trainer.precision} in training, {cfg.model.export_dtype} in this folder",
                "Seed": f"{cfg.seed}",
            }
            | ({} if factor is None else {"Attention factor": factor}),
            results={name: values(found) for name, found in self.results.items()},
            measured_on=[] if plan.suite is None else plan.suite.document_ids,
            command=without_folders(shlex.join(["python", "train.py", *provenance["overrides"]])),
            versions={name: provenance["packages"][name] for name in ("torch", "transformers", "lightning")},
            commit=commit,
            cache_bytes=2 * cache_width(plan.config),
            misread=self.misread_by_engines(),
            described=None if plan.suite is None else plan.suite.metrics(),
        ).write(self.folder / "model")

    def misread_by_engines(self) -> dict[str, str]:
        """Engines that serve RUN/model wrong, each with why; warns where it is the one that the run is for."""
        folder, engine = self.folder / "model", self.cfg.model.engine
        found = misread_by(folder, load_config(str(folder)))
        if engine in found:
            log.warning(f"{engine} serves {folder} wrong: {found[engine]} (docs/SERVING.md)")
        return found

    def save_metrics(self, metrics: dict[str, dict[str, float]]):
        """metrics.json: the metrics of RUN/model by name, as evaluate.py writes them, then every model's.

        It is written last, and report.html is made of it: a folder that has it is complete.
        """
        plan = self.plan
        logged = {f"coverage/{name}": value for name, value in self.covered.items()}
        for row in logged_rows(self.folder / "metrics.csv"):
            logged |= {name: float(value) for name, value in row.items() if name.startswith(LOGGED)}
        logged |= {k: float(v) for k, v in plan.trainer.callback_metrics.items() if k.startswith(LOGGED)}
        logged["train/steps"] = steps = plan.trainer.global_step
        logged |= {f"measuring/{name}_seconds": round(seconds, 1) for name, seconds in self.took.items()}
        logged["cost/tokens"] = tokens = steps * self.cfg.trainer.global_batch * plan.sampler.example_len
        if self.flops_per_token is not None:
            logged["cost/flops"] = self.flops_per_token * tokens
        if plan.watch is not None and plan.watch.found is not None:
            best = plan.watch.found
            logged |= {f"best/{best['metric']}": best["value"], "best/step": best["step"]}
        write_json(self.folder / "metrics.json", metrics.get("extended", {}) | logged | metrics)

    def print_results(self):
        """The table over the models, and where everything is."""
        plan, folder = self.plan, self.folder
        if self.results and plan.suite is not None:
            documents = ", ".join(plan.suite.document_ids[:3]) + " ..." * (len(plan.suite.document_ids) > 3)
            title = (
                f"{plan.scaling.name}, {plan.sampler.name}, {plan.geometry.window} -> {plan.sampler.target_len} tokens"
            )
            title += f"; perplexity on {documents}" if documents else ""
            metrics = {name: values(found) for name, found in self.results.items()}
            print_table(results_table(metrics, title))
        has_own_factor = factor_is_not_ratio(plan.scaling, plan.geometry.window, plan.sampler.target_len)
        versions = "transformers 4.56 or newer" if has_own_factor else "any transformers"
        lines = [f"Run folder  {folder}", f"Model       {folder}/model  ({versions} loads it)"]
        if plan.watch is not None and plan.watch.found is not None:
            best = plan.watch.found
            lines.append(f"Best        {folder}/best  ({best['metric']} {best['value']:.4g} at step {best['step']:,})")
        if self.results:
            lines += [f"Metrics     {folder}/metrics.json", f"Plots       {folder}/plots/"]
        lines.append(f"Page        {folder}/report.html")
        if remark := out_of_reach(self.results.get("untuned", {}), plan.geometry.window):
            lines.append(f"The untuned model: {remark}")
        log.info("\n".join(lines))

    def warn_of_short(self, metrics: dict[str, dict[str, float]]):
        """Says whether the trained model is worse at short texts than the untuned one, where both were measured."""
        window, limit = self.plan.geometry.window, self.cfg.watch.max_short_increase
        before, after = (metrics.get(name, {}).get(f"ppl@{window}") for name in ("untuned", "extended"))
        if before is not None and after is not None and limit is not None and after / before - 1 > limit:
            log.warning(short_warning(window, "after the training", before, after / before - 1, limit))
