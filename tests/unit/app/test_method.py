"""What loggers tell runs apart by."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from pose.app import schema
from pose.app.method import method_of, title_of

CONF = Path(__file__).resolve().parents[3] / "conf"
schema.register()


def composed(*overrides, with_hydra=False):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=with_hydra)


def test_without_hydra_it_is_called_by_its_classes():
    method = method_of(composed("pose=pose_n3", "rope=ntk", "seed=3", "objective=self_distill"))
    assert method == {
        "method": "PoSE + NTK", "sampler": "PoSE", "rope": "NTK", "objective": "SelfDistill", "finetune": "full",
        "model": "assets/tiny", "train_len": None, "target_len": 2048, "max_steps": 250, "seed": 3,
    }  # fmt: skip


def test_with_hydra_it_is_called_as_it_was_chosen(monkeypatch):
    given = ("pose=pose_n3", "rope=ntk_by_parts", "pose.train_len=128", "finetune=qlora")
    hydra = composed(*given, with_hydra=True).hydra
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
    cfg = composed(*given)
    found = {"method": "pose_n3 + ntk_by_parts", "objective": "lm", "finetune": "qlora", "train_len": 128}
    assert found.items() <= method_of(cfg).items()
    assert title_of(cfg) == "assets/tiny 2048: pose_n3 + ntk_by_parts"


@pytest.mark.parametrize(
    ("path", "name"),
    [("null", "random weights"), ("meta/Llama-2-7b", "meta/Llama-2-7b"), ("/a/RUN/model", "RUN/model")],
)
def test_a_model_is_called_by_the_end_of_its_path(path, name):
    assert method_of(composed(f"model.path={path}"))["model"] == name


def test_adapters_over_frozen_weights_are_told_apart():
    assert method_of(composed("finetune=lora"))["finetune"] == "lora"
