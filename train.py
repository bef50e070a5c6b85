"""Extends a model's context window: python train.py [group=choice ...] [key=value ...]"""

from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pose.app import build, runtime, schema
from pose.app import run as outcome
from pose.reporting.plots import plot_results, plot_training
from pose.training import faults, launch, memory
from pose.training.folder import alone_in
from pose.training.loggers import closing

schema.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig):
    with runtime.readable_errors():
        run_dir = launch.join(Path(HydraConfig.get().runtime.output_dir))
        runtime.set_up(cfg)
        with alone_in(run_dir), memory.freed(), faults.explained(run_dir):
            run(cfg, run_dir)


def run(cfg: DictConfig, run_dir: Path):
    plan = build.plan_training(cfg, run_dir)
    if plan.is_finished:
        outcome.say_finished(run_dir)
        return
    if launch.is_needed(plan.trainer):
        launch.run(plan.trainer.num_devices, run_dir, plan.checkpoint and plan.checkpoint.folder)
        return
    with closing(plan.trainer.loggers):
        train(cfg, plan, run_dir)


def train(cfg: DictConfig, plan: build.Plan, run_dir: Path):
    runtime.save_config(cfg, run_dir, plan.settings, plan.step)
    covered = outcome.cover(plan, run_dir)
    results = outcome.pick_up(cfg, plan, run_dir)

    with runtime.explained_memory_errors(cfg):
        load_untuned = partial(build.load_model, cfg, plan, plan.base)
        outcome.measure_short(cfg, plan, run_dir, load_untuned)
        if cfg.model.path is not None and cfg.eval.before:
            outcome.measure(cfg, plan, run_dir, results, "untuned", load_untuned)
            if plan.scaling.name != "none":
                load_scaled = partial(build.load_model, cfg, plan, plan.config)
                outcome.measure(cfg, plan, run_dir, results, "scaled", load_scaled)
        module = build.build_module(cfg, plan)
        plan.trainer.fit(module, plan.data, ckpt_path=plan.ckpt_path, weights_only=True)
        if not plan.trainer.is_global_zero:
            return
        load_extended = partial(build.load_exported, cfg, plan, run_dir / "model")
        outcome.measure(cfg, plan, run_dir, results, "extended", load_extended)

    outcome.write_card(cfg, plan, results, run_dir)
    plot_training(run_dir / "metrics.csv", run_dir / "plots" / "training.png")
    plot_results(results, run_dir / "plots" / "evaluation.png", plan.geometry.window)
    outcome.finish_loggers(plan, cfg, results | {"coverage": covered})
    outcome.save_metrics(run_dir, plan, results, covered)
    outcome.print_results(run_dir, plan, results)
    outcome.warn_of_short(cfg, plan, results)


if __name__ == "__main__":
    main()
