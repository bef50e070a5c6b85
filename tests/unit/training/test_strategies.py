"""Which precisions a training accepts, and why not the others. Whole trainings: tests/integration."""

import lightning as L
import pytest
import torch

from pose.errors import ConfigError
from pose.training.strategies import check_strategy, resolve_precision


def precision_of(name):
    """What Lightning's trainer makes of a precision."""
    trainer = L.Trainer(accelerator="cpu", precision=name, logger=False, enable_checkpointing=False)
    return trainer.strategy, trainer.precision


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("16-true", "weights themselves in fp16 and has no scaler"),
        ("bf16-true", "weights themselves in bf16, whose rounding is larger than most steps"),
        ("64-true", "twice the memory for nothing"),
        (64, "twice the memory for nothing"),
    ],
)
def test_a_precision_without_fp32_weights_is_refused_with_its_reason(name, why):
    with pytest.raises(ConfigError, match=f"trainer.precision=.*{why}.*choose 32-true, bf16-mixed, 16-mixed"):
        check_strategy(*precision_of(name))


@pytest.mark.parametrize("name", ["32-true", 32, "bf16-mixed", "bf16"])
def test_those_with_fp32_weights_are_accepted(name):
    check_strategy(*precision_of(name))


@pytest.mark.parametrize(("is_fast", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_auto_takes_bf16_on_a_gpu_that_computes_it(monkeypatch, is_fast, precision):
    """A V100 emulates it, which torch counts as supported by default."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: is_fast or including_emulation
    )
    assert resolve_precision("auto", "gpu") == precision
