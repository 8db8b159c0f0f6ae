"""The report of a training run: from the sizes it began with to the present ones, over all of its cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ..compat.sharding import parameter_count
from ..layers import Layer
from ..reporting.history import Attempt
from ..reporting.report import CompressionReport
from ..reporting.rows import LayerReport


def run_report(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    initial_sizes: Mapping[int, int],
    history: Sequence[Attempt],
    name: str = "select",
) -> CompressionReport | None:
    """What a run did to a model, for `model.compression_report`; None if it has not cut it.

    Spectra are those of the first attempt, before any cut. Energy kept is the product over the cuts of what each kept,
    output error what they lost together, before training went on. A layer that was cut names the run's realization. Where
    each of its cuts has an error bound they add up, by the triangle inequality; of what training changed in between they know nothing.

    Args:
        model: as it is now.
        layers: of the model.
        initial_sizes: before the first cut, by layer index.
        history: of the callback.
        name: of the realization.
    """
    if all(layer.state_size == initial_sizes[layer.index] for layer in layers):
        return None
    rows = []
    for layer in layers:
        energy, output, before = 1.0, 1.0, initial_sizes[layer.index]
        bounds: list[float | None] = []
        for attempt in history:
            if attempt.sizes[layer.index] < before:
                energy *= attempt.energy_kept[layer.index]
                output *= 1 - attempt.output_error[layer.index]
                bounds.append(attempt.error_bound.get(layer.index))
            before = attempt.sizes[layer.index]
        known = [bound for bound in bounds if bound is not None]
        rows.append(
            LayerReport(
                index=layer.index,
                old_size=initial_sizes[layer.index],
                new_size=layer.state_size,
                hankel_singular_values=history[0].hankel_singular_values[layer.index],
                energy_kept=energy,
                output_error=1 - output,
                channels=layer.channels,
                realization=name if layer.state_size < initial_sizes[layer.index] else "",
                error_bound=sum(known) if known and len(known) == len(bounds) else None,
                head_sizes=None if layer.head_state_sizes is None else list(layer.head_state_sizes),
            )
        )
    after = parameter_count(model)
    return CompressionReport(rows, name, history[0].parameters, after)
