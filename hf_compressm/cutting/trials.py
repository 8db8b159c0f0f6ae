"""Mixers that are cut as they run: a model as it would be after a cut, without a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.offloading import device_of, hook_of, weights_at_hand, without_hooks_
from ..interrupts import restoring
from ..layers import Layer, Realization, new_data


@contextmanager
def cut_for_a_while(model: nn.Module, layers: Sequence[Layer], cuts: Mapping[int, Realization]) -> Iterator[None]:
    """The model with mixers in the places of its own that are cut as they run, by layer index; afterwards it is as it was."""
    chosen = (layer for layer in layers if layer.index in cuts)
    with mixers_for_a_while(model, {layer.name: CutMixer(layer, cuts[layer.index]) for layer in chosen}):
        yield


@contextmanager
def mixers_for_a_while(model: nn.Module, mixers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other mixers, by their names in it; afterwards it is as it was."""
    taken: list[tuple[nn.Module, str, nn.Module]] = []

    def restore() -> None:
        for owner, name, mixer in taken:
            setattr(owner, name, mixer)

    with restoring(restore):
        for path, mixer in mixers.items():
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            taken.append((owner, name, getattr(owner, name)))
            setattr(owner, name, mixer)
        yield


class CutMixer(nn.Module):
    """A layer's mixer, cut anew each time that it runs: what the cut makes of its weights is not kept.

    It gives what the cut mixer gives, and otherwise has what the full one has.
    """

    def __init__(self, layer: Layer, cut: Realization) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, cut=cut)  # and not as parts of it, which the mixer is not
        self.training = layer.mixer.training

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"].mixer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the cut mixer gives, of the arguments of the full one."""
        with weights_at_hand(self.layer.mixer):
            return cut_copy(self.layer, self.cut).mixer.train(self.training)(*args, **kwargs)


@torch.no_grad()
def cut_copy(layer: Layer, cut: Realization) -> Layer:
    """The layer with a copy of its mixer that is cut, and shares with it all weights that the cut leaves alone."""
    mixer = layer.mixer
    new = new_data(layer, cut.to(device_of(mixer)).parameter_cuts(layer))
    shared: list[Any] = [*mixer.buffers(), *(hook for each in mixer.modules() if (hook := hook_of(each)) is not None)]
    memo = {id(value): value for value in shared}
    for parameter in mixer.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    other = copy.copy(layer)
    other.mixer = copy.deepcopy(mixer, memo)
    without_hooks_(other.mixer)
    cut.apply_(other, new, _replace_data)
    return other


def _replace_data(parameter: Tensor, new: Tensor) -> None:
    parameter.data = new.to(parameter.dtype).contiguous()
