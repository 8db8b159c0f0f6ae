"""Balanced truncation of a linear time-invariant system by the square-root method.

Glossary (code: paper):
    P, Q:     P, Q; the controllability and observability Gramians
    L_P, L_Q: factors of them, P = L_P L_P^H and Q = L_Q L_Q^H
    sigma:    σ; the Hankel singular values
    r:        r; the reduced state size
    Rm:       the right map [n, r], from reduced to full states, x ≈ Rm x_r
    Lm:       the left map [n, r], from full to reduced states, x_r = Lm^H x; Lm^H Rm = I

Sources: CompreSSM (arXiv 2510.02823), its background on balanced truncation; Laub, Heath, Paige and Ward (1987) and
Tombs and Postlethwaite (1987) for the square-root method; Enns (1984), Glover (1984) and, in discrete time, Hinrichsen
and Pritchard (1990) for the error bound; Antoulas (2005), chapter 7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factorisations import svd
from .singular_values import cross_factor, gramian_factor
from .systems import DiagonalSystem, StateSpace

RANK_TOLERANCE = 1e-10
"""A Hankel singular value below this share of the largest counts as zero: its direction is rounding noise."""


def projection_maps(L_Q: Tensor, L_P: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the maps Rm, Lm onto the r strongest balanced states: Rm = L_P V s^-1/2, Lm = L_Q U s^-1/2.

    U s V^H is the singular value decomposition of L_Q^H L_P, cut to its first r terms, so that Lm^H Rm = I, and both
    Gramians of the reduced states are diag(s). Where r exceeds the numerical rank, the maps' last columns are zero.

    Args:
        L_Q: factors of the observability Gramians [..., n, n].
        L_P: factors of the controllability Gramians [..., n, n]; leading dimensions broadcast.
        r: reduced state size, 1 to n.

    Returns:
        Rm and Lm, each [..., n, r], in float64 or complex128.

    Raises:
        ValueError: `r` is not in 1..n.
    """
    _, Rm, Lm = balance(L_Q, L_P, r)
    return Rm, Lm


def balanced_truncation(system: DiagonalSystem | StateSpace, r: int) -> tuple[StateSpace, float]:
    """Reduce a stable system to the r states of its balanced realization with the largest Hankel singular values.

    Args:
        system: the system of size n, with all its poles inside the unit circle.
        r: reduced state size, 1 to n. Beyond the system's numerical rank (the order of its minimal realization) the
            further states are zero: their rows and columns of A, B and C vanish, and they do nothing.

    Returns:
        The reduced system of size r, and the bound on its error: max_ω ||G(e^{iω}) - G_r(e^{iω})||_2 is at most twice
        the sum of the distinct Hankel singular values that were cut.

    Raises:
        ValueError: `r` is not in 1..n, or the system is not stable.
    """
    L_P = gramian_factor(system.controllability_gramian(), "controllability Gramian P")
    L_Q = gramian_factor(system.observability_gramian(), "observability Gramian Q")
    sigma, Rm, Lm = balance(L_Q, L_P, r)
    reduced = StateSpace(Lm.mH @ system.A @ Rm, Lm.mH @ system.B, system.C @ Rm, system.D)
    return reduced, error_bound(sigma, min(r, int(_is_significant(sigma).sum())))


def balance(L_Q: Tensor, L_P: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all n singular values s, and `projection_maps` for the first r of them."""
    n = L_P.shape[-1]
    if not 1 <= r <= n:
        raise ValueError(f"the reduced state size must be in 1..{n}, not {r}")
    U, sigma, Vh = svd(cross_factor(L_Q, L_P))
    scale = torch.where(_is_significant(sigma), sigma.rsqrt(), 0)[..., None, :r]
    Rm = L_P.to(Vh.dtype) @ Vh.mH[..., :r] * scale
    Lm = L_Q.to(U.dtype) @ U[..., :r] * scale
    return sigma, Rm, Lm


def _is_significant(sigma: Tensor) -> Tensor:
    return sigma > RANK_TOLERANCE * sigma[..., :1]


def error_bound(sigma: Tensor, r: int) -> float:
    """Return twice the sum of the distinct values among sigma[r:], [n] descending; equal means to rounding."""
    cut = sigma[r:]
    rounding = len(sigma) * torch.finfo(sigma.dtype).eps * sigma[0]
    is_new = torch.ones_like(cut, dtype=torch.bool)
    is_new[1:] = cut[:-1] - cut[1:] > rounding
    return 2 * cut[is_new].sum().item()
