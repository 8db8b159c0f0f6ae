"""Weights of projected layers are loaded into a model whose layers are not, or otherwise: shapes alone don't tell."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..cutting.apply import write_sizes_
from ..cutting.optimizer import as_list, hold_new_, let_go_
from ..layers import Layer, find_layers, keeping_maps, set_data_
from ..modeling.modeling_compressm import project_, project_heads_, unproject_
from ..modeling.state_sizes import get_head_state_sizes, get_state_sizes, get_unprojected_state_sizes

Form = tuple[int, int | None, tuple[int, ...] | None]
"""State size, the size that it is projected from, and those of the heads."""


@torch.no_grad()
def take_forms_(model: Any, folder: str, optimizer: Any = None) -> bool:
    """Project the layers of a model that are projected in a checkpoint, to the sizes there, and no others. In place.

    The maps are zeros until the weights are loaded.

    Args:
        model: that the checkpoint's weights are about to be loaded into.
        folder: of the checkpoint.
        optimizer: of the model, if there is one: it holds the maps that are there then, and forgets what it knew of them.

    Returns:
        whether any layer has another form now.
    """
    if not isinstance(model, PreTrainedModel) or not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        return False
    config = type(model.config).from_pretrained(folder)
    there = list(
        zip(get_state_sizes(config), get_unprojected_state_sizes(config), get_head_state_sizes(config), strict=True)
    )
    layers, changed = find_layers(model), False
    if max(layer.index for layer in layers) >= len(there):
        return False  # it is another model's, which loading it says
    for layer in layers:
        size, N, heads = there[layer.index]
        form: Form = size, N, None if heads is None else tuple(heads)
        now: Form = layer.state_size, layer.unprojected_state_size, layer.head_state_sizes
        if form != now and (N, now[1]) != (None, None):
            _take_form_(layer, form, model, as_list(optimizer))
            changed = True
    if changed:
        write_sizes_(model, layers)
    return changed


def _take_form_(layer: Layer, form: Form, model: Any, optimizers: list[torch.optim.Optimizer]) -> None:
    mixer, (size, N, heads) = layer.mixer, form
    if N is None:
        let_go_(optimizers, mixer.BC_projection)
        unproject_(mixer)
        return
    with keeping_maps(mixer, set_data_):
        if heads is None:
            project_(mixer, torch.zeros(2 * mixer.n_groups, N, size))
        else:
            project_heads_(mixer, heads, torch.zeros(2, N, sum(heads)))
    for optimizer in optimizers:
        optimizer.state.pop(mixer.BC_projection, None)
    hold_new_(optimizers, model, mixer)
