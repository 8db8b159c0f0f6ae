"""The smallest state that keeps a budget: how far the slim model's predictions may be from the full one's.

What each size of each layer costs is known in nats, so the best sizes of every total are, too, and what they cost
together: the ladder. It is off by a factor, which a trial tells: the planned model's divergence is measured, the rung
chosen anew, until the next rung down would break the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers.utils import logging

from ..hankel.ranks import Allocation
from ..layers import Realization
from ..reporting.rows import Divergence as DivergenceRow
from ..reporting.rows import Tradeoff

logger = logging.get_logger(__name__)

TRIALS = 8
"""At most; each is a forward pass over the held-out tokens."""
CLOSE = 0.05
"""A trial that leaves less than this share of the budget unused is the last."""
POINTS = 32
"""Of the trade-off that reports show."""


@dataclass(frozen=True)
class Rung:
    """Sizes of all layers, and what they cost by the layers' curves."""

    sizes: list[int]
    predicted: float


class Ladder:
    """The best sizes of every total of states, from the fewest up: each rung costs less than all below it.

    The last is in any case the present sizes, also where others cost no more.

    Args:
        costs: for each layer [N_l] what keeping r states costs, at r - 1.
        choices: for each layer the sizes that it may have, ascending; the last is its present one.
        uniform: one size for all layers.
    """

    def __init__(self, costs: Sequence[Tensor], choices: Sequence[Sequence[int]], uniform: bool) -> None:
        self._allocation: Allocation | None = None
        if uniform:
            shared = sorted(set(choices[0]).intersection(*choices[1:]) | {max(choice[-1] for choice in choices)})
            rows = [[min(size, choice[-1]) for choice in choices] for size in shared]
            every = [float(sum(cost[r - 1] for cost, r in zip(costs, row, strict=True))) for row in rows]
            self._rows = rows
        else:
            self._allocation = Allocation(costs, choices)
            every = self._allocation.cost.tolist()
        lowest = np.minimum.accumulate(np.array([np.inf, *every]))[:-1]
        self._at = [at for at, cost in enumerate(every[:-1]) if cost < lowest[at]] + [len(every) - 1]
        self.predicted = [every[at] for at in self._at]

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, rung: int) -> Rung:
        at = self._at[rung]
        sizes = self._rows[at] if self._allocation is None else self._allocation.ranks(at)
        return Rung(sizes, self.predicted[rung])

    def lowest_within(self, cost: float) -> int:
        """The lowest rung that costs no more than that; the highest if all do."""
        return next((rung for rung, predicted in enumerate(self.predicted) if predicted <= cost), len(self) - 1)

    def tradeoff(self, factor: float) -> list[Tradeoff]:
        """Some rungs, spread over all of them, with their costs times a factor."""
        some = sorted({round(i) for i in np.linspace(0, len(self) - 1, min(POINTS, len(self)))})
        rungs = [self[rung] for rung in some]
        return [Tradeoff(sum(rung.sizes), factor * rung.predicted, rung.sizes) for rung in rungs]


def keep_budget(
    ladder: Ladder,
    budget: float,
    realize: Callable[[Sequence[int]], dict[int, Realization]],
    measure: Callable[[Mapping[int, Realization]], float],
    tokens: int,
) -> tuple[dict[int, Realization], DivergenceRow, float]:
    """The lowest rung whose divergence, as measured, is within the budget.

    Args:
        ladder: of sizes, by what they cost.
        budget: the most that the predictions may diverge.
        realize: from sizes to what each layer that is cut becomes.
        measure: the divergence of the model that they make.
        tokens: that it is measured on, for the report.

    Returns:
        the realizations (none if even the highest rung below the top breaks the budget), the divergence, and the factor
        between measured and predicted costs.
    """
    top = len(ladder) - 1
    good, bad, factor = top, -1, 1.0
    best: dict[int, Realization] = {}
    row = DivergenceRow(budget, 0.0, 0.0, tokens)
    for trial in range(TRIALS):
        if good - bad <= 1:
            break
        rung = min(max(ladder.lowest_within(budget / factor), bad + 1), good - 1)
        if trial >= TRIALS // 2 and not best:  # where the curves say little, the factor climbs too slowly
            rung = max(rung, (good + bad) // 2)
        if trial == TRIALS - 1 and not best:  # if this one breaks it, too, nothing is to be cut
            rung = top - 1
        made = realize(ladder[rung].sizes)
        measured = measure(made)
        predicted = ladder.predicted[rung]
        logger.info(
            f"hf_compressm: {sum(ladder[rung].sizes)} states: divergence {measured:.4g}, predicted {predicted:.4g}, "
            f"allowed {budget:.4g}."
        )
        if predicted > 0 and 0 < measured < np.inf:
            factor = measured / predicted
        if measured > budget:
            bad = rung
        else:
            good, best, row = rung, made, DivergenceRow(budget, predicted, measured, tokens)
            if measured >= (1 - CLOSE) * budget:
                break
    return best, row, factor
