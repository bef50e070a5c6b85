"""Optimizers: AdamW with states in fp32, and with states in 8 bits.

Shapes: n elements of a weight.
"""

from collections.abc import Callable
from typing import Any

import torch

from pose.modeling.compat import bitsandbytes
from pose.training.options import OPTIMIZERS


def make_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], fused: bool = True
) -> torch.optim.Optimizer:
    """The optimizer of a training.

    Args:
        name: one of OPTIMIZERS. adamw8bit (arXiv 2110.02861) keeps both moments in 8 bits, in blocks of 256 elements
            with a scale each; those of weights of fewer than 4,096 elements in fp32.
        groups: of parameters, each with its weight_decay.
        lr: peak learning rate.
        betas: of AdamW.
        fused: whether AdamW takes its step in one kernel.
    """
    assert name in OPTIMIZERS
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    return _adamw8bit()(groups, lr=lr, betas=betas, weight_decay=0.0)


def round_stochastically(exact: torch.Tensor) -> torch.Tensor:
    """fp32 [n] to bf16 [n]: up or down with the probability that makes the mean exact.

    Steps smaller than a bf16 weight's last bit are so taken in the mean, where rounding to the nearest takes none. The
    16 bits that go are filled up with random ones: a carry rounds up. torch's generator of the device is drawn from.
    """
    bits = exact.contiguous().view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(exact.isfinite(), rounded, exact).to(torch.bfloat16)  # NaN plus noise may be a number


def _adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    class AdamW8bit(bitsandbytes().optim.AdamW8bit):  # type: ignore[misc]  # without types
        """bitsandbytes' own; a bf16 weight is stepped on as an fp32 copy of it alone, and rounded stochastically."""

        def update_step(self, group, p, gindex, pindex):
            held, gradient = p.data, p.grad
            if held.dtype != torch.bfloat16:
                super().update_step(group, p, gindex, pindex)
                return
            try:
                p.data = held.float()
                p.grad = gradient.float()
                super().update_step(group, p, gindex, pindex)
                held.copy_(round_stochastically(p.data))
            finally:
                p.data, p.grad = held, gradient

    return AdamW8bit
