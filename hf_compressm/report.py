"""CompressionReport: what was measured and what was cut, as a table and a figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
    """Share of the layer's output energy that the cut loses on the calibration data."""
    channels: int


@dataclass(frozen=True)
class CompressionReport:
    """What was measured and what was cut.

    `print` gives a table, `plot` a figure, `to_dict` something that JSON can hold.
    """

    layers: list[LayerReport]
    realization: str
    parameters_before: int
    parameters_after: int

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
        return asdict(self)

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
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for position, layer in enumerate(self.layers):
            color = colormaps["viridis"](position / max(1, len(self.layers) - 1))
            for spectrum in layer.hankel_singular_values:
                top = spectrum[0] or 1.0
                values = [value / top for value in spectrum]
                axes.semilogy(range(1, len(values) + 1), values, color=color, lw=1, alpha=0.8)
                axes.plot(layer.new_size, values[layer.new_size - 1], "o", color=color, ms=4)
        axes.set(xlabel="state", ylabel="Hankel singular value / largest", title="Spectra; dots: states kept")
        axes.set_ylim(bottom=1e-6)
        axes.spines[["top", "right"]].set_visible(False)
        last = max(layer.index for layer in self.layers)
        mappable = figure.colorbar(_scale(last), ax=axes, label="layer")
        mappable.outline.set_visible(False)
        return figure

    def _summary(self) -> str:
        return (
            f"state per sequence {self.state_bytes_before / 1024:,.0f} -> {self.state_bytes_after / 1024:,.0f} KiB (fp32), "
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,}"
        )


def _scale(last: int) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, max(1, last)), "viridis")
