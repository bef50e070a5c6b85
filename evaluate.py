"""Measures how far models reach: python evaluate.py ckpt=X [eval=choice] [eval.key=value ...]

X is a run folder of train.py, any Hugging Face folder, a .gguf file or a hub id, or a list of them: ckpt=[X,Y].
A killed evaluation goes on where it was when the same command is given again.
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pose.app import compare, runtime, schema
from pose.training import signals

schema.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig):
    with runtime.readable_errors(), signals.ending(lambda: "Given again, the same command goes on where it was"):
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        runtime.set_up(cfg)
        candidates = compare.plan_evaluation(cfg)
        runtime.save_config(cfg, run_dir)
        results, took = {}, {}
        for candidate in candidates:
            with runtime.explained_memory_errors(cfg):
                results[candidate.name], took[candidate.name] = compare.measure(cfg, candidate)
            compare.save(cfg, run_dir, candidates, results, took)
        compare.show(run_dir, candidates, results)


if __name__ == "__main__":
    main()
