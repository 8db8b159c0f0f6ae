"""What every layer's statistics can tell, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .moments import ReadoutMoments


class Statistics(ABC):
    """What a layer's states do on the calibration data; `update` it with a system per batch.

    Everything in it is a sum over tokens, so that the statistics of several processes are added up by adding `sums`.

    Attributes:
        tokens: that were seen, a float64 scalar.
        groups: the read-out moments of each group of states that is chosen on its own.
        contributions: whether the groups' contribution Grams are added up.
    """

    tokens: Tensor
    groups: list[ReadoutMoments]
    contributions: bool = True

    @property
    def state_size(self) -> int:
        """N of the layer that was read."""
        return self.groups[0].size

    @abstractmethod
    def update(self, system: Any) -> None:
        """Add the tokens of a batch."""

    @abstractmethod
    def gramians(self) -> tuple[Tensor, Tensor]:
        """P and Q per token in float64, [systems, N, N]."""

    @abstractmethod
    def spectrum(self, sigma: Tensor) -> Tensor:
        """The layer's spectrum, [groups, N], from those of its systems, [systems, N]."""

    @abstractmethod
    def modal_gain(self) -> Tensor:
        """AIRE-style score of each state, [groups, N]."""

    @abstractmethod
    def state_power(self) -> Tensor:
        """The diagonal of P, summed over the channels with their output weights, [groups, N]."""

    def without_contributions_(self) -> None:
        """Leave out what only selections are chosen by, where that takes time."""

    def contributions_alone_(self) -> None:
        """Leave out what candidates for a read-out are not chosen by, where that takes time."""

    def output_energies(self) -> Tensor:
        """Of each group, summed over tokens, [groups]."""
        return torch.stack([moments.contribution.sum() for moments in self.groups])

    def offload_(self) -> None:
        """Add up on the CPU what grows with the square of the state size, where it is not there already."""

    def sums(self) -> Iterator[Tensor]:
        """The tensors that are sums over tokens."""
        for owner in (self, *self.groups):
            for value in vars(owner).values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield value
