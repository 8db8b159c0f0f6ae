"""How far the ranking of the states has settled between two attempts of a run."""

from __future__ import annotations

from typing import Any


def rank_correlation(before: dict[str, Any], now: dict[str, Any]) -> float | None:
    """Spearman's rank correlation of the states' contributions, averaged over layers and groups.

    Hankel singular values are sorted and name no states; what each state contributes to its layer's output energy does.

    Args:
        before, now: entries of `CompreSSMCallback.history`. Only states that are in both count.

    Returns:
        1 for the same ranking; None where no layer has three states in common.
    """
    from scipy.stats import spearmanr

    values = []
    for index, groups in now["states"].items():
        old = [before[key].get(index, before[key].get(str(index))) for key in ("states", "contributions")]
        for group, states in enumerate(groups):
            known = dict(zip(old[0][group], old[1][group], strict=True))
            pairs = [
                (known[state], value)
                for state, value in zip(states, now["contributions"][index][group], strict=True)
                if state in known
            ]
            if len(pairs) >= 3:
                value = float(spearmanr(*zip(*pairs, strict=True)).statistic)
                if value == value:
                    values.append(value)
    return sum(values) / len(values) if values else None
