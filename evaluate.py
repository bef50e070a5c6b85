"""Measures how far a model reaches: python evaluate.py ckpt=X [eval=choice] [eval.key=value ...]

X is a run folder of train.py, any Hugging Face folder, or a hub id.
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pose import build, runtime, schema
from pose.report import FAMILIES, plot_results, print_table, results_table

schema.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig):
    with runtime.readable_errors():
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        runtime.set_up(cfg)
        plan = build.plan_evaluation(cfg)
        runtime.save_config(cfg, run_dir)

        metrics = plan.suite.run(build.load_checkpoint(cfg, plan))
        runtime.write_json(run_dir / "metrics.json", metrics)
        results = {Path(cfg.ckpt).name or cfg.ckpt: metrics}
        plot_results(results, run_dir / "plots" / "evaluation.png", plan.window)
        print_table(results_table(results, f"Results ({run_dir}/metrics.json)", tuple(FAMILIES)))


if __name__ == "__main__":
    main()
