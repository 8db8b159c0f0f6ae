"""Measure a model in the middle of its training, on the batches of all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..backends import Backend
from ..config import CompreSSMConfig
from ..cutting import Measurement
from ..cutting.inputs import Inputs
from ..cutting.measuring import measured_together
from ..cutting.observing import can_weigh_by_loss, observe_by_loss, observing
from ..data.evaluation import evaluating
from ..data.packing import heeds_seq_idx, samples_in, warn_of_borders
from ..hankel.statistics import Statistics
from ..layers import find_layers
from .recording import Batch

FITTED_TOKENS = 2**15
"""Of which what the mixers read is kept for fits, if the first batch is no larger."""


@torch.no_grad()
def measure_batches(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    config: CompreSSMConfig,
    backend: Backend,
    max_tokens: int | None = None,
) -> Measurement:
    """Run the model on batches, and add up the statistics of all processes.

    Args:
        model: not wrapped.
        batches: of this process.
        config: of which `weights` and `estimator` count, and whether it refits: then what the mixers read is kept, of the
            first batches, and brought to process 0.
        backend: that the model is trained with.
        max_tokens: of each batch; None for all.

    Raises:
        ValueError: if there is no batch, or a mixer never ran.
    """
    batches = batches[len(batches) - backend.least(len(batches)) :]
    layers, called = find_layers(model), backend.as_called(model)
    by_loss = can_weigh_by_loss(model, layers, config)

    def run(statistics: list[Statistics], some: Sequence[Batch], inputs: Inputs | None) -> list[Statistics]:
        if not batches:
            raise ValueError("No training batch passed through the model before the attempt to cut it.")
        if not any(layer.reads_data for layer in layers):
            return statistics  # they are complete
        with evaluating(model):
            for args, kwargs in some:
                kept = None if inputs is None or backend.processes * tokens_of(inputs) >= FITTED_TOKENS else inputs
                if by_loss and "input_ids" in kwargs:
                    observe_by_loss(
                        called, layers, statistics, kwargs, kept, args=args, max_tokens=max_tokens, least=backend.least
                    )
                else:
                    with observing(layers, statistics, kept, max_tokens=max_tokens):
                        called(*args, **kwargs)
        backend.settle_()
        return statistics

    if any("input_ids" in kwargs and samples_in(kwargs) is not None for _, kwargs in batches):
        heeds = heeds_seq_idx(model, layers)
        if not heeds or any(kwargs.get("seq_idx") is None for _, kwargs in batches):
            warn_of_borders(model, heeds)
    inputs = Inputs(backend.processes) if config.refits else None
    statistics = measured_together(layers, config, backend, run, batches, inputs)
    return Measurement(model, layers, statistics, config.estimator, "fisher" if by_loss else "gate", inputs)


def tokens_of(inputs: Inputs) -> int:
    """How many a layer has read."""
    return sum(hidden_states[..., 0].numel() for reads in list(inputs.values())[:1] for hidden_states, *_ in reads)
