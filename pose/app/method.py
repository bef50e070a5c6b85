"""Method, model and target of a run in a few names, by which loggers tell runs apart and group them."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pose.modeling.options import NF4


def method_of(cfg: DictConfig) -> dict[str, Any]:
    """What a comparison of runs groups by, and filters.

    Sampler and RoPE method, which `method` joins, objective and finetuning are called as they were chosen on the
    command line, such as pose_n3; a config without Hydra's record of that is called by its classes.
    """
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}

    def chosen(group: str) -> str:
        return choices.get(group) or cfg[group]["_target_"].rpartition(".")[2]

    sampler, rope, lora = chosen("pose"), chosen("rope"), cfg.finetune.lora
    return {
        "method": f"{sampler} + {rope}",
        "sampler": sampler,
        "rope": rope,
        "objective": chosen("objective"),
        "finetune": "full" if lora.rank is None else "qlora" if lora.frozen_dtype == NF4 else "lora",
        "model": "random weights" if cfg.model.path is None else "/".join(Path(cfg.model.path).parts[-2:]),
        "train_len": cfg.pose.train_len,
        "target_len": cfg.pose.target_len,
        "max_steps": cfg.trainer.max_steps,
        "seed": cfg.seed,
    }


def title_of(cfg: DictConfig) -> str:
    """The name of a run that has no other."""
    method = method_of(cfg)
    return f"{method['model']} {method['target_len']}: {method['method']}"
