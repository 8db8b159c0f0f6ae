"""Discrete-time linear time-invariant systems and their Gramians.

Glossary (code: paper):
    a, A:   Λ, A; the state matrix, as its diagonal [n] or dense [n, n]
    B:      B; the input matrix [n, m]
    C:      C; the output matrix [p, n]
    D:      D; the feedthrough [p, m]
    P:      P; the controllability Gramian [n, n], P = A P A^H + B B^H
    Q:      Q; the observability Gramian [n, n], Q = A^H Q A + C^H C
    G:      G; the transfer function, G(z) = C (z I - A)^-1 B + D
    omega:  ω; frequencies in radians per sample [w]
    n, m, p: the numbers of states, of inputs and of outputs

Sources: CompreSSM (arXiv 2510.02823), its background on LTI systems; Antoulas, Approximation of Large-Scale Dynamical
Systems (2005), chapter 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def double(x: Tensor) -> Tensor:
    """Return `x` in float64, or in complex128 if it is complex."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def lti_gramian(a: Tensor, X: Tensor) -> Tensor:
    """Solve G = diag(a) G diag(a)^H + X by its closed form, G_ij = X_ij / (1 - a_i conj(a_j)).

    X = B B^H gives the controllability Gramian; X = C^H C with conj(a) for a, the observability Gramian. The time
    means of a, B B^T and C^T C give the mean-LTI surrogate of a selective SSM.

    Args:
        a: eigenvalues [..., n], real or complex, |a| < 1.
        X: constant term [..., n, n]; its leading dimensions broadcast against those of `a`.

    Returns:
        The Gramian [..., n, n] in float64 or complex128.

    Raises:
        ValueError: some |a| is not below 1.

    Source: CompreSSM (arXiv 2510.02823), the Gramians of a diagonal system.
    """
    a = double(a)
    _check_stable(a)
    return double(X) / (1 - a.unsqueeze(-1) * a.unsqueeze(-2).conj())


@dataclass(frozen=True, eq=False)
class StateSpace:
    """The system x_{k+1} = A x_k + B u_k, y_k = C x_k + D u_k with a dense A.

    The matrices are stored, and every method computes, in float64, or in complex128 if one of them is complex.

    Args:
        A: state matrix [n, n].
        B: input matrix [n, m].
        C: output matrix [p, n].
        D: feedthrough [p, m]; None is zero.

    Raises:
        ValueError: the shapes do not fit together. The Gramians raise it if a pole is not inside the unit circle.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None

    def __post_init__(self) -> None:
        _check_shapes(self.A, (self.A.shape[0],) * 2, self.B, self.C, self.D)
        _store_in_double(self, A=self.A, B=self.B, C=self.C, D=self.D)

    @property
    def poles(self) -> Tensor:
        """The eigenvalues of A, [n] complex128."""
        eigenvalues: Tensor = torch.linalg.eigvals(self.A)
        return eigenvalues

    def controllability_gramian(self) -> Tensor:
        """Return P = A P A^H + B B^H, [n, n]."""
        _check_stable(self.poles)
        return _solve_lyapunov(self.A, self.B @ self.B.mH)

    def observability_gramian(self) -> Tensor:
        """Return Q = A^H Q A + C^H C, [n, n]."""
        _check_stable(self.poles)
        return _solve_lyapunov(self.A.mH, self.C.mH @ self.C)

    def frequency_response(self, omega: Tensor) -> Tensor:
        """Return G(e^{iω}) for the frequencies `omega` [w], as [w, p, m] complex128."""
        A, B, C = (x.to(torch.complex128) for x in (self.A, self.B, self.C))
        identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
        G: Tensor = C @ torch.linalg.solve(_unit_circle(omega)[:, None, None] * identity - A, B)
        return G if self.D is None else G + self.D

    def impulse_response(self, length: int) -> Tensor:
        """Return the Markov parameters D, C B, C A B, C A^2 B, ... as [length, p, m]."""
        states = [self.B]
        for _ in range(length - 2):
            states.append(self.A @ states[-1])
        return _markov_parameters(self.C @ torch.stack(states), self.D, length)


@dataclass(frozen=True, eq=False)
class DiagonalSystem:
    """The system x_{k+1} = diag(a) x_k + B u_k, y_k = C x_k + D u_k.

    The matrices are stored, and every method computes, in float64, or in complex128 if one of them is complex.

    Args:
        a: eigenvalues of the state matrix [n], real or complex, |a| < 1.
        B: input matrix [n, m].
        C: output matrix [p, n].
        D: feedthrough [p, m]; None is zero.

    Raises:
        ValueError: some |a| is not below 1, or the shapes do not fit together.

    Source: CompreSSM (arXiv 2510.02823), the diagonal LTI system.
    """

    a: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None

    def __post_init__(self) -> None:
        _check_shapes(self.a, (self.a.shape[0],), self.B, self.C, self.D)
        _check_stable(self.a)
        _store_in_double(self, a=self.a, B=self.B, C=self.C, D=self.D)

    @property
    def A(self) -> Tensor:  # noqa: N802
        """The state matrix diag(a), [n, n]."""
        return torch.diag(self.a)

    def controllability_gramian(self) -> Tensor:
        """Return P_ij = (B B^H)_ij / (1 - a_i conj(a_j)), [n, n]."""
        return lti_gramian(self.a, self.B @ self.B.mH)

    def observability_gramian(self) -> Tensor:
        """Return Q_ij = (C^H C)_ij / (1 - conj(a_i) a_j), [n, n]."""
        return lti_gramian(self.a.conj(), self.C.mH @ self.C)

    def frequency_response(self, omega: Tensor) -> Tensor:
        """Return G(e^{iω}) for the frequencies `omega` [w], as [w, p, m] complex128."""
        G = self.C / (_unit_circle(omega)[:, None, None] - self.a) @ self.B.to(torch.complex128)
        return G if self.D is None else G + self.D

    def impulse_response(self, length: int) -> Tensor:
        """Return the Markov parameters D, C B, C A B, C A^2 B, ... as [length, p, m]."""
        powers = torch.linalg.vander(self.a, N=max(length, 2)).mT
        return _markov_parameters(self.C * powers[:, None] @ self.B, self.D, length)


def _check_shapes(state: Tensor, expected: tuple[int, ...], B: Tensor, C: Tensor, D: Tensor | None) -> None:
    n = state.shape[0]
    fits = state.shape == expected and B.ndim == C.ndim == 2 and B.shape[0] == C.shape[1] == n
    if not fits or (D is not None and D.shape != (C.shape[0], B.shape[1])):
        shapes = [None if x is None else tuple(x.shape) for x in (state, B, C, D)]
        raise ValueError(f"state matrix, B [n, m], C [p, n] and D [p, m] do not fit together: shapes {shapes}")


def _check_stable(poles: Tensor) -> None:
    if not (poles.abs() < 1).all():  # also catches NaN
        raise ValueError(
            f"the system is not stable: its largest |eigenvalue| is {poles.abs().max().item():.6g}, and it must be "
            "below 1 (exp(Δ A) can round to 1 in low precision: compute it in float64)"
        )


def _store_in_double(system: StateSpace | DiagonalSystem, **matrices: Tensor | None) -> None:
    is_complex = any(x is not None and x.is_complex() for x in matrices.values())
    for name, x in matrices.items():
        if x is not None:
            object.__setattr__(system, name, x.to(torch.complex128 if is_complex else torch.float64))


def _solve_lyapunov(A: Tensor, X: Tensor) -> Tensor:
    """Solve G = A G A^H + X."""
    from scipy.linalg import solve_discrete_lyapunov  # slow to import, and only this needs it

    G = solve_discrete_lyapunov(*(x.detach().cpu().resolve_conj().numpy() for x in (A, X)))
    return torch.as_tensor(G, dtype=A.dtype, device=A.device)


def _unit_circle(omega: Tensor) -> Tensor:
    return torch.exp(1j * omega.double())


def _markov_parameters(tail: Tensor, D: Tensor | None, length: int) -> Tensor:
    """Put D, or zero, in front of C B, C A B, ..."""
    head = torch.zeros_like(tail[:1]) if D is None else D.unsqueeze(0)
    return torch.cat([head, tail])[:length]
