"""Measures how far models reach: python evaluate.py ckpt=X [eval=choice] [eval.key=value ...]

X is a run folder of train.py, any Hugging Face folder, a .gguf file or a hub id, or a list of them: ckpt=[X,Y]; with
names for tables and plots: ckpt={base:X,mine:Y}. A killed evaluation goes on where it was when the same command is
given again.
"""

import hydra
from omegaconf import DictConfig

from pose.app import schema
from pose.app.hints import naming_near_keys

schema.register()


@naming_near_keys("evaluate")
@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig):
    from pose.app.compare import evaluate  # torch and the like are imported when the config stands

    evaluate(cfg)


if __name__ == "__main__":
    main()
