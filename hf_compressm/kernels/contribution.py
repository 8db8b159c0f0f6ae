"""Triton scan for the contribution Gram M of Mamba-1.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `u` | A, Delta_t, B_t, C_t, u_t | the selective state space model, per token |
| `h` | h_t | state, h_t = exp(Delta_t A) h_{t-1} + Delta_t u_t B_t |
| `M` | M | sum over tokens and channels of w (C_i h_i) (C_j h_j) |

M is the Gram of the features g C_n h_n over tokens and channels, so one matrix product per token adds to it and K_t
is not needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mamba import LOG2_E, PRECISION


@triton.jit
def _contribution_kernel(
    u,
    delta,
    A,
    B,
    C,
    gate,
    tiles,
    M,
    length,
    channels,
    N,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile (i, j) of M from one block of channels and one row of the batch."""
    block, tile, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    in_d = d < channels
    i = tl.load(tiles + 2 * tile) * TILE + tl.arange(0, TILE)
    j = tl.load(tiles + 2 * tile + 1) * TILE + tl.arange(0, TILE)
    in_i, in_j = i < N, j < N
    A_i = tl.load(A + d[None, :] * N + i[:, None], mask=in_i[:, None] & in_d[None, :], other=0.0) * LOG2_E
    A_j = tl.load(A + d[None, :] * N + j[:, None], mask=in_j[:, None] & in_d[None, :], other=0.0) * LOG2_E
    h_i = tl.zeros([TILE, CHANNELS], tl.float32)
    h_j = tl.zeros([TILE, CHANNELS], tl.float32)
    total = tl.zeros([TILE, TILE], tl.float32)
    token = row.to(tl.int64) * length
    end = token + length
    next_step = tl.load(delta + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
    next_u = tl.load(u + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
    next_g = tl.load(gate + token * channels + d, mask=in_d, other=0.0).to(tl.float32)
    for _ in range(length):
        step, drive, g = next_step, next_step * next_u, next_g
        # Read ahead: the load's latency hides behind this token's arithmetic.
        more = d < tl.where(token + 1 < end, channels, 0)
        next_step = tl.load(delta + (token + 1) * channels + d, mask=more, other=0.0).to(tl.float32)
        next_u = tl.load(u + (token + 1) * channels + d, mask=more, other=0.0).to(tl.float32)
        next_g = tl.load(gate + (token + 1) * channels + d, mask=more, other=0.0).to(tl.float32)
        maps = token * N
        B_i = tl.load(B + maps + i, mask=in_i, other=0.0).to(tl.float32)
        B_j = tl.load(B + maps + j, mask=in_j, other=0.0).to(tl.float32)
        C_i = tl.load(C + maps + i, mask=in_i, other=0.0).to(tl.float32)
        C_j = tl.load(C + maps + j, mask=in_j, other=0.0).to(tl.float32)
        h_i = tl.exp2(A_i * step[None, :]) * h_i + drive[None, :] * B_i[:, None]
        h_j = tl.exp2(A_j * step[None, :]) * h_j + drive[None, :] * B_j[:, None]
        features_i = h_i * (C_i[:, None] * g[None, :])
        features_j = h_j * (C_j[:, None] * g[None, :])
        total += tl.dot(features_i, tl.trans(features_j), input_precision=PRECISION)
        token += 1
    part = row.to(tl.int64) * tl.num_programs(0) + block
    place = M + (part * N + i[:, None]) * N + j[None, :]
    tl.store(place, total, mask=in_i[:, None] & in_j[None, :])


def contribution(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, gate: Tensor) -> Tensor:
    """The contribution Gram of a layer.

    Args:
        u, gate: inputs and gates, [batch, length, channels].
        delta: step sizes, [batch, length, channels].
        A: continuous-time dynamics, [channels, N].
        B, C: input and output maps, [batch, length, N].

    Returns:
        M, [N, N], float64.
    """
    batch, length, channels = u.shape
    N = B.shape[2]
    tile, lanes = min(64, max(16, triton.next_power_of_2(N))), 32
    blocks = triton.cdiv(channels, lanes)
    count = triton.cdiv(N, tile)
    tiles = torch.tril_indices(count, count, device=u.device).T.contiguous().int()
    parts = u.new_zeros(batch, blocks, N, N, dtype=torch.float32)
    _contribution_kernel[(blocks, len(tiles), batch)](
        *(x.contiguous() for x in (u, delta, A, B, C, gate)),
        tiles,
        parts,
        length,
        channels,
        N,
        TILE=tile,
        CHANNELS=lanes,
        PRECISION=PRECISION,
        num_warps={16: 1, 32: 4, 64: 8}[tile],
    )
    M = parts.sum((0, 1), dtype=torch.float64)
    return M.tril() + M.tril(-1).mT
