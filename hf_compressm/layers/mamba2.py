"""Mamba-2 mixers: read their selective system, and cut or project their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat.parts import shape_of
from ..config import CompreSSMConfig
from ..hankel.mamba2 import Mamba2Statistics
from ..hankel.ranks import allowed_sizes, powers_of_two
from ..hankel.realization import Projection, project
from ..hankel.selective import Mamba2System
from ..modeling.modeling_compressm import HEAD_BUFFERS, project_, stock_class
from .contracts import MixerInputs, Realization, ResizeParameter
from .mixer import MixerLayer, causal_conv, linear, valid_tokens
from .parameters import ParameterCut, set_data_
from .rows import fit_rows, fitted_cuts
from .selection import Select

PROJECTION = "BC_projection"
# Bytes of state fall with every size, and tiles of memory and of kernels want a multiple of 8.
STEP = 8


class Mamba2Select(Select):
    """Keep some states: rows of `in_proj` and channels of `conv1d`, or columns of the maps of a projected layer."""

    fits_differ = True

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """But for a layer whose heads' states differ in number."""
        return layer.head_state_sizes is None

    @classmethod
    def sizes(cls, layer: Any, config: CompreSSMConfig) -> list[int]:
        """Multiples of 8, or of what the config names so far as the CUDA convolution takes it; or the tuned ones."""
        if config.multiple_of == "tuned":
            return _tuned_sizes(layer, config)
        multiple = step = config.multiple_of or STEP
        while layer.groups * step % 8:
            step += multiple
        return allowed_sizes(layer.state_size, config.min_state_size, step)

    @classmethod
    def check_size(cls, layer: Any, size: int) -> None:
        """Refuse a size that the causal convolution's kernel can't take.

        Raises:
            ValueError: if groups * size is not a multiple of 8.
        """
        if layer.groups * size % 8 and layer.unprojected_state_size is None:
            step = next(n for n in range(1, 9) if n * layer.groups % 8 == 0)
            below, above = size // step * step, size // step * step + step
            good = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"Layer {layer.index} can't select {size} states: the CUDA convolution needs n_groups * state_size "
                f"({layer.groups} * {size}) to be a multiple of 8. Take {good}, or realization='project'."
            )


class Project(Realization):
    """Scan a balanced projection of the state, by two maps that follow the convolution. `groups` are `Projection`s."""

    name = kind = "project"
    stock = False
    reads_contributions = False

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """For the mixers of transformers: each has a form that scans a projected state."""
        return stock_class(layer.mixer) is not None and layer.head_state_sizes is None

    @classmethod
    def suits(cls, config: CompreSSMConfig, *, in_training: bool) -> bool:
        """After training, unless a stock checkpoint or a selection is asked for."""
        return not in_training and not config.uniform and config.selection == "auto"

    @classmethod
    def sizes(cls, layer: Any, config: CompreSSMConfig) -> list[int]:
        """Multiples of 8, or of what the config names; or the tuned ones."""
        if config.multiple_of == "tuned":
            return _tuned_sizes(layer, config)
        return allowed_sizes(layer.state_size, config.min_state_size, config.multiple_of or STEP)

    @classmethod
    def paths(
        cls, layers: Sequence[Any], statistics: Sequence[Any], config: CompreSSMConfig
    ) -> list[dict[int, Realization]]:
        """For each layer the projection to every size."""
        together: dict[tuple[int, torch.device], list[int]] = {}
        for position, entry in enumerate(statistics):
            together.setdefault((entry.state_size, entry.tokens.device), []).append(position)
        found: dict[int, list[dict[int, Projection]]] = {}
        for positions in together.values():
            groups = [statistics[i].groups for i in positions]
            outputs = torch.stack([moments.output for some in groups for moments in some])
            paths = iter(project(outputs, torch.cat([statistics[i].P for i in positions])))
            found |= {i: list(islice(paths, len(some))) for i, some in zip(positions, groups, strict=True)}
        return [
            {size: cls(tuple(path[size] for path in found[i])) for size in found[i][0]} for i in range(len(layers))
        ]

    @classmethod
    def of_first_states(cls, layer: Any, size: int) -> Realization:
        """The maps that keep the first states."""
        identity = torch.eye(layer.state_size, size, dtype=torch.float32, device=layer.device)
        return cls((Projection(identity, identity, 0.0),) * layer.groups)

    def parameter_cuts(self, layer: Any) -> dict[str, ParameterCut]:
        """The maps, after those of a layer that is projected already."""
        groups = self.groups
        maps = torch.stack([*(group.B_projection for group in groups), *(group.C_projection for group in groups)])
        if layer.unprojected_state_size is not None:
            maps = layer.mixer.BC_projection.detach().double() @ maps.double()
        return {PROJECTION: ParameterCut(values=maps)}

    def added_parameters(self, layer: Any) -> int:
        """The maps, or what becomes of those that are there already."""
        if layer.unprojected_state_size is not None:
            return super().added_parameters(layer)
        return int(2 * layer.groups * layer.state_size * self.size)

    def apply_(self, layer: Any, new: Mapping[str, Tensor], resize_: ResizeParameter = set_data_) -> None:
        """Make the mixer one that projects. In place."""
        with keeping_maps(layer.mixer, resize_):
            project_(layer.mixer, **new)


@contextmanager
def keeping_maps(mixer: Any, resize_: ResizeParameter) -> Iterator[None]:
    """Let the maps that a mixer is given in here take the place of those that it has, in the parameter that optimizers hold."""
    held = dict(mixer.named_parameters(recurse=False)).get(PROJECTION)
    yield
    if held is not None:
        resize_(held, mixer.BC_projection.detach())
        mixer.BC_projection = held


def _tuned_sizes(layer: Any, config: CompreSSMConfig) -> list[int]:
    """What the kernels pad to. They tune themselves for each new size, most of a minute in the first training step."""
    return powers_of_two(layer.state_size, max(16, config.min_state_size))


class Mamba2Layer(MixerLayer):
    """One Mamba-2 mixer of a model, stock or already projected.

    Args:
        name: of the mixer in the model.
        mixer: of transformers' Mamba-2 models, or a module with its attributes.
    """

    NEEDS = frozenset(
        [
            "A_log",
            "D",
            "dt_bias",
            "in_proj",
            "conv1d",
            "norm",
            "out_proj",
            "act",
            "intermediate_size",
            "num_heads",
            "n_groups",
            "ssm_state_size",
            "conv_dim",
            "time_step_limit",
            "layer_idx",
        ]
    )
    MAY_HAVE = frozenset({"mup_vector", PROJECTION, *HEAD_BUFFERS})
    SYSTEM = frozenset(["A_log", "D", "dt_bias", "in_proj", "conv1d", PROJECTION])
    family = "Mamba-2"
    keeps_samples_apart = True
    realizations: ClassVar[dict[str, type[Realization]]] = {"select": Mamba2Select, "project": Project}

    @classmethod
    def expected_shapes(cls, mixer: Any) -> dict[str, list[int | None]]:
        """The shapes of a mixer's tensors, by name (None: any), from its attributes."""
        inner, heads = mixer.intermediate_size, mixer.num_heads
        states = mixer.n_groups * getattr(mixer, "unprojected_state_size", mixer.ssm_state_size)
        conv = inner + 2 * states
        rows = inner + conv + heads
        return {"A_log": [heads], "D": [heads], "in_proj.weight": [rows, None], "conv1d.weight": [conv, None, None]}

    @property
    def state_size(self) -> int:
        """N of the scan: the projected size of a projected mixer."""
        return int(self.mixer.ssm_state_size)

    @property
    def groups(self) -> int:
        """Groups of heads that share B and C."""
        return int(self.mixer.n_groups)

    @property
    def channels(self) -> int:
        """Scanned channels: each has a state of N numbers per sequence."""
        return int(self.mixer.intermediate_size)

    @property
    def unprojected_state_size(self) -> int | None:  # type: ignore[override]
        """N before the projection of a projected mixer, else None."""
        return getattr(self.mixer, "unprojected_state_size", None)

    @property
    def head_state_sizes(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """N of each head of a mixer that is projected by head, else None."""
        return getattr(self.mixer, "head_state_sizes", None)

    @property
    def gradient_at(self) -> str:  # type: ignore[override]
        """The gated norm, after which nothing is linear in the scan's output; Falcon-H1 can do without."""
        return "norm" if hasattr(self.mixer.norm, "weight") else "out_proj"

    @property
    def activation_bytes(self) -> int:
        """Four float32 tensors of [length, heads, chunk], and of [length, heads, N]."""
        return int(16 * self.mixer.num_heads * (getattr(self.mixer, "chunk_size", 256) + self.state_size))

    def statistics(self, *, mean_lti: bool) -> Mamba2Statistics:
        """An empty accumulator for `read`'s systems."""
        heads, sizes = self.mixer.num_heads, self.head_state_sizes
        if sizes is None:
            return Mamba2Statistics(heads, self.groups, self.state_size, self.device, mean_lti=mean_lti)
        return Mamba2Statistics(heads, heads, max(sizes), self.device, mean_lti=mean_lti, head_sizes=sizes)

    def read(
        self, hidden_states: Tensor, attention_mask: Tensor | None, gradient: Tensor | None = None
    ) -> Mamba2System:
        """The mixer's selective system on its input [batch, length, hidden].

        If it is projected by head, with B and C of each head, filled up with zeros to the size of the largest.
        """
        mixer = self.mixer
        valid = valid_tokens(hidden_states, attention_mask)
        scale = getattr(mixer, "ssm_in_multiplier", 1.0)
        projected = linear(hidden_states.float() * valid[..., None] * scale, mixer.in_proj)
        if hasattr(mixer, "mup_vector"):
            projected = projected * mixer.mup_vector.float()
        z, xBC, step = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
        xBC = mixer.act(causal_conv(xBC, mixer.conv1d)) * valid[..., None]
        x, BC = xBC.tensor_split([mixer.intermediate_size], dim=-1)
        B, C = self._project(BC.unflatten(-1, (2 * self.groups, -1)))
        gate = self._gate(z, gradient) * valid[..., None]
        return Mamba2System(
            x=x.unflatten(-1, (mixer.num_heads, -1)),
            delta=F.softplus(step + mixer.dt_bias.float()).clamp(*mixer.time_step_limit or (0.0, None)),
            A=-torch.exp(mixer.A_log.float()),
            B=B,
            C=C,
            gate=gate.unflatten(-1, (mixer.num_heads, -1)),
            valid=valid,
        )

    def _project(self, BC: Tensor) -> tuple[Tensor, ...]:
        """B and C as they are scanned, [batch, length, groups or heads, N] each."""
        if self.unprojected_state_size is None:
            return BC.chunk(2, dim=2)
        mixer, sizes = self.mixer, self.head_state_sizes
        if sizes is None:
            return torch.einsum("blgn,gnr->blgr", BC, mixer.BC_projection.float()).chunk(2, dim=2)
        heads = [
            [F.pad(head, (0, max(sizes) - head.shape[-1])) for head in side.split(sizes, dim=-1)]
            for side in mixer.map_B_C(BC)
        ]
        return tuple(torch.stack(side, dim=2) for side in heads)

    def _gate(self, z: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is not None:
            return gradient.float() if self.gradient_at == "norm" else F.silu(z) * gradient.float()
        gate: Tensor = F.silu(z) * self.mixer.out_proj.weight.float().norm(dim=0)
        if self.gradient_at == "norm":
            gate = gate * self.mixer.norm.weight.float()
        return gate

    def magnitude(self) -> Tensor:
        """Product of the norms of each state's rows of B and C in `in_proj`, [groups, N].

        Of a projected state it is those of its columns of the maps, in which each unprojected state counts by its row's norm.
        """
        start, N = 2 * self.mixer.intermediate_size, self.unprojected_state_size or self.state_size
        rows: Tensor = self.mixer.in_proj.weight.float()[start : start + 2 * self.groups * N].norm(dim=1).view(-1, N)
        if self.unprojected_state_size is not None:
            rows = (rows[..., None] * self.mixer.BC_projection.float()).norm(dim=1)
        return rows.view(2, self.groups, -1).prod(0)

    def select(self, kept: Tensor, readout: Tensor | None = None) -> dict[str, ParameterCut]:
        """Rows of `in_proj` and channels of `conv1d`; or columns of the maps of a projected layer."""
        mixer = self.mixer
        if self.unprojected_state_size is not None:
            return {PROJECTION: ParameterCut(dim=2, index=kept.repeat(2, 1))}
        inner, size = mixer.intermediate_size, self.groups * self.state_size
        x = torch.arange(inner, device=kept.device)
        states = (torch.arange(self.groups, device=kept.device)[:, None] * self.state_size + kept).flatten()
        channels = torch.cat([x, inner + states, inner + size + states])
        heads = torch.arange(inner + mixer.conv_dim, mixer.in_proj.out_features, device=kept.device)
        rows = {"in_proj": torch.cat([x, inner + channels, heads]), "conv1d": channels}
        return {
            f"{name}.{key}": ParameterCut(index=index)
            for name, index in rows.items()
            for key, _ in getattr(mixer, name).named_parameters()
        }

    def refit(self, inputs: MixerInputs, selections: tuple[Any, ...], rounds: int) -> list[Any] | None:
        """Fit the kept rows and channels to the scan's output on its inputs.

        None for a projected layer, and if none is better than it was.
        """
        return None if self.unprojected_state_size is not None else fit_rows(self, inputs, selections, rounds)

    def refitted(self, fits: tuple[Any, ...]) -> dict[str, ParameterCut]:
        """The kept rows and channels, with the fitted values of those that make B and C."""
        return fitted_cuts(self, fits)

    def shapes(self, size: int) -> dict[str, torch.Size]:
        """The shapes at a state size of the parameters that depend on it."""
        mixer = self.mixer
        if self.head_state_sizes is not None:
            return {PROJECTION: torch.Size([2, mixer.unprojected_state_size, mixer.num_heads * size])}
        if self.unprojected_state_size is not None:
            return {PROJECTION: torch.Size([2 * self.groups, self.unprojected_state_size, size])}
        conv = mixer.intermediate_size + 2 * self.groups * size
        rows = {"in_proj": mixer.intermediate_size + conv + mixer.num_heads, "conv1d": conv}
        return {
            f"{name}.{key}": torch.Size([rows[name], *shape_of(parameter)[1:]])
            for name in rows
            for key, parameter in getattr(mixer, name).named_parameters()
        }

    def resize(self, size: int) -> None:
        """Tell the mixer its new state size."""
        mixer = self.mixer
        mixer.ssm_state_size = size
        if self.unprojected_state_size is None:
            inner, old = mixer.intermediate_size, (mixer.conv_dim - mixer.intermediate_size) // 2
            if hasattr(mixer, "mup_vector"):  # one factor for each of z, x, B, C and dt
                factors = mixer.mup_vector[..., [0, inner, 2 * inner, 2 * inner + old, -1]]
                counts = [inner, inner, self.groups * size, self.groups * size, mixer.num_heads]
                repeats = torch.tensor(counts, device=factors.device)
                mixer.mup_vector = factors.repeat_interleave(repeats, dim=-1)
                mixer.groups_time_state_size = self.groups * size
            mixer.conv_dim = mixer.intermediate_size + 2 * self.groups * size
            conv = mixer.conv1d
            conv.in_channels = conv.out_channels = conv.groups = mixer.conv_dim
            mixer.in_proj.out_features = mixer.intermediate_size + mixer.conv_dim + mixer.num_heads
