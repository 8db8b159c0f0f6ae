"""A model and its optimizer before a cut, so that the cut can be undone exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..layers import Layer, set_data_
from ..reporting.record import Recorded
from .apply import write_sizes_


class Snapshot:
    """What a cut replaces: it makes new tensors, so that references to the old ones are enough.

    Args:
        model, layers, optimizer: before the cut. No training step may come between it and `restore_`.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.layers, self.optimizer = model, layers, optimizer
        self.sizes = {layer.index: layer.state_size for layer in layers}
        parameters = [layer.mixer.get_parameter(name) for layer in layers for name in layer.changed_by_a_cut()]
        self.parameters = [(parameter, parameter.data) for parameter in parameters]
        self.states: list[tuple[Any, Any]] = [
            (p, dict(optimizer.state[p])) for p in parameters if p in optimizer.state
        ]
        self.recorded = Recorded(model)

    def restore_(self) -> None:
        """Undo the cut, bit for bit."""
        for parameter, data in self.parameters:
            set_data_(parameter, data)
        for layer in self.layers:
            layer.resize(self.sizes[layer.index])
        for parameter, state in self.states:
            self.optimizer.state[parameter] = state
        write_sizes_(self.model, self.layers)
        self.recorded.restore_()
