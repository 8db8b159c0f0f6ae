"""Triton scans of Mamba-2: Gramians and the contribution Gram, all through chunks of matrix products.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `x` | a_h, Delta_t, B_t, C_t, x_t | the selective state space model, per token |
| `h` | h_t | state of a head, [head_dim, N], h_t = exp(Delta_t a) h_{t-1} + Delta_t x_t B_t^T |
| `P` | P | weighted controllability Gramian, the sum over t and p of g_tp^2 h_tp h_tp^T |
| `R` | - | R_t = g_t^2 + exp(2 Delta_{t+1} a) R_{t+1}: how much of P an input at t still moves |
| `G` | - | G_t = valid_t + exp(2 Delta_t a) G_{t-1}: the observability Gramian is the sum of G_t C_t C_t^T |
| `f` | - | feature of a token and a channel p of a head, [N]: f_n = g_tp C_tn h_tpn |
| `M` | M | contribution Gram, the sum over tokens and channels of f f^T |
| `S` | - | state before the first token of a chunk |

The decay of a head is one number, so its Gramian needs no outer product of states. With k_t = Delta_t x_t, expanding
h h^T by the last input gives

    P = sum over t of (B_t v_t^T + v_t B_t^T),  v_t = sum over p of R_tp k_tp (h_tp - k_tp B_t / 2),

and v is a linear attention: queries R k, keys k, values B. Inside a chunk it is a product of [chunk, chunk], across
chunks it goes through h. That costs what a forward pass of the scan costs, N / 2 times less than the outer products.

M has no such shortcut: C_t weighs every token's outer products anew. But with the decays L of a chunk, [chunk, chunk],
the states of all of a chunk's tokens are one product for each channel, and their part of M is another:

    h_p = (decay since the start) S_p + (L * k_p) B,  M = sum over chunks and p of f_p^T f_p,  f_p [chunk, N].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device_of
from .contribution import pairs_of_blocks, split
from .mamba import CHUNK, LOG2_E, PRECISION

SPAN = 4
"""Chunks whose parts of M one program adds up: fewer parts to write against more programs to fill the card."""


@triton.jit
def _reach_kernel(
    delta,
    A,
    gate,
    R,
    length,
    heads,
    head_dim,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """R of one head and one row of the batch, backwards in chunks."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s = tl.arange(0, CHUNK)
    p = tl.arange(0, DIM)
    rate = tl.load(A + head) * (2 * LOG2_E)
    after = tl.zeros([DIM], tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for index in range(chunks):
        t = (chunks - 1 - index) * CHUNK + s
        in_t = t < length
        inside = in_t[:, None] & (p < head_dim)[None, :]
        place = ((row * length + t)[:, None] * heads + head) * head_dim + p[None, :]
        g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        # The decay of a step acts between the token before and its own: past the last token there is nothing.
        steps = tl.load(delta + (row * length + t + 1) * heads + head, mask=t + 1 < length, other=0.0).to(tl.float32)
        passed = tl.cumsum(steps * rate, 0)  # from the chunk's start to after each token
        before = passed - steps * rate
        between = before[None, :] - before[:, None]
        decay = tl.exp2(tl.where(s[None, :] >= s[:, None], between, -float("inf")))
        reach = tl.dot(decay, g * g, input_precision=PRECISION)
        reach += tl.exp2(tl.sum(steps * rate, 0) - before)[:, None] * after[None, :]
        tl.store(R + place, reach, mask=inside)
        after = tl.sum(tl.where(s[:, None] == 0, reach, 0.0), 0)


@triton.jit
def _controllability_kernel(
    x,
    delta,
    A,
    B,
    R,
    valid,
    P,
    G,
    length,
    heads,
    head_dim,
    groups,
    N,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the sum of B_t v_t^T, of one head and one row of the batch; the first tile also writes G."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(N, COLUMNS)
    i = (tl.program_id(2) // tiles) * ROWS + tl.arange(0, ROWS)
    j = (tl.program_id(2) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    group = head // (heads // groups)
    s = tl.arange(0, CHUNK)
    p = tl.arange(0, DIM)
    rate = tl.load(A + head) * LOG2_E
    h = tl.zeros([DIM, COLUMNS], tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    reach = 0.0
    for start in range(0, length, CHUNK):
        t = start + s
        in_t = t < length
        inside = in_t[:, None] & (p < head_dim)[None, :]
        place = ((row * length + t)[:, None] * heads + head) * head_dim + p[None, :]
        steps = tl.load(delta + (row * length + t) * heads + head, mask=in_t, other=0.0).to(tl.float32)
        keys = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * steps[:, None]
        queries = tl.load(R + place, mask=inside, other=0.0) * keys
        maps = ((row * length + t)[:, None] * groups + group) * N
        B_j = tl.load(B + maps + j[None, :], mask=in_t[:, None] & (j < N)[None, :], other=0.0).to(tl.float32)
        passed = tl.cumsum(steps * rate, 0)
        end = tl.sum(steps * rate, 0)
        between = passed[:, None] - passed[None, :]
        decay = tl.exp2(tl.where(s[:, None] >= s[None, :], between, -float("inf")))
        if tl.program_id(2) == 0:
            counts = tl.load(valid + row * length + t, mask=in_t, other=0.0)
            seen = tl.sum(decay * decay * counts[None, :], 1) + tl.exp2(2 * passed) * reach
            tl.store(G + (row * length + t) * heads + head, seen, mask=in_t)
            reach = tl.sum(tl.where(s == CHUNK - 1, seen, 0.0), 0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores *= tl.where(s[:, None] == s[None, :], 0.5, decay)
        v = tl.dot(scores, B_j, input_precision=PRECISION)
        v += tl.dot(queries * tl.exp2(passed)[:, None], h, input_precision=PRECISION)
        keys *= tl.exp2(end - passed)[:, None]
        h = h * tl.exp2(end) + tl.dot(tl.trans(keys), B_j, input_precision=PRECISION)
        B_i = tl.load(B + maps + i[None, :], mask=in_t[:, None] & (i < N)[None, :], other=0.0).to(tl.float32)
        total += tl.dot(tl.trans(B_i), v, input_precision=PRECISION)
    pair = ((row * heads + head) * N + i[:, None]) * N + j[None, :]
    tl.store(P + pair, total, mask=(i < N)[:, None] & (j < N)[None, :])


def controllability(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, gate: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """The heads' controllability Gramians, weighted by the gates, and what the observability Gramians need.

    Args:
        x, gate: inputs and gates, [batch, length, heads, head_dim], float32 or bfloat16.
        delta: step sizes, [batch, length, heads].
        A: continuous-time dynamics, one negative scalar per head, [heads], float32.
        B: input maps, [batch, length, groups, N].
        valid: 1 for tokens that count and 0 for padding, [batch, length], float32.

    Returns:
        the sum over batch, tokens and head_dim of gate^2 h h^T, [heads, N, N], float64, and G, [batch, length, heads],
        float32.
    """
    batch, length, heads, head_dim = x.shape
    groups, N = B.shape[2:]
    x, delta, A, B, gate, valid = (tensor.contiguous() for tensor in (x, delta, A, B, gate, valid))
    dim = max(16, triton.next_power_of_2(head_dim))
    R = torch.empty_like(x, dtype=torch.float32)
    with on_device_of(x):
        _reach_kernel[(heads, batch)](
            delta, A, gate, R, length, heads, head_dim, CHUNK=32, DIM=dim, PRECISION=PRECISION, num_warps=4
        )
    rows = min(128, max(16, triton.next_power_of_2(N)))
    columns = min(64, rows)
    parts = x.new_empty(batch, heads, N, N, dtype=torch.float32)
    G = torch.empty_like(delta, dtype=torch.float32)
    with on_device_of(x):
        _controllability_kernel[(heads, batch, triton.cdiv(N, rows) * triton.cdiv(N, columns))](
            x,
            delta,
            A,
            B,
            R,
            valid,
            parts,
            G,
            length,
            heads,
            head_dim,
            groups,
            N,
            CHUNK=16,
            DIM=dim,
            ROWS=rows,
            COLUMNS=columns,
            PRECISION=PRECISION,
            num_warps=4 if rows < 64 else 8,
        )
    half = parts.sum(0, dtype=torch.float64)
    return half + half.mT, G


@triton.jit
def _starts_kernel(
    x,
    delta,
    A,
    B,
    starts,
    length,
    heads,
    head_dim,
    groups,
    N,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The states before each chunk, of one head, one row of the batch and some of the N."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    group = head // (heads // groups)
    s = tl.arange(0, CHUNK)
    p = tl.arange(0, DIM)
    rate = tl.load(A + head) * LOG2_E
    chunks = tl.cdiv(length, CHUNK)
    h = tl.zeros([DIM, COLUMNS], tl.float32)
    for chunk in range(chunks):
        state = (((row * chunks + chunk) * heads + head) * head_dim + p[:, None]) * N + j[None, :]
        tl.store(starts + state, h, mask=(p < head_dim)[:, None] & (j < N)[None, :])
        t = chunk * CHUNK + s
        in_t = t < length
        inside = in_t[:, None] & (p < head_dim)[None, :]
        place = ((row * length + t)[:, None] * heads + head) * head_dim + p[None, :]
        maps = ((row * length + t)[:, None] * groups + group) * N + j[None, :]
        steps = tl.load(delta + (row * length + t) * heads + head, mask=in_t, other=0.0).to(tl.float32)
        keys = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * steps[:, None]
        B_j = tl.load(B + maps, mask=in_t[:, None] & (j < N)[None, :], other=0.0).to(tl.float32)
        end = tl.sum(steps * rate, 0)
        keys *= tl.exp2(end - tl.cumsum(steps * rate, 0))[:, None]
        h = h * tl.exp2(end) + tl.dot(tl.trans(keys), B_j, input_precision=PRECISION)


@triton.jit
def _contribution_kernel(
    x,
    delta,
    A,
    B,
    C,
    gate,
    starts,
    pairs,
    M,
    length,
    heads,
    head_dim,
    groups,
    N,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """M over a span of chunks of one head and one row of the batch, not yet symmetric, for a pair of blocks of states.

    Tiles are [states, tokens]: the products' rows, which the warps share out, are then the longer side.
    """
    chunks = tl.cdiv(length, CHUNK)
    spans = tl.cdiv(chunks, SPAN)
    head, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, span = part // spans, (part % spans).to(tl.int32)
    group = head // (heads // groups)
    s = tl.arange(0, CHUNK)
    lane = tl.arange(0, TILE)
    first, second = tl.load(pairs + 2 * tl.program_id(2)), tl.load(pairs + 2 * tl.program_id(2) + 1)
    n = tl.where(lane < TILE // 2, first * (TILE // 2) + lane, (second - 1) * (TILE // 2) + lane)
    in_n = n < N
    rate = tl.load(A + head) * LOG2_E
    total = tl.zeros([TILE, TILE], tl.float32)
    for chunk in range(span * SPAN, tl.minimum(span * SPAN + SPAN, chunks)):
        t = chunk * CHUNK + s
        in_t = t < length
        tokens = row * length + t
        channels = (tokens * heads + head) * head_dim
        state = starts + ((row * chunks + chunk) * heads + head) * head_dim * N + n
        maps = (tokens[None, :] * groups + group) * N + n[:, None]
        steps = tl.load(delta + tokens * heads + head, mask=in_t, other=0.0).to(tl.float32)
        inside = in_n[:, None] & in_t[None, :]
        outputs = tl.load(C + maps, mask=inside, other=0.0).to(tl.float32)
        B_high, B_low = split(tl.load(B + maps, mask=inside, other=0.0).to(tl.float32), OPERAND)
        passed = tl.cumsum(steps * rate, 0)
        # From s, down, to t. Masked before exp2: a difference that looks ahead is positive and might overflow.
        between = tl.where(s[:, None] <= s[None, :], passed[None, :] - passed[:, None], -float("inf"))
        decay = tl.exp2(between) * steps[:, None]
        since_start = tl.exp2(passed)
        next_x = tl.load(x + channels, mask=in_t, other=0.0).to(tl.float32)
        next_g = tl.load(gate + channels, mask=in_t, other=0.0).to(tl.float32)
        next_state = tl.load(state, mask=in_n, other=0.0)
        for p in range(head_dim):
            drive, g, start = next_x, next_g, next_state
            # Read ahead: the load's latency hides behind this channel's arithmetic.
            more = t < tl.where(p + 1 < head_dim, length, 0)
            next_x = tl.load(x + channels + p + 1, mask=more, other=0.0).to(tl.float32)
            next_g = tl.load(gate + channels + p + 1, mask=more, other=0.0).to(tl.float32)
            next_state = tl.load(state + (p + 1) * N, mask=n < tl.where(p + 1 < head_dim, N, 0), other=0.0)
            high, low = split(decay * drive[:, None] * g[None, :], OPERAND)
            h = start[:, None] * (since_start * g)[None, :]
            h = tl.dot(B_high, high, h)
            h = tl.dot(B_low, high, h)
            h = tl.dot(B_high, low, h)
            # f f^T = high high^T + high low^T + low high^T + what is too small; of the middle two, which are each
            # other's transposes, only the first is computed, twice: M is made symmetric in the end.
            high, low = split(h * outputs, OPERAND)
            total = tl.dot(high, tl.trans(high), total)
            total = tl.dot(high, tl.trans(low + low), total)
    pair = ((part * heads + head) * N + n[:, None]) * N + n[None, :]
    tl.store(M + pair, total, mask=in_n[:, None] & in_n[None, :])


def contribution(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, gate: Tensor) -> Tensor:
    """The contribution Gram of each group of heads that shares B and C, with a relative error of about 1e-5.

    Args:
        x, delta, A, B, gate: as for `controllability`.
        C: output maps, [batch, length, groups, N].

    Returns:
        M, [groups, N, N], float64.
    """
    batch, length, heads, head_dim = x.shape
    groups, N = B.shape[2:]
    x, delta, A, B, C, gate = (tensor.contiguous() for tensor in (x, delta, A, B, C, gate))
    tile = min(128, max(16, triton.next_power_of_2(N)))
    columns = min(64, tile)
    chunks = triton.cdiv(length, CHUNK)
    starts = x.new_empty(batch, chunks, heads, head_dim, N, dtype=torch.float32)
    with on_device_of(x):
        _starts_kernel[(heads, batch, triton.cdiv(N, columns))](
            x,
            delta,
            A,
            B,
            starts,
            length,
            heads,
            head_dim,
            groups,
            N,
            CHUNK=CHUNK,
            DIM=max(16, triton.next_power_of_2(head_dim)),
            COLUMNS=columns,
            PRECISION=PRECISION,
            num_warps=4,
        )
    pairs = pairs_of_blocks(N, tile, x.device)
    spans = triton.cdiv(chunks, SPAN)
    parts = x.new_empty(batch * spans, groups, heads // groups, N, N, dtype=torch.float32)
    with on_device_of(x):
        _contribution_kernel[(heads, batch * spans, len(pairs))](
            x,
            delta,
            A,
            B,
            C,
            gate,
            starts,
            pairs,
            parts,
            length,
            heads,
            head_dim,
            groups,
            N,
            SPAN=SPAN,
            CHUNK=CHUNK,
            TILE=tile,
            # The interpreter has no bfloat16 products; it makes the same ones of the same numbers in float32.
            OPERAND=tl.bfloat16 if x.is_cuda else tl.float32,
            num_warps=8 if tile == 128 else 4,
        )
    M = parts.sum((0, 2), dtype=torch.float64)
    return (M + M.mT) / 2
