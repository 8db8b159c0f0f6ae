"""Mamba-2 scans in matrix products: the state space dual form, in plain torch. The scan is differentiable by B and C.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `x` | a_h, Delta_t, B_t, C_t, x_t | the selective state space model, per token |
| `within` | L | decays between two tokens of a chunk, exp(sum over s < k <= t of Delta_k a), lower triangular |
| `P`, `R`, `k`, `v`, `f`, `M`, `S` | | as in `mamba2`, whose Gramians these are: the CPU path |

The decay of a head is one number, so y_t = sum over s <= t of (C_t . B_s) L_ts Delta_s x_s: inside of a chunk a masked
product of [chunk, chunk], and across chunks through the states. Neither the decays nor Delta x depend on B or C, so they
are computed once for any number of scans.

Source: Dao and Gu, Transformers are SSMs (arXiv 2405.21060), section 6.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64
SPAN = 8
"""Tokens whose states are there at once, in all channels, to add up M."""


class ChunkedScan:
    """The outputs of a Mamba-2 scan for any B and C.

    Args:
        inputs: Delta x, [batch, length, heads, head_dim].
        rates: Delta A, the logarithms of the decays, [batch, length, heads].
        groups: of heads that share B and C; head h belongs to group h // (heads / groups).
        chunk: tokens of a masked product.
    """

    def __init__(self, inputs: Tensor, rates: Tensor, groups: int, *, chunk: int = CHUNK) -> None:
        self.groups, self.chunk, self.length = groups, chunk, inputs.shape[1]
        # [batch, chunks, group, head of the group, token of the chunk]
        steps = self._chunks(rates).unflatten(-1, (groups, -1)).permute(0, 1, 3, 4, 2).double()
        passed = steps.cumsum(-1)  # up to and with a token, since the chunk's start
        total = passed[..., -1]
        before = total.cumsum(1) - total  # since the sequence's start, [batch, chunks, group, head]
        dtype = inputs.dtype
        self.within = decays(passed, passed).to(dtype)
        self.from_start, self.to_end = passed.exp().to(dtype), (total[..., None] - passed).exp().to(dtype)
        # From the end of chunk d to the start of chunk c > d, [batch, group, head, c, d].
        ends, starts = ((before + total).movedim(1, -1), before.movedim(1, -1))
        self.across = decays(starts, ends, -1).to(dtype)
        inputs = self._chunks(inputs).unflatten(3, (groups, -1))
        self.inputs = inputs.permute(0, 1, 3, 4, 2, 5).contiguous()  # [batch, chunks, group, head, token, head_dim]
        self.stored = self.inputs * self.to_end[..., None]

    def __call__(self, B: Tensor, C: Tensor) -> Tensor:
        """The output y [batch, length, heads, head_dim] of B and C [batch, length, groups, N]."""
        B, C = (self._chunks(M).transpose(2, 3) for M in (B, C))  # [batch, chunks, group, token, N]
        inside = ((C @ B.mT)[:, :, :, None] * self.within) @ self.inputs
        states = B.mT[:, :, :, None] @ self.stored  # [batch, chunks, group, head, N, head_dim]
        before = torch.einsum("bghcd,bdghnp->bcghnp", self.across, states)
        y: Tensor = inside + self.from_start[..., None] * (C[:, :, :, None] @ before)
        y = y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).flatten(2, 3)
        return y[:, : self.length]

    def _chunks(self, x: Tensor) -> Tensor:
        """[batch, length, ...] as [batch, chunks, chunk, ...], with zeros at the end."""
        missing = -x.shape[1] % self.chunk
        chunks: Tensor = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)).unflatten(1, (-1, self.chunk))
        return chunks


def decays(to: Tensor, since: Tensor, diagonal: int = 0) -> Tensor:
    """exp(to - since) of all pairs, [..., to, since], lower triangular up to a diagonal.

    What is above it may overflow, and is masked before, too, so that it has no gradient.
    """
    return (to[..., :, None] - since[..., None, :]).tril(diagonal).exp().tril(diagonal)


def controllability(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, gate: Tensor) -> Tensor:
    """The heads' controllability Gramians, weighted by the gates, as `mamba2.controllability` gives them.

    Args:
        x, gate: inputs and gates, [batch, length, heads, head_dim].
        delta: step sizes, [batch, length, heads].
        A: continuous-time dynamics, one negative scalar per head, [heads].
        B: input maps, [batch, length, groups, N].

    Returns:
        P, the sum over batch, tokens and head_dim of gate^2 h h^T, [heads, N, N].
    """
    heads = len(A)
    rates, k = delta * A, delta[..., None] * x
    # A scan backwards in time, in which a step's decay acts between its token and the one before.
    later = F.pad(rates[:, 1:].flip(1), (0, 0, 1, 0))
    one = rates.new_ones(*rates.shape[:2], 1, 1)
    R = ChunkedScan(gate.square().flip(1), 2 * later, 1)(one, one).flip(1)
    B = B.repeat_interleave(heads // B.shape[2], dim=2)
    # Of the last input, only half: P is the sum of B v^T and its transpose.
    v = ChunkedScan(B, rates, heads)(k, R * k) - (R * k.square()).sum(-1, keepdim=True) / 2 * B
    half = B.flatten(0, 1).permute(1, 2, 0) @ v.flatten(0, 1).transpose(0, 1)
    return half + half.mT


def contribution(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, gate: Tensor) -> Tensor:
    """The contribution Gram of each group of heads that shares B and C, as `mamba2.contribution` gives it.

    Args:
        x, delta, A, B, gate: as for `controllability`.
        C: output maps, [batch, length, groups, N].

    Returns:
        M, the sum over batch, tokens and channels of f f^T, [groups, N, N], float64.
    """
    groups, N = B.shape[2:]
    # [batch, groups, heads of a group, (head_dim,) token]
    rates = (delta * A).unflatten(2, (groups, -1)).permute(0, 2, 3, 1)
    k, gate = ((tensor.unflatten(2, (groups, -1)).permute(0, 2, 3, 4, 1)) for tensor in (delta[..., None] * x, gate))
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # [batch, groups, token, N]
    S = x.new_zeros(*k.shape[:-1], N)
    M = x.new_zeros(groups, N, N, dtype=torch.float64)
    for start in range(0, x.shape[1], SPAN):
        span = slice(start, start + SPAN)
        passed = rates[..., span].cumsum(-1)
        since_start, to_end = passed.exp(), (passed[..., -1:] - passed).exp()
        drive, g = k[..., span], gate[..., span]
        inputs, outputs = B[:, :, span], C[:, :, span]
        moved = decays(passed, passed)[..., None, :, :] * drive[..., None, :] * g[..., None]
        f = (moved.flatten(2, 4) @ inputs).view(*moved.shape[:-1], N)
        f += (since_start[..., None, :] * g)[..., None] * S[..., None, :]
        f = (f * outputs[:, :, None, None]).transpose(0, 1).reshape(groups, -1, N)
        M += f.mT @ f
        S = since_start[..., -1, None, None] * S + (drive * to_end[..., None, :]) @ inputs[:, :, None]
    return M
