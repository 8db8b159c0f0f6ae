"""Realizations that keep some of the states: as they are, with a read-out fitted, or with everything refitted.

`selection="auto"` chooses the states by what the read-out can make up for, where the family has one, and else by greedy
elimination. The others are baselines, each an order of the states (`ORDERS`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat.offloading import weights_at_hand
from ..config import CompreSSMConfig
from ..hankel.moments import elimination_order
from ..hankel.realization import Selection, select, select_each_with_readout
from .contracts import MixerInputs, Realization
from .parameters import ParameterCut

Order = Callable[[Any, Any, int, CompreSSMConfig], Tensor]
"""From a layer, its statistics, a group and the config to the group's states, the most important first, [N]."""


def _greedy(layer: Any, statistics: Any, group: int, config: CompreSSMConfig) -> Tensor:
    return elimination_order(statistics.groups[group].contribution)


def _ghost(layer: Any, statistics: Any, group: int, config: CompreSSMConfig) -> Tensor:
    power = statistics.state_power()[group] * statistics.groups[group].output.diagonal()
    order: Tensor = power.argsort(descending=True)
    return order


def _lti_modal(layer: Any, statistics: Any, group: int, config: CompreSSMConfig) -> Tensor:
    order: Tensor = statistics.modal_gain()[group].argsort(descending=True)
    return order


def _magnitude(layer: Any, statistics: Any, group: int, config: CompreSSMConfig) -> Tensor:
    with weights_at_hand(layer.mixer):
        order: Tensor = layer.magnitude()[group].argsort(descending=True)
        return order


def _random(layer: Any, statistics: Any, group: int, config: CompreSSMConfig) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed * 1000 + layer.index * 10 + group)
    return torch.randperm(layer.state_size, generator=generator).to(statistics.groups[group].output.device)


ORDERS: dict[str, Order] = {
    "auto": _greedy,
    "greedy": _greedy,
    "ghost": _ghost,
    "lti_modal": _lti_modal,
    "magnitude": _magnitude,
    "random": _random,
}
"""By `CompreSSMConfig.selection`."""


class Select(Realization):
    """Keep some states, with their own rows of B and C. `groups` are `hankel.realization.Selection`s."""

    name = kind = "select"
    has_fit = True

    @property
    def kept(self) -> list[list[int]]:
        """The states that stay, a list for each group."""
        return [group.kept.tolist() for group in self.groups]

    @classmethod
    def paths(
        cls, layers: Sequence[Any], statistics: Sequence[Any], config: CompreSSMConfig
    ) -> list[dict[int, Realization]]:
        """For each layer the selection of every size."""
        found = [
            [
                select(moments, ORDERS[config.selection](layer, entry, group, config))
                for group, moments in enumerate(entry.groups)
            ]
            for layer, entry in zip(layers, statistics, strict=True)
        ]
        if config.selection == "auto":
            groups = [
                (path, moments)
                for paths, entry in zip(found, statistics, strict=True)
                for path, moments in zip(paths, entry.groups, strict=True)
                if moments.readout
            ]
            fits = select_each_with_readout([moments for _, moments in groups])
            for (path, _), fit in zip(groups, fits, strict=True):
                path |= fit
        return [
            {size: cls.of_selections(layer, entry, tuple(path[size] for path in paths)) for size in paths[0]}
            for layer, entry, paths in zip(layers, statistics, found, strict=True)
        ]

    @classmethod
    def of_selections(cls, layer: Any, statistics: Any, selections: tuple[Selection, ...]) -> Realization:
        """What a layer becomes by a selection in each of its groups."""
        return (cls if selections[0].readout is None else ReadOut)(selections)

    @classmethod
    def of_first_states(cls, layer: Any, size: int) -> Realization:
        """Keep the first states of each group."""
        kept = torch.arange(size, device=layer.device)
        return cls((Selection(kept, None, 0.0),) * layer.groups)

    def parameter_cuts(self, layer: Any) -> dict[str, ParameterCut]:
        """The kept rows and columns."""
        cuts: dict[str, ParameterCut] = layer.select(torch.stack([group.kept for group in self.groups]))
        return cuts

    def refit(self, layer: Any, inputs: MixerInputs, rounds: int) -> Realization:
        """Fit the layer to the full one's output, if its family can; itself if that gains nothing."""
        fits = layer.refit(inputs, self.groups, rounds)
        fitted = self if fits is None else Refit(tuple(fits))
        return fitted if fitted.cost <= self.cost else self


class ReadOut(Select):
    """Keep some states, and map C to the read-out that makes up best for the others."""

    kind = "read-out"

    def parameter_cuts(self, layer: Any) -> dict[str, ParameterCut]:
        """The kept rows and columns, and R C in the place of C."""
        kept, readout = (torch.stack([getattr(group, name) for group in self.groups]) for name in ("kept", "readout"))
        cuts: dict[str, ParameterCut] = layer.select(kept, readout)
        return cuts


class Refit(Select):
    """Keep some states, with all that belongs to them fitted anew. `groups` are the family's own."""

    kind = "refit"

    def parameter_cuts(self, layer: Any) -> dict[str, ParameterCut]:
        """The fitted values."""
        cuts: dict[str, ParameterCut] = layer.refitted(self.groups)
        return cuts

    def refit(self, layer: Any, inputs: MixerInputs, rounds: int) -> Realization:
        """Itself: it is fitted."""
        return self
