"""Cut a model without measuring it, for what depends on shapes alone."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..backends import OneProcess
from ..config import CompreSSMConfig
from ..layers import find_layers, realization_of
from .apply import cut_
from .sizes import check_targets


@torch.no_grad()
def cut_to_first_states_(model: PreTrainedModel, size: int, realization: str = "auto") -> None:
    """Cut every SSM layer to its first states, in place, whatever they carry.

    Raises:
        ValueError: as `compress_`.
    """
    layers = find_layers(model)
    config = CompreSSMConfig(state_size=size, realization=realization)
    name = realization_of(config, layers)
    check_targets(config, layers, name)
    realizations = {layer.index: layer.realizations[name].of_first_states(layer, size) for layer in layers}
    cut_(model, layers, realizations, [], OneProcess())
