"""Mamba-1 mixers: read their selective system, and cut their state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hankel.gramians import MambaStatistics, MambaSystem
from ..hankel.realization import Selection
from ..hankel.refit import Refit, refit
from .parameter_cut import ParameterCut


def causal_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A mixer's depthwise causal convolution, [batch, length, channels] in and float32 out."""
    bias = None if conv.bias is None else conv.bias.float()
    out = F.conv1d(x.mT, conv.weight.float(), bias, padding=conv.kernel_size[0] - 1, groups=conv.groups)
    return out[..., : x.shape[1]].mT.float()


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer in float32, or in autocast's precision, as the model itself computes it; float32 comes out."""
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float()).float()


def valid_tokens(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """1 for tokens and 0 for padding, [batch, length], float32."""
    if attention_mask is None:
        return torch.ones(hidden_states.shape[:2], device=hidden_states.device)
    return attention_mask.float()


def wrong_shapes(mixer: Any, expected: dict[str, list[int | None]]) -> list[str]:
    """For each tensor of another shape than expected (None: any), a remark."""
    remarks = []
    for name, shape in expected.items():
        tensor = mixer
        for part in name.split("."):
            tensor = getattr(tensor, part)
        if tensor.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
            remarks.append(f"has {name} {list(tensor.shape)} for {['any' if n is None else n for n in shape]}")
    return remarks


class MambaLayer:
    """One Mamba-1 mixer of a model.

    Args:
        name: of the mixer in the model.
        mixer: a `MambaMixer`, or a module with its attributes.
    """

    NEEDS = frozenset(
        [
            "A_log",
            "D",
            "in_proj",
            "conv1d",
            "x_proj",
            "dt_proj",
            "out_proj",
            "act",
            "time_step_rank",
            "intermediate_size",
            "ssm_state_size",
            "layer_idx",
        ]
    )
    """Attributes that are read."""
    MAY_HAVE: frozenset[str] = frozenset()
    """Further parameters, buffers and modules that the mixer may have."""
    groups = 1
    """Sets of states that are chosen on their own, each with its B and C."""
    can_project = False
    pads_states = False
    """Whether the kernels work on a power of two of states, whatever their number."""

    def __init__(self, name: str, mixer: Any) -> None:
        self.name = name
        self.mixer = mixer
        self.index: int = mixer.layer_idx

    @staticmethod
    def misfit(mixer: Any) -> list[str]:
        """What is wrong with the shapes of a mixer that has all the names."""
        I, N, R = mixer.intermediate_size, mixer.ssm_state_size, mixer.time_step_rank
        return wrong_shapes(
            mixer, {"A_log": [I, N], "D": [I], "x_proj.weight": [R + 2 * N, None], "dt_proj.weight": [None, R]}
        )

    @property
    def state_size(self) -> int:
        """N."""
        return self.mixer.ssm_state_size

    @property
    def channels(self) -> int:
        """Scanned channels: each has a state of N numbers per sequence."""
        return self.mixer.intermediate_size

    def statistics(self, *, mean_lti: bool) -> Any:
        """An empty accumulator for `read`'s systems."""
        return MambaStatistics(self.channels, self.state_size, self.mixer.A_log.device, mean_lti=mean_lti)

    def read(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Any:
        """The mixer's selective system on its input [batch, length, hidden]."""
        mixer = self.mixer
        valid = valid_tokens(hidden_states, attention_mask)
        x, z = linear(hidden_states.float() * valid[..., None], mixer.in_proj).chunk(2, dim=-1)
        u = mixer.act(causal_conv(x, mixer.conv1d)) * valid[..., None]
        sizes = [mixer.time_step_rank, self.state_size, self.state_size]
        step, B, C = self._normalise(*linear(u, mixer.x_proj).split(sizes, dim=-1))
        return MambaSystem(
            u=u,
            delta=F.softplus(linear(step, mixer.dt_proj)),
            A=-torch.exp(mixer.A_log.float()),
            B=B,
            C=C,
            gate=F.silu(z) * valid[..., None] * mixer.out_proj.weight.float().norm(dim=0),
            valid=valid,
        )

    def _normalise(self, step: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return step, B, C

    def refit(self, inputs: list[tuple[Tensor, Tensor | None]], selections: list[Selection], rounds: int) -> list[Any]:
        """Fit the selection of each group to the mixer's output on its inputs, as `read` takes them."""
        return [refit([self.read(*read) for read in inputs], selections[0], rounds)]

    def magnitude(self) -> Tensor:
        """Product of the norms of each state's rows of B and C, [1, N]."""
        rows = self.mixer.x_proj.weight.float()[self.mixer.time_step_rank :].norm(dim=1)
        return (rows[: self.state_size] * rows[self.state_size :])[None]

    def check_size(self, size: int) -> None:
        """Every size is good for the Mamba-1 kernels."""

    def cut(self, groups: list[Any]) -> dict[str, ParameterCut]:
        """How the mixer's parameters change in a selection; nothing is changed yet."""
        (selection,) = groups
        kept, R, N = selection.kept, self.mixer.time_step_rank, self.state_size
        step = torch.arange(R, device=kept.device)
        rows = torch.cat([step, R + kept, R + N + kept])
        if isinstance(selection, Refit):
            return self._refitted(selection, rows)
        return {
            "A_log": ParameterCut(dim=1, index=kept),
            "x_proj.weight": ParameterCut(index=rows, readout=selection.readout, readout_start=R + N),
        }

    def _refitted(self, fit: Refit, rows: Tensor) -> dict[str, ParameterCut]:
        mixer, kept, N = self.mixer, fit.kept, self.state_size
        step, B, C = mixer.x_proj.weight.detach().double().split([mixer.time_step_rank, N, N])
        x_proj = torch.cat([step, fit.inputs @ B, fit.readout @ C])
        return {
            "A_log": ParameterCut(dim=1, index=kept, values=torch.log(-fit.A)),
            "x_proj.weight": ParameterCut(index=rows, values=x_proj),
            "D": ParameterCut(
                index=torch.arange(self.channels, device=kept.device), values=mixer.D.detach() + fit.skip
            ),
        }

    def size_of(self, shapes: dict[str, torch.Size]) -> int | None:
        """The state size that a checkpoint's tensors have, from those of its shapes that tell it."""
        if "A_log" in shapes:
            return shapes["A_log"][1]
        if "x_proj.weight" in shapes:
            return (shapes["x_proj.weight"][0] - self.mixer.time_step_rank) // 2
        return None

    def changed_by_a_cut(self) -> list[str]:
        """The parameters that a selection changes, by name."""
        return list(self.shapes(self.state_size))

    def shapes(self, size: int) -> dict[str, torch.Size]:
        """The shapes at a state size of the parameters that depend on it."""
        return {
            "A_log": torch.Size([self.channels, size]),
            "x_proj.weight": torch.Size([self.mixer.time_step_rank + 2 * size, self.channels]),
        }

    def resize(self, size: int) -> None:
        """Tell the mixer its new state size."""
        self.mixer.ssm_state_size = size
        self.mixer.x_proj.out_features = self.mixer.time_step_rank + 2 * size
