"""The command `python -m pose.coverage`: what position samplers cover, as a table, a plot and a CSV file."""

import hydra
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from pose.app import schema
from pose.app.hints import naming_near_keys
from pose.coverage import coverage
from pose.errors import ConfigError
from pose.files import CONF
from pose.positions import PositionSampler

schema.register()


def build_samplers(cfg: DictConfig) -> dict[str, PositionSampler]:
    """The samplers of `python -m pose.coverage`, by name: that of the group `pose`, and those of `beside`, as long.

    Raises:
        ConfigError: a name that is no choice of the group.
    """
    from pose.app import build

    job, lengths = HydraConfig.get(), ("pose.train_len=", "pose.target_len=")
    changed = [o for o in job.overrides.task if o.startswith(("pose.", "pose@")) and not o.startswith(lengths)]
    name = " ".join([job.runtime.choices["pose"], *(o.removeprefix("pose@").removeprefix("pose.") for o in changed)])
    samplers = {name: build.build_sampler(cfg.pose)}
    for choice in cfg.beside:
        overrides = [f"pose={choice}", *(f"{key}{OmegaConf.select(cfg, key[:-1])}" for key in lengths)]
        try:
            samplers.setdefault(choice, build.build_sampler(compose("coverage", overrides).pose))
        except HydraException as error:
            choices = ", ".join(GlobalHydra.instance().config_loader().get_group_options("pose"))
            raise ConfigError(f"beside has {choice!r}, which is no choice of the group pose: {choices}") from error
    return samplers


@naming_near_keys("coverage")
@hydra.main(version_base="1.3", config_path=str(CONF), config_name="coverage")
def main(cfg: DictConfig):
    """Covers the sampler of the group `pose`, and those of `beside`."""
    from pose.app import runtime  # torch and the like are imported when the config stands
    from pose.app.preflight import check_config
    from pose.reporting.coverage import coverage_table, plot_coverage
    from pose.reporting.tables import print_table

    with runtime.readable_errors():
        check_config(cfg, schema.CoverageConfig)
        run_dir = runtime.run_folder()
        samplers = build_samplers(cfg)
        covered = {name: coverage(sampler, cfg.num_samples, cfg.seed) for name, sampler in samplers.items()}
        next(iter(covered.values())).save_csv(run_dir / "coverage.csv")
        plot_coverage(covered, run_dir / "coverage.png")
        print_table(coverage_table(covered, f"Coverage ({run_dir}/coverage.csv, coverage.png)"))


if __name__ == "__main__":
    main()
