"""Scans over time: `reference` and `chunked` in plain torch, for any device; the other modules in Triton, for CUDA.

Triton is imported by those modules alone, and they only where `fused` says so.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def fused(x: Tensor) -> bool:
    """Whether the Triton kernels take tensors like this one."""
    return x.is_cuda and _has_triton()


def on_device_of(x: Tensor) -> torch.cuda.device:
    """What a launch stands in: Triton launches on the current device, which need not be that of its tensors.

    On a CPU, as in Triton's interpreter, it does nothing.
    """
    return torch.cuda.device(x.get_device())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
