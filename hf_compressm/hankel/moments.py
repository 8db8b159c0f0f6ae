"""Second moments of a layer's output in its states, and the order in which the states go.

| here | paper | meaning |
|---|---|---|
| `C` | C_t | output maps, per token |
| `K` | - | K_t = sum over channels of w_t h_t h_t^T: how the states move the layer's output at token t |
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_READOUT = 4096
"""Rows of the largest normal matrix of a read-out or a refit: states that take any row of C, times N."""


class ReadoutMoments:
    """Second moments of a layer's output in its states, for one group of B and C.

    With y_t = sum_n C_tn h_tn, the energy of the output is the sum over t of C_t^T K_t C_t, and a read-out
    y'_t = sum_s (R C_t)_s h_ts leaves an error that is quadratic in R, with the coefficients kept here (float64).

    Attributes:
        large_on: the device of `normal_pairs` and `beside`.
        output: sum over t of C_t C_t^T, [N, N].
        contribution: M, the sum over t of K_t * C_t C_t^T (elementwise), [N, N].
        cross: sum over t of (K_t C_t) C_t^T, [N, N]; for a read-out.
        candidates: the c states whose least-squares read-out may be any map of C, [c]; empty if it is not asked for.
        rest: the states beside them, [N - c]; empty if there are no candidates.
        normal_pairs: sum over t of K_t (x) C_t C_t^T over pairs of candidates and pairs of states,
            [c (c + 1) / 2, N (N + 1) / 2].
        beside: sum over t of K_tsd C_td C_tn for candidates s, states d beside them and all states n: what the candidates'
            read-out can take of the others, [c, N - c, N].
    """

    def __init__(self, size: int, device: torch.device, *, readout: bool) -> None:
        self.size = size
        self.readout = readout
        self.output = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.large_on = device
        self.contribution, self.cross = self.output.clone(), self.output.clone()
        self._take(torch.arange(size if readout and size**2 <= MAX_READOUT else 0, device=device))

    def update(self, K: Tensor, C: Tensor) -> None:
        """Add tokens: K [tokens, N, N] and C [tokens, N]."""
        outer = C[:, :, None] * C[:, None, :]
        self.output += outer.sum(0)
        self.contribution += (K * outer).sum(0)
        if self.readout:
            self.cross += torch.einsum("tij,tj,tk->ik", K, C, C)
        if self.readout and not len(self.candidates):
            self.choose_candidates(self.contribution)
        if self.readout:
            c = self.candidates
            k, j = torch.tril_indices(len(c), len(c), device=K.device)
            a, b = torch.tril_indices(self.size, self.size, device=K.device)
            self.normal_pairs += (K[:, c[k], c[j]].T @ outer[:, a, b]).to(self.large_on)
            if len(self.rest):
                self.add_beside(C, K[:, c[:, None], self.rest], slice(None))

    def add(self, C: Tensor, K: Tensor, moved: Tensor | None = None, contribution: Tensor | None = None) -> None:
        """Add tokens of which the kernels have taken only what is needed.

        Args:
            C: output maps, [tokens, N].
            K: K_t over the candidates, [tokens, c, c].
            moved: the candidates of K_t C_t, [tokens, c]; not needed if all states are candidates.
            contribution: the tokens' part of M, [N, N]; likewise.
        """
        C, c = C.double(), self.candidates
        self.output += C.mT @ C
        rows, columns = _tril_places(len(c), C.device), _tril_places(self.size, C.device)
        outer = (C[:, :, None] * C[:, None, :]).flatten(1)[:, columns]
        pairs = K.flatten(1)[:, rows].double().mT @ outer
        self.normal_pairs += pairs.to(self.large_on)
        if moved is None or contribution is None:
            # Both are sums of what the read-out takes of all pairs of states.
            where = _pair_index(c)
            contribution = pairs.diagonal()[where]
            cross = pairs[where[:, :, None], where[None]].sum(1)
            self.cross += cross
        else:
            self.cross[c] += moved.double().mT @ C
        self.contribution += contribution

    def add_beside(self, C: Tensor, K: Tensor, some: slice) -> None:
        """Add tokens' part of `beside` for some of the states in `rest`.

        Args:
            C: output maps, [tokens, N].
            K: K_t of the candidates with these states, [tokens, c, states].
            some: which they are.
        """
        moved = (K * C[:, None, self.rest[some]]).flatten(1)
        self.beside[:, some] += (moved.mT @ C).view(len(self.candidates), -1, self.size).to(self.large_on)

    def choose_candidates(self, contribution: Tensor) -> None:
        """There are too many states for a fit over all of them: take those that matter most on the first tokens."""
        self._take(elimination_order(contribution)[: max(1, MAX_READOUT // self.size)].sort().values)

    def normal_matrix(self) -> Tensor:
        """The least-squares normal matrix over all candidates, [c * N, c * N], rows ordered by (candidate, state)."""
        rows, columns = _pair_index(self.candidates), _pair_index(torch.arange(self.size, device=self.output.device))
        normal = self.normal_pairs.to(rows.device)[rows[:, None, :, None], columns[None, :, None, :]]
        return normal.reshape(2 * [len(self.candidates) * self.size])

    def _take(self, candidates: Tensor) -> None:
        self.candidates, c, N = candidates, len(candidates), self.size
        beside = torch.ones(N, dtype=torch.bool, device=candidates.device)
        beside[candidates] = False
        # Nothing is beside no candidates: there is no read-out, or they are not chosen yet.
        self.rest = beside.nonzero()[:, 0][: N * c]
        self.normal_pairs = self.output.new_zeros(c * (c + 1) // 2, N * (N + 1) // 2, device=self.large_on)
        self.beside = self.output.new_zeros(c, len(self.rest), N, device=self.large_on)

    def offload_(self) -> None:
        """Add up `normal_pairs` and `beside` on the CPU."""
        self.large_on = torch.device("cpu")
        self.normal_pairs, self.beside = self.normal_pairs.cpu(), self.beside.cpu()


def _pair_index(items: Tensor) -> Tensor:
    """Where the pair (i, j) stands among `tril_indices`, for every i and j: [n, n]."""
    i = torch.arange(len(items), device=items.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    return high * (high + 1) // 2 + low


def _tril_places(size: int, device: torch.device) -> Tensor:
    """Where `tril_indices` stand in a flat [size, size] matrix, [size (size + 1) / 2]."""
    i, j = torch.tril_indices(size, size, device=device)
    places: Tensor = i * size + j
    return places


def elimination_order(contribution: Tensor) -> Tensor:
    """Order states from the most to the least important by greedy elimination.

    Each step drops the state that adds least to the energy of what is dropped, E[w (sum over dropped n of C_n h_n)^2],
    which is the sum of M over the dropped states.

    Args:
        contribution: M, [N, N].

    Returns:
        the N states, [N]; keeping r of them means keeping the first r.
    """
    # Many small steps, each of which looks at the one before: not for a GPU, nor for tensors.
    M = contribution.cpu().numpy()
    cost = M.diagonal().copy()
    order = np.empty(len(cost), dtype=np.int64)
    for position in reversed(range(len(cost))):
        order[position] = cost.argmin()
        cost += 2 * M[order[position]]
        cost[order[position:]] = np.inf
    return torch.from_numpy(order).to(contribution.device)
