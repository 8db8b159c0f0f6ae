"""AdamW for parameters of low precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class MasterAdamW(torch.optim.AdamW):
    """AdamW that moves float32 copies of bfloat16 parameters, in which a weight of 1 can't take a step below 0.004.

    Args:
        parameters: that are trained; after each step they take the copies' values, rounded.
        kwargs: as for AdamW.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **kwargs: Any) -> None:
        pairs = [(p, p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())) for p in parameters]
        self.copies = [pair for pair in pairs if pair[0] is not pair[1]]
        super().__init__([master for _, master in pairs], **kwargs)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step by the parameters' gradients."""
        for parameter, master in self.copies:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        loss = super().step(closure)
        for parameter, master in self.copies:
            parameter.copy_(master)
            master.grad = None
        return loss
