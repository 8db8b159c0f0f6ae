"""CompressionReport: what was measured and what was cut, as a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .figures import plot_report
from .rows import Divergence, Healing, LayerReport, Perplexity, Tradeoff


@dataclass(frozen=True)
class CompressionReport:
    """What was measured and what was cut.

    `print` gives a table, `plot` a figure, `to_dict` something that JSON can hold. `perplexity` is there if it was asked
    for.
    """

    layers: list[LayerReport]
    realization: str
    parameters_before: int
    parameters_after: int
    perplexity: Perplexity | None = None
    divergence: Divergence | None = None
    """Asked, predicted and measured, of a cut by `max_divergence`."""
    tradeoff: list[Tradeoff] | None = None
    """What other totals of states would have cost, from the fewest up."""
    healing: Healing | None = None
    """What a distillation after the cut gained; what else is reported of the layers is of the cut alone."""
    held_out_tokens: int = 0
    """Tokens that the output errors were taken on and nothing was fitted to; 0 where there was too little data to hold any
    back, and in training: the errors are those on the calibration data then."""
    elsewhere: list[str] = field(default_factory=list)
    """Where the size of a stock checkpoint is slow or wrong, and the one before the cut was not; a line for each engine."""

    @property
    def states_before(self) -> int:
        """States of all layers before the cut."""
        return sum(layer.old_size for layer in self.layers)

    @property
    def states_after(self) -> int:
        """States of all layers after the cut."""
        return sum(layer.new_size for layer in self.layers)

    @property
    def state_bytes_before(self) -> int:
        """Bytes of recurrent state per sequence, in float32, before the cut."""
        return sum(4 * layer.channels * layer.old_size for layer in self.layers)

    @property
    def state_bytes_after(self) -> int:
        """Bytes of recurrent state per sequence, in float32, after the cut."""
        return sum(4 * layer.channels * layer.new_size for layer in self.layers)

    @property
    def sizes(self) -> dict[int, int]:
        """State size after the cut, by layer index."""
        return {layer.index: layer.new_size for layer in self.layers}

    @property
    def resized(self) -> dict[int, tuple[int, int]]:
        """State size before and after the cut, by layer index."""
        return {layer.index: (layer.old_size, layer.new_size) for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists and numbers."""
        state_bytes = {"state_bytes_before": self.state_bytes_before, "state_bytes_after": self.state_bytes_after}
        return asdict(self) | state_bytes

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionReport:
        """From what `to_dict` gives."""
        perplexity, divergence, tradeoff, healing = (
            values.get(name) for name in ("perplexity", "divergence", "tradeoff", "healing")
        )
        return cls(
            layers=[LayerReport(**row) for row in values["layers"]],
            realization=values["realization"],
            parameters_before=values["parameters_before"],
            parameters_after=values["parameters_after"],
            perplexity=None if perplexity is None else Perplexity(**perplexity),
            divergence=None if divergence is None else Divergence(**divergence),
            held_out_tokens=values.get("held_out_tokens", 0),
            elsewhere=list(values.get("elsewhere", [])),
            tradeoff=None if tradeoff is None else [Tradeoff(**point) for point in tradeoff],
            healing=None if healing is None else Healing(**healing),
        )

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"State sizes ({self.realization})", caption=self._summary())
        bounded = any(layer.error_bound is not None for layer in self.layers)
        for column in ("layer", "states", "energy kept", "output error", *["error bound"] * bounded):
            table.add_column(column, justify="right")
        for layer in self.layers:
            table.add_row(
                str(layer.index),
                _states(layer),
                f"{layer.energy_kept:.2%}",
                f"{layer.output_error:.2%}",
                *["" if layer.error_bound is None else f"{layer.error_bound:.3g}"] * bounded,
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=80, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def plot(self) -> Any:
        """The spectra of all layers, each relative to its largest value, with what was kept, as a matplotlib Figure.

        Beside them, where it is known, what any other total of states would have cost, and the states of each head.
        """
        return plot_report(self.layers, self.tradeoff, "" if self.divergence is None else self.divergence.unit)

    def _summary(self) -> str:
        text = (
            f"state per sequence {self.state_bytes_before / 1024:,.0f} -> {self.state_bytes_after / 1024:,.0f} KiB (fp32)\n"
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,}"
        )
        if self.divergence is not None:
            text += (
                f"\ndivergence {self.divergence.measured:.4f} {self.divergence.unit} on held-out text, "
                f"{self.divergence.asked:g} allowed\n(predicted: {self.divergence.predicted:.4f})"
            )
        if self.healing is not None:
            text += (
                f"\nhealed in {self.healing.seconds:,.0f} s on {self.healing.tokens:,} tokens: "
                f"divergence {self.healing.before:.4f} -> {self.healing.after:.4f}"
            )
        if self.perplexity is not None:
            text += (
                f"\nperplexity {self.perplexity.before:.2f} -> {self.perplexity.after:.2f}{self._recall()}\n"
                f"({self.perplexity.data})"
            )
        return "\n".join([text, *(f"note: {line}" for line in self.elsewhere)])

    def _recall(self) -> str:
        found = self.perplexity
        if found is None or found.recall_before is None or found.recall_after is None:
            return ""
        return f", of repeated bigrams {found.recall_before:.2f} -> {found.recall_after:.2f}"


def _states(layer: LayerReport) -> str:
    if layer.new_size == layer.old_size:
        return str(layer.old_size)
    of_heads = f" (heads {min(layer.head_sizes)} to {max(layer.head_sizes)})" if layer.head_sizes else ""
    return f"{layer.old_size} -> {layer.new_size}{of_heads}"
