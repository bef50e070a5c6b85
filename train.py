"""Extends a model's context window: python train.py [group=choice ...] [key=value ...]"""

import hydra
from omegaconf import DictConfig

from pose.app import schema
from pose.app.hints import naming_near_keys

schema.register()


@naming_near_keys("train")
@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig):
    from pose.app.run import train  # torch and the like are imported when the config stands

    train(cfg)


if __name__ == "__main__":
    main()
