"""Scans over time: `reference` and `chunked` in plain torch, for any device; the other modules in Triton, for CUDA.

Triton is imported by those modules alone, and they only where `fused` says so.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def fused(x: Tensor) -> bool:
    """Whether the Triton kernels take tensors like this one."""
    return x.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
