"""Which r of a layer's N states stay, and how what stays is read out.

| here | paper | meaning |
|---|---|---|
| `kept` | - | S, the states that stay |
| `readout` | - | R, the new output map C' = R C |
| `B_projection`, `C_projection` | W, V | the maps of an oblique projection: B' = B @ B_projection, C' = C @ C_projection |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .balanced_truncation import projection_maps
from .gramians import ReadoutMoments
from .singular_values import gramian_factor


@dataclass(frozen=True)
class Selection:
    """Keep r of N states: `kept` [r], sorted; `readout` [r, N], or None where C keeps its own rows."""

    kept: Tensor
    readout: Tensor | None
    error: float
    """Share of the layer's output energy that is lost, in [0, 1] up to rounding."""


@dataclass(frozen=True)
class Projection:
    """Scan an r-dimensional state: `B_projection`, `C_projection` [N, r]."""

    B_projection: Tensor
    C_projection: Tensor
    error: float


def select(moments: ReadoutMoments, order: Tensor) -> dict[int, Selection]:
    """Keep the first r states of an order, for every r; C keeps its own rows.

    Args:
        moments: of the group.
        order: all states, the most important first, [N].
    """
    M = moments.contribution
    path = {}
    for r in range(1, moments.size + 1):
        dropped = order[r:]
        path[r] = Selection(order[:r].sort().values, None, _share(M[dropped][:, dropped].sum(), M.sum()))
    return path


def select_with_readout(moments: ReadoutMoments, ridge: float = 1e-6) -> dict[int, Selection]:
    """Keep r states and fit C' = R C to the output that all N states give, for every r up to the candidates' number.

    R minimises E[w (y - sum_s (R C)_s h_s)^2]. Backward elimination: of the states still there, the one goes whose loss
    costs least after the others' read-out was fitted again (the block form of the optimal brain surgeon), starting
    from all candidates. The normal matrix is scaled to a unit diagonal, to which `ridge` is added.

    Args:
        moments: of the group, with candidates.
        ridge: relative regularisation.
    """
    N, kept = moments.size, moments.candidates
    normal, target = moments.normal_matrix(), moments.cross[kept].reshape(-1)
    scale = normal.diagonal().clamp_min(torch.finfo(normal.dtype).tiny).rsqrt()
    identity = torch.eye(len(scale), dtype=normal.dtype, device=normal.device)
    inverse = torch.linalg.inv(normal * scale[:, None] * scale + ridge * identity)
    target = target * scale
    solution = inverse @ target
    energy = moments.contribution.sum()
    path = {}
    while len(kept):
        r = len(kept)
        path[r] = Selection(kept, (solution * scale).view(r, N), _share(energy - solution @ target, energy))
        blocks = inverse.view(r, N, r, N).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        rows = solution.view(r, N)
        drop = int((rows * torch.linalg.solve(blocks, rows)).sum(1).argmin())
        stays = torch.arange(r, device=kept.device) != drop
        flat = stays.repeat_interleave(N)
        gain = torch.linalg.solve(blocks[drop], inverse[~flat][:, flat]).T
        solution = solution[flat] - gain @ solution[~flat]
        inverse = inverse[flat][:, flat] - gain @ inverse[~flat][:, flat]
        target, scale, kept = target[flat], scale[flat], kept[stays]
    return path


def project(moments: ReadoutMoments, P: Tensor) -> dict[int, Projection]:
    """Balance the state against P and E[C C^T] and keep its first r directions, for every r (Mamba-2).

    Every invertible map of the state commutes with a dynamics that is a scalar times the identity, so the oblique
    projection is carried by B and C alone and makes no error that time could amplify.

    Args:
        moments: of the group.
        P: the group's controllability Gramian, weighted by the output, [N, N].
    """
    L_P, L_C = gramian_factor(P), gramian_factor(moments.output)
    total = torch.linalg.svdvals(L_C.mH @ L_P).square()
    path = {}
    for r in range(1, moments.size + 1):
        C_projection, B_projection = projection_maps(L_C, L_P, r)
        path[r] = Projection(B_projection, C_projection, _share(total[r:].sum(), total.sum()))
    return path


def _share(part: Tensor, whole: Tensor) -> float:
    return max(0.0, float(part / whole)) if whole > 0 else 0.0
