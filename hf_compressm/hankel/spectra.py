"""The Hankel spectra of many layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .factorisations import BATCHED, TOGETHER, on_threads
from .singular_values import check_finite, hankel_singular_values
from .statistics import Statistics


def hankel_spectra(statistics: Sequence[Statistics]) -> list[Tensor]:
    """The Hankel singular values of many layers, [1 or groups, N] each.

    Layers of one size are factorised together, as many as it takes for one part of the factorisations: the Gramians of all
    layers in float64 may be more than a GPU holds.
    """
    spectra: dict[int, Tensor] = {}
    waiting: dict[tuple[torch.Size, torch.device], list[tuple[int, Tensor, Tensor]]] = {}
    for index, entry in enumerate(statistics):
        P, Q = entry.gramians()
        alike = waiting.setdefault((P.shape[1:], entry.tokens.device), [])
        alike.append((index, P, Q))
        if sum(len(P) for _, P, _ in alike) >= TOGETHER:
            spectra |= _spectra(statistics, alike)
            alike.clear()
    for alike in waiting.values():
        if alike:
            spectra |= _spectra(statistics, alike)
    return [spectra[index] for index in range(len(statistics))]


def _spectra(statistics: Sequence[Statistics], alike: list[tuple[int, Tensor, Tensor]]) -> dict[int, Tensor]:
    """The spectra of layers of one size, by index, from their Gramians."""
    indices, *pairs = zip(*alike, strict=True)
    P, Q = (torch.cat(part) for part in pairs)
    values = hankel_singular_values(P, Q) if P.shape[-1] <= BATCHED else _on_threads(P, Q)
    sigma = values.split([len(part) for part in pairs[0]])
    return {index: statistics[index].spectrum(part) for index, part in zip(indices, sigma, strict=True)}


def _on_threads(P: Tensor, Q: Tensor) -> Tensor:
    """`hankel_singular_values` of matrices that no GPU solver takes as a batch: on threads of the CPU, one thread each.

    sigma^2 are the eigenvalues of L_P^T Q L_P. That is right to 1e-8 of the largest sigma, which is more than float32
    Gramians hold, and takes half the time of the singular values of L_Q^T L_P.
    """

    def spectra(P: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray]:
        eigenvalues, eigenvectors = np.linalg.eigh(P)
        L = eigenvectors * np.sqrt(eigenvalues.clip(0))[:, None]
        balanced = L.swapaxes(1, 2) @ Q @ L
        return (np.sqrt(np.linalg.eigvalsh(balanced).clip(0))[:, ::-1],)

    check_finite(P, "controllability Gramian P")
    check_finite(Q, "observability Gramian Q")
    return on_threads(spectra, P, Q)[0]
