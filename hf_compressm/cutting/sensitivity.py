"""How much the model's predictions move when the state of one layer is cut.

Two layers that lose the same share of their output do not cost the model the same. What a cut of layer l to r states
costs is taken as k_l * error_l(r), with the share error_l(r) of the layer's output energy that is lost, known for every
r, and one factor k_l that is measured: cut that layer alone, and see how far the predictions move.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..data.evaluation import evaluating
from ..interrupts import restoring
from ..layers import Layer, Realization, new_data


def sensitivities(
    model: nn.Module, layers: Sequence[Layer], cuts: Sequence[Realization], predict: Callable[[], Tensor]
) -> list[float]:
    """For each layer, how far the predictions move for each unit of its cut's cost, in nats per token.

    Args:
        model: it is the same afterwards, also after an error.
        layers: of the model.
        cuts: for each layer what it is cut to.
        predict: runs the model; see `divergences`.
    """
    with evaluating(model):
        moved = divergences(model, layers, cuts, predict)
    return [kl / cut.cost if cut.cost > 0 else 0.0 for kl, cut in zip(moved, cuts, strict=True)]


@torch.no_grad()
def divergences(
    model: nn.Module, layers: Sequence[Layer], cuts: Sequence[Realization], predict: Callable[[], Tensor]
) -> list[float]:
    """For each layer, how far the model's predictions move when that layer alone is cut.

    Args:
        model: in evaluation mode; it is the same afterwards, also after an error.
        layers: of the model.
        cuts: for each layer what it is cut to, on a copy.
        predict: runs the model; its logits [..., classes], or, of a model without a head, its last hidden states.

    Returns:
        the Kullback-Leibler divergence from the full model's predictions, in nats per token.
    """
    full = predict().float().log_softmax(-1)
    moved = []
    for layer, cut in zip(layers, cuts, strict=True):
        with _cut_alone(model, layer, cut):
            slim = predict().float().log_softmax(-1)
        moved.append(max(0.0, float((full.exp() * (full - slim)).sum(-1).mean())))
    return moved


@contextmanager
def _cut_alone(model: nn.Module, layer: Layer, cut: Realization) -> Iterator[None]:
    """The model with a cut copy of one mixer in the place of the mixer itself."""
    other = copy.copy(layer)
    other.mixer = copy.deepcopy(layer.mixer)
    cut.apply_(other, new_data(other, cut.parameter_cuts(other)))
    parent, _, name = layer.name.rpartition(".")
    owner = model.get_submodule(parent)
    with restoring(lambda: setattr(owner, name, layer.mixer)):
        setattr(owner, name, other.mixer)
        yield
