"""Which r of a layer's N states stay, and how what stays is read out.

| here | paper | meaning |
|---|---|---|
| `kept` | - | S, the states that stay |
| `readout` | - | R, the new output map C' = R C |
| `B_projection`, `C_projection` | W, V | the maps of an oblique projection: B' = B @ B_projection, C' = C @ C_projection |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .balanced_truncation import balance
from .factorisations import cholesky, cholesky_inverse, solve
from .moments import ReadoutMoments
from .singular_values import gramian_factor

SIDE_BY_SIDE = 2**24
"""Numbers in the normal matrices of the layers that are eliminated side by side."""


@dataclass(frozen=True)
class Selection:
    """Keep r of N states: `kept` [r], sorted; `readout` [r, N], or None where C keeps its own rows."""

    kept: Tensor
    readout: Tensor | None
    error: float
    """Share of the layer's output energy that is lost, in [0, 1] up to rounding."""

    @property
    def size(self) -> int:
        """The state size, r."""
        return len(self.kept)


@dataclass(frozen=True)
class Projection:
    """Scan an r-dimensional state: `B_projection`, `C_projection` [N, r]."""

    B_projection: Tensor
    C_projection: Tensor
    error: float

    @property
    def size(self) -> int:
        """The state size, r."""
        return self.B_projection.shape[1]


def select(moments: ReadoutMoments, order: Tensor) -> dict[int, Selection]:
    """Keep the first r states of an order, for every r; C keeps its own rows.

    Args:
        moments: of the group.
        order: all states, the most important first, [N].
    """
    N, order = moments.size, order.cpu()
    M = moments.contribution.cpu()[order][:, order]
    # lost[r] is what states r, r + 1, ... of the order add to the output together.
    lost = [*M.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal().tolist(), 0.0]
    prefixes = torch.stack([torch.cat([order[:r].sort().values, order[r:]]) for r in range(1, N + 1)])
    prefixes = prefixes.to(moments.contribution.device)
    return {r: Selection(prefixes[r - 1, :r], None, share(lost[r], lost[0])) for r in range(1, N + 1)}


def select_with_readout(moments: ReadoutMoments, ridge: float = 1e-6) -> dict[int, Selection]:
    """Keep r states and fit C' = R C to the output that all N states give, for every r.

    R minimises E[w (y - sum_s (R C)_s h_s)^2]. Backward elimination: of the states still there, the one goes whose loss
    costs least after the others' read-out was fitted again (the block form of the optimal brain surgeon). The states
    beside the candidates go first; while they are there, theirs are multiples of their own rows of C. Each size's
    read-outs contain those of the size below, so that more states never lose more. The normal matrix is scaled to a
    unit diagonal, to which `ridge` is added.

    Args:
        moments: of the group, with candidates.
        ridge: relative regularisation.
    """
    return select_each_with_readout([moments], ridge)[0]


def select_each_with_readout(moments: list[ReadoutMoments], ridge: float = 1e-6) -> list[dict[int, Selection]]:
    """`select_with_readout` for many layers: those of one size run side by side, and a GPU is waited for only once."""
    paths: list[dict[int, Selection]] = [{} for _ in moments]
    alike: dict[tuple[int, int, torch.device], list[int]] = {}
    for index, entry in enumerate(moments):
        alike.setdefault((len(entry.candidates), entry.size, entry.output.device), []).append(index)
    for (c, N, _), indices in alike.items():
        together = max(1, SIDE_BY_SIDE // (c * N) ** 2)
        for start in range(0, len(indices), together):
            part = indices[start : start + together]
            for index, path in zip(part, _eliminate([moments[index] for index in part], ridge), strict=True):
                paths[index] = path
    return paths


def _eliminate(moments: list[ReadoutMoments], ridge: float) -> list[dict[int, Selection]]:
    """Backward elimination in layers with equally many states and candidates."""
    N, layers = moments[0].size, len(moments)
    kept = torch.stack([entry.candidates for entry in moments])
    normal = torch.stack([entry.normal_matrix() for entry in moments])
    target = torch.stack([entry.cross[entry.candidates].flatten() for entry in moments])
    energy = torch.stack([entry.contribution.sum() for entry in moments])
    scale = normal.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(normal.dtype).tiny).rsqrt()
    inverse, ridge = _ridge_inverse(normal * scale[:, :, None] * scale[:, None], ridge)
    target = target * scale
    solution = (inverse @ target[..., None])[..., 0]
    sizes: list[dict[int, Selection]] = [
        _eliminate_rest(entry, inverse[index], solution[index], target[index], scale[index], ridge)
        if len(entry.rest)
        else {}
        for index, entry in enumerate(moments)
    ]
    layer, state = torch.arange(layers, device=kept.device)[:, None], torch.arange(N, device=kept.device)
    steps, lost = [], []
    for r in range(kept.shape[1], 0, -1):
        steps.append((kept, (solution * scale).view(layers, r, N)))
        lost.append(energy - (solution * target).sum(1))
        if r == 1:
            break
        blocks = inverse.view(layers, r, N, r, N).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        rows = solution.view(layers, r, N)
        cost = (rows * solve(blocks, rows[..., None])[..., 0]).sum(2)
        drop = cost.argmin(1, keepdim=True)
        stays = torch.arange(r - 1, device=kept.device)
        stays = stays + (stays >= drop)
        gone, flat = drop * N + state, (stays[..., None] * N + state).flatten(1)
        beside = inverse[layer[..., None], gone[..., None], flat[:, None]]
        gain = solve(blocks[layer[:, 0], drop[:, 0]], beside).mT
        solution = solution[layer, flat] - (gain @ solution[layer, gone][..., None])[..., 0]
        inverse = inverse[layer[..., None], flat[..., None], flat[:, None]] - gain @ beside
        target, scale, kept = target[layer, flat], scale[layer, flat], kept[layer, stays]
    errors = torch.stack([*lost, energy]).T.tolist()
    for index, error in enumerate(errors):
        for step, (states, readout) in enumerate(steps):
            sizes[index][states.shape[1]] = Selection(states[index], readout[index], share(error[step], error[-1]))
    return sizes


def _eliminate_rest(
    moments: ReadoutMoments, inverse: Tensor, solution: Tensor, target: Tensor, scale: Tensor, ridge: float
) -> dict[int, Selection]:
    """Backward elimination of the states beside the candidates, all of which are kept, in one layer.

    Such a state has the one feature C_d h_d. What the candidates' features explain is taken out of the others' normal
    matrix (its Schur complement), in which the others then are eliminated.

    Args:
        moments: of the layer.
        inverse, solution, target, scale: of the candidates' read-out alone, all but `scale` scaled.
        ridge: that it was fitted with.
    """
    candidates, rest, N = moments.candidates, moments.rest, moments.size
    M = moments.contribution
    own = M[rest, rest].clamp_min(torch.finfo(M.dtype).tiny).rsqrt()
    beside = moments.beside.to(own.device).transpose(1, 2).flatten(0, 1) * scale[:, None] * own
    explained = inverse @ beside
    normal = M[rest][:, rest] * own[:, None] * own - beside.mT @ explained
    right = M[rest].sum(1) * own - beside.mT @ solution
    (inverse_rest,), _ = _ridge_inverse(normal[None], ridge)
    dropped, gains, gained = _eliminate_features(inverse_rest, right)
    readouts = ((solution[:, None] - explained @ gains.mT) * scale[:, None]).view(len(candidates), N, -1)
    energy = float(M.sum())
    errors = (energy - solution @ target - gained).tolist()
    path = {}
    for step, error in enumerate(errors):
        others = dropped[step:]
        kept, order = torch.cat([candidates, rest[others]]).sort()
        readout = torch.cat([readouts[..., step], readouts.new_zeros(len(others), N)])
        readout[torch.arange(len(candidates), len(kept)), rest[others]] = (gains[step] * own)[others]
        path[len(kept)] = Selection(kept, readout[order], share(error, energy))
    return path


def _eliminate_features(inverse: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward elimination of single features.

    Args:
        inverse: of their normal matrix, [m, m].
        right: the right-hand side, [m].

    Returns:
        the order in which they are dropped, [m]; the solutions before each drop, [m, m], zero for what is dropped; and
        the energy that these explain, [m].
    """
    # Many small steps, each of which looks at the one before: not for a GPU, nor for tensors.
    H, b = inverse.cpu().numpy().copy(), right.cpu().numpy()
    solution, m = H @ b, len(b)
    there = np.ones(m, dtype=bool)
    dropped, solutions, explained = np.empty(m, dtype=np.int64), np.empty((m, m)), np.empty(m)
    for step in range(m):
        solutions[step], explained[step] = solution, solution @ b
        power = np.where(there, H.diagonal(), 1)
        d = dropped[step] = np.where(there, solution**2 / power, np.inf).argmin()
        column = H[:, d] / power[d]
        solution = np.where(there, solution - column * solution[d], 0)
        H -= column[:, None] * H[d]
        there[d] = False
        solution[d] = 0
    order, gains, gained = (torch.from_numpy(x).to(inverse.device) for x in (dropped, solutions, explained))
    return order, gains, gained


def _ridge_inverse(normal: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(normal + ridge I)^-1 of symmetric matrices with a diagonal of ones, [layers, n, n], and the ridge."""
    ridge = safe_ridge(normal, ridge)
    identity = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    return cholesky_inverse(cholesky(normal + ridge * identity)[0]), ridge


def safe_ridge(normal: Tensor, ridge: float) -> float:
    """A ridge for normal matrices with a diagonal of ones, [..., n, n].

    Their entries are sums of float32 numbers, whose rounding can make the smallest eigenvalues negative. The ridge is
    raised tenfold until it is twice as large as that.
    """
    identity = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    while ridge < 0.1 and cholesky(normal + ridge / 2 * identity)[1].any():
        ridge *= 10
    return ridge


def project(outputs: Tensor, P: Tensor) -> list[dict[int, Projection]]:
    """Balance the state against P and E[C C^T] and keep its first r directions, for every r (Mamba-2).

    Every invertible map of the state commutes with a dynamics that is a scalar times the identity, so the oblique
    projection is carried by B and C alone and makes no error that time could amplify.

    Args:
        outputs: the sums over tokens of C C^T of some groups, [groups, N, N].
        P: their controllability Gramians, weighted by the output, [groups, N, N].
    """
    sigma, C_projection, B_projection = balance(gramian_factor(outputs), gramian_factor(P), P.shape[-1])
    # From the smallest up, and 0 for all of them.
    lost = torch.nn.functional.pad(sigma.square().flip(1).cumsum(1).flip(1), (0, 1)).tolist()
    return [
        {r: Projection(B[:, :r], C[:, :r], share(row[r], row[0])) for r in range(1, len(row))}
        for B, C, row in zip(B_projection, C_projection, lost, strict=True)
    ]


def share(part: float, whole: float) -> float:
    """The part as a share, in spite of rounding not below 0; 0 of nothing."""
    return max(0.0, part / whole) if whole > 0 else 0.0
