"""Triton scans of Mamba-1: Gramians, the Gram of the output, and the states at the chunks' starts.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `u` | A, Delta_t, B_t, C_t, u_t | the selective state space model, per token |
| `h` | h_t | state, h_t = exp(Delta_t A) h_{t-1} + Delta_t u_t B_t |
| `P`, `Q` | P, Q | controllability and observability Gramians |
| `G` | - | G_t = valid_t + (Abar_t Abar_t^T) * G_{t-1}: how often, and with which decay, C_t sees earlier states |
| `K` | K_t | sum over channels of w_t h_t h_t^T: how the states move the layer's output at token t |

The states never reach the device memory, but for those at the start of each chunk of `CHUNK` tokens, from which the
chunks are scanned side by side. Every state is kept as a [states, channels] tile, channels last: neighbouring threads
read neighbouring channels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device_of

LOG2_E = tl.constexpr(1.4426950408889634)
CHUNK = 64
"""Tokens from one stored state to the next."""
PROGRAMS = 2**14
"""Enough programs of one warp to fill a card several times over."""
PRECISION = "tf32x3"
"""Of the matrix products: three tf32 ones that together are good to float32's rounding."""


@triton.jit
def load_row(x, token, end, n, size):
    """Numbers n of row `token` of x [tokens, size], in float32; zeros from row `end` on, and where n is too large."""
    return tl.load(x + token * size + n, mask=n < tl.where(token < end, size, 0), other=0.0).to(tl.float32)


@triton.jit
def load_token(u, delta, B, token, end, d, n, channels, N):
    """A token's step sizes and inputs, for the channels d, and its input map, for the states n; see `load_row`."""
    return (
        load_row(delta, token, end, d, channels),
        load_row(u, token, end, d, channels),
        load_row(B, token, end, n, N),
    )


@triton.jit
def _load_pair(u, delta, B, C, valid, token, end, d, i, j, channels, N):
    """What a token adds to the Gramians' pairs (i, j): `load_token` of i, B_j, C_i, C_j, and whether it counts."""
    step, inputs, B_i = load_token(u, delta, B, token, end, d, i, channels, N)
    B_j, C_i, C_j = load_row(B, token, end, j, N), load_row(C, token, end, i, N), load_row(C, token, end, j, N)
    return step, inputs, B_i, B_j, C_i, C_j, tl.load(valid + token, mask=token < end, other=0.0)


# A known multiple of 16 channels would let the stores at the end choose a layout of four channels to a thread, and the
# loop pay for it: with one channel to a thread, rows and columns of a tile meet without moving between threads.
@triton.jit(do_not_specialize=["channels"])
def _gramians_kernel(
    u,
    delta,
    A,
    B,
    C,
    valid,
    tiles,
    P,
    Q,
    batch,
    length,
    channels,
    N,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One tile of the pairs (i, j) of some channels' P and Q, over every so many rows of the batch."""
    split, splits = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.load(tiles + 2 * tl.program_id(1)) * TILE + tl.arange(0, TILE)
    j = tl.load(tiles + 2 * tl.program_id(1) + 1) * TILE + tl.arange(0, TILE)
    in_d, in_i, in_j = d < channels, i < N, j < N
    A_i = tl.load(A + i[:, None] * channels + d[None, :], mask=in_i[:, None] & in_d[None, :], other=0.0) * LOG2_E
    A_j = tl.load(A + j[:, None] * channels + d[None, :], mask=in_j[:, None] & in_d[None, :], other=0.0) * LOG2_E
    sum_P = tl.zeros([TILE, TILE, CHANNELS], tl.float32)
    sum_Q = tl.zeros([TILE, TILE, CHANNELS], tl.float32)
    for turn in range(tl.cdiv(batch - split, splits)):
        h_i = tl.zeros([TILE, CHANNELS], tl.float32)
        h_j = tl.zeros([TILE, CHANNELS], tl.float32)
        G = tl.zeros([TILE, TILE, CHANNELS], tl.float32)
        token = (split + turn * splits) * length
        end = token + length
        next_step, next_u, next_B_i, next_B_j, next_C_i, next_C_j, next_counts = _load_pair(
            u, delta, B, C, valid, token, end, d, i, j, channels, N
        )
        for _ in range(length):
            step, drive, counts = next_step, next_step * next_u, next_counts
            B_i, B_j, C_i, C_j = next_B_i, next_B_j, next_C_i * counts, next_C_j
            # Read ahead: the loads' latency hides behind this token's arithmetic.
            token += 1
            next_step, next_u, next_B_i, next_B_j, next_C_i, next_C_j, next_counts = _load_pair(
                u, delta, B, C, valid, token, end, d, i, j, channels, N
            )
            decay_i = tl.exp2(A_i * step[None, :])
            decay_j = tl.exp2(A_j * step[None, :])
            h_i = decay_i * h_i + drive[None, :] * B_i[:, None]
            h_j = decay_j * h_j + drive[None, :] * B_j[:, None]
            sum_P += (h_i * counts)[:, None, :] * h_j[None, :, :]
            G = (decay_i[:, None, :] * decay_j[None, :, :]) * G + counts
            sum_Q += (C_i[:, None, None] * C_j[None, :, None]) * G
    pair = (i[:, None, None] * N + j[None, :, None]) * channels + d[None, None, :]
    pair += split * N * N * channels
    mask = in_i[:, None, None] & in_j[None, :, None] & in_d[None, None, :]
    tl.store(P + pair, sum_P, mask=mask)
    tl.store(Q + pair, sum_Q, mask=mask)


@triton.jit
def _starts_kernel(
    u,
    delta,
    A,
    B,
    C,
    gate,
    starts,
    y,
    length,
    channels,
    N,
    OUTPUT: tl.constexpr,
    CHUNK: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The states before each chunk of one row of the batch, and the gated output if `OUTPUT`, for some channels."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    in_d, in_n = d < channels, n < N
    inside = in_n[:, None] & in_d[None, :]
    rates = tl.load(A + n[:, None] * channels + d[None, :], mask=inside, other=0.0) * LOG2_E
    h = tl.zeros([STATES, CHANNELS], tl.float32)
    row = tl.program_id(1).to(tl.int64)
    token = row * length
    end = token + length
    next_step, next_u, next_B = load_token(u, delta, B, token, end, d, n, channels, N)
    for t in range(length):
        if t % CHUNK == 0:
            chunk = row * tl.cdiv(length, CHUNK) + t // CHUNK
            tl.store(starts + (chunk * N + n[:, None]) * channels + d[None, :], h, mask=inside)
        step, drive, inputs = next_step, next_step * next_u, next_B
        ahead = token + 1
        next_step, next_u, next_B = load_token(u, delta, B, ahead, end, d, n, channels, N)
        h = tl.exp2(rates * step[None, :]) * h + drive[None, :] * inputs[:, None]
        if OUTPUT:
            outputs = load_row(C, token, end, n, N)
            g = load_row(gate, token, end, d, channels)
            tl.store(y + token * channels + d, tl.sum(h * outputs[:, None], 0) * g, mask=in_d)
        token += 1


@triton.jit
def _output_gram_kernel(
    u,
    delta,
    A,
    B,
    gate,
    starts,
    y,
    K,
    moved,
    length,
    channels,
    N,
    OUTPUT: tl.constexpr,
    CHUNK: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add some channels' part of K_t, and of sum over channels of g h y if `OUTPUT`, for the tokens of one chunk."""
    chunks = tl.cdiv(length, CHUNK)
    position = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    in_d, in_n = d < channels, n < N
    inside = in_n[:, None] & in_d[None, :]
    rates = tl.load(A + d[None, :] * N + n[:, None], mask=inside, other=0.0) * LOG2_E
    h = tl.load(starts + (position * N + n[:, None]) * channels + d[None, :], mask=inside, other=0.0)
    first = (position % chunks) * CHUNK
    last = tl.minimum(first + CHUNK, length)
    row = position // chunks
    token = row * length + first
    end = row * length + last
    next_step, next_u, next_B = load_token(u, delta, B, token, end, d, n, channels, N)
    next_g = load_row(gate, token, end, d, channels)
    for _ in range(first, last):
        step, drive, g, inputs = next_step, next_step * next_u, next_g, next_B
        ahead = token + 1
        next_step, next_u, next_B = load_token(u, delta, B, ahead, end, d, n, channels, N)
        next_g = load_row(gate, ahead, end, d, channels)
        h = tl.exp2(rates * step[None, :]) * h + drive[None, :] * inputs[:, None]
        gated = h * g[None, :]
        part = tl.dot(gated, tl.trans(gated), input_precision=PRECISION)
        pair = (token * N + n[:, None]) * N + n[None, :]
        tl.atomic_add(K + pair, part, mask=in_n[:, None] & in_n[None, :], sem="relaxed")
        if OUTPUT:
            output = load_row(y, token, end, d, channels)
            tl.atomic_add(moved + token * N + n, tl.sum(gated * output[None, :], 1), mask=in_n, sem="relaxed")
        token = ahead


def gramians(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the time-varying controllability and observability Gramians over batch and valid tokens.

    Args:
        u, delta: inputs and step sizes, [batch, length, channels], float32 or bfloat16.
        A: continuous-time diagonal dynamics, [channels, N], float32.
        B, C: input and output maps, [batch, length, N].
        valid: 1 for tokens that count and 0 for padding, [batch, length], float32.

    Returns:
        P and Q, each [channels, N, N], float32.
    """
    batch, length, channels = u.shape
    N = A.shape[1]
    # One warp a program, one channel a thread. Larger tiles share more work and leave too few warps to hide latencies.
    tile, lanes = 4, 32
    tiles = _lower_tiles(N, tile, u.device)
    # Rows of the batch run side by side until the card is full, each split with its own sums: they are added in a fixed
    # order.
    blocks = triton.cdiv(channels, lanes) * len(tiles)
    splits = min(batch, max(1, triton.cdiv(PROGRAMS, blocks)))
    P, Q = u.new_empty(2, splits, N, N, channels, dtype=torch.float32).unbind(0)
    with on_device_of(u):
        _gramians_kernel[(triton.cdiv(channels, lanes), len(tiles), splits)](
            *(x.contiguous() for x in (u, delta, A.T, B, C, valid)),
            tiles,
            P,
            Q,
            batch,
            length,
            channels,
            N,
            TILE=tile,
            CHANNELS=lanes,
            num_warps=1,
            maxnreg=128,
        )
    return _whole(P), _whole(Q)


@lru_cache
def _lower_tiles(N: int, tile: int, device: torch.device) -> Tensor:
    """Where the tiles of an [N, N] matrix on and below the diagonal stand, [tiles, 2], int32."""
    count = triton.cdiv(N, tile)
    return torch.tril_indices(count, count, device=device).T.contiguous().int()


def _whole(parts: Tensor) -> Tensor:
    """Add splits up, and fill what lies above the diagonal: [splits, N, N, channels] to [channels, N, N]."""
    total = parts.sum(0) if len(parts) > 1 else parts[0]
    n = torch.arange(total.shape[0], device=total.device)
    below = (n[:, None] >= n)[..., None]
    return torch.where(below, total, total.transpose(0, 1)).permute(2, 0, 1).contiguous()


def chunk_starts(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scan, and keep the states before every `CHUNK`-th token.

    Args:
        u, delta, A, B: as for `gramians`.
        C, gate: output maps [batch, length, N] and gates [batch, length, channels], if the output is wanted.

    Returns:
        the states [batch, chunks, N, channels], and the gated output [batch, length, channels] (empty if not wanted),
        float32.
    """
    batch, length, channels = u.shape
    N = A.shape[1]
    starts = u.new_empty(batch, triton.cdiv(length, CHUNK), N, channels, dtype=torch.float32)
    y = u.new_empty(u.shape if C is not None else 0, dtype=torch.float32)
    states = triton.next_power_of_2(N)
    lanes = 32 if states < 256 else 16
    with on_device_of(u):
        _starts_kernel[(triton.cdiv(channels, lanes), batch)](
            *(x.contiguous() for x in (u, delta, A.T, B)),
            B if C is None else C.contiguous(),
            u if gate is None else gate.contiguous(),
            starts,
            y,
            length,
            channels,
            N,
            OUTPUT=C is not None,
            CHUNK=CHUNK,
            STATES=states,
            CHANNELS=lanes,
            num_warps=min(8, max(1, states // 16)),
        )
    return starts, y


def output_gram(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, gate: Tensor, starts: Tensor, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The Gram of the gated states over channels, for every token.

    Args:
        u, delta, A, B: as for `gramians`.
        gate: [batch, length, channels].
        starts: of `chunk_starts`.
        y: the gated output, [batch, length, channels], if the second result is wanted.

    Returns:
        K_t [batch, length, N, N], and the sum over channels of (gate h) y [batch, length, N], float32.
    """
    batch, length, channels = u.shape
    N = A.shape[1]
    K = u.new_zeros(batch, length, N, N, dtype=torch.float32)
    moved = u.new_zeros((batch, length, N) if y is not None else 0, dtype=torch.float32)
    states = max(16, triton.next_power_of_2(N))
    lanes = 64
    with on_device_of(u):
        _output_gram_kernel[(batch * triton.cdiv(length, CHUNK), triton.cdiv(channels, lanes))](
            *(x.contiguous() for x in (u, delta, A, B, gate, starts)),
            u if y is None else y,
            K,
            moved,
            length,
            channels,
            N,
            OUTPUT=y is not None,
            CHUNK=CHUNK,
            STATES=states,
            CHANNELS=lanes,
            PRECISION=PRECISION,
            num_warps=1 if states == 16 else 4,
        )
    return K, moved
