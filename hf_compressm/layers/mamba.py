"""Mamba-1 mixers: read their selective system, and cut their state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hankel.mamba import MambaStatistics
from ..hankel.refit import refit
from ..hankel.selective import MambaSystem
from .contracts import MixerInputs
from .mixer import MixerLayer, causal_conv, linear, valid_tokens
from .parameters import ParameterCut
from .systems import Systems


class MambaLayer(MixerLayer):
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
    SYSTEM = frozenset(["A_log", "D", "x_proj", "dt_proj"])
    family = "Mamba"
    gradient_at = "out_proj"

    @classmethod
    def expected_shapes(cls, mixer: Any) -> dict[str, list[int | None]]:
        """The shapes of a mixer's tensors, by name (None: any), from its attributes."""
        I, N, R = mixer.intermediate_size, mixer.ssm_state_size, mixer.time_step_rank
        return {"A_log": [I, N], "D": [I], "x_proj.weight": [R + 2 * N, None], "dt_proj.weight": [None, R]}

    @property
    def gradient_is_slow(self) -> bool:  # type: ignore[override]
        """On a CPU, where the stock scan is a loop whose backward pass takes the square of the length."""
        return self.device.type == "cpu"

    @property
    def state_size(self) -> int:
        """N."""
        return int(self.mixer.ssm_state_size)

    @property
    def channels(self) -> int:
        """Scanned channels: each has a state of N numbers per sequence."""
        return int(self.mixer.intermediate_size)

    def statistics(self, *, mean_lti: bool) -> Any:
        """An empty accumulator for `read`'s systems."""
        return MambaStatistics(self.channels, self.state_size, self.device, mean_lti=mean_lti)

    def read(self, hidden_states: Tensor, attention_mask: Tensor | None, gradient: Tensor | None = None) -> Any:
        """The mixer's selective system on its input [batch, length, hidden]."""
        mixer = self.mixer
        valid = valid_tokens(hidden_states, attention_mask)
        x, z = linear(hidden_states.float() * valid[..., None], mixer.in_proj).chunk(2, dim=-1)
        weight = mixer.out_proj.weight.float().norm(dim=0) if gradient is None else gradient.float()
        u = mixer.act(causal_conv(x, mixer.conv1d)) * valid[..., None]
        sizes = [mixer.time_step_rank, self.state_size, self.state_size]
        step, B, C = self._normalise(*linear(u, mixer.x_proj).split(sizes, dim=-1))
        return MambaSystem(
            u=u,
            delta=F.softplus(linear(step, mixer.dt_proj)),
            A=-torch.exp(mixer.A_log.float()),
            B=B,
            C=C,
            gate=F.silu(z) * valid[..., None] * weight,
            valid=valid,
        )

    def _normalise(self, step: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return step, B, C

    def refit(self, inputs: MixerInputs, selections: tuple[Any, ...], rounds: int) -> list[Any] | None:
        """Fit the selection of each group to the mixer's output on its inputs, as `read` takes them."""
        return [refit(Systems(self, inputs), selections[0], rounds)]

    def magnitude(self) -> Tensor:
        """Product of the norms of each state's rows of B and C, [1, N]."""
        rows: Tensor = self.mixer.x_proj.weight.float()[self.mixer.time_step_rank :].norm(dim=1)
        return (rows[: self.state_size] * rows[self.state_size :])[None]

    def select(self, kept: Tensor, readout: Tensor | None = None) -> dict[str, ParameterCut]:
        """Columns of A, and rows of `x_proj`; a read-out maps those of C."""
        (states,), R, N = kept, self.mixer.time_step_rank, self.state_size
        return {
            "A_log": ParameterCut(dim=1, index=states),
            "x_proj.weight": ParameterCut(
                index=self._rows(states), readout=None if readout is None else readout[0], readout_start=R + N
            ),
        }

    def refitted(self, fits: tuple[Any, ...]) -> dict[str, ParameterCut]:
        """New A, B, C and D."""
        mixer, (fit,), N = self.mixer, fits, self.state_size
        step, B, C = mixer.x_proj.weight.detach().double().split([mixer.time_step_rank, N, N])
        x_proj = torch.cat([step, fit.inputs @ B, fit.readout @ C])
        return {
            "A_log": ParameterCut(dim=1, index=fit.kept, values=torch.log(-fit.A)),
            "x_proj.weight": ParameterCut(index=self._rows(fit.kept), values=x_proj),
            "D": ParameterCut(
                index=torch.arange(self.channels, device=fit.kept.device), values=mixer.D.detach() + fit.skip
            ),
        }

    def _rows(self, kept: Tensor) -> Tensor:
        """The rows of `x_proj` that stay: those of the step, and the kept states' of B and C."""
        R = self.mixer.time_step_rank
        return torch.cat([torch.arange(R, device=kept.device), R + kept, R + self.state_size + kept])

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
