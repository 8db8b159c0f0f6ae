"""CompressionReport: what was measured and what was cut, as a table and a figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .figures import plot_spectra


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


@dataclass(frozen=True)
class Perplexity:
    """Perplexity before and after a cut, and what it was taken on."""

    before: float
    after: float
    data: str


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
        return plot_spectra({"": self})

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
