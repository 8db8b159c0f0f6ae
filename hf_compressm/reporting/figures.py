"""The figures: spectra of a model, and the course of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .history import Attempt
from .rows import LayerReport, Tradeoff


def plot_spectra(reports: Mapping[str, Sequence[LayerReport]]) -> Any:
    """The spectra of several models side by side, titled by their names: a matplotlib Figure.

    A line is a layer, solid over the states that it keeps (up to the dot) and pale over those that were cut.
    """
    figure, panels = _panels(len(reports))
    for axes, (name, layers) in zip(panels, reports.items(), strict=True):
        _draw_spectra(axes, name, layers)
    panels[0].set_ylabel("Hankel singular value / largest of its layer")
    return figure


def plot_report(layers: Sequence[LayerReport], tradeoff: Sequence[Tradeoff] | None, unit: str) -> Any:
    """One model, as a matplotlib Figure.

    Its spectra, the divergence to expect of any number of states, in some unit, and the states of each head, as far as they are
    known.
    """
    by_head = any(layer.head_sizes for layer in layers)
    figure, panels = _panels(1 + (tradeoff is not None) + by_head)
    _draw_spectra(panels[0], "", layers)
    panels[0].set_ylabel("Hankel singular value / largest of its layer")
    if tradeoff is not None:
        _draw_tradeoff(panels[1], layers, tradeoff, unit)
    if by_head:
        _draw_heads(panels[-1], layers)
    return figure


def _draw_heads(axes: Any, layers: Sequence[LayerReport]) -> None:
    """Heads by layers, coloured by their states, those of a layer from the fewest to the most."""
    heads = max(len(layer.head_sizes or ()) for layer in layers)
    sizes = [sorted(layer.head_sizes or [layer.new_size] * heads) for layer in layers]
    image = axes.imshow([list(row) for row in zip(*sizes, strict=True)], cmap="viridis", aspect="auto", origin="lower")
    step = -(-len(layers) // 8)
    axes.set_xticks(range(0, len(layers), step), labels=[str(layer.index) for layer in layers[::step]])
    axes.set_yticks([])
    axes.set_xlabel("layer")
    axes.set_ylabel("heads, by their states")
    axes.set_title("States of each head", loc="left", fontsize=11)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, label="states", aspect=30, pad=0.02)
    bar.outline.set_visible(False)


def _draw_tradeoff(right: Any, layers: Sequence[LayerReport], tradeoff: Sequence[Tradeoff], unit: str) -> None:
    points = [point for point in tradeoff if point.divergence > 0]
    right.plot([point.states for point in points], [point.divergence for point in points], color="0.25", lw=2)
    now = sum(layer.new_size for layer in layers)
    right.axvline(now, color=_colors()(0.5), lw=1.2, ls="--")
    right.annotate(f" {now} states", (now, right.get_ylim()[1]), va="top", color=_colors()(0.5))
    right.set_yscale("log")
    right.set_xlabel("states of all layers")
    right.set_ylabel(f"divergence of the predictions ({unit})")
    right.set_title("What fewer states cost", loc="left", fontsize=11)
    _tidy(right)


def _panels(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 5.2 * count, 4.2), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _draw_spectra(axes: Any, name: str, layers: Sequence[LayerReport]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    count = len(layers)
    norm = BoundaryNorm([position - 0.5 for position in range(count + 1)], 256)
    colors = _colors()
    for position, layer in enumerate(layers):
        for spectrum in layer.hankel_singular_values:
            _draw_spectrum(axes, spectrum, layer, colors(norm(position)))
    values = [value / (s[0] or 1.0) for row in layers for s in row.hankel_singular_values for value in s]
    axes.set_yscale("log")
    axes.set_ylim(max(1e-6, min((value for value in values if value > 0), default=1e-6) / 1.6), 1.4)
    axes.set_xlim(0, max(layer.old_size for layer in layers) + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("state, from the largest singular value down")
    axes.set_title(_headline(name, layers), loc="left", fontsize=11)
    _tidy(axes)
    bar = axes.figure.colorbar(ScalarMappable(norm, colors), ax=axes, label="layer", aspect=30, pad=0.02)
    step = -(-count // 8)
    bar.set_ticks(range(0, count, step), labels=[str(layer.index) for layer in layers[::step]])
    bar.ax.tick_params(length=0)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _headline(name: str, layers: Sequence[LayerReport]) -> str:
    before, after = sum(layer.old_size for layer in layers), sum(layer.new_size for layer in layers)
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


def plot_history(history: Sequence[Attempt], initial_sizes: Mapping[int, int], layer: int | None = None) -> Any:
    """A training run with cuts, from `CompreSSMCallback.history`: a matplotlib Figure.

    Left, the spectrum of one layer at every attempt, from pale to dark, pale over what was cut there. Right, the states
    of every layer.

    Args:
        history: of the callback.
        initial_sizes: state sizes before the first cut, by layer index.
        layer: whose spectrum to show; by default the one that ends with the median number of states.

    Raises:
        ValueError: if the history is empty.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not history:
        raise ValueError("There was no attempt to cut yet, so there is nothing to plot.")
    sizes = {index: [size, *(attempt.sizes[index] for attempt in history)] for index, size in initial_sizes.items()}
    if layer is None:
        layer = sorted(sizes, key=lambda index: sizes[index][-1])[len(sizes) // 2]
    figure = Figure(figsize=(11.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.12, 1])
    plot_settling(history, layer, left)
    steps = [0, *(attempt.step for attempt in history)]
    end = steps[-1] * 1.12
    for position, (index, values) in enumerate(sizes.items()):
        color = _colors()(position / max(1, len(sizes) - 1))
        right.step([*steps, end], [*values, values[-1]], where="post", color=color, lw=2.2)
        if len(sizes) <= 8:
            right.annotate(f" layer {index}", (end, values[-1]), color=color, va="center", annotation_clip=False)
    right.set_ylim(0, max(initial_sizes.values()) * 1.06)
    right.set_xlim(0, end)
    right.set_xlabel("training step")
    right.set_title("States of every layer", loc="left", fontsize=11)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(right)
    return figure


def plot_settling(history: Sequence[Attempt], layer: int, axes: Any) -> None:
    """Draw the spectrum of one layer at every attempt on matplotlib `axes`, pale over what was cut there.

    Args:
        history: of `CompreSSMCallback`.
        layer: its index.
        axes: to draw on; a colour bar is put beside them.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    norm, colors = Normalize(0, history[-1].step), _colors().reversed()
    for attempt in history:
        color, size = colors(norm(attempt.step)), attempt.sizes[layer]
        for spectrum in attempt.hankel_singular_values[layer]:
            values = [value / (spectrum[0] or 1.0) for value in spectrum]
            states = range(1, len(values) + 1)
            axes.plot(states, values, color=color, lw=1, alpha=0.35)
            axes.plot(states[:size], values[:size], color=color, lw=1.8)
            if size < len(values):
                axes.plot(size, values[size - 1], "o", color=color, ms=6, mec="white", mew=1, zorder=3)
    axes.set_yscale("log")
    axes.set_xlabel("state, from the largest singular value down")
    axes.set_ylabel("Hankel singular value / largest")
    axes.set_title(f"Spectrum of layer {layer} while the model trains", loc="left", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(axes)
    mappable = ScalarMappable(norm, colors)
    bar = axes.figure.colorbar(mappable, ax=axes, label="training step", aspect=30, pad=0.02)
    bar.outline.set_visible(False)


def _tidy(axes: Any) -> None:
    axes.grid(axis="y", color="0.92", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
