"""What the states of a Mamba-2 layer do, accumulated over calibration batches.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `x` | A, Delta, B, C, u | the selective state space model, per token |
| `P`, `Q` | P, Q | controllability and observability Gramians |
| `gate` | - | what multiplies a channel of the scan's output on its way to the residual stream; its square is w |
| `K` | - | K_t = sum over channels of w_t h_t h_t^T: how the states move the layer's output at token t |
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..kernels.reference import mamba2_states, observability_reach
from .moments import ReadoutMoments
from .selective import Mamba2System
from .statistics import Statistics


class Mamba2Statistics(Statistics):
    """What a Mamba-2 layer's states do on the calibration data; `update` it with a system per batch.

    All heads of a group share B and C, and Abar is a scalar per head, so that a group is one system with the Gramians
    sum over heads of w P_h and of w Q_h.
    """

    def __init__(self, heads: int, groups: int, size: int, device: torch.device, *, mean_lti: bool = False) -> None:
        self.mean_lti = mean_lti
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros(heads, dtype=torch.float64, device=device)
        self.P = torch.zeros(groups, size, size, dtype=torch.float64, device=device)
        self.Q = torch.zeros(groups, size, size, dtype=torch.float64, device=device)
        self.groups = [ReadoutMoments(size, device, readout=False) for _ in range(groups)]

    def update(self, system: Mamba2System) -> None:
        """Add the tokens of a batch."""
        self.tokens += system.valid.sum()
        self.weight += system.gate.square().sum((0, 1, 3))
        if self.mean_lti:
            self._update_mean_lti(system)
        if kernels.fused(system.x):
            self._update_fused(system)
        else:
            self._update_by_chunks(system)

    def _update_fused(self, system: Mamba2System) -> None:
        """The scans as kernels."""
        from ..kernels.mamba2 import contribution, controllability

        x, delta, A, B, C, gate = system.x, system.delta, system.A, system.B, system.C, system.gate
        if not self.mean_lti:
            P, reach = controllability(x, delta, A, B, gate, system.valid)
            self.P += P
            self.Q += self._observability(system, reach)
        output = torch.einsum("blgi,blgj->gij", C.double(), C.double())
        contributions = contribution(x, delta, A, B, C, gate)
        for moments, part, M in zip(self.groups, output, contributions, strict=True):
            moments.output += part
            moments.contribution += M

    def _update_by_chunks(self, system: Mamba2System) -> None:
        """The same in plain torch, a few tokens at a time."""
        groups = system.B.shape[2]
        for time, h in mamba2_states(system.x, system.delta, system.A, system.B):
            gated = (system.gate[:, time, ..., None] * h).unflatten(2, (groups, -1)).flatten(3, 4)
            K = gated.mT @ gated  # [batch, time, groups, N, N]
            if not self.mean_lti:
                self.P += K.sum((0, 1))
            for group, moments in enumerate(self.groups):
                moments.update(K[:, :, group].flatten(0, 1), system.C[:, time, group].flatten(0, 1))
        if not self.mean_lti:
            self.Q += self._observability(system, observability_reach(system.delta, system.A, system.valid))

    def gramians(self) -> tuple[Tensor, Tensor]:
        """P and Q per token in float64, [groups, N, N]."""
        return self.P / self.tokens, self.Q / self.tokens

    def spectrum(self, sigma: Tensor) -> Tensor:
        """The groups' spectra as they are, [groups, N]."""
        return sigma

    def modal_gain(self) -> Tensor:
        """AIRE-style score of each state, [groups, N]. All states of a head decay alike, so it is that of P and C."""
        output = torch.stack([moments.output.diagonal() for moments in self.groups])
        return (self.P.diagonal(dim1=1, dim2=2) * output).sqrt()

    def state_power(self) -> Tensor:
        """The diagonal of P, which holds the output weights already, [groups, N]."""
        return self.P.diagonal(dim1=1, dim2=2)

    def _observability(self, system: Mamba2System, reach: Tensor) -> Tensor:
        """sum over heads, batch and t of w_h Q_ht, from the heads' G [batch, length, heads]."""
        groups = system.C.shape[2]
        weight = system.gate.square().sum((0, 1, 3)) / system.valid.sum()
        reach = (reach * weight).unflatten(-1, (groups, -1)).sum(-1) * system.valid[..., None]
        return torch.einsum("blgi,blgj->gij", reach[..., None] * system.C, system.C)

    def _update_mean_lti(self, system: Mamba2System) -> None:
        groups = system.B.shape[2]
        count = system.valid.sum()
        decay = torch.exp((system.delta * system.valid[..., None]).sum((0, 1)) / count * system.A)
        gain = 1 / (1 - decay.square())
        weight = system.gate.square().sum((0, 1, 3)) / count
        drive = (system.delta[..., None] * system.x).square().mean(-1) * weight * gain * system.x.shape[-1]
        drive = drive.unflatten(-1, (groups, -1)).sum(-1) * system.valid[..., None]
        reach = (weight * gain).unflatten(-1, (groups, -1)).sum(-1) * system.valid[..., None]
        self.P += torch.einsum("blg,blgi,blgj->gij", drive, system.B, system.B)
        self.Q += torch.einsum("blg,blgi,blgj->gij", reach, system.C, system.C)
