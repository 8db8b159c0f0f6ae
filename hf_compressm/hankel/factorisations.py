"""Factorise many matrices, a bounded number of them at a time.

The solvers of a GPU take a workspace that is many times as large as their input: `eigh` in float64 takes 640 kB for each
16 x 16 matrix, 192 GiB for the channels of a large model's layers. Every factorisation of a batch goes through here. Large
matrices they take one after the other, so that the CPU's threads are quicker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

TOGETHER = 1024
"""Matrices that are factorised at once."""
NUMBERS = 2**18
"""Numbers in them: 1024 matrices of 16 x 16."""
BATCHED = 32
"""The largest matrices, n x n, that the solvers of a GPU take many at a time."""


def in_parts(factorise: Callable[..., tuple[Tensor, ...]], *matrices: Tensor) -> tuple[Tensor, ...]:
    """What a factorisation gives of matrices [..., n, m], a bounded number of them at a time.

    Args:
        factorise: of one or more tensors, to tensors with the same leading dimensions.
        matrices: that it takes, all with the same leading dimensions.
    """
    batch = matrices[0].shape[:-2]
    flat = [X.reshape(-1, *X.shape[-2:]) for X in matrices]
    together = max(1, min(TOGETHER, NUMBERS // max(1, flat[0].shape[1:].numel())))
    if len(flat[0]) <= together:
        return factorise(*matrices)
    parts = zip(*(factorise(*part) for part in zip(*(X.split(together) for X in flat), strict=True)), strict=True)
    return tuple(torch.cat(part).unflatten(0, batch) for part in parts)


def on_threads(factorise: Callable[..., Any], *matrices: Tensor) -> tuple[Tensor, ...]:
    """What a factorisation of NumPy gives of matrices [batch, n, n] on the CPU, on all its threads; on their device.

    Args:
        factorise: of one or more arrays, to arrays of the same batch.
        matrices: that it takes.
    """
    arrays = [X.cpu().numpy() for X in matrices]
    workers = os.cpu_count() or 1
    parts = min(4 * workers, len(arrays[0]))
    # LAPACK's own threads would only get into the way of these.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(factorise, *(np.array_split(array, parts) for array in arrays)))
    return tuple(torch.from_numpy(np.concatenate(part)).to(matrices[0].device) for part in zip(*found, strict=True))


def eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of Hermitian matrices [..., n, n]."""
    values, vectors = _large(np.linalg.eigh, X) if _is_large(X) else in_parts(torch.linalg.eigh, X)
    return values, vectors


def svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and V^H of matrices [..., n, n]."""
    U, sigma, Vh = _large(np.linalg.svd, X) if _is_large(X) else in_parts(torch.linalg.svd, X)
    return U, sigma, Vh


def _is_large(X: Tensor) -> bool:
    return X.is_cuda and X.shape[-1] > BATCHED


def _large(factorise: Callable[..., Any], X: Tensor) -> tuple[Tensor, ...]:
    found = on_threads(factorise, X.reshape(-1, *X.shape[-2:]))
    return tuple(part.view(*X.shape[:-2], *part.shape[1:]) for part in found)


def solve(A: Tensor, B: Tensor) -> Tensor:
    """A^-1 B, as `torch.linalg.solve_ex` gives it: a singular A is not looked for.

    Args:
        A: [..., n, n].
        B: [..., n, m].
    """
    return in_parts(lambda A, B: (torch.linalg.solve_ex(A, B).result,), A, B)[0]


def cholesky(A: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.cholesky_ex`: the factors of symmetric matrices [..., n, n], and where that is not 0 the failures."""
    L, info = in_parts(torch.linalg.cholesky_ex, A)
    return L, info


def cholesky_inverse(L: Tensor) -> Tensor:
    """(L L^T)^-1 of factors [..., n, n]."""
    return in_parts(lambda L: (torch.cholesky_inverse(L),), L)[0]
