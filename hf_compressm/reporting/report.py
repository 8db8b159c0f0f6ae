"""CompressionReport: what was measured and what was cut, as a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .figures import plot_spectra
from .rows import LayerReport, Perplexity


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

    def to_dict(self) -> dict[str, Any]:
        """The report as plain lists and numbers."""
        state_bytes = {"state_bytes_before": self.state_bytes_before, "state_bytes_after": self.state_bytes_after}
        return asdict(self) | state_bytes

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionReport:
        """From what `to_dict` gives."""
        perplexity = values.get("perplexity")
        return cls(
            layers=[LayerReport(**row) for row in values["layers"]],
            realization=values["realization"],
            parameters_before=values["parameters_before"],
            parameters_after=values["parameters_after"],
            perplexity=None if perplexity is None else Perplexity(**perplexity),
        )

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"State sizes ({self.realization})", caption=self._summary())
        for column in ("layer", "states", "energy kept", "output error"):
            table.add_column(column, justify="right")
        for layer in self.layers:
            table.add_row(
                str(layer.index),
                f"{layer.old_size} -> {layer.new_size}" if layer.new_size != layer.old_size else str(layer.old_size),
                f"{layer.energy_kept:.2%}",
                f"{layer.output_error:.2%}",
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=80, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def plot(self) -> Any:
        """The spectra of all layers, each relative to its largest value, with what was kept: a matplotlib Figure."""
        return plot_spectra({"": self.layers})

    def _summary(self) -> str:
        text = (
            f"state per sequence {self.state_bytes_before / 1024:,.0f} -> {self.state_bytes_after / 1024:,.0f} KiB (fp32)\n"
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,}"
        )
        if self.perplexity is not None:
            text += (
                f"\nperplexity {self.perplexity.before:.2f} -> {self.perplexity.after:.2f}\n({self.perplexity.data})"
            )
        return text
