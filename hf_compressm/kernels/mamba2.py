"""Triton scans of Mamba-2: both Gramians through chunks of matrix products, without the states of single tokens.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `x` | a_h, Delta_t, B_t, C_t, x_t | the selective state space model, per token |
| `h` | h_t | state of a head, [head_dim, N], h_t = exp(Delta_t a) h_{t-1} + Delta_t x_t B_t^T |
| `P` | P | weighted controllability Gramian, the sum over t and p of g_tp^2 h_tp h_tp^T |
| `R` | - | R_t = g_t^2 + exp(2 Delta_{t+1} a) R_{t+1}: how much of P an input at t still moves |
| `G` | - | G_t = valid_t + exp(2 Delta_t a) G_{t-1}: the observability Gramian is the sum of G_t C_t C_t^T |

The decay of a head is one number, so its Gramian needs no outer product of states. With k_t = Delta_t x_t, expanding
h h^T by the last input gives

    P = sum over t of (B_t v_t^T + v_t B_t^T),  v_t = sum over p of R_tp k_tp (h_tp - k_tp B_t / 2),

and v is a linear attention: queries R k, keys k, values B. Inside a chunk it is a product of [chunk, chunk], across
chunks it goes through h. That costs what a forward pass of the scan costs, N / 2 times less than the outer products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mamba import LOG2_E, PRECISION


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
    """The groups' controllability Gramians, weighted by the gates, and what the observability Gramians need.

    Args:
        x, gate: inputs and gates, [batch, length, heads, head_dim], float32 or bfloat16.
        delta: step sizes, [batch, length, heads].
        A: continuous-time dynamics, one negative scalar per head, [heads], float32.
        B: input maps, [batch, length, groups, N].
        valid: 1 for tokens that count and 0 for padding, [batch, length], float32.

    Returns:
        the sum over batch, tokens, heads and head_dim of gate^2 h h^T, [groups, N, N], float64, and G,
        [batch, length, heads], float32.
    """
    batch, length, heads, head_dim = x.shape
    groups, N = B.shape[2:]
    x, delta, A, B, gate, valid = (tensor.contiguous() for tensor in (x, delta, A, B, gate, valid))
    dim = max(16, triton.next_power_of_2(head_dim))
    R = torch.empty_like(x, dtype=torch.float32)
    _reach_kernel[(heads, batch)](
        delta, A, gate, R, length, heads, head_dim, CHUNK=32, DIM=dim, PRECISION=PRECISION, num_warps=4
    )
    rows = min(128, max(16, triton.next_power_of_2(N)))
    columns = min(64, rows)
    parts = x.new_empty(batch, groups, heads // groups, N, N, dtype=torch.float32)
    G = torch.empty_like(delta, dtype=torch.float32)
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
    half = parts.sum((0, 2), dtype=torch.float64)
    return half + half.mT, G
