"""The command `python -m pose.coverage`: what position samplers cover, as a table, a plot and a CSV file."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pose.app import build, runtime, schema
from pose.coverage import coverage
from pose.files import CONF
from pose.reporting.coverage import coverage_table, plot_coverage
from pose.reporting.tables import print_table

schema.register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="coverage")
def main(cfg: DictConfig):
    """Covers the sampler of the group `pose`, and those of `beside`."""
    with runtime.readable_errors():
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        samplers = build.build_samplers(cfg)
        covered = {name: coverage(sampler, cfg.num_samples, cfg.seed) for name, sampler in samplers.items()}
        next(iter(covered.values())).save_csv(run_dir / "coverage.csv")
        plot_coverage(covered, run_dir / "coverage.png")
        print_table(coverage_table(covered, f"Coverage ({run_dir}/coverage.csv, coverage.png)"))


if __name__ == "__main__":
    main()
