"""Gramians and read-out moments of selective state space models, accumulated over calibration batches.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `u` | A, Delta, B, C, u | the selective state space model, per token |
| `P`, `Q` | P, Q | controllability and observability Gramians |
| `gate` | - | what multiplies a channel of the scan's output on its way to the residual stream; its square is w |
| `K` | - | K_t = sum over channels of w_t h_t h_t^T: how the states move the layer's output at token t |
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from .. import kernels
from ..kernels.reference import mamba2_states, mamba_states, observability_gramian, observability_reach
from .singular_values import check_finite, hankel_singular_values
from .systems import lti_gramian

# The least-squares read-out's normal matrix has (candidates * N)^2 entries.
MAX_READOUT = 4096
# The largest matrices that the factorisations of a GPU take many at a time.
BATCHED = 32
# How many tokens of each sequence choose the candidates, if not all states are.
FIRST_TOKENS = 16
# Numbers in the largest temporary tensor of a fused update.
WORKING_SET = 2**26


@dataclass(frozen=True)
class MambaSystem:
    """The selective system of one Mamba-1 mixer on one batch, in float32.

    Shapes: `u`, `delta`, `gate` [batch, length, channels]; `A` [channels, N]; `B`, `C` [batch, length, N]; `valid`
    [batch, length], 1 for tokens and 0 for padding.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    gate: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Mamba2System:
    """The selective system of one Mamba-2 mixer on one batch, in float32.

    Shapes: `x`, `gate` [batch, length, heads, head_dim]; `delta` [batch, length, heads]; `A` [heads]; `B`, `C`
    [batch, length, groups, N]; `valid` [batch, length].
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    gate: Tensor
    valid: Tensor


class ReadoutMoments:
    """Second moments of a layer's output in its states, for one group of B and C.

    With y_t = sum_n C_tn h_tn, the energy of the output is the sum over t of C_t^T K_t C_t, and a read-out
    y'_t = sum_s (R C_t)_s h_ts leaves an error that is quadratic in R, with the coefficients kept here (float64).

    Attributes:
        output: sum over t of C_t C_t^T, [N, N].
        contribution: M, the sum over t of K_t * C_t C_t^T (elementwise), [N, N].
        cross: sum over t of (K_t C_t) C_t^T, [N, N].
        candidates: the c states that a least-squares read-out may keep, [c]; empty if it is not asked for.
        normal_pairs: sum over t of K_t (x) C_t C_t^T over pairs of candidates and pairs of states,
            [c (c + 1) / 2, N (N + 1) / 2].
    """

    def __init__(self, size: int, device: torch.device, *, readout: bool) -> None:
        self.size = size
        self.readout = readout
        self.output = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.contribution, self.cross = self.output.clone(), self.output.clone()
        self.candidates = torch.arange(size if readout and size**2 <= MAX_READOUT else 0, device=device)
        self.normal_pairs = self._empty_pairs()

    def update(self, K: Tensor, C: Tensor) -> None:
        """Add tokens: K [tokens, N, N] and C [tokens, N]."""
        outer = C[:, :, None] * C[:, None, :]
        self.output += outer.sum(0)
        self.contribution += (K * outer).sum(0)
        self.cross += torch.einsum("tij,tj,tk->ik", K, C, C)
        if self.readout and not len(self.candidates):
            self.choose_candidates(self.contribution)
        if self.readout:
            c = self.candidates
            k, j = torch.tril_indices(len(c), len(c), device=K.device)
            a, b = torch.tril_indices(self.size, self.size, device=K.device)
            self.normal_pairs += K[:, c[k], c[j]].T @ outer[:, a, b]

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
        self.normal_pairs += pairs
        if moved is None or contribution is None:
            # Both are sums of what the read-out takes of all pairs of states.
            where = _pair_index(c)
            contribution = pairs.diagonal()[where]
            cross = pairs[where[:, :, None], where[None]].sum(1)
            self.cross += cross
        else:
            self.cross[c] += moved.double().mT @ C
        self.contribution += contribution

    def choose_candidates(self, contribution: Tensor) -> None:
        """There are too many states for a fit over all of them: take those that matter most on the first tokens."""
        self.candidates = elimination_order(contribution)[: max(1, MAX_READOUT // self.size)].sort().values
        self.normal_pairs = self._empty_pairs()

    def normal_matrix(self) -> Tensor:
        """The least-squares normal matrix over all candidates, [c * N, c * N], rows ordered by (candidate, state)."""
        rows, columns = _pair_index(self.candidates), _pair_index(torch.arange(self.size, device=self.output.device))
        normal = self.normal_pairs[rows[:, None, :, None], columns[None, :, None, :]]
        return normal.reshape(2 * [len(self.candidates) * self.size])

    def _empty_pairs(self) -> Tensor:
        c = len(self.candidates)
        return self.output.new_zeros(c * (c + 1) // 2, self.size * (self.size + 1) // 2)


def _pair_index(items: Tensor) -> Tensor:
    """Where the pair (i, j) stands among `tril_indices`, for every i and j: [n, n]."""
    i = torch.arange(len(items), device=items.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    return high * (high + 1) // 2 + low


def _tril_places(size: int, device: torch.device) -> Tensor:
    """Where `tril_indices` stand in a flat [size, size] matrix, [size (size + 1) / 2]."""
    i, j = torch.tril_indices(size, size, device=device)
    return i * size + j


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


class MambaStatistics:
    """What a Mamba-1 layer's states do on the calibration data; `update` it with a system per batch.

    Args:
        channels, size: of the layer.
        mean_lti: use the paper's surrogate, the time mean of Abar with second moments of its inputs and outputs,
            instead of the time-varying scan.
    """

    def __init__(self, channels: int, size: int, device: torch.device, *, mean_lti: bool = False) -> None:
        self.mean_lti = mean_lti
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros(channels, dtype=torch.float64, device=device)
        self.decay = torch.zeros(channels, size, dtype=torch.float64, device=device)
        self.P = torch.zeros(channels, size, size, device=device)
        self.Q = torch.zeros(channels, size, size, device=device)
        self.groups = [ReadoutMoments(size, device, readout=True)]

    def update(self, system: MambaSystem) -> None:
        """Add the tokens of a batch."""
        count = system.valid.sum()
        self.tokens += count
        self.weight += system.gate.square().sum((0, 1))
        self.decay += count * torch.exp(system.delta.mean((0, 1))[:, None] * system.A)
        if self.mean_lti:
            drive = (system.delta * system.u).square() * system.valid[..., None]
            self.P += torch.einsum("bld,bli,blj->dij", drive, system.B, system.B)
            self.Q += torch.einsum("bl,bli,blj->ij", system.valid, system.C, system.C)
        if kernels.fused(system.u):
            self._update_fused(system)
        else:
            self._update_by_chunks(system)

    def _update_fused(self, system: MambaSystem) -> None:
        """The scans as kernels, some rows of the batch at a time."""
        from ..kernels.contribution import contribution
        from ..kernels.mamba import chunk_starts, gramians, output_gram

        u, delta, A, B, C, gate = system.u, system.delta, system.A, system.B, system.C, system.gate
        if not self.mean_lti:
            P, Q = gramians(u, delta, A, B, C, system.valid)
            self.P += P
            self.Q += Q
        (moments,) = self.groups
        size = moments.size
        if not len(moments.candidates):
            first = slice(0, FIRST_TOKENS)
            moments.choose_candidates(
                contribution(u[:, first], delta[:, first], A, B[:, first], C[:, first], gate[:, first])
            )
        every, kept = len(moments.candidates) == size, moments.candidates
        rows = max(1, WORKING_SET // (u.shape[1] * size**2))
        for start in range(0, len(u), rows):
            some = slice(start, start + rows)
            inputs, steps, outputs, gates = u[some], delta[some], C[some], gate[some]
            if every:
                starts, _ = chunk_starts(inputs, steps, A, B[some])
                K, _ = output_gram(inputs, steps, A, B[some], gates, starts)
                moments.add(outputs.flatten(0, 1), K.flatten(0, 1))
            else:
                starts, y = chunk_starts(inputs, steps, A, B[some], outputs, gates)
                K, moved = output_gram(inputs, steps, A[:, kept], B[some][..., kept], gates, starts[:, :, kept], y)
                M = contribution(inputs, steps, A, B[some], outputs, gates)
                moments.add(outputs.flatten(0, 1), K.flatten(0, 1), moved.flatten(0, 1), M)

    def _update_by_chunks(self, system: MambaSystem) -> None:
        """The same in plain torch, a few tokens at a time."""
        for time, h in mamba_states(system.u, system.delta, system.A, system.B, chunk=FIRST_TOKENS):
            gated = system.gate[:, time, :, None] * h
            self.groups[0].update((gated.mT @ gated).flatten(0, 1), system.C[:, time].flatten(0, 1))
            if not self.mean_lti:
                channel_states = (h * system.valid[:, time, None, None]).flatten(0, 1).permute(1, 2, 0)
                self.P += channel_states @ channel_states.mT
        if not self.mean_lti:
            self.Q += observability_gramian(system.delta, system.A, system.C, system.valid)

    def hankel_singular_values(self) -> Tensor:
        """The layer's spectrum, [1, N], descending: the channels' own spectra, averaged with their output weights."""
        return hankel_spectra([self])[0]

    def gramians(self) -> tuple[Tensor, Tensor]:
        """P and Q per token in float64, [channels, N, N]."""
        P, Q = self.P.double() / self.tokens, self.Q.double() / self.tokens
        if not self.mean_lti:
            return P, Q
        decay = self.decay / self.tokens
        return lti_gramian(decay, P), lti_gramian(decay, Q)

    def spectrum(self, sigma: Tensor) -> Tensor:
        """The layer's spectrum, [1, N], from its channels', [channels, N]."""
        weight = self.weight / self.weight.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return (weight @ sigma)[None]

    def modal_gain(self) -> Tensor:
        """AIRE-style score of each state, [1, N]: the modes' gains c^2 p / (1 - |abar|^2), averaged over channels."""
        energy = self.P.diagonal(dim1=1, dim2=2).double()
        output = self.groups[0].output.diagonal()
        return (self.weight @ (energy * output / (1 - (self.decay / self.tokens).square())))[None]


class Mamba2Statistics:
    """What a Mamba-2 layer's states do on the calibration data; `update` it with a system per batch.

    All heads of a group share B and C, and Abar is a scalar per head, so that a group is one system with the Gramians
    sum over heads of w P_h and of w Q_h.
    """

    def __init__(self, heads: int, groups: int, size: int, device: torch.device, *, mean_lti: bool = False) -> None:
        self.mean_lti = mean_lti
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros(heads, dtype=torch.float64, device=device)
        self.P = torch.zeros(groups, size, size, dtype=torch.float64, device=device)
        self.Q = torch.zeros(groups, size, size, dtype=torch.float64, device=device)
        self.groups = [ReadoutMoments(size, device, readout=False) for _ in range(groups)]

    def update(self, system: Mamba2System) -> None:
        """Add the tokens of a batch."""
        self.tokens += system.valid.sum()
        self.weight += system.gate.square().sum((0, 1, 3))
        if self.mean_lti:
            self._update_mean_lti(system)
        if kernels.fused(system.x):
            self._update_fused(system)
        else:
            self._update_by_chunks(system)

    def _update_fused(self, system: Mamba2System) -> None:
        """The scans as kernels."""
        from ..kernels.mamba2 import contribution, controllability

        x, delta, A, B, C, gate = system.x, system.delta, system.A, system.B, system.C, system.gate
        if not self.mean_lti:
            P, reach = controllability(x, delta, A, B, gate, system.valid)
            self.P += P
            self.Q += self._observability(system, reach)
        output = torch.einsum("blgi,blgj->gij", C.double(), C.double())
        contributions = contribution(x, delta, A, B, C, gate)
        for moments, part, M in zip(self.groups, output, contributions, strict=True):
            moments.output += part
            moments.contribution += M

    def _update_by_chunks(self, system: Mamba2System) -> None:
        """The same in plain torch, a few tokens at a time."""
        groups = system.B.shape[2]
        for time, h in mamba2_states(system.x, system.delta, system.A, system.B):
            gated = (system.gate[:, time, ..., None] * h).unflatten(2, (groups, -1)).flatten(3, 4)
            K = gated.mT @ gated  # [batch, time, groups, N, N]
            if not self.mean_lti:
                self.P += K.sum((0, 1))
            for group, moments in enumerate(self.groups):
                moments.update(K[:, :, group].flatten(0, 1), system.C[:, time, group].flatten(0, 1))
        if not self.mean_lti:
            self.Q += self._observability(system, observability_reach(system.delta, system.A, system.valid))

    def hankel_singular_values(self) -> Tensor:
        """The spectrum of each group, [groups, N], descending."""
        return hankel_spectra([self])[0]

    def gramians(self) -> tuple[Tensor, Tensor]:
        """P and Q per token in float64, [groups, N, N]."""
        return self.P / self.tokens, self.Q / self.tokens

    def spectrum(self, sigma: Tensor) -> Tensor:
        """The groups' spectra as they are, [groups, N]."""
        return sigma

    def modal_gain(self) -> Tensor:
        """AIRE-style score of each state, [groups, N]. All states of a head decay alike, so it is that of P and C."""
        output = torch.stack([moments.output.diagonal() for moments in self.groups])
        return (self.P.diagonal(dim1=1, dim2=2) * output).sqrt()

    def _observability(self, system: Mamba2System, reach: Tensor) -> Tensor:
        """sum over heads, batch and t of w_h Q_ht, from the heads' G [batch, length, heads]."""
        groups = system.C.shape[2]
        weight = system.gate.square().sum((0, 1, 3)) / system.valid.sum()
        reach = (reach * weight).unflatten(-1, (groups, -1)).sum(-1) * system.valid[..., None]
        return torch.einsum("blgi,blgj->gij", reach[..., None] * system.C, system.C)

    def _update_mean_lti(self, system: Mamba2System) -> None:
        groups = system.B.shape[2]
        count = system.valid.sum()
        decay = torch.exp((system.delta * system.valid[..., None]).sum((0, 1)) / count * system.A)
        gain = 1 / (1 - decay.square())
        weight = system.gate.square().sum((0, 1, 3)) / count
        drive = (system.delta[..., None] * system.x).square().mean(-1) * weight * gain * system.x.shape[-1]
        drive = drive.unflatten(-1, (groups, -1)).sum(-1) * system.valid[..., None]
        reach = (weight * gain).unflatten(-1, (groups, -1)).sum(-1) * system.valid[..., None]
        self.P += torch.einsum("blg,blgi,blgj->gij", drive, system.B, system.B)
        self.Q += torch.einsum("blg,blgi,blgj->gij", reach, system.C, system.C)


class HasGramians(Protocol):
    """Statistics of a layer of one or several systems."""

    def gramians(self) -> tuple[Tensor, Tensor]: ...

    def spectrum(self, sigma: Tensor) -> Tensor: ...


def hankel_spectra(statistics: Sequence[HasGramians]) -> list[Tensor]:
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
