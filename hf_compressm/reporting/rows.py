"""What a report is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One SSM layer: its index in the model, sizes, spectrum, and what the cut kept."""

    index: int
    old_size: int
    new_size: int
    hankel_singular_values: list[list[float]]
    """Descending, one list per group."""
    energy_kept: float
    """Share of the Hankel energy (sum of the Hankel singular values) in the first `new_size` of them."""
    output_error: float
    """Share of the layer's output energy that the cut loses on the calibration data."""
    channels: int
    realization: str = ""
    """How the layer was cut: "select", "read-out" (C fitted), "refit" (A, B, C and D fitted) or "project"; empty if not."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity before and after a cut, and what it was taken on."""

    before: float
    after: float
    data: str
