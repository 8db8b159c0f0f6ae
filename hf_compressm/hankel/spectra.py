"""The Hankel spectra of many layers at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from .singular_values import check_finite, hankel_singular_values
from .statistics import Statistics

# The largest matrices that the factorisations of a GPU take many at a time.
BATCHED = 32


def hankel_spectra(statistics: Sequence[Statistics]) -> list[Tensor]:
    """The Hankel singular values of many layers, [1 or groups, N] each; layers of one size are factorised together."""
    pairs = [entry.gramians() for entry in statistics]
    spectra: list[Tensor] = [P for P, _ in pairs]
    for size in {P.shape[-1] for P, _ in pairs}:
        alike = [index for index, (P, _) in enumerate(pairs) if P.shape[-1] == size]
        P, Q = (torch.cat(part) for part in zip(*(pairs[index] for index in alike), strict=True))
        values = hankel_singular_values(P, Q) if size <= BATCHED else _on_threads(P, Q)
        sigma = values.split([len(pairs[index][0]) for index in alike])
        for index, part in zip(alike, sigma, strict=True):
            spectra[index] = statistics[index].spectrum(part)
    return spectra


def _on_threads(P: Tensor, Q: Tensor) -> Tensor:
    """`hankel_singular_values` of matrices that no GPU solver takes as a batch: on threads of the CPU, one thread each.

    sigma^2 are the eigenvalues of L_P^T Q L_P. That is right to 1e-8 of the largest sigma, which is more than float32
    Gramians hold, and takes half the time of the singular values of L_Q^T L_P.
    """

    def spectra(P: Tensor, Q: Tensor) -> np.ndarray:
        eigenvalues, eigenvectors = np.linalg.eigh(P.cpu().numpy())
        L = eigenvectors * np.sqrt(eigenvalues.clip(0))[:, None]
        balanced = L.swapaxes(1, 2) @ Q.cpu().numpy() @ L
        return np.sqrt(np.linalg.eigvalsh(balanced).clip(0))[:, ::-1]

    check_finite(P, "controllability Gramian P")
    check_finite(Q, "observability Gramian Q")
    workers = min(os.cpu_count() or 1, len(P))
    # LAPACK's own threads would only get into the way of these.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(spectra, P.chunk(4 * workers), Q.chunk(4 * workers)))
    return torch.from_numpy(np.concatenate(parts)).to(P.device)
