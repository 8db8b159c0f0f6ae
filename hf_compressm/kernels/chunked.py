"""A Mamba-2 scan in matrix products, differentiable by B and C: the state space dual form, in plain torch.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `x` | a_h, Delta_t, B_t, C_t, x_t | the selective state space model, per token |
| `within` | L | decays between two tokens of a chunk, exp(sum over s < k <= t of Delta_k a), lower triangular |

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


class ChunkedScan:
    """The outputs of a Mamba-2 scan for any B and C.

    Args:
        x: inputs after convolution and activation, [batch, length, heads, head_dim].
        delta: step sizes after softplus and clamping, [batch, length, heads].
        A: continuous-time dynamics, one negative scalar per head, [heads].
        groups: of heads that share B and C; head h belongs to group h // (heads / groups).
        chunk: tokens of a masked product.
    """

    def __init__(self, x: Tensor, delta: Tensor, A: Tensor, groups: int, *, chunk: int = CHUNK) -> None:
        self.groups, self.chunk, self.length = groups, chunk, x.shape[1]
        # [batch, chunks, group, head of the group, token of the chunk]
        steps = self._chunks(delta * A).unflatten(-1, (groups, -1)).permute(0, 1, 3, 4, 2).double()
        passed = steps.cumsum(-1)  # up to and with a token, since the chunk's start
        total = passed[..., -1]
        before = total.cumsum(1) - total  # since the sequence's start, [batch, chunks, group, head]
        dtype = x.dtype
        self.within = decays(passed, passed).to(dtype)
        self.from_start, self.to_end = passed.exp().to(dtype), (total[..., None] - passed).exp().to(dtype)
        # From the end of chunk d to the start of chunk c > d, [batch, group, head, c, d].
        ends, starts = ((before + total).movedim(1, -1), before.movedim(1, -1))
        self.across = decays(starts, ends).tril(-1).to(dtype)
        inputs = self._chunks(delta[..., None] * x).unflatten(3, (groups, -1))
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


def decays(to: Tensor, since: Tensor) -> Tensor:
    """exp(to - since) of all pairs, [..., to, since], lower triangular."""
    return (to[..., :, None] - since[..., None, :]).tril().exp().tril()
