"""Extends a model's context window: python train.py [group=choice ...] [key=value ...]"""

import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pose import build, outcome, runtime, schema
from pose.modeling.export import export_model
from pose.report import plot_results, plot_training

schema.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig):
    with runtime.readable_errors():
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        runtime.set_up(cfg)
        plan = build.plan_training(cfg, run_dir)
        build.fill_in(cfg, plan)
        runtime.save_config(cfg, run_dir)
        covered = outcome.cover(plan, run_dir)
        results = {}

        before = cfg.model.path is not None and cfg.eval.before
        if before:
            outcome.measure(plan, results, "untuned", lambda: build.load_model(cfg, plan, plan.base))
        model = build.load_model(cfg, plan, plan.config)
        if before and plan.scaling.name != "none":
            outcome.measure(plan, results, "scaled", lambda: model)

        start = time.perf_counter()
        module = build.build_module(cfg, plan, model)
        plan.trainer.fit(module, plan.data)
        seconds = time.perf_counter() - start
        dtype, is_writer = build.DTYPES[cfg.model.export_dtype], plan.trainer.is_global_zero
        export_model(module.model, plan.tokenizer, run_dir / "model", dtype, is_writer)
        if not is_writer:
            return

        outcome.measure(plan, results, "extended", lambda: build.load_exported(cfg, plan, run_dir / "model"))
        outcome.save_metrics(run_dir, plan, results, seconds, covered)
        outcome.write_card(cfg, plan, results, run_dir)
        plot_training(run_dir / "metrics.csv", run_dir / "plots" / "training.png")
        plot_results(results, run_dir / "plots" / "evaluation.png", plan.geometry.window)
        outcome.finish_loggers(plan, cfg, results | {"coverage": covered})
        outcome.print_results(run_dir, plan, results)


if __name__ == "__main__":
    main()
