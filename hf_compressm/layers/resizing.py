"""Give mixers the state sizes of weights that are about to be loaded into them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .contracts import Layer, ResizeParameter
from .parameters import set_data_
from .registry import find_layers


@torch.no_grad()
def resize_like_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[int, int]:
    """Give a plain model's SSM layers the sizes of a slim model's weights, so that these can be loaded. In place.

    The weights that change their shape are zeros until `model.load_state_dict(state_dict)`. An optimizer is made after it.

    Args:
        model: as it is built, with the full sizes.
        state_dict: of the slim model.

    Returns:
        the sizes, by layer index.

    Raises:
        ValueError: if the model has no SSM layer, or the weights of one are not there.
    """
    layers = find_layers(model)
    prefixes = {layer.index: f"{layer.name}." if layer.name else "" for layer in layers}
    sizes = {layer.index: size_in(layer, state_dict, prefixes[layer.index]) for layer in layers}
    missing = [layer.name or "the mixer" for layer in layers if sizes[layer.index] is None]
    if missing:
        raise ValueError(f"The weights have none of {missing[0]}: they are of another model. Nothing was changed.")
    found = {index: size for index, size in sizes.items() if size is not None}
    for layer in layers:
        if layer.state_size != found[layer.index]:
            make_room_(layer, found[layer.index])
    return found


def size_in(layer: Layer, state_dict: Mapping[str, Tensor], prefix: str) -> int | None:
    """The state size of the weights that a layer's mixer will be given; None if none of them tells.

    Args:
        layer: of any size.
        state_dict: that has them, in whole or in part.
        prefix: of their names in it.
    """
    names = layer.shapes(layer.state_size)
    return layer.size_of({name: state_dict[prefix + name].shape for name in names if prefix + name in state_dict})


@torch.no_grad()
def make_room_(layer: Layer, size: int, resize_: ResizeParameter = set_data_) -> list[nn.Parameter]:
    """Give a layer a state size, with zeros for weights. In place.

    Args:
        layer, size: which, and how many states.
        resize_: gives a parameter its new data.

    Returns:
        the parameters that have another shape now.
    """
    shapes = layer.shapes(size)
    parameters = [layer.mixer.get_parameter(name) for name in shapes]
    for parameter, shape in zip(parameters, shapes.values(), strict=True):
        resize_(parameter, torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    layer.resize(size)
    return parameters
