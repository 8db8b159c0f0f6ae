"""Refit what a selection keeps of a Mamba-2 layer: the rows that make B and C, to the full layer's output.

| here | paper | meaning |
|---|---|---|
| `B`, `C` | B, C | of the full layer, per token |
| `rows` | - | what makes B' and C' of the layer's input: B' = act(conv(weight u + bias)), and C' likewise |
| `K` | - | controllability of a layer's tokens: P = sum over s, s' of B_s K_ss' B_s'^T |
| `w` | - | how much a channel of the scan's output counts at a token |

Two errors are minimised, one after the other, both quadratic in B' and in C' and with no closed form through the
activation, by L-BFGS. The second is the layer's own, the sum of w (y' - y)^2 on the calibration data. It is dear, a scan
for each step, and is learnt by heart: which token reads which is known for as many pairs only as the data has. So the
first takes the read-outs C_t to be independent of the states h_t, as the balanced projection does:

    E = tr(sum C'C'^T  sum w h'h'^T) - 2 tr(sum C C'^T  sum w h'h^T) + tr(sum C C^T  sum w h h^T),

where the sums over states are B'^T K B' and so on, and K [tokens, tokens] depends on the decays and x alone: no scan is
left, and every token's C' is fitted to every state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.chunked import ChunkedScan, decays
from .lbfgs import LBFGS
from .selective import Mamba2System

SPAN = 512
"""Tokens after which the states in K start anew."""
CHECK = (50, 5)
"""After how many evaluations of the two errors the held-out error is looked at, or earlier if they are few."""
PATIENCE = 2
"""How many looks may find nothing better before the next error's turn."""
HISTORY = 100
"""Steps that L-BFGS remembers: with 10, it needs twice as many."""
EXACT = 1e-9
"""A start that loses a smaller share of the energy is not fitted."""


@dataclass(frozen=True)
class Rows:
    """What makes B and C of a layer's input, the rows of B first.

    `weight` [2, groups, states, hidden], `taps` [2, groups, states, kernel], and the biases [2, groups, states] of the
    projection and the convolution, where there are any.
    """

    weight: Tensor
    taps: Tensor
    bias: Tensor | None
    conv_bias: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """With each tensor changed."""
        return replace(self, **{name: change(value) for name, value in self.tensors().items()})

    def flat(self) -> Tensor:
        """All of them in one vector."""
        return torch.cat([tensor.flatten() for tensor in self.tensors().values()])

    def filled(self, flat: Tensor) -> Rows:
        """The same with the values of such a vector."""
        tensors = self.tensors()
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        views = {name: part.view(old.shape) for part, (name, old) in zip(parts, tensors.items(), strict=True)}
        return replace(self, **views)

    def scaled(self, factors: Tensor) -> Rows:
        """With what multiplies the rows after the projection, [2, groups, states], in their weights and biases."""
        bias = None if self.bias is None else self.bias * factors
        return replace(self, weight=self.weight * factors[..., None], bias=bias)

    def of_group(self, group: int) -> Rows:
        """Those of one group, [2, states, ...]."""
        return self.map(lambda tensor: tensor[:, group])

    @classmethod
    def of_groups(cls, groups: Sequence[Rows]) -> Rows:
        """Those of all groups, from those of each."""
        tensors = [one.tensors() for one in groups]
        return replace(groups[0], **{name: torch.stack([one[name] for one in tensors], dim=1) for name in tensors[0]})


@dataclass(frozen=True)
class RowsRefit:
    """A group of a cut Mamba-2 layer whose rows of B and C are no longer those of the full one."""

    kept: Tensor
    rows: Rows
    error: float
    """The selection's, times the share of it that the fit leaves on what it was not fitted to."""

    @property
    def size(self) -> int:
        """The state size, r."""
        return len(self.kept)


class Reading:
    """What a layer reads in some sequences of one length, and what it makes of it.

    Args:
        u: what the rows read, [batch, length, hidden].
        system: the full layer's.
        act: the activation after the convolution.
    """

    def __init__(self, u: Tensor, system: Mamba2System, act: Callable[[Tensor], Tensor]) -> None:
        self.u, self.act, self.valid, self.gate = u, act, system.valid, system.gate
        self.groups = system.B.shape[2]
        self.scan = ChunkedScan(system.delta[..., None] * system.x, system.delta * system.A, self.groups)
        self.y = self.scan(system.B, system.C)
        self.energy = self._by_group(self.y)
        self.K = controllability(system)
        self.B, self.C = pieces(system.B), pieces(system.C)
        self.KB = self.K @ self.B

    def maps(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """B' and C', [batch, length, groups, states]."""
        q = self.u @ rows.weight.flatten(0, 2).mT
        if rows.bias is not None:
            q = q + rows.bias.flatten()
        taps, length = rows.taps.flatten(0, 2), q.shape[1]
        earlier = F.pad(q, (0, 0, taps.shape[1] - 1, 0))
        q = torch.stack([earlier[:, k : k + length] * taps[:, k] for k in range(taps.shape[1])]).sum(0)
        if rows.conv_bias is not None:
            q = q + rows.conv_bias.flatten()
        B, C = (self.act(q) * self.valid[..., None]).unflatten(-1, rows.weight.shape[:3]).unbind(2)
        return B, C

    def lost(self, rows: Rows) -> Tensor:
        """The sum over tokens and channels of w (y' - y)^2, [groups]."""
        return self._by_group(self.scan(*self.maps(rows)) - self.y)

    def moments(self, rows: Rows) -> tuple[Tensor, ...]:
        """The sums of w h'h'^T, w h h'^T, C'C'^T and C C'^T over tokens, each [groups, states, states]."""
        B, C = (pieces(M) for M in self.maps(rows))
        products = B.mT @ (self.K @ B), self.KB.mT @ B, C.mT @ C, self.C.mT @ C
        return tuple(product.sum(0) for product in products)

    def _by_group(self, y: Tensor) -> Tensor:
        energy: Tensor = (y * self.gate).square().sum((0, 1, 3)).unflatten(0, (self.groups, -1)).sum(1)
        return energy


def pieces(M: Tensor) -> Tensor:
    """[batch, length, groups, n] as [pieces, groups, span, n], with zeros at the end."""
    span = min(SPAN, M.shape[1])
    padded = F.pad(M, (0, 0, 0, 0, 0, -M.shape[1] % span))
    spans: Tensor = padded.unflatten(1, (-1, span)).flatten(0, 1).transpose(1, 2)
    return spans


def controllability(system: Mamba2System) -> Tensor:
    """K [pieces, groups, span, span]: the sum over tokens and channels of w h h^T is the sum over pieces of B^T K B."""
    groups = system.B.shape[2]
    passed = pieces((system.delta * system.A)[..., None]).double().cumsum(2)[..., 0]
    inputs, weight = pieces(system.delta[..., None] * system.x), pieces(system.gate).square()
    K = inputs.new_zeros(len(inputs), groups, inputs.shape[2], inputs.shape[2])
    for head in range(len(system.A)):
        decay = decays(passed[:, head], passed[:, head]).to(inputs.dtype)  # [pieces, t, s]
        reach = decay.square().mT @ weight[:, head]
        K[:, head * groups // len(system.A)] += (reach * inputs[:, head]) @ inputs[:, head].mT * decay
    return K + K.tril(-1).mT


class Loss(ABC):
    """An error of a layer that is cut, over some readings, by its rows: [groups], in the unit of `energy`."""

    energy: Tensor

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.readings = readings

    @abstractmethod
    def __call__(self, rows: Rows) -> Tensor:
        """The error of each group."""

    def share(self, rows: Rows) -> Tensor:
        """The groups' shares of their energy together, a scalar."""
        return (self(rows) / self.energy.clamp_min(torch.finfo(self.energy.dtype).tiny)).sum()


class OwnLoss(Loss):
    """The layer's own."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        super().__init__(readings)
        self.energy = torch.stack([one.energy for one in readings]).sum(0)

    def __call__(self, rows: Rows) -> Tensor:
        """The sum over tokens and channels of w (y' - y)^2."""
        return torch.stack([one.lost(rows) for one in self.readings]).sum(0)


class IndependentLoss(Loss):
    """The error that the layer would have if its read-outs were independent of its states, times the number of tokens."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        super().__init__(readings)
        P = torch.stack([(one.B.mT @ one.KB).sum(0) for one in readings]).sum(0)
        G = torch.stack([(one.C.mT @ one.C).sum(0) for one in readings]).sum(0)
        self.energy = (P * G).sum((1, 2))

    def __call__(self, rows: Rows) -> Tensor:
        """The sum over pairs of tokens of w_t (C'_s . h'_t - C_s . h_t)^2."""
        moments = zip(*(one.moments(rows) for one in self.readings), strict=True)
        P, P_full, G, G_full = (torch.stack(each).sum(0) for each in moments)
        return (P * G).sum((1, 2)) - 2 * (P_full * G_full).sum((1, 2)) + self.energy


@torch.no_grad()
def refit_rows(
    train: Sequence[Reading], held: Sequence[Reading], start: Rows, evaluations: Sequence[int]
) -> tuple[Rows, list[float]]:
    """Fit the rows of what was kept to the full layer's output.

    Args:
        train: what to fit to.
        held: what to judge the fit by, and stop it; what it is fitted to if there is nothing else.
        start: the rows as they are in the full layer.
        evaluations: of the two errors, at most.

    Returns:
        the rows, in float32, and for each group the share of the start's error that is left by them. Groups that a fit
        makes no better keep their rows.
    """
    own, independent = OwnLoss(train), IndependentLoss(train)
    judge = OwnLoss(held) if held else own
    best = Best(judge, start)
    if (best.lost > EXACT * judge.energy).any():
        for loss, count, check in zip((independent, own), evaluations, CHECK, strict=True):
            descend(loss.share, best, count, min(check, -(-count // 2)))
    return best.rows, best.left()


class Best:
    """The best rows of each group so far, by an error [groups] that nothing is fitted to."""

    def __init__(self, judge: OwnLoss, start: Rows) -> None:
        self.judge, self.rows = judge, start
        self.before = self.lost = judge(start)

    def __call__(self, rows: Rows) -> bool:
        """Take the groups that are better than all before them; whether there is any."""
        lost = self.judge(rows)
        better = lost < self.lost
        self.lost = torch.where(better, lost, self.lost)
        old = self.rows.tensors()
        self.rows = replace(
            rows,
            **{
                name: torch.where(better.view(-1, *(1,) * (new.dim() - 2)), new, old[name])
                for name, new in rows.tensors().items()
            },
        )
        return bool(better.any())

    def left(self) -> list[float]:
        """The share of the start's error that the best rows of each group leave."""
        return torch.where(self.lost < self.before, self.lost / self.before, 1.0).tolist()


def descend(objective: Callable[[Rows], Tensor], best: Best, evaluations: int, every: int) -> None:
    """L-BFGS from the best rows; it ends when it has come no further twice, looking after `every` evaluations."""
    shape = best.rows
    search = LBFGS(lambda x: objective(shape.filled(x)), shape.flat(), HISTORY)
    missed, more = 0, True
    while more and search.evaluations < evaluations and missed < PATIENCE:
        more = search.run(every)
        missed = 0 if best(shape.filled(search.x)) else missed + 1
