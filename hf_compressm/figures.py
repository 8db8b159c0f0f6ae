"""The figures: spectra of a model, and the course of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import CompressionReport, LayerReport


def plot_spectra(reports: Mapping[str, CompressionReport]) -> Any:
    """The spectra of several models side by side, titled by their names: a matplotlib Figure.

    A line is a layer, solid over the states that it keeps (up to the dot) and pale over those that were cut.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(1.2 + 5.2 * len(reports), 4.2), layout="constrained")
    panels = figure.subplots(1, len(reports), squeeze=False)[0]
    for axes, (name, report) in zip(panels, reports.items(), strict=True):
        count = len(report.layers)
        norm = BoundaryNorm([position - 0.5 for position in range(count + 1)], 256)
        colors = _colors()
        for position, layer in enumerate(report.layers):
            color = colors(norm(position))
            for spectrum in layer.hankel_singular_values:
                _draw_spectrum(axes, spectrum, layer, color)
        values = [value / (s[0] or 1.0) for row in report.layers for s in row.hankel_singular_values for value in s]
        axes.set_yscale("log")
        axes.set_ylim(max(1e-6, min((value for value in values if value > 0), default=1e-6) / 1.6), 1.4)
        axes.set_xlim(0, max(layer.old_size for layer in report.layers) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("state, from the largest singular value down")
        axes.set_title(_headline(name, report), loc="left", fontsize=11)
        axes.grid(axis="y", color="0.92", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, label="layer", aspect=30, pad=0.02)
        step = -(-count // 8)
        bar.set_ticks(range(0, count, step), labels=[str(layer.index) for layer in report.layers[::step]])
        bar.ax.tick_params(length=0)
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
    panels[0].set_ylabel("Hankel singular value / largest of its layer")
    return figure


def _headline(name: str, report: CompressionReport) -> str:
    before, after = report.states_before, report.states_after
    what = f"{after} of {before} states kept (dots)" if after < before else f"{before} states"
    return f"{name}: {what}" if name else what


def _colors() -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    # The yellow end of viridis is too pale for a thin line.
    return ListedColormap(colormaps["viridis"]([0.9 * step / 255 for step in range(256)]))


def _draw_spectrum(axes: Any, spectrum: list[float], layer: LayerReport, color: Any) -> None:
    values = [value / (spectrum[0] or 1.0) for value in spectrum]
    states = range(1, len(values) + 1)
    kept = layer.new_size
    if kept == layer.old_size:
        axes.plot(states, values, color=color, lw=1.8)
        return
    axes.plot(states, values, color=color, lw=1.2, alpha=0.35)
    axes.plot(states[:kept], values[:kept], color=color, lw=2)
    axes.plot(kept, values[kept - 1], "o", color=color, ms=7, mec="white", mew=1.2, zorder=3)


def plot_history(history: list[dict[str, Any]], initial_sizes: Mapping[Any, int]) -> Any:
    """A training run with cuts, from `CompreSSMCallback.history`: a matplotlib Figure.

    Left, the spectrum of the layers (their mean, each relative to its largest value) at every attempt, from pale to dark:
    it settles early. Right, the states of every layer.

    Args:
        history: of the callback.
        initial_sizes: state sizes before the first cut, by layer index.

    Raises:
        ValueError: if the history is empty.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ValueError("There was no attempt to cut yet, so there is nothing to plot.")
    steps = [entry["step"] for entry in history]
    figure = Figure(figsize=(11.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.12, 1])
    norm, colors = Normalize(min(0, steps[0]), steps[-1]), _colors()
    for entry in history:
        values = _mean_spectrum(entry["hankel_singular_values"])
        last = entry is history[-1]
        left.plot(
            range(1, len(values) + 1),
            values,
            color=colors(1 - norm(entry["step"])),
            lw=2.2 if last else 1.4,
            zorder=2 + last,
        )
    left.set_yscale("log")
    left.set_xlim(0.5, max(initial_sizes.values()) + 0.5)
    left.set_xlabel("state, from the largest singular value down")
    left.set_ylabel("Hankel singular value / largest")
    left.set_title("The spectra settle early ...", loc="left", fontsize=12)
    bar = figure.colorbar(ScalarMappable(norm, colors.reversed()), ax=left, label="training step", aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    x = [0, *steps, steps[-1] * 1.12]
    for position, (index, size) in enumerate(initial_sizes.items()):
        sizes = [size, *(_by_index(entry["sizes"], index) for entry in history)]
        color = colors(position / max(1, len(initial_sizes) - 1))
        right.step(x, [*sizes, sizes[-1]], where="post", color=color, lw=2, label=f"layer {index}")
    right.set_ylim(0, max(initial_sizes.values()) * 1.08)
    right.set_xlim(0, x[-1])
    right.set_xlabel("training step")
    right.set_ylabel("states")
    right.set_title("... so that states fall while the model trains", loc="left", fontsize=12)
    if len(initial_sizes) <= 8:
        right.legend(frameon=False, loc="lower left", ncols=2)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="0.92", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _mean_spectrum(by_layer: Mapping[Any, list[list[float]]]) -> list[float]:
    """Geometric would hide the layers that need few states: the plain mean, as far as any layer reaches."""
    spectra = [[value / (s[0] or 1.0) for value in s] for groups in by_layer.values() for s in groups]
    length = max(map(len, spectra))
    columns = ([s[i] for s in spectra if i < len(s)] for i in range(length))
    return [sum(column) / len(column) for column in columns]


def _by_index(by_layer: Mapping[Any, int], index: Any) -> int:
    # A checkpoint's JSON turns the layer numbers into strings.
    return by_layer[index] if index in by_layer else by_layer[str(index)]
