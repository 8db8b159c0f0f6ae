"""How far the ranking of the states has settled between two attempts of a run."""

from __future__ import annotations

from collections.abc import Mapping

States = Mapping[int, list[list[int]]]
Contributions = Mapping[int, list[list[float]]]


def rank_correlation(
    states_before: States, contributions_before: Contributions, states: States, contributions: Contributions
) -> float | None:
    """Spearman's rank correlation of the states' contributions, averaged over layers and groups.

    Hankel singular values are sorted and name no states; what each state contributes to its layer's output energy does.

    Args:
        states_before, contributions_before: of an `Attempt`.
        states, contributions: of a later one. Only states that are in both count.

    Returns:
        1 for the same ranking; None where no layer has three states in common.
    """
    from scipy.stats import spearmanr

    correlations = []
    for index, groups in states.items():
        before = zip(states_before[index], contributions_before[index], strict=True)
        # Heads that were cut on their own are more groups than before, of states with names of their own.
        for old, names, values in zip(before, groups, contributions[index], strict=False):
            known = dict(zip(*old, strict=True))
            pairs = [(known[state], value) for state, value in zip(names, values, strict=True) if state in known]
            if len(pairs) >= 3:
                value = float(spearmanr(*zip(*pairs, strict=True)).statistic)
                if value == value:
                    correlations.append(value)
    return sum(correlations) / len(correlations) if correlations else None
