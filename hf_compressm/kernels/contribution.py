"""Triton scan for the contribution Gram M of Mamba-1.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `u` | A, Delta_t, B_t, C_t, u_t | the selective state space model, per token |
| `h` | h_t | state, h_t = exp(Delta_t A) h_{t-1} + Delta_t u_t B_t |
| `M` | M | sum over tokens and channels of w (C_i h_i) (C_j h_j) |

M is the Gram of the features f_n = g C_n h_n over tokens and channels, so one matrix product per token adds to it and
K_t is not needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device_of
from .mamba import LOG2_E, load_row, load_token


@triton.jit
def split(values, OPERAND: tl.constexpr):
    """Two bfloat16 numbers whose sum is good to 2^-17: a float32 number for the tensor cores' fastest products."""
    # Rounded as an integer: back and forth through bfloat16 takes the slow unit for single conversions.
    bits = (values.to(tl.int32, bitcast=True) + 0x8000) & -0x10000
    high = bits.to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16).to(OPERAND), (values - high).to(tl.bfloat16).to(OPERAND)


@triton.jit
def _contribution_kernel(
    u,
    delta,
    A,
    B,
    C,
    gate,
    pairs,
    M,
    length,
    channels,
    N,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """M of one block of channels and one row of the batch, not yet symmetric, for a pair of blocks of states."""
    block, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    lane = tl.arange(0, TILE)
    first, second = tl.load(pairs + 2 * tl.program_id(1)), tl.load(pairs + 2 * tl.program_id(1) + 1)
    n = tl.where(lane < TILE // 2, first * (TILE // 2) + lane, (second - 1) * (TILE // 2) + lane)
    in_d, in_n = d < channels, n < N
    rates = tl.load(A + d[None, :] * N + n[:, None], mask=in_n[:, None] & in_d[None, :], other=0.0) * LOG2_E
    h = tl.zeros([TILE, CHANNELS], tl.float32)
    total = tl.zeros([TILE, TILE], tl.float32)
    token = row * length
    end = token + length
    next_step, next_u, next_B = load_token(u, delta, B, token, end, d, n, channels, N)
    next_g = load_row(gate, token, end, d, channels)
    next_C = load_row(C, token, end, n, N)
    for _ in range(length):
        step, drive, g, inputs, outputs = next_step, next_step * next_u, next_g, next_B, next_C
        # Read ahead: the load's latency hides behind this token's arithmetic.
        token += 1
        next_step, next_u, next_B = load_token(u, delta, B, token, end, d, n, channels, N)
        next_g = load_row(gate, token, end, d, channels)
        next_C = load_row(C, token, end, n, N)
        h = tl.exp2(rates * step[None, :]) * h + drive[None, :] * inputs[:, None]
        high, low = split(h * (outputs[:, None] * g[None, :]), OPERAND)
        # f f^T = high high^T + high low^T + low high^T + what is too small; of the middle two, which are each other's
        # transposes, only the first is computed, twice: M is made symmetric in the end.
        total = tl.dot(high, tl.trans(high), total)
        total = tl.dot(high, tl.trans(low + low), total)
    part = row * tl.num_programs(0) + block
    tl.store(M + (part * N + n[:, None]) * N + n[None, :], total, mask=in_n[:, None] & in_n[None, :])


def pairs_of_blocks(N: int, tile: int, device: torch.device) -> Tensor:
    """The pairs of blocks of tile / 2 states that cover all pairs of N states, [pairs, 2], int32.

    A tile of M belongs to the states of two blocks, the first's and the second's, so that all tiles are on M's
    diagonal and need no second set of states.
    """
    blocks = max(2, triton.cdiv(N, tile // 2))
    return torch.triu_indices(blocks, blocks, 1, device=device).T.contiguous().int()


def contribution(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, gate: Tensor) -> Tensor:
    """The contribution Gram of a layer, with a relative error of about 1e-5.

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
    tile, lanes = min(128, max(16, triton.next_power_of_2(N))), 32
    blocks = triton.cdiv(channels, lanes)
    pairs = pairs_of_blocks(N, tile, u.device)
    parts = u.new_empty(batch, blocks, N, N, dtype=torch.float32)
    with on_device_of(u):
        _contribution_kernel[(blocks, len(pairs), batch)](
            *(x.contiguous() for x in (u, delta, A, B, C, gate)),
            pairs,
            parts,
            length,
            channels,
            N,
            TILE=tile,
            CHANNELS=lanes,
            # The interpreter has no bfloat16 products; it makes the same ones of the same numbers in float32.
            OPERAND=tl.bfloat16 if u.is_cuda else tl.float32,
            num_warps={16: 1, 32: 4, 64: 4, 128: 8}[tile],
        )
    M = parts.sum((0, 1), dtype=torch.float64)
    return (M + M.mT) / 2
