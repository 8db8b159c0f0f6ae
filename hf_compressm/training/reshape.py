"""A parameter changes its shape and stays the same object."""

from __future__ import annotations

import torch
from torch import Tensor


def set_data_(parameter: Tensor, new: Tensor) -> None:
    """Give a parameter new data of another shape and keep the object, which optimizers and wrappers hold.

    Passing through another dtype drops autograd's accumulator of the old shape.
    """
    new = new.detach().to(parameter.dtype).contiguous()
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.grad = None
    parameter.data = parameter.data.to(other)
    parameter.data = new
