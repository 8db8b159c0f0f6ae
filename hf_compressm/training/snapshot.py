"""A model and its optimizer before a cut, so that the cut can be undone exactly."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..architectures import SSMLayer, unprojected_sizes
from ..hub import set_state_sizes
from .reshape import set_data_


class Snapshot:
    """What a cut replaces: it makes new tensors, so that references to the old ones are enough.

    Args:
        model, layers, optimizer: before the cut. No training step may come between it and `restore_`.
    """

    def __init__(self, model: PreTrainedModel, layers: list[SSMLayer], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.layers, self.optimizer = model, layers, optimizer
        self.sizes = {layer.index: layer.state_size for layer in layers}
        parameters = [layer.mixer.get_parameter(name) for layer in layers for name in layer.changed_by_a_cut()]
        self.parameters = [(parameter, parameter.data) for parameter in parameters]
        self.states: list[tuple[Any, Any]] = [
            (p, dict(optimizer.state[p])) for p in parameters if p in optimizer.state
        ]
        self.report = getattr(model, "compression_report", None)

    def restore_(self) -> None:
        """Undo the cut, bit for bit."""
        for parameter, data in self.parameters:
            set_data_(parameter, data)
        for layer in self.layers:
            layer.resize(self.sizes[layer.index])
        for parameter, state in self.states:
            self.optimizer.state[parameter] = state
        set_state_sizes(self.model, self.sizes, unprojected_sizes(self.layers))
        self.model.compression_report = self.report  # type: ignore[assignment]
