"""Hankel singular values of a system from its two Gramians.

Glossary (code: paper):
    P:        P; the controllability Gramian
    Q:        Q; the observability Gramian
    L_P, L_Q: factors of them, P = L_P L_P^H and Q = L_Q L_Q^H
    sigma:    σ; the Hankel singular values, σ_1 >= σ_2 >= ... >= 0

Sources: CompreSSM (arXiv 2510.02823), where σ = sqrt(eig(P Q)); Laub, Heath, Paige and Ward, Computation of system
balancing transformations (1987), for the square-root form σ = svd(L_Q^H L_P), which no rounding can make NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factorisations import eigh, in_parts
from .systems import double


def check_finite(P: Tensor, name: str) -> None:
    """Refuse a Gramian that has a NaN or an infinity with a ValueError that names it."""
    if not torch.isfinite(P).all():
        raise ValueError(f"the {name} has entries that are not finite")


def gramian_factor(P: Tensor, name: str = "Gramian") -> Tensor:
    """Return L with L L^H = P, from an eigendecomposition with its negative eigenvalues set to zero.

    Args:
        P: Hermitian positive semi-definite matrices [..., n, n]; rounding may have made them slightly indefinite.
        name: what the error message calls them.

    Returns:
        The factors [..., n, n] in float64 or complex128.

    Raises:
        ValueError: `P` has a NaN or an infinity.
    """
    check_finite(P, name)
    P = double(P)
    eigenvalues, eigenvectors = eigh((P + P.mH) / 2)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt().unsqueeze(-2)


def hankel_singular_values(P: Tensor, Q: Tensor) -> Tensor:
    """Return σ = svd(L_Q^H L_P), the Hankel singular values, in descending order.

    Args:
        P: controllability Gramians [..., n, n].
        Q: observability Gramians [..., n, n]; leading dimensions broadcast.

    Returns:
        The singular values [..., n] in float64, finite and not negative.

    Raises:
        ValueError: a Gramian has a NaN or an infinity; the message says which.
    """
    L_P = gramian_factor(P, "controllability Gramian P")
    L_Q = gramian_factor(Q, "observability Gramian Q")
    (sigma,) = in_parts(lambda X: (torch.linalg.svdvals(X),), cross_factor(L_Q, L_P))
    return sigma


def cross_factor(L_Q: Tensor, L_P: Tensor) -> Tensor:
    """Return L_Q^H L_P [..., n, n], whose singular values are the Hankel singular values."""
    L_Q, L_P = double(L_Q), double(L_P)
    dtype = torch.promote_types(L_Q.dtype, L_P.dtype)
    return L_Q.mH.to(dtype) @ L_P.to(dtype)
