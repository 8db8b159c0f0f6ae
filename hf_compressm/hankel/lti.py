"""Balanced truncation of diagonal systems with real inputs and outputs, and a complex state: LRU, S4D, S5.

Such a layer computes x_k = diag(a) x_{k-1} + B u_k and y_k = Re(C x_k) + D u_k. What is truncated is the system of n complex
states (a, B, C), as in CompreSSM. It is exact for the real layer, too: its transfer function is the mean of G(e^{iω}) and
of the conjugate of G(e^{-iω}), so that no frequency's error exceeds the complex system's bound.

Glossary (code: paper):
    a:          Λ; the eigenvalues of the state matrix [..., n]; leading dimensions are independent systems
    B, C:       B, C; [..., n, m] and [..., p, n]
    P, Q:       P, Q; the controllability and observability Gramians [..., n, n]
    S:          -; E[x x^T] for white noise as the input: the state's second moment without conjugation, [..., n, n]
    Rm, Lm:     the maps of the square-root method, see `balanced_truncation`
    r:          r; the reduced number of states
    T:          -; the eigenvectors of the truncated state matrix

Sources: CompreSSM (arXiv 2510.02823), for LRUs; Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences
(arXiv 2303.06349); Pernebo and Silverman (1982): a truncated system is stable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .balanced_truncation import balance, error_bound
from .factorisations import in_parts, solve
from .moments import ReadoutMoments
from .realization import share
from .singular_values import gramian_factor
from .statistics import Statistics
from .systems import double, lti_gramian

NOTHING = 1e-12
"""A state whose share of what the strongest one writes times reads is below this is a zero that rounding has moved."""


@dataclass(frozen=True, eq=False)
class ModalSystem:
    """Diagonal systems side by side, each x_k = diag(a) x_{k-1} + B u_k, y_k = Re(C x_k), in float64 or complex128.

    Args:
        a: eigenvalues [..., n], |a| < 1.
        B: input matrices [..., n, m], for the discrete steps.
        C: output matrices [..., p, n].

    Raises:
        ValueError: the shapes do not fit together, an entry is not finite, or a system is not stable.
    """

    a: Tensor
    B: Tensor
    C: Tensor

    def __post_init__(self) -> None:
        fits = self.a.ndim >= 1 and self.a.shape == self.B.shape[:-1] == (*self.C.shape[:-2], self.C.shape[-1])
        if not fits:
            shapes = [tuple(x.shape) for x in (self.a, self.B, self.C)]
            raise ValueError(f"a [..., n], B [..., n, m] and C [..., p, n] do not fit together: shapes {shapes}")
        for name in ("a", "B", "C"):
            matrix = double(getattr(self, name).detach())
            if not torch.isfinite(matrix).all():
                raise ValueError(f"{name} has entries that are not finite")
            object.__setattr__(self, name, matrix)

    @property
    def size(self) -> int:
        """n."""
        return self.a.shape[-1]

    def controllability_gramian(self) -> Tensor:
        """P = A P A^H + B B^H, [..., n, n]: the mean of x x^H for white noise of unit power.

        Raises:
            ValueError: some |a| is not below 1.
        """
        return lti_gramian(self.a, self.B @ self.B.mH)

    def observability_gramian(self) -> Tensor:
        """Q = A^H Q A + C^H C, [..., n, n].

        Raises:
            ValueError: some |a| is not below 1.
        """
        return lti_gramian(self.a.conj(), self.C.mH @ self.C)

    def contributions(self) -> Tensor:
        """What pairs of states add to the mean energy of the real output, for white noise of unit power: [..., n, n], real.

        The sum over all pairs is the energy, the square of the H2 norm without D. With Re z = (z + conj z) / 2, it is half of
        E|z|^2 + Re E z^2.
        """
        a, B, C = self.a, self.B, self.C
        S = (B @ B.mT) / (1 - a[..., :, None] * a[..., None, :])
        energy = self.controllability_gramian() * (C.mH @ C).mT + S * (C.mT @ C)
        return energy.real / 2

    def energy(self) -> float:
        """Mean energy of the real outputs of all systems together, for white noise of unit power."""
        return float(self.contributions().sum())

    def first(self, r: int) -> tuple[Tensor, Tensor, Tensor]:
        """a, B and C of the first r states."""
        return self.a[..., :r], self.B[..., :r, :], self.C[..., :r]

    def minus(self, other: ModalSystem) -> ModalSystem:
        """The system whose output is the difference of two on the same inputs."""
        parts = [self.a, other.a], [self.B, other.B], [self.C, -other.C]
        return ModalSystem(*(torch.cat(part, dim) for part, dim in zip(parts, (-1, -2, -1), strict=True)))


@dataclass(frozen=True)
class Truncated:
    """A layer's systems after balanced truncation, diagonal again: a [..., r], B [..., r, m], C [..., p, r]."""

    a: Tensor
    B: Tensor
    C: Tensor
    error: float
    """Share of the output energy that is lost, for white noise as the input."""
    bound: float
    """The largest gain of the error at any frequency is at most this: twice the sum of the Hankel singular values cut."""

    @property
    def size(self) -> int:
        """r."""
        return self.a.shape[-1]


class TruncatedPath(Mapping[int, Truncated]):
    """Systems truncated to every size from 1 to n, each made when it is first asked for.

    Args:
        system: the full ones. They are balanced once.

    Raises:
        ValueError: some |a| is not below 1.
    """

    def __init__(self, system: ModalSystem) -> None:
        self.system = system
        L_P = gramian_factor(system.controllability_gramian(), "controllability Gramian P")
        L_Q = gramian_factor(system.observability_gramian(), "observability Gramian Q")
        self._power = L_P.abs().square().sum(-1).mean(-1)
        self.sigma, self._Rm, self._Lm = balance(L_Q, L_P, system.size)
        self._energy = system.energy()
        self._made: dict[int, Truncated] = {}

    def __len__(self) -> int:
        return self.system.size

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self) + 1))

    def __getitem__(self, r: int) -> Truncated:
        if not 1 <= r <= len(self):
            raise KeyError(r)
        if r not in self._made:
            cut = self._diagonal(r)
            bound = max(error_bound(sigma, r) for sigma in self.sigma.reshape(-1, len(self)))
            lost = max(0.0, self.system.minus(cut).energy())
            self._made[r] = Truncated(cut.a, cut.B, cut.C, share(lost, self._energy), bound)
        return self._made[r]

    def _diagonal(self, r: int) -> ModalSystem:
        """The r strongest balanced states, in coordinates in which their state matrix is diagonal.

        These are free up to a factor for each state, which is chosen such that white noise gives it the mean power that the
        old states had: B and C stay of the size that training has given them. Beyond the numerical rank there is nothing to
        add, and old states fill the places, with C = 0.
        """
        a, Rm, Lm = self.system.a, self._Rm[..., :r], self._Lm[..., :r]
        new_a, T = in_parts(torch.linalg.eig, Lm.mH @ (a[..., None] * Rm))
        B = solve(T, (Lm.mH @ self.system.B).to(T.dtype))
        C = (self.system.C @ Rm).to(T.dtype) @ T
        does = B.norm(dim=-1) * C.norm(dim=-2)
        idle = does <= NOTHING * does.amax(-1, keepdim=True)
        power = B.abs().square().sum(-1) / (1 - new_a.abs().square())
        scale = torch.where(idle, 1, (self._power[..., None] / power).sqrt())[..., None]
        B = torch.where(idle[..., None], self.system.B[..., :r, :].to(B.dtype), B * scale)
        C = torch.where(idle[..., None, :], 0, C / scale.mT)
        return ModalSystem(torch.where(idle, a[..., :r].to(new_a.dtype), new_a), B, C)


class LTIStatistics(Statistics):
    """What the states of diagonal systems do for white noise as the input: it follows from the weights, with no data.

    Args:
        system: [n, ...], or [systems, n, ...] side by side.

    Raises:
        ValueError: some |a| is not below 1.
    """

    def __init__(self, system: ModalSystem) -> None:
        if system.a.ndim == 1:
            system = ModalSystem(system.a[None], system.B[None], system.C[None])
        self.system = system
        self.tokens = torch.ones((), dtype=torch.float64, device=system.a.device)
        moments = ReadoutMoments(system.size, system.a.device, readout=False)
        moments.contribution = system.contributions().sum(0)
        moments.output = (system.C.mH @ system.C).real.sum(0)
        self.groups = [moments]

    def update(self, system: ModalSystem) -> None:
        """There is nothing to add."""
        raise TypeError("The statistics of a time-invariant layer follow from its weights, and take no data.")

    def gramians(self) -> tuple[Tensor, Tensor]:
        """P and Q, [systems, n, n] complex128."""
        return self.system.controllability_gramian(), self.system.observability_gramian()

    def spectrum(self, sigma: Tensor) -> Tensor:
        """The mean over the systems, [1, n]."""
        return sigma.mean(0, keepdim=True)

    def modal_gain(self) -> Tensor:
        """The largest gain of each state alone, |b| |c| / (1 - |a|), [1, n]."""
        system = self.system
        gain = system.B.norm(dim=-1) * system.C.norm(dim=-2) / (1 - system.a.abs())
        return gain.sum(0, keepdim=True)

    def state_power(self) -> Tensor:
        """The diagonal of P, summed over the systems, [1, n]."""
        return self.gramians()[0].diagonal(dim1=-2, dim2=-1).real.sum(0, keepdim=True)

    def sums(self) -> Iterator[Tensor]:
        """None: every process has the same."""
        return iter(())
