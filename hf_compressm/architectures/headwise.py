"""Zamba's Mamba-1 mixers, whose channels are split into heads with B and C of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hankel.gramians import MambaSystem
from ..hankel.headwise import HeadwiseStatistics
from ..hankel.realization import Selection
from ..hankel.refit import Refit, refit
from .mamba import MambaLayer, causal_conv, linear, valid_tokens, wrong_shapes
from .parameter_cut import ParameterCut


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

    @staticmethod
    def misfit(mixer: Any) -> list[str]:
        H, N, R = mixer.n_mamba_heads, mixer.ssm_state_size, mixer.time_step_rank
        d = mixer.intermediate_size // H
        return wrong_shapes(
            mixer,
            {"A_log": [H, d, N], "D": [H, d], "x_proj_weight": [H, R + 2 * N, d], "dt_proj_weight": [H, d, R]},
        )

    @property
    def groups(self) -> int:  # type: ignore[override]
        """Heads."""
        return self.mixer.n_mamba_heads

    def statistics(self, *, mean_lti: bool) -> HeadwiseStatistics:
        channels = self.channels // self.groups
        return HeadwiseStatistics(self.groups, channels, self.state_size, self.mixer.A_log.device, mean_lti=mean_lti)

    def read(self, hidden_states: Tensor, attention_mask: Tensor | None) -> list[MambaSystem]:
        """The selective system of each head on the mixer's input [batch, length, hidden]."""
        mixer = self.mixer
        valid = valid_tokens(hidden_states, attention_mask)
        projected = linear(hidden_states.float() * valid[..., None], mixer.in_proj)
        x, z = projected[..., 0::2], projected[..., 1::2]  # rows of in_proj: x and z of a channel side by side
        u = mixer.act(causal_conv(x, mixer.conv1d)) * valid[..., None]
        gate = F.silu(z) * valid[..., None] * mixer.out_proj.weight.float().norm(dim=0)
        sizes = [mixer.time_step_rank, self.state_size, self.state_size]
        systems = []
        for head, (u_h, gate_h) in enumerate(zip(u.chunk(self.groups, -1), gate.chunk(self.groups, -1), strict=True)):
            u_h, gate_h = u_h.contiguous(), gate_h.contiguous()
            step, B, C = F.linear(u_h, mixer.x_proj_weight[head].float()).float().split(sizes, dim=-1)
            delta = F.linear(step, mixer.dt_proj_weight[head].float(), mixer.dt_proj_bias[head].float()).float()
            A = -torch.exp(mixer.A_log[head].float())
            systems.append(MambaSystem(u_h, F.softplus(delta), A, B, C, gate_h, valid))
        return systems

    def refit(
        self, inputs: list[tuple[Tensor, Tensor | None]], selections: list[Selection], rounds: int
    ) -> list[Refit]:
        heads = zip(*(self.read(*read) for read in inputs), strict=True)
        return [refit(list(systems), kept, rounds) for systems, kept in zip(heads, selections, strict=True)]

    def magnitude(self) -> Tensor:
        """Product of the norms of each state's rows of B and C, [heads, N]."""
        rows = self.mixer.x_proj_weight.float()[:, self.mixer.time_step_rank :].norm(dim=2)
        return rows[:, : self.state_size] * rows[:, self.state_size :]

    def cut(self, groups: list[Any]) -> dict[str, ParameterCut]:
        """How the mixer's parameters change, given a selection or refit of each head; nothing is changed yet."""
        mixer, R, N = self.mixer, self.mixer.time_step_rank, self.state_size
        kept = torch.stack([group.kept for group in groups])
        step = torch.arange(R, device=kept.device).expand(len(kept), -1)
        rows = torch.cat([step, R + kept, R + N + kept], dim=1)
        if not isinstance(groups[0], Refit):
            fitted = [group.readout for group in groups if group.readout is not None]
            readout = torch.stack(fitted) if fitted else None
            return {
                "A_log": ParameterCut(dim=2, index=kept),
                "x_proj_weight": ParameterCut(dim=1, index=rows, readout=readout, readout_start=R + N),
            }
        inputs, readout = (torch.stack([getattr(fit, name) for fit in groups]) for name in ("inputs", "readout"))
        dt, B, C = mixer.x_proj_weight.detach().double().split([R, N, N], dim=1)
        channels = torch.arange(mixer.D.shape[1], device=kept.device).expand(len(kept), -1)
        return {
            "A_log": ParameterCut(dim=2, index=kept, values=torch.log(-torch.stack([fit.A for fit in groups]))),
            "x_proj_weight": ParameterCut(dim=1, index=rows, values=torch.cat([dt, inputs @ B, readout @ C], dim=1)),
            "D": ParameterCut(
                dim=1, index=channels, values=mixer.D.detach() + torch.stack([fit.skip for fit in groups])
            ),
        }

    def size_of(self, shapes: dict[str, torch.Size]) -> int | None:
        if "A_log" in shapes:
            return shapes["A_log"][2]
        if "x_proj_weight" in shapes:
            return (shapes["x_proj_weight"][1] - self.mixer.time_step_rank) // 2
        return None

    def shapes(self, size: int) -> dict[str, torch.Size]:
        heads, channels = self.mixer.D.shape
        return {
            "A_log": torch.Size([heads, channels, size]),
            "x_proj_weight": torch.Size([heads, self.mixer.time_step_rank + 2 * size, channels]),
        }

    def resize(self, size: int) -> None:
        self.mixer.ssm_state_size = size
