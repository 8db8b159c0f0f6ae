"""Layers of several Mamba-1 heads, each with its own B and C: every head is a system of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .mamba import MambaStatistics
from .moments import ReadoutMoments
from .selective import MambaSystem
from .statistics import Statistics


class HeadwiseStatistics(Statistics):
    """The statistics of a layer's heads; `update` it with a system of each head per batch.

    Args:
        heads: their number.
        channels, size, mean_lti: of each, as for `MambaStatistics`.
    """

    def __init__(self, heads: int, channels: int, size: int, device: torch.device, *, mean_lti: bool = False) -> None:
        self.heads = [MambaStatistics(channels, size, device, mean_lti=mean_lti) for _ in range(heads)]

    def update(self, systems: list[MambaSystem]) -> None:
        """Add the tokens of a batch, as a system of each head."""
        for head, system in zip(self.heads, systems, strict=True):
            head.update(system)

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]
        """Tokens that each head saw."""
        return self.heads[0].tokens

    @property
    def groups(self) -> list[ReadoutMoments]:  # type: ignore[override]
        """The moments of each head."""
        return [moments for head in self.heads for moments in head.groups]

    def gramians(self) -> tuple[Tensor, Tensor]:
        """P and Q per token in float64, [heads * channels, N, N]."""
        P, Q = zip(*(head.gramians() for head in self.heads), strict=True)
        return torch.cat(P), torch.cat(Q)

    def spectrum(self, sigma: Tensor) -> Tensor:
        """The heads' spectra, [heads, N], from those of all channels, [heads * channels, N]."""
        parts = zip(self.heads, sigma.chunk(len(self.heads)), strict=True)
        return torch.cat([head.spectrum(part) for head, part in parts])

    def modal_gain(self) -> Tensor:
        """AIRE-style score of each state, [heads, N]."""
        return torch.cat([head.modal_gain() for head in self.heads])

    def state_power(self) -> Tensor:
        """The diagonal of P, summed over the channels with their output weights, [heads, N]."""
        return torch.cat([head.state_power() for head in self.heads])

    def offload_(self) -> None:
        """Add up the heads' Gramians and normal matrices on the CPU."""
        for head in self.heads:
            head.offload_()

    def sums(self) -> Iterator[Tensor]:
        """The tensors that are sums over tokens."""
        for head in self.heads:
            yield from head.sums()
