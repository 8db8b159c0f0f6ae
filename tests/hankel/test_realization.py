"""Selections and projections against brute force and independent least squares."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from hf_compressm.hankel.moments import ReadoutMoments, elimination_order
from hf_compressm.hankel.realization import project, select, select_with_readout

N, TOKENS, CHANNELS = 5, 60, 7


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """States [tokens, channels, N] (correlated, of different sizes) and output maps [tokens, N], float64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(N, N, generator=generator, dtype=torch.float64) + 2 * torch.eye(N, dtype=torch.float64)
    h = torch.randn(TOKENS, CHANNELS, N, generator=generator, dtype=torch.float64) @ mixing
    return h, torch.randn(TOKENS, N, generator=generator, dtype=torch.float64)


def taken(data) -> ReadoutMoments:
    h, C = data
    moments = ReadoutMoments(N, torch.device("cpu"), readout=True)
    for part in (slice(0, 25), slice(25, None)):
        moments.update(h[part].mT @ h[part], C[part])
    return moments


@pytest.fixture
def moments(data) -> ReadoutMoments:
    return taken(data)


def lost(data, kept, readout=None) -> float:
    h, C = data
    y = torch.einsum("tdn,tn->td", h, C)
    C_new = C[:, kept] if readout is None else C @ readout.T
    return float((y - torch.einsum("tds,ts->td", h[..., kept], C_new)).square().sum() / y.square().sum())


def test_reported_errors_are_the_true_ones(data, moments):
    for r, selection in select(moments, elimination_order(moments.contribution)).items():
        assert len(selection.kept) == r
        assert selection.error == pytest.approx(lost(data, selection.kept), abs=1e-12)
    for r, selection in select_with_readout(moments).items():
        assert selection.readout.shape == (r, N)
        assert selection.error == pytest.approx(lost(data, selection.kept, selection.readout), abs=1e-5)


def test_readout_is_the_least_squares_solution_for_its_states(data, moments):
    h, C = data
    y = torch.einsum("tdn,tn->td", h, C).flatten()
    for r, selection in select_with_readout(moments, ridge=1e-12).items():
        features = torch.einsum("tds,tn->tdsn", h[..., selection.kept], C).reshape(-1, r * N)
        solution = torch.linalg.lstsq(features, y).solution
        residual = (y - features @ solution).square().sum() / y.square().sum()
        assert lost(data, selection.kept, selection.readout) == pytest.approx(float(residual), abs=1e-8)


def test_each_elimination_step_is_the_best_one(data, moments):
    path = select_with_readout(moments, ridge=1e-12)
    h, C = data
    y = torch.einsum("tdn,tn->td", h, C).flatten()

    def refit_error(kept) -> float:
        features = torch.einsum("tds,tn->tdsn", h[..., list(kept)], C).reshape(len(y), -1)
        return float((y - features @ torch.linalg.lstsq(features, y).solution).square().sum() / y.square().sum())

    for r in range(N, 1, -1):
        best = min(refit_error(kept) for kept in combinations(path[r].kept.tolist(), r - 1))
        assert path[r - 1].error == pytest.approx(best, abs=1e-8)


def test_readout_never_loses_more_than_plain_selection_of_the_same_states(data, moments):
    for selection in select_with_readout(moments).values():
        assert selection.error <= lost(data, selection.kept) + 1e-6


def test_all_states_lose_nothing(data, moments):
    assert select_with_readout(moments)[N].error < 1e-5
    assert select(moments, torch.arange(N))[N].error == 0


@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_float32_grams_does_not_break_the_fit(seed):
    """States and output maps of rank 2: in all other directions the normal matrix is nothing but rounding."""
    size = 40
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(20, 8, 2, generator=generator) @ torch.randn(2, size, generator=generator)
    C = torch.randn(20, 2, generator=generator) @ torch.randn(2, size, generator=generator)
    moments = ReadoutMoments(size, torch.device("cpu"), readout=True)
    moments.update(h.mT @ h, C)
    path = select_with_readout(moments)
    assert max(float(selection.readout.abs().max()) for selection in path.values()) < 100
    assert lost((h.double(), C.double()), path[2].kept, path[2].readout) < 1e-4


@pytest.fixture
def limited(monkeypatch, data) -> ReadoutMoments:
    """Moments that may fit any read-out of 2 of the 5 states."""
    monkeypatch.setattr("hf_compressm.hankel.moments.MAX_READOUT", 2 * N)
    return taken(data)


def test_every_size_has_a_read_out_where_there_are_too_many_states_to_fit_all(data, limited):
    path = select_with_readout(limited)
    assert sorted(path) == list(range(1, N + 1))
    assert len(limited.candidates) == 2
    for r, selection in path.items():
        assert selection.kept.tolist() == sorted(set(selection.kept.tolist()))
        assert selection.readout.shape == (r, N)
        assert selection.error == pytest.approx(lost(data, selection.kept, selection.readout), abs=1e-5)


def test_beside_the_candidates_it_is_least_squares_on_multiples_of_the_states_own_outputs(data, limited):
    """Which of them goes is the best choice, too, one by one."""
    h, C = data
    y = torch.einsum("tdn,tn->td", h, C).flatten()
    path = select_with_readout(limited, ridge=1e-12)
    candidates = limited.candidates.tolist()

    def least(kept) -> float:
        features = [torch.einsum("td,tn->tdn", h[..., s], C).reshape(len(y), N) for s in candidates]
        own = [(h[..., s] * C[:, None, s]).reshape(len(y), 1) for s in kept if s not in candidates]
        features = torch.cat(features + own, 1)
        return float((y - features @ torch.linalg.lstsq(features, y).solution).square().sum() / y.square().sum())

    for r in range(2, N + 1):
        kept = path[r].kept.tolist()
        assert set(candidates) <= set(kept)
        assert path[r].error == pytest.approx(least(kept), abs=1e-8)
        if r > 2:
            fewer = [least([s for s in kept if s != gone]) for gone in set(kept) - set(candidates)]
            assert path[r - 1].error == pytest.approx(min(fewer), abs=1e-8)


def test_projection_is_exact_where_the_state_has_low_rank():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(2, N, generator=generator, dtype=torch.float64)
    h = torch.randn(TOKENS, CHANNELS, 2, generator=generator, dtype=torch.float64) @ basis
    C = torch.randn(TOKENS, N, generator=generator, dtype=torch.float64)
    moments = ReadoutMoments(N, torch.device("cpu"), readout=False)
    K = h.mT @ h
    moments.update(K, C)
    cut = project(moments.output[None], K.sum(0)[None])[0][2]
    y = torch.einsum("tdn,tn->td", h, C)
    projected = torch.einsum("tdr,tr->td", h @ cut.B_projection, C @ cut.C_projection)
    torch.testing.assert_close(projected, y)
    assert cut.error < 1e-12
