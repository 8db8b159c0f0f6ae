"""Mamba-2 realization that gives every head a projection, and a size, of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import CompreSSMConfig
from ..hankel.by_head import HeadPaths, HeadProjections
from ..hankel.ranks import allowed_sizes
from ..hankel.realization import Projection
from ..modeling.modeling_compressm import project_heads_, stock_class
from .contracts import Realization, ResizeParameter
from .mamba2 import PROJECTION, keeping_maps
from .parameters import ParameterCut, set_data_


class ProjectHeads(Realization):
    """Scan a balanced projection of the state in each head. `groups` are `HeadProjections`; the size is the heads' mean."""

    name = kind = "project_heads"
    stock = False
    reads_contributions = False

    @property
    def head_sizes(self) -> list[int]:
        """States of each head."""
        return [size for group in self.groups for size in group.sizes]

    @property
    def size(self) -> int:
        """States of a head, on average."""
        sizes = self.head_sizes
        return sum(sizes) // len(sizes)

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """For the mixers of transformers: each has a form that scans projected states."""
        return stock_class(layer.mixer) is not None

    @classmethod
    def sizes(cls, layer: Any, config: CompreSSMConfig) -> list[int]:
        """Any, or multiples of what the config names: kernels see the heads' sizes, which are any anyway."""
        step = config.multiple_of if isinstance(config.multiple_of, int) else 1
        return allowed_sizes(layer.state_size, config.min_state_size, step)

    @classmethod
    def paths(
        cls, layers: Sequence[Any], statistics: Sequence[Any], config: CompreSSMConfig
    ) -> list[Mapping[int, Realization]]:
        """For each layer the projections of every mean size."""
        return [
            _Path(
                HeadPaths(entry.P_of_heads, [group.output for group in entry.groups], entry.head_sizes, layer.groups),
                layer,
            )
            for layer, entry in zip(layers, statistics, strict=True)
        ]

    @classmethod
    def of_first_states(cls, layer: Any, size: int) -> Realization:
        """The maps that keep the first states of every head, of as many as there are."""
        number = layer.mixer.num_heads
        sizes = list(layer.head_state_sizes or [layer.state_size] * number)
        identity = torch.eye(max(sizes), dtype=torch.float32, device=layer.device)
        while sum(sizes) > number * size:
            sizes[sizes.index(max(sizes))] -= 1
        heads = tuple(Projection(identity[:, :n], identity[:, :n], 0.0) for n in sizes)
        per_group = number // layer.groups
        return cls(tuple(HeadProjections(heads[i : i + per_group], 0.0) for i in range(0, number, per_group)))

    def parameter_cuts(self, layer: Any) -> dict[str, ParameterCut]:
        """The maps, a head after the other, after those of a layer that is projected already."""
        sides = [
            [getattr(head, name) for group in self.groups for head in group.heads]
            for name in ("B_projection", "C_projection")
        ]
        if layer.unprojected_state_size is not None:
            sides = [
                [before @ head[: before.shape[1]].double() for before, head in zip(part, heads, strict=True)]
                for part, heads in zip(_maps_of_heads(layer), sides, strict=True)
            ]
        return {PROJECTION: ParameterCut(values=torch.stack([torch.cat(heads, dim=1) for heads in sides]))}

    def added_parameters(self, layer: Any) -> int:
        """The maps, less those that are there already."""
        N = layer.unprojected_state_size
        before = 0 if N is None else layer.mixer.BC_projection.numel()
        return int(2 * (N or layer.state_size) * sum(self.head_sizes) - before)

    def apply_(self, layer: Any, new: Mapping[str, Tensor], resize_: ResizeParameter = set_data_) -> None:
        """Make the mixer one that projects by head. In place."""
        with keeping_maps(layer.mixer, resize_):
            project_heads_(layer.mixer, self.head_sizes, **new)


def _maps_of_heads(layer: Any) -> list[list[Tensor]]:
    """Of a projected layer, the maps of B that its heads have now, and those of C, [unprojected N, r] each."""
    maps = layer.mixer.BC_projection.detach().double()
    if layer.head_state_sizes is not None:
        return [list(side.split(layer.head_state_sizes, dim=1)) for side in maps]
    return [list(side.repeat_interleave(layer.mixer.num_heads // layer.groups, dim=0)) for side in maps.chunk(2)]


class _Path(Mapping[int, Realization]):
    """A layer's realization at every mean size, made when it is asked for: all of them are many maps."""

    def __init__(self, heads: HeadPaths, layer: Any) -> None:
        self._heads, self._number, self._size = heads, int(layer.mixer.num_heads), int(layer.state_size)

    def __getitem__(self, size: int) -> Realization:
        if not 1 <= size <= self._size:
            raise KeyError(size)
        return ProjectHeads(self._heads[size * self._number])

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, self._size + 1))

    def __len__(self) -> int:
        return self._size
