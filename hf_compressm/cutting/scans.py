"""Scan with this package's scans while a model is measured, where transformers would take its plain ones.

They give what those give, but for rounding, and take a part of the time. Mamba-1's, a loop over tokens, is run from the memory
that a CPU's cache holds, on a GPU by a Triton kernel; where a gradient is wanted, it stays. Mamba-2's is run in smaller chunks and once
for all heads that share B and C: on a CPU a quarter of the time, with a gradient a fifth. Where a cache is wanted, the stock scans
run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import kernels
from ..compat.pretrained import stock_scans
from ..interrupts import restoring, uninterrupted
from ..kernels.chunked import ChunkedScan
from ..kernels.reference import mamba_output
from ..layers import Layer


@contextmanager
def quick_scans(layers: Sequence[Layer]) -> Iterator[None]:
    """Scan the layers' mixers so in here. Of those that overlap, the first to leave puts the stock scan back for all."""
    replaced: list[tuple[Any, str, Callable[..., Any]]] = []

    def restore() -> None:
        for home, name, stock in replaced:
            setattr(home, name, stock)

    with restoring(restore):
        with uninterrupted():
            for name, quick in QUICK.items():
                for home, scan in stock_scans([layer.mixer for layer in layers], name):
                    stock = getattr(scan, _STOCK, scan)  # a quick one is there, where another block has not been left
                    replaced.append((home, name, stock))
                    now = quick(stock)
                    setattr(now, _STOCK, stock)
                    setattr(home, name, now)
        yield


_STOCK = "compressm_stock"


def _mamba(stock: Callable[..., Any]) -> Callable[..., Any]:
    def scan(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        if torch.is_grad_enabled() or return_last_state or not (u.is_cuda or u.dtype == torch.float32):
            return stock(u, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **kwargs)
        delta = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        delta = F.softplus(delta) if delta_softplus else delta
        system = [x.mT.float().contiguous() for x in (u, delta, B, C)]
        y = _output(system[0], system[1], A.float(), system[2], system[3]).mT.to(u.dtype)
        y = y if D is None else y + u * D[None, :, None]
        return y if z is None else y * F.silu(z)

    return scan


def _mamba2(stock: Callable[..., Any]) -> Callable[..., Any]:
    def scan(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        if initial_states is not None or return_final_states:
            steps = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
            kwargs |= {"initial_states": initial_states, "return_final_states": return_final_states}
            return stock(x, dt, A, B, C, chunk_size, D, **steps, **kwargs)
        delta = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        delta = (F.softplus(delta) if dt_softplus else delta).clamp(*dt_limit).float()
        x = x.float()
        y = ChunkedScan(delta[..., None] * x, delta * A.float(), B.shape[2])(B.float(), C.float())
        return (y if D is None else y + D[:, None] * x).contiguous()  # FalconH1Mixer wants another view of it

    return scan


QUICK = {"mamba_selective_scan": _mamba, "mamba2_chunk_scan": _mamba2}
"""What takes the place of transformers' scans, by their names."""


def _output(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    if not kernels.fused(u):
        return mamba_output(u, delta, A, B, C)
    from ..kernels.mamba import chunk_starts

    return chunk_starts(u, delta, A, B, C, torch.ones_like(u))[1]
