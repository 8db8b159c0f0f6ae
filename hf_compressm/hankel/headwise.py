"""Layers of several Mamba-1 heads, each with its own B and C: every head is a system of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .gramians import MambaStatistics, MambaSystem, ReadoutMoments


class HeadwiseStatistics:
    """The statistics of a layer's heads; `update` it with a system of each head per batch.

    Args:
        heads: their number.
        channels, size, mean_lti: of each, as for `MambaStatistics`.
    """

    def __init__(self, heads: int, channels: int, size: int, device: torch.device, *, mean_lti: bool = False) -> None:
        self.heads = [MambaStatistics(channels, size, device, mean_lti=mean_lti) for _ in range(heads)]

    def update(self, systems: list[MambaSystem]) -> None:
        for head, system in zip(self.heads, systems, strict=True):
            head.update(system)

    @property
    def tokens(self) -> Tensor:
        return self.heads[0].tokens

    @property
    def groups(self) -> list[ReadoutMoments]:
        """The moments of each head."""
        return [moments for head in self.heads for moments in head.groups]

    def hankel_singular_values(self) -> Tensor:
        """The spectrum of each head, [heads, N], descending."""
        return torch.cat([head.hankel_singular_values() for head in self.heads])

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
