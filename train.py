"""Extends a model's context window: python train.py [group=choice ...] [key=value ...]"""

from pathlib import Path

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pose import runtime, schema
from pose.modeling.export import export_model

schema.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig):
    with runtime.readable_errors():
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        runtime.quiet_libraries()
        if cfg.num_threads:
            torch.set_num_threads(cfg.num_threads)
        L.seed_everything(cfg.seed, verbose=False)
        plan = runtime.plan_training(cfg, run_dir)
        runtime.save_config(cfg, run_dir)

        model = runtime.load_model(cfg, plan.config)
        module = runtime.build_module(cfg, plan, model)
        plan.trainer.fit(module, plan.data)
        export_model(module.model, plan.tokenizer, run_dir / "model", runtime.DTYPES[cfg.model.export_dtype])


if __name__ == "__main__":
    main()
