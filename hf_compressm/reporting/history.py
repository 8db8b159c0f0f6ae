"""The course of a training run: one record for each attempt to cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """One attempt to cut a model while it trains. All dictionaries are by layer index.

    Attributes:
        step: of the training, after which it was made.
        sizes: the state sizes after it.
        hankel_singular_values: of each layer and group before it, descending.
        contributions: how much each state contributed to the output energy of its layer, for each group.
        states: which of the states that training began with those are.
        output_error: share of the layer's output energy that the cut lost, before training went on.
        energy_kept: share of the layer's Hankel energy that the cut kept.
        parameters: of the model, before it.
        rank_correlation: how far the ranking of the states agrees with that of the attempt before; None where there is
            nothing to compare.
        undone: whether `rollback` took the cut back.
        skipped: whether `min_reduction` left it out.
        error_bound: of the layers that the cut has one for, as `LayerReport.error_bound`.
    """

    step: int
    sizes: Mapping[int, int]
    hankel_singular_values: Mapping[int, list[list[float]]]
    contributions: Mapping[int, list[list[float]]]
    states: Mapping[int, list[list[int]]]
    output_error: Mapping[int, float]
    energy_kept: Mapping[int, float]
    parameters: int
    rank_correlation: float | None = None
    undone: bool = False
    skipped: bool = False
    error_bound: Mapping[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Attempt:
        """From what `to_dict` gives, also by way of JSON, which turns layer numbers into strings."""

        def restored(value: Any) -> Any:
            return {int(index): entry for index, entry in value.items()} if isinstance(value, Mapping) else value

        return cls(**{name: restored(value) for name, value in values.items()})
