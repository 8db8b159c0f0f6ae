"""Balanced truncation of diagonal systems with real inputs and outputs, and a complex state: LRU, S4D, S5.

Such a layer computes x_k = diag(a) x_{k-1} + B u_k and y_k = Re(C x_k) + D u_k. What it does is a real system of twice as many
states, z = [Re x; Im x], and that is what is truncated, with the theory's bound. The eigenvalues of what is left are
conjugate pairs, and each is a complex state again, so that 2r real states make r complex ones. CompreSSM's LRU code
truncates the complex system (a, B, C), as if Im(C x) were an output, too; where a layer has states near each other's
conjugates, which say the same to a real output, that keeps more than is needed for a larger error.

Glossary (code: paper):
    a:          Λ; the eigenvalues of the state matrix [..., n]; leading dimensions are independent systems
    B, C:       B, C; [..., n, m] and [..., p, n]
    P, Q:       P, Q; the controllability and observability Gramians, of the complex or of the real system
    S, U:       -; what they lack to tell of the real system: the same without conjugation
    Rm, Lm:     the maps of the square-root method, see `balanced_truncation`
    sigma:      σ; the 2n Hankel singular values of the real system. A complex state counts what two of them carry together
    r, k:       r; the reduced number of complex states, and of the real ones in them
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
from .moments import ReadoutMoments
from .realization import share
from .singular_values import gramian_factor
from .statistics import Statistics
from .systems import double, lti_gramian


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
        """The state size, n."""
        return self.a.shape[-1]

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """P, S, Q and U, [..., n, n] complex128 each.

        P and S are the means of x x^H and x x^T for white noise of unit power; Q and U are such that what a state x adds to
        the energy of all later outputs is (x^H Q x + Re x^T U x) / 2.

        Raises:
            ValueError: some |a| is not below 1.
        """
        a, B, C = (x.to(torch.complex128) for x in (self.a, self.B, self.C))
        P, Q = lti_gramian(a, B @ B.mH), lti_gramian(a.conj(), C.mH @ C)
        between = 1 - a[..., :, None] * a[..., None, :]
        return P, (B @ B.mT) / between, Q, (C.mT @ C) / between

    def controllability_gramian(self) -> Tensor:
        """P = A P A^T + B B^T of the real system, [..., 2n, 2n]: the mean of z z^T for white noise of unit power.

        Raises:
            ValueError: some |a| is not below 1.
        """
        P, S, _, _ = self.moments()
        return _blocks(P + S, S - P, S + P, P - S)

    def observability_gramian(self) -> Tensor:
        """Q = A^T Q A + C^T C of the real system, [..., 2n, 2n].

        Raises:
            ValueError: some |a| is not below 1.
        """
        _, _, Q, U = self.moments()
        return _blocks(Q + U, -Q - U, Q - U, Q - U)

    def real_matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """A [2n, 2n], B [2n, m] and C [p, 2n] of the real system, of a single one."""
        a, B, C = (x.to(torch.complex128) for x in (self.a, self.B, self.C))
        A = 2 * _blocks(a.diag(), -a.diag(), a.diag(), a.diag())
        return A, torch.cat([B.real, B.imag]), torch.cat([C.real, -C.imag], 1)

    def contributions(self) -> Tensor:
        """What pairs of states add to the mean energy of the real output, for white noise of unit power: [..., n, n], real.

        The sum over all pairs is the energy, the square of the H2 norm without D. With Re z = (z + conj z) / 2, it is half of
        E|z|^2 + Re E z^2.
        """
        P, S, _, _ = self.moments()
        C = self.C.to(P.dtype)
        return (P * (C.mH @ C).mT + S * (C.mT @ C)).real / 2

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


def _blocks(top_left: Tensor, top_right: Tensor, bottom_left: Tensor, bottom_right: Tensor) -> Tensor:
    """Half of [[Re, Im], [Im, Re]] of four complex matrices."""
    top, bottom = torch.cat([top_left.real, top_right.imag], -1), torch.cat([bottom_left.imag, bottom_right.real], -1)
    return torch.cat([top, bottom], -2) / 2


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
        """The state size, r."""
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
        self._energy = system.energy()
        self._each = [_Balanced(*parts) for parts in _one_by_one(system)]
        self._made: dict[int, Truncated] = {}

    def __len__(self) -> int:
        return self.system.size

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self) + 1))

    def __getitem__(self, r: int) -> Truncated:
        if not 1 <= r <= len(self):
            raise KeyError(r)
        if r not in self._made:
            made = [one.truncated(r) for one in self._each]
            parts = [torch.stack(matrices) for matrices in zip(*(cut for cut, _ in made), strict=True)]
            a, B, C = parts if self.system.a.ndim > 1 else (part[0] for part in parts)
            lost = max(0.0, self.system.minus(ModalSystem(a, B, C)).energy())
            self._made[r] = Truncated(a, B, C, share(lost, self._energy), max(bound for _, bound in made))
        return self._made[r]


class _Balanced:
    """One system a [n], B [n, m], C [p, n], with the maps that balance its 2n real states."""

    def __init__(self, a: Tensor, B: Tensor, C: Tensor) -> None:
        system = ModalSystem(a, B, C)
        P, Q = system.controllability_gramian(), system.observability_gramian()
        L_P, L_Q = gramian_factor(P, "controllability Gramian P"), gramian_factor(Q, "observability Gramian Q")
        self.sigma, self.Rm, self.Lm = balance(L_Q, L_P, 2 * len(a))
        self.A, self.B, self.C = system.real_matrices()
        self.first, self.power = system.first, P.trace() / len(a)

    def truncated(self, r: int) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
        """a, B and C of r states that hold as many of the strongest balanced ones as they can, and the bound.

        A complex state holds a pair of conjugate eigenvalues of the truncated system, or one that is real, so that r of them
        hold 2r real states, or a few less. Where there are no more, beyond the numerical rank, old states fill the places,
        with C = 0.
        """
        k = min(2 * r, int((self.Rm != 0).any(0).sum()))
        while True:
            Rm, Lm = self.Rm[:, :k], self.Lm[:, :k]
            eigenvalues, T = torch.linalg.eig(Lm.mT @ self.A @ Rm)
            stay = eigenvalues.imag >= 0
            excess = int(stay.sum()) - r
            if excess <= 0:
                break
            k -= excess  # a real state less is one complex state less, at most
        a, T_C = eigenvalues[stay], (self.C @ Rm).to(T.dtype) @ T[:, stay]
        B = torch.linalg.solve_ex(T, (Lm.mT @ self.B).to(T.dtype)).result[stay]
        C = T_C * torch.where(a.imag > 0, 2, 1)
        # A factor is free: one by which white noise gives a state the mean power of the old ones leaves B and C the size that
        # training has given them.
        scale = (self.power * (1 - a.abs().square()) / B.abs().square().sum(1)).sqrt()[:, None]
        fill_a, fill_B, fill_C = self.first(r - len(a))
        parts = torch.cat([a, fill_a]), torch.cat([B * scale, fill_B]), torch.cat([C / scale.mT, 0 * fill_C], 1)
        return parts, error_bound(self.sigma, k)


def _one_by_one(system: ModalSystem) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """a, B and C of each system side by side."""
    many = [x if system.a.ndim > 1 else x[None] for x in (system.a, system.B, system.C)]
    yield from zip(*many, strict=True)


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
        """P and Q of the real systems, [systems, 2n, 2n]."""
        return self.system.controllability_gramian(), self.system.observability_gramian()

    def spectrum(self, sigma: Tensor) -> Tensor:
        """The mean over the systems, [1, n], where a complex state counts what two real ones carry."""
        mean: Tensor = sigma.unflatten(-1, (-1, 2)).sum(-1).mean(0, keepdim=True)
        return mean

    def modal_gain(self) -> Tensor:
        """The largest gain of each state alone, |b| |c| / (1 - |a|), [1, n]."""
        system = self.system
        gain: Tensor = system.B.norm(dim=-1) * system.C.norm(dim=-2) / (1 - system.a.abs())
        return gain.sum(0, keepdim=True)

    def state_power(self) -> Tensor:
        """The diagonal of P, summed over the systems, [1, n]."""
        return self.system.moments()[0].diagonal(dim1=-2, dim2=-1).real.sum(0, keepdim=True)

    def sums(self) -> Iterator[Tensor]:
        """None: every process has the same."""
        return iter(())
