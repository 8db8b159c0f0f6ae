"""A projection of its own for each Mamba-2 head: where every head has its own controllability Gramian, and its own size.

| here | paper | meaning |
|---|---|---|
| `P` | P_h | controllability Gramian of a head, weighted by the output |
| `output` | - | O, the sum over tokens of C C^T, which the heads of a group share |
| `sigma` | sigma | singular values of P_h and O; their squares are what the balanced states carry |
| `lost` | - | what a head's output loses with every number of states |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .factorisations import on_threads
from .realization import Projection, share
from .singular_values import check_finite, gramian_factor

RANK_TOLERANCE = 1e-7
"""A singular value below this share of the head's largest counts as zero: its square is rounding noise."""


@dataclass(frozen=True)
class HeadProjections:
    """The projections of a group's heads, each to a size of its own, and the share of the group's output that they lose."""

    heads: tuple[Projection, ...]
    error: float

    @property
    def sizes(self) -> list[int]:
        """States of each head."""
        return [head.size for head in self.heads]


class HeadPaths:
    """The projections of a layer's heads to every total of states, shared by the heads so that least is lost.

    A head's balanced states carry sigma_1^2 >= sigma_2^2 >= ... of its output, so that the best r states of all heads
    together are those that carry most, whichever head they belong to.

    Args:
        P: the heads' controllability Gramians, weighted by the output, [heads, N, N].
        outputs: the sum over tokens of C C^T of each group, or of each head where these have C of their own, [N, N] each.
        there: how many states each head has, where some of the N are filled up.
        groups: their number, if there is an output for each head.
    """

    def __init__(
        self, P: Tensor, outputs: Sequence[Tensor], there: Sequence[int] | None = None, groups: int | None = None
    ) -> None:
        balanced = [balance_heads(part, output) for part, output in zip(P.chunk(len(outputs)), outputs, strict=True)]
        sigma, self._B, self._C = (torch.cat(parts) for parts in zip(*balanced, strict=True))
        self._groups, carried = groups or len(outputs), sigma.square()
        # From the smallest up, and 0 for all of them: [heads, N + 1].
        self._lost = torch.cat([carried.flip(1).cumsum(1).flip(1), carried.new_zeros(len(carried), 1)], dim=1)
        if there is not None:
            carried = carried.where(torch.arange(carried.shape[1]) < torch.tensor(there)[:, None], -1.0)
        self._order = carried.flatten().argsort(descending=True, stable=True) // carried.shape[1]

    def sizes(self, total: int) -> list[int]:
        """The states of each head that lose least, `total` in all."""
        return torch.bincount(self._order[:total], minlength=len(self._lost)).tolist()

    def __getitem__(self, total: int) -> tuple[HeadProjections, ...]:
        """What becomes of each group's heads with that many states in all."""
        heads, sizes = range(len(self._lost)), self.sizes(total)
        lost = [float(self._lost[head, size]) for head, size in zip(heads, sizes, strict=True)]
        whole = self._lost[:, 0].tolist()
        made = [
            Projection(self._B[head, :, :size], self._C[head, :, :size], share(lost[head], whole[head]))
            for head, size in zip(heads, sizes, strict=True)
        ]
        per_group = len(heads) // self._groups
        parts = [slice(start, start + per_group) for start in range(0, len(heads), per_group)]
        return tuple(HeadProjections(tuple(made[part]), share(sum(lost[part]), sum(whole[part]))) for part in parts)


def balance_heads(P: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Balance each head's states against P_h and the C C^T that all share.

    With output = L L^T and the eigenvectors L^T P_h L = V sigma^2 V^T, the maps are Lm = L V sigma^-1/2 of B and
    Rm = P_h L V sigma^-3/2 of C, which are those of `balanced_truncation.balance`. Columns beyond the numerical rank are
    zero.

    Args:
        P: [heads, N, N].
        output: [N, N].

    Returns:
        sigma, [heads, N], descending, on the CPU; and the maps of B and of C, [heads, N, N], where P is.

    Raises:
        ValueError: if P or the output is not finite.
    """
    check_finite(P, "controllability Gramian P")
    L = gramian_factor(output.cpu(), "second moment of C").to(P.device)
    balanced = L.mT @ P.double() @ L
    eigenvalues, V = on_threads(np.linalg.eigh, (balanced + balanced.mT) / 2)
    sigma, V = eigenvalues.flip(1).clamp_min(0).sqrt().cpu(), V.flip(2)
    significant = sigma > RANK_TOLERANCE * sigma[:, :1]
    scale = torch.where(significant, sigma.rsqrt(), 0).to(P.device)[:, None]
    B_maps = L @ V * scale
    return sigma, B_maps, P.double() @ B_maps * scale.square()
