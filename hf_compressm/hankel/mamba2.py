"""What the states of a Mamba-2 layer do, accumulated over calibration batches.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `x` | A, Delta, B, C, u | the selective state space model, per token |
| `P`, `Q` | P, Q | controllability and observability Gramians |
| `gate` | - | what multiplies a channel of the scan's output on its way to the residual stream; its square is w |
| `K` | - | K_t = sum over channels of w_t h_t h_t^T: how the states move the layer's output at token t |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import kernels
from ..kernels import chunked
from ..kernels.chunked import ChunkedScan
from ..kernels.reference import observability_reach
from .moments import ReadoutMoments
from .selective import Mamba2System
from .statistics import Statistics

# Numbers in the largest temporary tensor.
WORKING_SET = 2**22


class Mamba2Statistics(Statistics):
    """What a Mamba-2 layer's states do on the calibration data; `update` it with a system per batch.

    All heads of a group share B and C, and Abar is a scalar per head, so that a group is one system with the Gramians
    sum over heads of w P_h and of w Q_h. They are kept for each head, which may also have a projection of its own; and in
    Q, and with `mean_lti` in P, w is the mean over all tokens, which is not known before the last.

    A layer that is projected by head is a system for each head: as many groups as heads, whose B and C are filled up with
    zeros to the size of the largest.

    Attributes:
        head_sizes: the states of each head of such a layer, else None.
        tokens: that were seen.
        weight: sum over tokens of w, [heads].
        rates: sum over tokens of Delta A, [heads]; for `mean_lti`.
        controllable: sum over tokens of w P_t, [heads, N, N]; with `mean_lti`, of B B^T times the input's energy.
        observable: sum over tokens of Q_t, [heads, N, N]; with `mean_lti` none, it is the groups' C C^T.
        energy: without the contributions, sum over tokens of the groups' output energies, [groups].
    """

    def __init__(
        self,
        heads: int,
        groups: int,
        size: int,
        device: torch.device,
        *,
        mean_lti: bool = False,
        head_sizes: Sequence[int] | None = None,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.mean_lti, self.head_sizes = mean_lti, head_sizes
        self.tokens, self.weight, self.rates = zeros(), zeros(heads), zeros(heads)
        self.controllable = zeros(heads, size, size)
        self.observable = zeros(0 if mean_lti else heads, size, size)
        self.groups = [ReadoutMoments(size, device, readout=False) for _ in range(groups)]
        self.energy = zeros(groups)

    @property
    def state_size(self) -> int:
        """N, or the mean of the heads' sizes."""
        return super().state_size if self.head_sizes is None else sum(self.head_sizes) // len(self.head_sizes)

    def update(self, system: Mamba2System) -> None:
        """Add the tokens of a batch."""
        self.tokens += system.valid.sum()
        self.weight += system.gate.square().sum((0, 1, 3))
        if self.mean_lti:
            self.rates += (system.delta * system.valid[..., None]).sum((0, 1)) * system.A
            drive = (system.delta[..., None] * system.x).square().sum(-1)
            self.controllable += _outer_products(drive * system.valid[..., None], system.B).to(
                self.controllable.device
            )
        self._update_groups(system)
        if not self.mean_lti:
            P, reach = _gramians(system)
            self.controllable += P.to(self.controllable.device)
            self.observable += _outer_products(reach * system.valid[..., None], system.C).to(self.observable.device)

    def _update_groups(self, system: Mamba2System) -> None:
        """Second moments of C, and how the states contribute to the output or else only its energy."""
        x, delta, A, B, C, gate = system.x, system.delta, system.A, system.B, system.C, system.gate
        for moments, part in zip(self.groups, torch.einsum("blgi,blgj->gij", C.double(), C.double()), strict=True):
            moments.output += part
        if self.contributions:
            for moments, M in zip(self.groups, _contribution(x)(x, delta, A, B, C, gate), strict=True):
                moments.contribution += M
        else:
            y = ChunkedScan(delta[..., None] * x, delta * A, len(self.groups))(B, C)
            self.energy += (gate * y).square().sum((0, 1, 3)).unflatten(0, (len(self.groups), -1)).sum(1)

    def without_contributions_(self) -> None:
        """Leave the states' contributions out, which take most of the time."""
        self.contributions = False

    def output_energies(self) -> Tensor:
        """Of each group, summed over tokens, [groups]."""
        return super().output_energies() if self.contributions else self.energy

    def offload_(self) -> None:
        """Add up the Gramians on the CPU."""
        self.controllable, self.observable = self.controllable.cpu(), self.observable.cpu()

    @property
    def P(self) -> Tensor:  # noqa: N802
        """The sum over tokens and a group's heads of w P, [groups, N, N]."""
        weight = self._mean_weight() if self.mean_lti else torch.ones_like(self.weight)
        return self._over_heads(weight, self.controllable)

    @property
    def P_of_heads(self) -> Tensor:  # noqa: N802
        """The sum over tokens of w P, [heads, N, N]."""
        controllable = self.controllable.to(self.weight.device)
        return self._mean_weight()[:, None, None] * controllable if self.mean_lti else controllable

    def gramians(self) -> tuple[Tensor, Tensor]:
        """P and Q per token in float64, [groups, N, N]."""
        if self.mean_lti:
            outputs = torch.stack([moments.output for moments in self.groups])
            observable = outputs.repeat_interleave(len(self.weight) // len(outputs), dim=0)
        else:
            observable = self.observable
        return self.P / self.tokens, self._over_heads(self._mean_weight(), observable) / self.tokens

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

    def _mean_weight(self) -> Tensor:
        """Of each head, [heads]; with `mean_lti`, also over all later tokens."""
        weight = self.weight / self.tokens
        return weight / (1 - torch.exp(2 * self.rates / self.tokens)) if self.mean_lti else weight

    def _over_heads(self, weight: Tensor, sums: Tensor) -> Tensor:
        """Sums of the heads added up over each group by weight, where they lie: what comes back is [groups, N, N]."""
        by_group = zip(*(tensor.unflatten(0, (len(self.groups), -1)) for tensor in (weight, sums)), strict=True)
        return torch.stack([torch.tensordot(w.to(X.device), X, 1) for w, X in by_group]).to(weight.device)


def _gramians(system: Mamba2System) -> tuple[Tensor, Tensor]:
    """The sum of w P over the tokens, [heads, N, N], and how far C C^T reach in Q, [batch, length, heads]."""
    x, delta, A, B, gate, valid = system.x, system.delta, system.A, system.B, system.gate, system.valid
    if not kernels.fused(x):
        return chunked.controllability(x, delta, A, B, gate), observability_reach(delta, A, valid)
    from ..kernels.mamba2 import controllability

    return controllability(x, delta, A, B, gate, valid)


def _contribution(x: Tensor) -> Callable[..., Tensor]:
    if not kernels.fused(x):
        return chunked.contribution
    from ..kernels.mamba2 import contribution

    return contribution


def _outer_products(weight: Tensor, x: Tensor) -> Tensor:
    """The sum over tokens of weight x x^T for each head, [heads, N, N], some heads at a time.

    Args:
        weight: [batch, length, heads].
        x: of each group, [batch, length, groups, N].
    """
    per_group = weight.shape[2] // x.shape[2]
    together = max(1, WORKING_SET // x[:, :, 0].numel())
    found = []
    for group, weights in enumerate(weight.flatten(0, 1).split(per_group, dim=1)):
        rows = x[:, :, group].flatten(0, 1)
        found += [(some.T[..., None] * rows).mT @ rows for some in weights.split(together, dim=1)]
    return torch.cat(found)
