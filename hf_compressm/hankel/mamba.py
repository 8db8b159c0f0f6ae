"""What the states of a Mamba-1 layer do, accumulated over calibration batches.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `u` | A, Delta, B, C, u | the selective state space model, per token |
| `P`, `Q` | P, Q | controllability and observability Gramians |
| `gate` | - | what multiplies a channel of the scan's output on its way to the residual stream; its square is w |
| `K` | - | K_t = sum over channels of w_t h_t h_t^T: how the states move the layer's output at token t |
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import kernels
from ..kernels.reference import mamba_states, observability_gramian
from .moments import ReadoutMoments
from .selective import MambaSystem
from .statistics import Statistics
from .systems import lti_gramian

# How many tokens of each sequence choose the candidates, if not all states are.
FIRST_TOKENS = 16
# States whose K_t are computed at once by the kernel, which holds a token's in registers.
TOGETHER = 64
# Above so many states, Gramians are those of some channels, spread over all of them: each wants eigenvalues of its own, and memory
# with the square of the states. The others count by these; nothing but spectra and baseline scores comes from Gramians.
FEW_STATES, GRAMIAN_CHANNELS = 32, 256
# Numbers in the largest temporary tensor of a fused update.
WORKING_SET = 2**24


class MambaStatistics(Statistics):
    """What a Mamba-1 layer's states do on the calibration data; `update` it with a system per batch.

    Args:
        channels, size: of the layer.
        mean_lti: use the paper's surrogate, Abar at the mean step size with second moments of its inputs and outputs,
            instead of the time-varying scan.

    Attributes:
        some: the channels that have Gramians, weights and rates here, [c]; None for all of them.
    """

    def __init__(self, channels: int, size: int, device: torch.device, *, mean_lti: bool = False) -> None:
        self.mean_lti = mean_lti
        self.some: Tensor | None = None
        if size > FEW_STATES and channels > GRAMIAN_CHANNELS:
            self.some = (
                torch.linspace(0, channels - 1, GRAMIAN_CHANNELS, dtype=torch.float32, device=device).round().long()
            )
            channels = GRAMIAN_CHANNELS
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros(channels, dtype=torch.float64, device=device)
        self.rates = torch.zeros(channels, size, dtype=torch.float64, device=device)
        self.P = torch.zeros(channels, size, size, dtype=torch.float32, device=device)
        self.Q = torch.zeros(channels, size, size, dtype=torch.float32, device=device)
        self.groups = [ReadoutMoments(size, device, readout=True)]
        self._alone = False

    def contributions_alone_(self) -> None:
        """Leave out what candidates for a read-out are not chosen by: in kernels, nearly all work."""
        self._alone = True

    def update(self, system: MambaSystem) -> None:
        """Add the tokens of a batch."""
        self.tokens += system.valid.sum()
        some = self._part(system)
        self.weight += some.gate.square().sum((0, 1))
        self.rates += (some.delta * some.valid[..., None]).sum((0, 1))[:, None] * some.A
        if self.mean_lti:
            drive = (some.delta * some.u).square() * some.valid[..., None]
            P = torch.einsum("bld,bli,blj->dij", drive, system.B, system.B)
            self._add(P, torch.einsum("bl,bli,blj->ij", system.valid, system.C, system.C))
        if kernels.fused(system.u):
            self._update_fused(system)
        else:
            self._update_by_chunks(system)

    def _part(self, system: MambaSystem) -> MambaSystem:
        """The channels that have Gramians."""
        if self.some is None:
            return system
        u, delta, gate = (x[..., self.some] for x in (system.u, system.delta, system.gate))
        return replace(system, u=u, delta=delta, gate=gate, A=system.A[self.some])

    def _update_fused(self, system: MambaSystem) -> None:
        """The scans as kernels, some rows of the batch at a time."""
        from ..kernels.contribution import contribution
        from ..kernels.mamba import chunk_starts, gramians, output_gram

        u, delta, A, B, C, gate = system.u, system.delta, system.A, system.B, system.C, system.gate
        if self._alone:
            self.groups[0].contribution += contribution(u, delta, A, B, C, gate)
            return
        if not self.mean_lti:
            part = self._part(system)
            self._add(*gramians(part.u, part.delta, part.A, B, C, part.valid))
        (moments,) = self.groups
        size = moments.size
        if not len(moments.candidates):
            first = slice(0, FIRST_TOKENS)
            moments.choose_candidates(
                contribution(u[:, first], delta[:, first], A, B[:, first], C[:, first], gate[:, first])
            )
        every, kept = len(moments.candidates) == size, moments.candidates
        rows = max(1, WORKING_SET // (u.shape[1] * size**2))
        for start in range(0, len(u), rows):
            some = slice(start, start + rows)
            inputs, steps, outputs, gates = u[some], delta[some], C[some], gate[some]
            if every:
                starts, _ = chunk_starts(inputs, steps, A, B[some])
                K, _ = output_gram(inputs, steps, A, B[some], gates, starts)
                moments.add(outputs.flatten(0, 1), K.flatten(0, 1))
            else:
                starts, y = chunk_starts(inputs, steps, A, B[some], outputs, gates)
                M = contribution(inputs, steps, A, B[some], outputs, gates)
                outputs, c = outputs.flatten(0, 1), len(kept)
                step = max(1, TOGETHER - c)
                for beside in (slice(n, n + step) for n in range(0, size - c, step)):
                    states = torch.cat([kept, moments.rest[beside]])
                    gram = output_gram(
                        inputs, steps, A[:, states], B[some][..., states], gates, starts[:, :, states], y
                    )
                    K, moved = (part.flatten(0, 1) for part in gram)
                    moments.add_beside(outputs.double(), K[:, :c, c:].double(), beside)
                moments.add(outputs, K[:, :c, :c], moved[:, :c], M)

    def _update_by_chunks(self, system: MambaSystem) -> None:
        """The same in plain torch, a few tokens at a time."""
        for time, h in mamba_states(system.u, system.delta, system.A, system.B, chunk=FIRST_TOKENS):
            gated = system.gate[:, time, :, None] * h
            self.groups[0].update((gated.mT @ gated).flatten(0, 1), system.C[:, time].flatten(0, 1))
            if not self.mean_lti:
                of = h if self.some is None else h[:, :, self.some]
                channel_states = (of * system.valid[:, time, None, None]).flatten(0, 1).permute(1, 2, 0)
                self.P += channel_states @ channel_states.mT
        if not self.mean_lti:
            some = self._part(system)
            self.Q += observability_gramian(some.delta, some.A, some.C, some.valid)

    def _add(self, P: Tensor, Q: Tensor) -> None:
        self.P += P.to(self.P.device)
        self.Q += Q.to(self.Q.device)

    def offload_(self) -> None:
        """Add up Gramians and normal matrices on the CPU."""
        self.P, self.Q = self.P.cpu(), self.Q.cpu()
        for moments in self.groups:
            moments.offload_()

    def gramians(self) -> tuple[Tensor, Tensor]:
        """P and Q per token in float64, [c, N, N]."""
        P, Q = (X.to(self.weight.device).double() / self.tokens for X in (self.P, self.Q))
        if not self.mean_lti:
            return P, Q
        return lti_gramian(self.decay, P), lti_gramian(self.decay, Q)

    @property
    def decay(self) -> Tensor:
        """Abar at the mean step size, [channels, N]."""
        return torch.exp(self.rates / self.tokens)

    def spectrum(self, sigma: Tensor) -> Tensor:
        """The layer's spectrum, [1, N]: its channels' own, [channels, N], averaged with their output weights."""
        weight = self.weight / self.weight.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return (weight @ sigma)[None]

    def modal_gain(self) -> Tensor:
        """AIRE-style score of each state, [1, N]: the modes' gains c^2 p / (1 - |abar|^2), averaged over channels."""
        energy = self.P.diagonal(dim1=1, dim2=2).to(self.weight.device).double()
        output = self.groups[0].output.diagonal()
        return (self.weight @ (energy * output / (1 - self.decay.square())))[None]

    def state_power(self) -> Tensor:
        """The diagonal of P, summed over the channels with their output weights, [1, N]."""
        return (self.weight @ self.P.diagonal(dim1=-2, dim2=-1).to(self.weight.device).double())[None]
