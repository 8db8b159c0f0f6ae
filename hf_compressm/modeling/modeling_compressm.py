"""Models with Mamba layers whose state sizes differ, or that project their state.

Glossary: N `unprojected_state_size`, r `ssm_state_size`, G `n_groups`, H `num_heads`, r_h `head_state_sizes`.

This file stands alone: it imports torch and transformers only. hf_compressm imports it, and every saved model that
needs it carries a copy, so that `from_pretrained(..., trust_remote_code=True)` works where hf_compressm is not
installed. Importing it teaches transformers three things, once per process:

- layer i of a model with `config.per_layer_config` is built from `config.per_layer_config[i]`, for the architectures of
  the table below;
- a Mamba-2 layer whose config sets `unprojected_state_size` gets a `ProjectedMixer` over its stock mixer, or, with
  `head_state_sizes` too, a `HeadwiseProjectedMixer`;
- the config of such a model names this file in `auto_map` and writes it beside every `config.json`.

What is patched, and why no public hook will do:

- `PreTrainedModel.__init__`, since a model builds its layers from one config and asks nobody; from there, and only for a
  slim model's architecture, its mixer's `__init__`, its `_init_weights`, which knows no projection, and Falcon-H1's
  `compute_mup_vector`, which knows one size for all layers. (`AutoModel.register` would take the place of the stock class
  for all models of its kind.)
- `PreTrainedConfig.to_json_file`, since models and configs in memory keep their stock classes, whose code transformers
  sees no reason to save. (`register_for_auto_class` is for the file of the class itself.)

Without it, transformers refuses these checkpoints (`AmbiguousGlobalPerLayerAttributeError`) and never loads them
wrong.
"""

import copy
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

try:  # for a GPU; it may be missing, and is not asked for by whoever checks what this file needs
    import triton
    import triton.language as tl
except ImportError:
    triton = None

NEEDS = "5.23"

# The first thing that happens where remote code is trusted: with an older one, names below would be missing.
if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, NEEDS.split("."))):
    raise ImportError(
        f"This model needs transformers {NEEDS} or newer, and {transformers.__version__} is installed: "
        f"pip install 'transformers>={NEEDS}'"
    )

from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba2 import modeling_mamba2

MODULE_NAME = "modeling_compressm"
FEW_PROGRAMS = 1024
SHORT_CHUNK = 64
HEAD_BUFFERS = ("head_order", "column_head", "column_start", "column_place")


@dataclass(frozen=True)
class Architecture:
    """Names in transformers.

    What its model classes start with, its mixer class, and its config's fields of the state size and, where the mixer is
    Mamba-2's, of the number of heads.
    """

    prefix: str
    mixer: str
    state_size: str
    heads: str | None = None


# By `model_type`.
ARCHITECTURES = {
    "mamba": Architecture("Mamba", "MambaMixer", "state_size"),
    "falcon_mamba": Architecture("FalconMamba", "FalconMambaMixer", "state_size"),
    "jamba": Architecture("Jamba", "JambaMambaMixer", "mamba_d_state"),
    "zamba": Architecture("Zamba", "ZambaMambaMixer", "mamba_d_state"),
    "mamba2": Architecture("Mamba2", "Mamba2Mixer", "state_size", "num_heads"),
    "zamba2": Architecture("Zamba2", "Zamba2MambaMixer", "mamba_d_state", "n_mamba_heads"),
    "bamba": Architecture("Bamba", "BambaMixer", "mamba_d_state", "mamba_n_heads"),
    "granitemoehybrid": Architecture(
        "GraniteMoeHybrid", "GraniteMoeHybridMambaLayer", "mamba_d_state", "mamba_n_heads"
    ),
    "falcon_h1": Architecture("FalconH1", "FalconH1Mixer", "mamba_d_state", "mamba_n_heads"),
    "nemotron_h": Architecture("NemotronH", "NemotronHMamba2Mixer", "ssm_state_size", "mamba_num_heads"),
}

# Read once: the copy a model carries is the code it ran with, even if the file on disk changes later.
SOURCE = Path(__file__).read_text(encoding="utf-8")


# Of a mixin, whose attributes are those of the stock mixer that comes after it.
_Module: Any = nn.Module


class ProjectedMixer(_Module):  # type: ignore[misc]
    """A Mamba-2 mixer that scans a projected state: B' = B @ B_projection and C' = C @ C_projection, per group.

    All the entries of a Mamba-2 head decay alike (its transition is a scalar times the identity), so any change of
    basis of the state commutes with the recurrence, and a balanced truncation of the state is just these two maps.
    They stand after the convolution and SiLU, which do not commute with a map and so keep their N rows.

    Every architecture has a stock mixer of its own, with the same forward pass but for two multipliers and an optional
    norm in Falcon-H1. `projected_class` puts this one before it.

    Attributes:
        BC_projection: trainable parameter [2 G, N, r], the groups' maps of B, then those of C.
        ssm_state_size: r, the size of the recurrent state in scan and cache.
        unprojected_state_size: N, the rows per group that `in_proj` and `conv1d` keep for each of B and C.

    Built by `project_`, or by `from_pretrained` and `from_config` for layers whose config says so.
    """

    BC_projection: nn.Parameter
    unprojected_state_size: int

    def check_maps_were_loaded(self) -> None:
        """Before weights that a checkpoint does not have are initialised.

        Raises:
            ValueError: if the mixer's other weights came from a checkpoint that lacks the projections.
        """
        loaded = [getattr(p, "_is_hf_initialized", False) for p in (self.A_log, self.BC_projection)]
        if loaded == [True, False]:
            raise ValueError(
                f"The checkpoint has no BC_projection for layer {self.layer_idx}, without which its state is another one: "
                "save or download it again."
            )

    @torch.no_grad()
    def init_projection(self) -> None:
        """Maps that no checkpoint has start by selecting the first r states."""
        projection = self.BC_projection
        init.copy_(projection, self.first_states().to(projection.dtype).expand_as(projection))

    def first_states(self) -> torch.Tensor:
        """The map that keeps the first states."""
        return torch.eye(*self.BC_projection.shape[1:], device=self.BC_projection.device)

    # The stock forward pass of transformers 5.24 line by line, without the fused training path (whose kernel reads B and C
    # straight from the convolution) and with the projections. 5.23 calls the cache `cache_params`.
    @force_accelerate_hooks("conv1d")
    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The mixer's output, of hidden_states [batch, length, hidden_size]."""
        cache = cache_params if cache is None else cache
        batch_size, seq_len, _ = hidden_states.shape
        dtype = hidden_states.dtype
        # Both are None too while the cache of this layer is empty.
        conv_state, recurrent_state = None, None
        if cache is not None:
            conv_state = cache.get_conv_state(self.layer_idx, state_idx=0)
            recurrent_state = cache.get_recurrent_state(self.layer_idx, state_idx=0)

        # 1. Gated MLP's linear projection
        hidden_states = modeling_mamba2.apply_mask_to_padding_states(hidden_states, attention_mask)
        gate, hidden_states_B_C, dt = self.project_in(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        A = -torch.exp(self.A_log.float())

        # 2. Convolution sequence transformation
        hidden_states_B_C = hidden_states_B_C.transpose(1, 2)
        if (
            cache is not None
            and conv_state is not None
            and seq_len == 1
            and not cache.is_recording_past(self.layer_idx)
        ):
            hidden_states_B_C = modeling_mamba2.causal_conv1d_update(
                hidden_states_B_C,
                conv_state,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                activation=self.activation,
            )
        else:
            if cache is not None:
                hidden_states_B_C = cache.update_conv_state(
                    hidden_states_B_C, self.layer_idx, conv_kernel_size=self.conv_kernel_size
                )
            hidden_states_B_C = modeling_mamba2.causal_conv1d_fn(
                hidden_states_B_C,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                activation=self.activation,
                **kwargs,
            )
            if cache is not None:
                hidden_states_B_C = hidden_states_B_C[:, :, -seq_len:]

        # 3. SSM transformation, in the projected state
        hidden_states_B_C = modeling_mamba2.apply_mask_to_padding_states(
            hidden_states_B_C.transpose(1, 2), attention_mask
        )
        hidden_states, B_C = hidden_states_B_C.tensor_split([self.intermediate_size], dim=-1)
        B_C = B_C.unflatten(-1, (2 * self.n_groups, self.unprojected_state_size))
        hidden_states = hidden_states.reshape(batch_size, seq_len, self.num_heads, self.head_dim)
        if recurrent_state is not None and seq_len == 1:  # Recurrent form
            scan_output = self.step(hidden_states[:, 0], dt[:, 0], A, B_C, recurrent_state, **kwargs)
        else:  # Chunk form
            scan_output, final_state = self.scan(
                hidden_states, dt, A, B_C, recurrent_state, return_final_states=cache is not None, **kwargs
            )
            if cache is not None and final_state is not None:
                cache.update_recurrent_state(final_state, layer_idx=self.layer_idx)

        scan_output = gated_norm(self.norm, scan_output.reshape(batch_size, seq_len, -1), gate)

        # 4. Final linear projection
        output: torch.Tensor = self.out_proj(scan_output.to(dtype))
        return output

    def project_in(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The gate, x, B, C and dt, with Falcon-H1's multipliers."""
        if not hasattr(self, "mup_vector"):
            projected: torch.Tensor = self.in_proj(hidden_states)
            return projected
        scaled: torch.Tensor = self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector
        return scaled

    def step(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B_C: torch.Tensor,
        state: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One token, [batch, heads, head_dim], on top of a state, which is changed in place."""
        B, C = self.map_B_C(B_C)
        output: torch.Tensor = modeling_mamba2.mamba2_selective_state_update(
            state,
            hidden_states,
            dt[..., None].expand(-1, -1, self.head_dim),
            A[:, None, None].expand(-1, self.head_dim, self.ssm_state_size),
            B[:, 0],
            C[:, 0],
            self.D[:, None].expand(-1, self.head_dim),
            z=None,
            dt_bias=self.dt_bias[:, None].expand(-1, self.head_dim),
            dt_softplus=True,
            **kwargs,
        )
        return output

    def scan(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B_C: torch.Tensor,
        state: torch.Tensor | None,
        return_final_states: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [batch, length, heads, head_dim], from a state or none; and the final state if it is asked for."""
        B, C = self.map_B_C(B_C)
        output = modeling_mamba2.mamba2_chunk_scan(
            hidden_states,
            dt,
            A,
            B,
            C,
            chunk_size=self._chunk_size(hidden_states, self.n_groups),
            D=self.D,
            z=None,
            return_final_states=return_final_states,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=state,
            dt_limit=self.time_step_limit,
            **kwargs,
        )
        return output if return_final_states else (output, None)

    def _chunk_size(self, x: torch.Tensor, pairs: int) -> int:
        """How many tokens are scanned at once, in which each of so many pairs of B and C is multiplied.

        The stock number is for kernels on a GPU; the scan in plain torch repeats the pairs for every head.
        """
        most: int = self.chunk_size
        return most if x.is_cuda else min(most, SHORT_CHUNK)

    def map_B_C(self, B_C: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: N802
        """The projected B and C, [batch, length, groups, r] each, of [batch, length, 2 groups, N]."""
        return torch.einsum("blgn,gnr->blgr", B_C, self.BC_projection.to(B_C.dtype)).chunk(2, dim=2)


class HeadwiseProjectedMixer(ProjectedMixer):
    """A Mamba-2 mixer in which each head h scans a projection of its own, of its own size r_h: B'_h = B @ L_h, C'_h = C @ R_h.

    The states of all heads lie behind one another, S = sum of r_h in all: in the maps' columns, and in the cache, where
    they are [batch, S, head_dim]. The scan over many tokens takes heads of about one size together, filled up with zeros
    to a width of which its kernels have few; a single token takes all of them at once as they are.

    Attributes:
        BC_projection: trainable parameter [2, N, S], the heads' maps of B, then those of C.
        head_state_sizes: r_h of each head.
        ssm_state_size: their mean, S / H.
        head_order: buffer [H], the heads as the scan takes them, those of one width together.
        column_head: buffer [S], the head that a column belongs to.
        column_start: buffer [H + 1], where each head's columns begin, and their end.
        column_place: buffer [S], where a column is among those of the scan.

    Built by `project_heads_`, or by `from_pretrained` and `from_config` for layers whose config says so.
    """

    head_state_sizes: tuple[int, ...]
    head_order: torch.Tensor
    column_head: torch.Tensor
    column_start: torch.Tensor
    column_place: torch.Tensor

    def init_projection(self) -> None:
        """As the projected mixer; also the buffers, which no checkpoint holds."""
        super().init_projection()
        self.place_heads_()

    def first_states(self) -> torch.Tensor:
        """The maps that keep the first states of each head."""
        identity = torch.eye(self.unprojected_state_size, device=self.BC_projection.device)
        return torch.cat([identity[:, :size] for size in self.head_state_sizes], dim=1)

    def place_heads_(self) -> None:
        """Make the buffers, from the heads' sizes."""
        self.widths = scan_widths(self.head_state_sizes, self.unprojected_state_size)
        order = sorted(range(self.num_heads), key=lambda head: self.widths[head])
        starts, start = {}, 0
        for head in order:
            starts[head], start = start, start + self.widths[head]
        columns = [(head, i) for head, size in enumerate(self.head_state_sizes) for i in range(size)]
        buffers = {
            "head_order": order,
            "column_head": [head for head, _ in columns],
            "column_start": [sum(self.head_state_sizes[:head]) for head in range(self.num_heads + 1)],
            "column_place": [starts[head] + i for head, i in columns],
        }
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, device=self.BC_projection.device), persistent=False)

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """The widths that the scan takes, with the number of heads of each, ascending."""
        return [(width, self.widths.count(width)) for width in sorted(set(self.widths))]

    def step(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B_C: torch.Tensor,
        state: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the projected mixer, of [batch, S, head_dim] states; one launch where no gradient is taken."""
        B, C = (side[:, 0] for side in self.map_B_C(B_C))
        followed = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_states, dt, A, B, self.D))
        one_launch = triton is not None and state.is_cuda and state.is_contiguous() and not followed
        update = step_of_heads if one_launch else step_of_heads_reference
        columns = self.column_start if one_launch else self.column_head
        return update(state, hidden_states, dt, A, B, C, self.D, self.dt_bias, columns)

    def scan(
        self,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B_C: torch.Tensor,
        state: torch.Tensor | None,
        return_final_states: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the projected mixer, of [batch, S, head_dim] states, in one launch for each width."""
        order, counts = self.head_order, [count for _, count in self.buckets]
        alone = len(counts) == 1  # in their own order
        columns = [width * count for width, count in self.buckets]
        states = [None] * len(counts) if state is None else self._fill_up(state, 1).split(columns, dim=1)
        maps = self._fill_up(self.BC_projection.to(B_C.dtype), 2).split(columns, dim=2)
        outputs, final_states = [], []
        for (width, count), x, step, a, part, skip, bias, before in zip(
            self.buckets,
            [hidden_states] if alone else _TakeApart.apply(hidden_states, order, counts),  # type: ignore[no-untyped-call]
            dt.index_select(2, order).split(counts, dim=2),
            A.index_select(0, order).split(counts),
            maps,
            self.D.index_select(0, order).split(counts),
            self.dt_bias.index_select(0, order).split(counts),
            states,
            strict=True,
        ):
            B, C = self._map(B_C, part, [width * n for n in self._heads_of(width)])
            output = modeling_mamba2.mamba2_chunk_scan(
                x,
                step,
                a,
                B.unflatten(2, (count, width)),
                C.unflatten(2, (count, width)),
                chunk_size=self._chunk_size(x, count),
                D=skip,
                z=None,
                return_final_states=return_final_states,
                dt_bias=bias,
                dt_softplus=True,
                initial_states=None if before is None else before.unflatten(1, (count, width)).transpose(2, 3),
                dt_limit=self.time_step_limit,
                **kwargs,
            )
            if return_final_states:
                output, final_state = output
                final_states.append(final_state.transpose(2, 3).flatten(1, 2))
            outputs.append(output)
        output = outputs[0] if alone else _PutTogether.apply(order, counts, *outputs)  # type: ignore[no-untyped-call]
        if not return_final_states:
            return output, None
        return output, torch.cat(final_states, dim=1).index_select(1, self.column_place)

    def map_B_C(self, B_C: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: N802
        """The heads' B and C, [batch, length, S] each, of [batch, length, 2 groups, N]."""
        per_group = self.num_heads // self.n_groups
        columns = [
            sum(self.head_state_sizes[start : start + per_group]) for start in range(0, self.num_heads, per_group)
        ]
        return self._map(B_C, self.BC_projection.to(B_C.dtype), columns)

    def _map(self, B_C: torch.Tensor, maps: torch.Tensor, columns: list[int]) -> tuple[torch.Tensor, ...]:
        """B and C by maps [2, N, columns], of which each group has so many."""
        rows = B_C.flatten(0, 1).unflatten(1, (2, self.n_groups)).unbind(2)
        mapped = [x.transpose(0, 1) @ part for x, part in zip(rows, maps.split(columns, dim=2), strict=True)]
        joined = mapped[0] if len(mapped) == 1 else torch.cat(mapped, dim=2)
        sides: tuple[torch.Tensor, ...] = joined.unflatten(1, B_C.shape[:2]).unbind(0)
        return sides

    def _chunk_size(self, x: torch.Tensor, pairs: int) -> int:
        """Short ones, since there are as many pairs as heads.

        Of very long sequences longer ones, since a kernel's grid counts pairs times chunks up to 2^16.
        """
        most: int = self.chunk_size
        chunk = min(most, SHORT_CHUNK)
        while chunk < most and -(-x.shape[1] // chunk) * pairs >= 2**16:
            chunk *= 2
        return min(chunk, most)

    def _heads_of(self, width: int) -> list[int]:
        """How many heads of each group the scan takes in that width."""
        per_group = self.num_heads // self.n_groups
        return [self.widths[start : start + per_group].count(width) for start in range(0, self.num_heads, per_group)]

    def _fill_up(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Columns of the heads, to those that the scan takes, with zeros for what is not there."""
        shape = list(x.shape)
        shape[dim] = sum(self.widths)
        return x.new_zeros(shape).index_copy(dim, self.column_place, x)


def take_apart(x: torch.Tensor, order: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, ...]:
    """The heads of [batch, length, heads, head_dim] in that order, so many together."""
    return tuple(x.index_select(2, part) for part in order.split(counts))


def put_together(parts: Sequence[torch.Tensor], order: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The heads that `take_apart` took apart."""
    shape = list(parts[0].shape)
    shape[2] = len(order)
    x = parts[0].new_empty(shape)
    for part, places in zip(parts, order.split(counts), strict=True):
        x.index_copy_(2, places, part)
    return x


# Each is the other's gradient, since no head is there twice; torch's own of a selection adds all of them up.
class _TakeApart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(order)
        ctx.counts = counts
        return take_apart(x, order, counts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return put_together(grads, order, ctx.counts), None, None


class _PutTogether(torch.autograd.Function):
    # Two by name: of a number that is left open, torch.compile would miscount what it calls this with.
    @staticmethod
    def forward(
        ctx: Any, order: torch.Tensor, counts: list[int], narrow: torch.Tensor, wide: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.counts = counts
        return put_together((narrow, wide), order, counts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return None, None, *take_apart(grad, order, ctx.counts)


@functools.cache
def projected_class(stock: type, mixin: type) -> type:
    """The class of a stock mixer that projects, such as `ProjectedBambaMixer`.

    Args:
        stock: the Mamba-2 mixer's class in transformers.
        mixin: `ProjectedMixer` or `HeadwiseProjectedMixer`.
    """
    name = mixin.__name__.removesuffix("Mixer") + stock.__name__
    return type(name, (mixin, stock), {"__module__": __name__, "__doc__": mixin.__doc__})


def stock_class(mixer: nn.Module) -> type | None:
    """The class in transformers that a Mamba-2 mixer is of, or was before it was projected; None if there is none."""
    mixers = {
        (f"transformers.models.{model_type}.modeling_{model_type}", architecture.mixer)
        for model_type, architecture in ARCHITECTURES.items()
        if architecture.heads
    }
    return next((kind for kind in type(mixer).__mro__ if (kind.__module__, kind.__name__) in mixers), None)


def step_of_heads_reference(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    column_head: torch.Tensor,
) -> torch.Tensor:
    """One token of heads whose states, in which they may differ in number, lie behind one another.

    Args:
        state: of all heads, [batch, S, head_dim], float32; changed in place.
        x, dt: of the token, [batch, heads, head_dim] and [batch, heads].
        A, D, dt_bias: [heads].
        B, C: [batch, S].
        column_head: the head that a state belongs to, [S].

    Returns:
        the output, [batch, heads, head_dim].
    """
    dt = nn.functional.softplus(dt + dt_bias.to(dt.dtype)).float()
    drive = (dt[..., None] * x.float())[:, column_head] * B.float()[..., None]
    state.copy_(state * torch.exp(dt * A)[:, column_head, None] + drive)
    heads = torch.arange(x.shape[1], device=x.device)
    of_head = (heads[:, None] == column_head).to(state.dtype)
    output = of_head @ (state * C.float()[..., None]) + x.float() * D.float()[:, None]
    return output.to(x.dtype)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _step_kernel(  # type: ignore[no-untyped-def]
        state, x, dt, A, B, C, D, dt_bias, starts, output, states, heads, head_dim, x_row, x_head, x_dim, dt_row, dt_head,
        ROWS: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        p = tl.arange(0, DIM)
        first, end = tl.load(starts + head), tl.load(starts + head + 1)
        delta = tl.load(dt + row * dt_row + head * dt_head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
        delta = tl.where(delta > 20.0, delta, tl.log(1.0 + tl.exp(tl.minimum(delta, 20.0))))
        decay = tl.exp(delta * tl.load(A + head))
        drive = tl.load(x + row * x_row + head * x_head + p * x_dim, mask=p < head_dim, other=0.0).to(tl.float32)
        total = drive * tl.load(D + head).to(tl.float32)
        drive *= delta
        for start in range(first, end, ROWS):
            n = start + tl.arange(0, ROWS)
            inside = (n < end)[:, None] & (p < head_dim)[None, :]
            place = (row * states + n)[:, None] * head_dim + p[None, :]
            b = tl.load(B + row * states + n, mask=n < end, other=0.0).to(tl.float32)
            c = tl.load(C + row * states + n, mask=n < end, other=0.0).to(tl.float32)
            h = tl.load(state + place, mask=inside, other=0.0) * decay + b[:, None] * drive[None, :]
            tl.store(state + place, h, mask=inside)
            total += tl.sum(h * c[:, None], 0)
        tl.store(output + (row * heads + head) * head_dim + p, total, mask=p < head_dim)


def step_of_heads(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    column_start: torch.Tensor,
) -> torch.Tensor:
    """`step_of_heads_reference` in one launch, without gradients.

    Args:
        state, x, dt, A, B, C, D, dt_bias: as there.
        column_start: where each head's states begin, and their end, [heads + 1].
    """
    batch, heads, head_dim = x.shape
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Few programs wait for memory, and take many rows of it at once; of many, those of small heads would have idle rows.
    rows = 64 if batch * heads <= FEW_PROGRAMS else 16
    # Triton launches on the current device, which accelerate's hooks leave alone. (`device_of` would break a graph.)
    with torch.cuda.device(x.get_device()):
        _step_kernel[(heads, batch)](
            state, x, dt, A, B.contiguous(), C.contiguous(), D, dt_bias, column_start, output,
            state.shape[1], heads, head_dim, *x.stride(), *dt.stride(),
            ROWS=rows, DIM=max(16, 1 << (head_dim - 1).bit_length()),
        )  # fmt: skip
    return output


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _gated_norm_kernel(x, gate, weight, output, width, x_row, gate_row, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        row, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
        inside, place = i < width, tl.program_id(1) * width + i
        h = tl.load(x + row * x_row + place, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(gate + row * gate_row + place, mask=inside, other=0.0).to(tl.float32)
        h *= z * tl.sigmoid(z)
        h *= tl.rsqrt(tl.sum(h * h, 0) / width + eps)
        w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + row * x_row + place, w * h.to(output.dtype.element_ty).to(tl.float32), mask=inside)


# Of five architectures, letter by letter the same.
GATED_NORMS = (
    "MambaRMSNormGated",
    "Zamba2RMSNormGated",
    "BambaRMSNormGated",
    "GraniteMoeHybridRMSNormGated",
    "NemotronHRMSNormGated",
)


def gated_norm(norm: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`norm(x, gate)` of a mixer, [batch, length, heads * head_dim]; where no gradient is taken, in one launch.

    The stock norm of Mamba-2 is ten launches, more than anything else in a decoded token, and rounds in the same places.
    Falcon-H1 has another, or none.
    """
    if isinstance(norm, nn.Identity):
        return x * nn.functional.silu(gate)
    followed = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate, norm.weight))
    known = type(norm).__name__ in GATED_NORMS and norm.weight.dtype == x.dtype
    watched = (
        norm._forward_hooks or norm._forward_pre_hooks or norm.weight.is_meta
    )  # offloaded, which is a hook's, too
    if triton is None or not x.is_cuda or followed or watched or not known:
        normed: torch.Tensor = norm(x, gate)
        return normed
    output, x, gate = torch.empty_like(x), x.flatten(0, 1), gate.flatten(0, 1)
    with torch.cuda.device(x.get_device()):  # as in `step_of_heads`
        _gated_norm_kernel[(len(x), x.shape[1] // norm.group_size)](
            x, gate, norm.weight, output, norm.group_size, x.stride(0), gate.stride(0), norm.variance_epsilon,
            WIDTH=triton.next_power_of_2(norm.group_size),
        )  # fmt: skip
    return output


def scan_widths(sizes: Sequence[int], most: int) -> list[int]:
    """The width in which the scan takes each head: one of two powers of two, by which it is filled up least.

    Each width is a launch of its own, which takes more time than some columns of zeros.

    Args:
        sizes: of the heads.
        most: what no width shall exceed.
    """
    powers = [min(most, max(16, 1 << (size - 1).bit_length())) for size in sizes]
    narrow = min(sorted(set(powers)), key=lambda w: sum(w if power <= w else max(powers) for power in powers))
    return [narrow if power <= narrow else max(powers) for power in powers]


def project_(mixer: Any, BC_projection: torch.Tensor) -> None:
    """Make a Mamba-2 mixer, stock or projected, scan the state that B and C are projected to. In place.

    The maps are copied to a new trainable parameter; those of a mixer that was projected before are dropped, so compose
    them first if the new maps act on the projected state. Tell the config with `set_state_sizes`.

    Args:
        mixer: stock (N = `ssm_state_size`) or projected (N = `unprojected_state_size`).
        BC_projection: [2 G, N, r], the groups' maps of B, then those of C.

    Raises:
        ValueError: if it does not have that shape.
    """
    N: int = getattr(mixer, "unprojected_state_size", mixer.ssm_state_size)
    expected = (2 * mixer.n_groups, N)
    if BC_projection.dim() != 3 or BC_projection.shape[:2] != expected:
        raise ValueError(
            f"BC_projection of layer {mixer.layer_idx} must be [2 * n_groups, state size, projected size] = "
            f"[{expected[0]}, {N}, r], got {list(BC_projection.shape)}."
        )
    mixer.__class__ = projected_class(stock_class(mixer), ProjectedMixer)
    _set_projection_(mixer, N, BC_projection.shape[-1], BC_projection)


def project_heads_(mixer: Any, head_state_sizes: Sequence[int], BC_projection: torch.Tensor) -> None:
    """Make a Mamba-2 mixer, stock or projected, scan states that B and C are projected to for each head. In place.

    Args:
        mixer: as for `project_`.
        head_state_sizes: states of each head, 0 to N; together a multiple of the number of heads.
        BC_projection: [2, N, their sum], the heads' maps of B behind one another, then those of C.

    Raises:
        ValueError: if the sizes are others, or the maps do not have that shape.
    """
    N: int = getattr(mixer, "unprojected_state_size", mixer.ssm_state_size)
    sizes = tuple(int(size) for size in head_state_sizes)
    mean, rest = divmod(sum(sizes), mixer.num_heads)
    if len(sizes) != mixer.num_heads or rest or not mean or not all(0 <= size <= N for size in sizes):
        raise ValueError(
            f"The {mixer.num_heads} heads of layer {mixer.layer_idx} have 0 to {N} states each, and together a multiple of "
            f"their number, got {list(sizes)}."
        )
    if tuple(BC_projection.shape) != (2, N, sum(sizes)):
        raise ValueError(
            f"BC_projection of layer {mixer.layer_idx} must be [2, state size, states of all heads] = [2, {N}, "
            f"{sum(sizes)}], got {list(BC_projection.shape)}."
        )
    mixer.__class__ = projected_class(stock_class(mixer), HeadwiseProjectedMixer)
    mixer.head_state_sizes = sizes
    _set_projection_(mixer, N, mean, BC_projection)
    mixer.place_heads_()


def _set_projection_(mixer: Any, N: int, r: int, BC_projection: torch.Tensor) -> None:
    mixer.unprojected_state_size = N
    mixer.ssm_state_size = r
    like = mixer.conv1d.weight
    values = torch.empty(BC_projection.shape, dtype=like.dtype, device=like.device).copy_(BC_projection.detach())
    mixer.BC_projection = nn.Parameter(values, requires_grad=like.requires_grad)


def unproject_(mixer: Any) -> None:
    """Make a projected Mamba-2 mixer the stock one that scans all of B and C again. In place; its maps are dropped."""
    mixer.ssm_state_size = mixer.unprojected_state_size
    for name in ("BC_projection", "unprojected_state_size", "head_state_sizes", "widths", *HEAD_BUFFERS):
        if hasattr(mixer, name):
            delattr(mixer, name)
    mixer.__class__ = stock_class(mixer)


class _Stock:
    """What sets the classes that `auto_map` names apart from stock ones, from which they do not differ."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: the config writes this file whenever it needs to be.

        Transformers' own rules would name this file even in the checkpoint of a model that has become stock again.
        """

    @classmethod
    def is_custom_code(cls) -> bool:
        """Else transformers would leave out what it does to the weights of stock classes, such as joining experts."""
        return False


# What `auto_map` points at: the stock names, since `architectures` is taken from the name of the class. Each is made when
# it is asked for, so that no other architecture's module is imported. So are the mixers that project, for pickle.
AUTO_CLASSES = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}


def __getattr__(name: str) -> type:
    for model_type, architecture in ARCHITECTURES.items():
        if name in [architecture.prefix + suffix for suffix in AUTO_CLASSES.values()]:
            stock = getattr(_stock_module(model_type), name)
            made = type(name, (_Stock, stock), {"__module__": __name__})
            globals()[name] = made
            return made
        for mixin in (ProjectedMixer, HeadwiseProjectedMixer):
            if architecture.heads and name == mixin.__name__.removesuffix("Mixer") + architecture.mixer:
                return projected_class(getattr(_stock_module(model_type), architecture.mixer), mixin)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _stock_module(model_type: str) -> Any:
    return importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def is_slimmed(config: Any) -> bool:
    """Whether stock transformers can't build a model, or its text model, from this config."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    return any(
        isinstance(part, PreTrainedConfig) and part.is_heterogeneous and part.model_type in ARCHITECTURES
        for part in parts
    )


def update_auto_map(config: PreTrainedConfig) -> None:
    """Name this file in `config.auto_map` if the model needs it, take its name out if it does not. In place.

    Other code for config and models, of the checkpoint that it was cut from, knows no layers of different sizes: its entries
    make room. Those of tokenizers and processors stay.
    """
    entries = getattr(config, "auto_map", None) or {}
    auto_map = {key: name for key, name in entries.items() if MODULE_NAME not in str(name)}
    if config.is_heterogeneous and config.model_type in ARCHITECTURES:
        auto_map = {key: name for key, name in auto_map.items() if not key.startswith(("AutoConfig", "AutoModel"))}
        prefix = ARCHITECTURES[config.model_type].prefix
        auto_map |= {key: f"{MODULE_NAME}.{prefix}{suffix}" for key, suffix in AUTO_CLASSES.items()}
    if auto_map == entries:
        return
    if auto_map:
        config.auto_map = auto_map
    else:
        del config.auto_map


def install() -> None:
    """Teach transformers to build and save these models.

    Does nothing the second time, from whichever copy of this file.
    """
    wrap_once(PreTrainedModel, "__init__", _prepare_mixer)
    wrap_once(PreTrainedConfig, "to_json_file", _write_source_beside)


def wrap_once(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of a class or module by a wrapper around it. Does nothing the second time."""
    stock = getattr(owner, name)
    if not hasattr(stock, "_compressm"):
        wrapper = functools.wraps(stock)(wrap(stock))
        vars(wrapper)["_compressm"] = True
        setattr(owner, name, wrapper)


def _prepare_mixer(stock_init: Callable[..., Any]) -> Callable[..., Any]:
    # A model's first statement, before it builds its layers. Only the module of its own architecture is touched.
    def init_model(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if is_slimmed(config) and config.model_type in ARCHITECTURES:
            module = _stock_module(config.model_type)
            mixer_class = getattr(module, ARCHITECTURES[config.model_type].mixer)
            wrap_once(mixer_class, "__init__", _build_from_layer_config)
            if hasattr(module, "compute_mup_vector"):
                wrap_once(module, "compute_mup_vector", _of_first_layer)
            model_class = getattr(module, ARCHITECTURES[config.model_type].prefix + "PreTrainedModel")
            wrap_once(model_class, "_init_weights", _init_slim_weights)
        stock_init(self, config, *args, **kwargs)

    return init_model


def _build_from_layer_config(stock_init: Callable[..., Any]) -> Callable[..., Any]:
    def init_from_layer_config(self: Any, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        of_layer, built = _layer_configs(config, layer_idx)
        stock_init(self, built, layer_idx, *args, **kwargs)
        if built is of_layer:
            return
        r, sizes = getattr(of_layer, _state_size_field(of_layer)), getattr(of_layer, "head_state_sizes", None)
        N = self.ssm_state_size
        if sizes is None:
            project_(self, torch.eye(N, r).expand(2 * self.n_groups, -1, -1))
        else:
            project_heads_(self, sizes, torch.zeros(2, N, sum(sizes)))

    return init_from_layer_config


def _layer_configs(config: Any, layer_idx: int) -> tuple[Any, Any]:
    """The config of a layer, and what its stock mixer is built from: if it is projected, a copy with the size before."""
    if config.is_heterogeneous:
        config = config.per_layer_config[layer_idx]
    N = getattr(config, "unprojected_state_size", None)
    if N is None:
        return config, config
    built = copy.copy(config)
    setattr(built, _state_size_field(config), N)
    return config, built


def _state_size_field(config: Any) -> str:
    return ARCHITECTURES[config.model_type].state_size


# Falcon-H1 computes one vector of multipliers, of a length that depends on the state size, and copies it to all layers:
# as it builds them, and again as it initialises its own weights, which it has none of. Each layer gets its own instead
# when the layer is initialised, which happens in each way to load a model.
def _of_first_layer(compute_mup_vector: Callable[..., Any]) -> Callable[..., Any]:
    def compute_first_mup_vector(config: Any) -> Any:
        return compute_mup_vector(_layer_configs(config, 0)[1])

    return compute_first_mup_vector


def _init_slim_weights(stock_init_weights: Callable[..., Any]) -> Callable[..., Any]:
    def init_weights(self: Any, module: Any) -> None:
        if self.config.is_heterogeneous and self.config.model_type == "falcon_h1" and hasattr(module, "layers"):
            return
        if isinstance(module, ProjectedMixer):
            module.check_maps_were_loaded()
        stock_init_weights(self, module)
        if isinstance(module, ProjectedMixer):
            module.init_projection()
        if self.config.is_heterogeneous and hasattr(module, "mup_vector"):
            old, config = module.mup_vector, _layer_configs(self.config, module.layer_idx)[1]
            module.mup_vector = _stock_module("falcon_h1").compute_mup_vector(config).to(old.device, old.dtype)

    return init_weights


def _write_source_beside(stock_to_json_file: Callable[..., Any]) -> Callable[..., Any]:
    # Every way to save a model or its config ends here, after the point where uploads note which files were there.
    def to_json_file(self: Any, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        update_auto_map(self)
        stock_to_json_file(self, json_file_path, *args, **kwargs)
        if is_slimmed(self):
            write_source(Path(json_file_path).parent)

    return to_json_file


def write_source(folder: Path) -> None:
    """Write this file to a folder, whole or not at all."""
    partial = folder / f".{MODULE_NAME}.py.partial"
    partial.write_text(SOURCE, encoding="utf-8")
    partial.replace(folder / f"{MODULE_NAME}.py")


install()
