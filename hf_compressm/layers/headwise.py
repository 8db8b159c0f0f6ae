"""Zamba's Mamba-1 mixers, whose channels are split into heads with B and C of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hankel.headwise import HeadwiseStatistics
from ..hankel.refit import refit
from ..hankel.selective import MambaSystem
from .contracts import MixerInputs
from .mamba import MambaLayer
from .mixer import causal_conv, linear, valid_tokens
from .parameters import ParameterCut
from .systems import Systems


class HeadwiseMambaLayer(MambaLayer):
    """A mixer of independent Mamba-1 heads. Each keeps states of its own choice, and all keep the same number.

    Args:
        name: of the mixer in the model.
        mixer: a `ZambaMambaMixer`, or a module with its attributes.
    """

    NEEDS = frozenset(
        [
            "A_log",
            "D",
            "in_proj",
            "conv1d",
            "x_proj_weight",
            "dt_proj_weight",
            "dt_proj_bias",
            "out_proj",
            "act",
            "n_mamba_heads",
            "time_step_rank",
            "intermediate_size",
            "ssm_state_size",
            "layer_idx",
        ]
    )
    SYSTEM = frozenset(["A_log", "D", "x_proj_weight", "dt_proj_weight", "dt_proj_bias"])

    @classmethod
    def expected_shapes(cls, mixer: Any) -> dict[str, list[int | None]]:
        """The shapes of a mixer's tensors, by name, from its attributes."""
        H, N, R = mixer.n_mamba_heads, mixer.ssm_state_size, mixer.time_step_rank
        d = mixer.intermediate_size // H
        return {"A_log": [H, d, N], "D": [H, d], "x_proj_weight": [H, R + 2 * N, d], "dt_proj_weight": [H, d, R]}

    @property
    def groups(self) -> int:
        """Heads."""
        return int(self.mixer.n_mamba_heads)

    def statistics(self, *, mean_lti: bool) -> HeadwiseStatistics:
        """An empty accumulator for `read`'s systems."""
        channels = self.channels // self.groups
        return HeadwiseStatistics(self.groups, channels, self.state_size, self.device, mean_lti=mean_lti)

    def read(
        self, hidden_states: Tensor, attention_mask: Tensor | None, gradient: Tensor | None = None
    ) -> list[MambaSystem]:
        """The selective system of each head on the mixer's input [batch, length, hidden]."""
        mixer = self.mixer
        valid = valid_tokens(hidden_states, attention_mask)
        projected = linear(hidden_states.float() * valid[..., None], mixer.in_proj)
        x, z = projected[..., 0::2], projected[..., 1::2]  # rows of in_proj: x and z of a channel side by side
        weight = mixer.out_proj.weight.float().norm(dim=0) if gradient is None else gradient.float()
        u = mixer.act(causal_conv(x, mixer.conv1d)) * valid[..., None]
        gate = F.silu(z) * valid[..., None] * weight
        sizes = [mixer.time_step_rank, self.state_size, self.state_size]
        systems = []
        for head, (u_h, gate_h) in enumerate(zip(u.chunk(self.groups, -1), gate.chunk(self.groups, -1), strict=True)):
            u_h, gate_h = u_h.contiguous(), gate_h.contiguous()
            step, B, C = F.linear(u_h, mixer.x_proj_weight[head].float()).float().split(sizes, dim=-1)
            delta = F.linear(step, mixer.dt_proj_weight[head].float(), mixer.dt_proj_bias[head].float()).float()
            A = -torch.exp(mixer.A_log[head].float())
            systems.append(MambaSystem(u_h, F.softplus(delta), A, B, C, gate_h, valid))
        return systems

    def refit(self, inputs: MixerInputs, selections: tuple[Any, ...], rounds: int) -> list[Any] | None:
        """Fit the selection of each head to the mixer's output on its inputs, as `read` takes them."""
        systems = Systems(self, inputs)
        return [refit(systems.head(number), kept, rounds) for number, kept in enumerate(selections)]

    def magnitude(self) -> Tensor:
        """Product of the norms of each state's rows of B and C, [heads, N]."""
        rows: Tensor = self.mixer.x_proj_weight.float()[:, self.mixer.time_step_rank :].norm(dim=2)
        return rows[:, : self.state_size] * rows[:, self.state_size :]

    def select(self, kept: Tensor, readout: Tensor | None = None) -> dict[str, ParameterCut]:
        """In each head, columns of A, and rows of `x_proj_weight`; a read-out maps those of C."""
        start = self.mixer.time_step_rank + self.state_size
        return {
            "A_log": ParameterCut(dim=2, index=kept),
            "x_proj_weight": ParameterCut(dim=1, index=self._rows(kept), readout=readout, readout_start=start),
        }

    def refitted(self, fits: tuple[Any, ...]) -> dict[str, ParameterCut]:
        """New A, B, C and D."""
        mixer, R, N = self.mixer, self.mixer.time_step_rank, self.state_size
        kept, A, inputs, readout, skip = (
            torch.stack([getattr(fit, name) for fit in fits]) for name in ("kept", "A", "inputs", "readout", "skip")
        )
        dt, B, C = mixer.x_proj_weight.detach().double().split([R, N, N], dim=1)
        channels = torch.arange(mixer.D.shape[1], device=kept.device).expand(len(kept), -1)
        return {
            "A_log": ParameterCut(dim=2, index=kept, values=torch.log(-A)),
            "x_proj_weight": ParameterCut(
                dim=1, index=self._rows(kept), values=torch.cat([dt, inputs @ B, readout @ C], dim=1)
            ),
            "D": ParameterCut(dim=1, index=channels, values=mixer.D.detach() + skip),
        }

    def _rows(self, kept: Tensor) -> Tensor:
        """The rows of `x_proj_weight` that stay in each head: those of the step, and the kept states' of B and C."""
        R = self.mixer.time_step_rank
        step = torch.arange(R, device=kept.device).expand(len(kept), -1)
        return torch.cat([step, R + kept, R + self.state_size + kept], dim=1)

    def shapes(self, size: int) -> dict[str, torch.Size]:
        """The shapes at a state size of the parameters that depend on it."""
        heads, channels = self.mixer.D.shape
        return {
            "A_log": torch.Size([heads, channels, size]),
            "x_proj_weight": torch.Size([heads, self.mixer.time_step_rank + 2 * size, channels]),
        }

    def resize(self, size: int) -> None:
        """Tell the mixer its new state size."""
        self.mixer.ssm_state_size = size
