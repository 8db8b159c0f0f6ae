"""Measure a model in the middle of its training, on the batches of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..backends import Backend
from ..config import CompreSSMConfig
from ..cutting import Measurement
from ..cutting.measuring import check_measured, empty_statistics, observing
from ..data.evaluation import evaluating
from ..hankel.statistics import Statistics
from ..layers import Layer, find_layers
from .recording import Batch


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
        config: of which `estimator` counts.
        backend: that the model is trained with.
        max_tokens: of each batch; None for all.

    Raises:
        ValueError: if there is no batch, or a mixer never ran.
    """
    if not batches:
        raise ValueError("No training batch passed through the model before the attempt to cut it.")
    layers = find_layers(model)

    def run(statistics: list[Statistics], some: Sequence[Batch]) -> list[Statistics]:
        _run(model, layers, statistics, some, max_tokens)
        return statistics

    statistics = empty_statistics(layers, config)
    backend.share_candidates_(statistics, lambda: run(empty_statistics(layers, config), batches[:1]))
    run(statistics, batches)
    backend.sum_(statistics)
    check_measured(layers, statistics)
    return Measurement(model, layers, statistics, config.estimator)


def _run(
    model: Any,
    layers: Sequence[Layer],
    statistics: Sequence[Statistics],
    batches: Sequence[Batch],
    max_tokens: int | None,
) -> None:
    with observing(layers, statistics, max_tokens=max_tokens), evaluating(model):
        for args, kwargs in batches:
            model(*args, **kwargs)
