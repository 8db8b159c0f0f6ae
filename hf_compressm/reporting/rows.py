"""What a report is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    """Share of the layer's output energy that the cut loses, on tokens that nothing was fitted to where the report has any."""
    channels: int
    realization: str = ""
    """How the layer was cut: "select", "read-out" (C fitted), "refit" (A, B, C and D fitted), "project", "project_heads"
    or "balance"; empty if not."""
    error_bound: float | None = None
    """The most that the gain of the error can be at any frequency, where theory tells: twice the sum of the Hankel singular values
    that were cut, of a time-invariant layer by balanced truncation."""
    head_sizes: list[int] | None = None
    """States of each head after the cut, where they may differ; `new_size` is their mean."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity before and after a cut, and what it was taken on."""

    before: float
    after: float
    data: str
    recall_before: float | None = None
    """Of the tokens whose bigram occurred earlier in the window, which a state is there to remember."""
    recall_after: float | None = None

    @classmethod
    def of(cls, before: Any, after: Any, data: str) -> Perplexity:
        """From two `data.evaluation.Evaluation`s."""
        return cls(before.perplexity, after.perplexity, data, before.recall, after.recall)


@dataclass(frozen=True)
class Divergence:
    """How far the slim model's predictions are from the full one's, on tokens that nothing was fitted to."""

    asked: float
    """The most that was allowed, `max_divergence`."""
    predicted: float
    """By the layers' cost curves, before the cut was tried."""
    measured: float
    tokens: int
    """That it was measured on."""
    unit: str = "nats per token"
    """Or "of the last hidden states' energy", of a model without a head."""


@dataclass(frozen=True)
class Healing:
    """A distillation from the full model after a cut."""

    parameters: str
    """What was trained: of what was "cut", or "all"."""
    tokens: int
    """That were learnt from."""
    seconds: float
    before: float
    """The divergence from the full model's predictions after the cut, on tokens that nothing was fitted to."""
    after: float
    """The lowest that healing came to there, which is the model's now. The same as before if it gained nothing."""
    held_out_tokens: int
    """That the divergences were measured on."""


@dataclass(frozen=True)
class Tradeoff:
    """One way to share states among the layers: how many in all, at which sizes, and the divergence to expect."""

    states: int
    divergence: float
    sizes: list[int]
