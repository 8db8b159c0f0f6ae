"""Mamba-1 mixers that normalise B and C after `x_proj` (Falcon-Mamba, Jamba)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .mamba import MambaLayer
from .parameter_cut import ParameterCut


class NormalisedMambaLayer(MambaLayer):
    """A Mamba-1 mixer with RMS norms over the states on B and C.

    Args:
        name: of the mixer in the model.
        mixer: a `FalconMambaMixer` (no weights in the norms), a `JambaMambaMixer`, or a module with their attributes.
    """

    NEEDS = MambaLayer.NEEDS | {"dt_layernorm", "b_layernorm", "c_layernorm"}

    def _normalise(self, step: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixer = self.mixer
        return mixer.dt_layernorm(step), mixer.b_layernorm(B), mixer.c_layernorm(C)

    def cut(self, groups: list[Any]) -> dict[str, ParameterCut]:
        return super().cut(groups)

    def resize(self, size: int) -> None:
        super().resize(size)
        for norm in (self.mixer.b_layernorm, self.mixer.c_layernorm):
            if not isinstance(norm.weight, torch.nn.Parameter):  # ones, which only the fused kernel reads
                norm.weight = norm.weight.new_ones(size)
