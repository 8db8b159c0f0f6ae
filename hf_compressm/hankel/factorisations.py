"""Factorise many matrices, a bounded number of them at a time.

The solvers of a GPU take a workspace that is many times as large as their input: `eigh` in float64 takes 640 kB for each
16 x 16 matrix, 192 GiB for the channels of a large model's layers. Every factorisation of a batch goes through here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOGETHER = 1024
"""Matrices that are factorised at once."""
NUMBERS = 2**18
"""Numbers in them: 1024 matrices of 16 x 16."""


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
