"""How many states to keep: one layer by its Hankel energy, a whole model by what each layer's cut costs.

Glossary (code: paper):
    sigma:     σ; the Hankel singular values in descending order
    tolerance: τ; the share of the Hankel energy that may be given up
    r:         r; the rank, which is the number of states kept
    energy:    sum_i σ_i (the singular values themselves, not their squares)

Source: CompreSSM (arXiv 2510.02823), the choice of the reduced order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def energy_rank(sigma: Tensor, tolerance: float) -> Tensor:
    """Return the smallest r with σ_1 + ... + σ_r >= (1 - τ) (σ_1 + ... + σ_n).

    A tolerance of 0 means no cut at all, so r = n, even where the last σ are zero. Otherwise a spectrum of zeros has
    rank 1. Sums that meet the threshold but for rounding count as meeting it.

    Args:
        sigma: singular values [..., n] in descending order.
        tolerance: τ in [0, 1).

    Returns:
        The ranks [...] in int64, each in 1..n.

    Raises:
        ValueError: `tolerance` is outside [0, 1), or a σ is negative, NaN or infinite.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"the tolerance is the share of Hankel energy given up, in [0, 1), not {tolerance}")
    if not (torch.isfinite(sigma) & (sigma >= 0)).all():
        raise ValueError("the Hankel singular values must be finite and not negative")
    n = sigma.shape[-1]
    if tolerance == 0:
        return torch.full(sigma.shape[:-1], n, device=sigma.device)
    # lost[..., r] is the energy given up by keeping r states, summed from the smallest σ up.
    lost = sigma.double().flip(-1).cumsum(-1).flip(-1)
    rounding = n * torch.finfo(torch.float64).eps
    allowed = (tolerance + rounding) * lost[..., :1]
    return (lost > allowed).sum(-1).clamp(min=1)


def energy_rank_of_layer(sigma: Tensor, tolerance: float, by_head: bool) -> int:
    """The states that a layer needs: those of the group that needs most, or, where heads differ, the mean over the heads.

    Args:
        sigma: of its groups or heads, [groups, N].
        tolerance: as for `energy_rank`.
        by_head: whether heads may differ in size.
    """
    ranks = energy_rank(sigma, tolerance)
    return -(-int(ranks.sum()) // len(ranks)) if by_head else int(ranks.max())


def round_up(size: int, multiple_of: int = 1, minimum: int = 1, maximum: int | None = None) -> int:
    """Return the smallest multiple of `multiple_of` that is at least `size` and `minimum`, capped at `maximum`.

    The cap wins over both: a layer's present state size as `maximum` is never exceeded, multiple or not.
    """
    rounded = -(-max(size, minimum) // multiple_of) * multiple_of
    return rounded if maximum is None else min(rounded, maximum)


def allowed_sizes(n: int, minimum: int = 1, multiple_of: int = 1) -> list[int]:
    """Return the multiples of `multiple_of` from `minimum` up that are less than n, and n, ascending."""
    first = round_up(1, multiple_of, minimum, maximum=n)
    return sorted({*range(first, n, multiple_of), n})


def powers_of_two(n: int, minimum: int = 1) -> list[int]:
    """Return the powers of two from `minimum` up that are less than n, and n, ascending."""
    return [2**k for k in range(n.bit_length()) if minimum <= 2**k < n] + [n]


def allocate_ranks(costs: Sequence[Tensor], total: int, sizes: Sequence[Sequence[int]]) -> list[int]:
    """Share `total` states among the layers at the least summed cost, exactly, by dynamic programming.

    Args:
        costs: for each layer [N_l], where costs[l][r - 1] is the cost of keeping r states in it.
        total: number of states to keep over all layers.
        sizes: for each layer the sizes that it may have, ascending.

    Returns:
        The size of each layer. They sum to `total`, or to the largest reachable sum below.

    Raises:
        ValueError: `total` is below the sum of the layers' smallest sizes, or a cost is not finite.
    """
    allocation = Allocation(costs, sizes)
    least = sum(choice[0] for choice in sizes)
    if total < least:
        raise ValueError(
            f"a total of {total} states cannot be shared among {len(sizes)} layers that need at least {least}: raise "
            "the total, or lower the minimum size or multiple_of (1 allows any size)"
        )
    return allocation.ranks(total)


class Allocation:
    """The best way to share any total of states among layers, at the least summed cost, by dynamic programming.

    Args:
        costs: for each layer [N_l], where costs[l][r - 1] is the cost of keeping r states in it.
        sizes: for each layer the sizes that it may have, ascending.

    Attributes:
        cost: the least cost of each total, [total + 1]; infinite where no sizes add up to it.

    Raises:
        ValueError: a cost is not finite.
    """

    def __init__(self, costs: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> None:
        self._tables = [_finite(cost) for cost in costs]
        self._sizes = sizes
        most = sum(choice[-1] for choice in sizes)
        # best[l][t] is the least cost of giving t states to the first l layers; infinite where t cannot be reached.
        self._best = [np.full(most + 1, np.inf)]
        self._best[0][0] = 0.0
        for choice, table in zip(sizes, self._tables, strict=True):
            after = np.full(most + 1, np.inf)
            for r in choice:
                np.minimum(after[r:], self._best[-1][: most + 1 - r] + table[r - 1], out=after[r:])
            self._best.append(after)
        self.cost = self._best[-1]

    def ranks(self, total: int) -> list[int]:
        """The sizes that add up to `total`, or to the largest reachable sum below."""
        # Walk back from it, repeating the same sums to find which size attained each minimum.
        t = int(np.flatnonzero(np.isfinite(self.cost[: total + 1]))[-1])
        ranks: list[int] = []
        for before, choice, table in zip(
            reversed(self._best[:-1]), reversed(self._sizes), reversed(self._tables), strict=True
        ):
            r = min((r for r in choice if r <= t), key=lambda r: before[t - r] + table[r - 1])
            ranks.append(r)
            t -= r
        return ranks[::-1]


def _finite(cost: Tensor) -> np.ndarray:
    table = cost.detach().cpu().double().numpy()
    if not np.isfinite(table).all():
        raise ValueError("the costs must be finite")
    return table
