"""How large a step may be: measured, since it differs by a factor of thirty between models and cuts.

AdamW moves every weight by about the learning rate, so that its steps make a noise of that size in all of them. What that
noise costs grows with its square, and healing can't get below it before the rate falls. The rate at which it costs a fixed
share of what the cut did was near the best one for Mamba and Mamba-2, for cuts that cost 0.01 and 0.15 nats (tests/gpu/healing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..interrupts import restoring

NOISE = 1e-3
"""The share of the cut's divergence that noise of the learning rate's size costs, at its peak."""
LARGEST, SMALLER = 1e-2, 0.3
"""Noise to try first, and by what to shrink it until it costs no more than the cut did: there its cost is quadratic."""
TRIALS = 6


@torch.no_grad()
def learning_rate(parameters: Sequence[nn.Parameter], divergence: Callable[[], float], seed: int = 0) -> float:
    """AdamW's peak learning rate for parameters of a model that was cut; they are as they were afterwards.

    Args:
        parameters: to be trained.
        divergence: of the model as it is now from the full one.
        seed: of the noise.
    """
    torch.manual_seed(seed)
    before = [parameter.detach().clone() for parameter in parameters]
    signs = [torch.randint(0, 2, p.shape, device=p.device, dtype=torch.int8).mul_(2).sub_(1) for p in parameters]

    def put(size: float) -> None:
        for parameter, old, sign in zip(parameters, before, signs, strict=True):
            parameter.copy_(old.float() + size * sign.float() if size else old)

    def cost(size: float) -> float:
        total = 0.0
        for direction in (size, -size):  # of both, so that the slope cancels
            put(direction)
            total += divergence() / 2
        return total - now

    size, now = LARGEST, divergence()
    with restoring(lambda: put(0.0)):
        for _ in range(TRIALS):
            lost = cost(size)
            if lost <= now:
                break
            size *= SMALLER
    return size * (NOISE * now / lost) ** 0.5 if lost > 0 else size
