"""Balanced truncation: its error bound, its stability, its balance, and systems that are not minimal."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag

from hf_compressm.hankel.balanced_truncation import balanced_truncation, projection_maps
from hf_compressm.hankel.singular_values import gramian_factor, hankel_singular_values
from hf_compressm.hankel.systems import DiagonalSystem, StateSpace

from .test_singular_values import random_gramian
from .test_systems import dense, diagonal_systems


def frequency_grid(system):
    """Frequencies dense everywhere, and at and around each pole's angle, where the peaks are."""
    poles = system.a if isinstance(system, DiagonalSystem) else system.poles
    around = torch.tensor([-3e-3, -1e-3, -3e-4, 0.0, 3e-4, 1e-3, 3e-3], dtype=torch.float64)
    peaks = (torch.angle(poles.to(torch.complex128))[:, None] + around).flatten()
    return torch.cat([torch.linspace(-math.pi, math.pi, 401, dtype=torch.float64), peaks])


def peak(response):
    return torch.linalg.matrix_norm(response, 2).max().item()


@settings(max_examples=60, deadline=None)
@given(system=diagonal_systems(), as_dense=st.booleans())
def test_error_bound_stability_and_full_order(system, as_dense):
    system = dense(system) if as_dense else system
    omega = frequency_grid(system)
    response = system.frequency_response(omega)
    rounding = 1e-8 * peak(response)
    n = len(system.B)
    bounds = []
    for r in range(1, n + 1):
        reduced, bound = balanced_truncation(system, r)
        assert reduced.A.shape == (r, r)
        assert reduced.poles.abs().max() < 1
        error = peak(response - reduced.frequency_response(omega))
        assert error <= bound + rounding
        bounds.append(bound)
    assert all(more >= less for more, less in itertools.pairwise(bounds))
    assert error <= rounding  # r = n


@settings(max_examples=30, deadline=None)
@given(system=diagonal_systems(max_radius=0.95))
def test_full_order_reproduces_the_impulse_response(system):
    reduced, bound = balanced_truncation(system, len(system.a))
    expected = system.impulse_response(20)
    actual = reduced.impulse_response(20)
    assert bound <= 1e-6 * peak(expected)
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=1e-8 * expected.abs().max().item())


def test_the_bound_is_tight_for_one_state():
    """G = c b / (z - a) with a > 0 peaks at z = 1, at σ (1 + a): the bound 2 σ is met as a goes to 1."""
    a = 0.9999
    system = DiagonalSystem(torch.tensor([a, 0.0]), torch.tensor([[0.01], [10.0]]), torch.tensor([[0.01, 10.0]]))
    reduced, bound = balanced_truncation(system, 1)
    error = peak(system.frequency_response(torch.zeros(1)) - reduced.frequency_response(torch.zeros(1)))
    assert 0.9 * bound < error <= bound


def test_reduced_gramians_are_balanced():
    generator = torch.Generator().manual_seed(1)
    a = torch.polar(torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([0.1, -2.0, 1.0, 3.0, 0.5]))
    B, C = (torch.randn(*shape, dtype=a.dtype, generator=generator) for shape in ((5, 2), (3, 5)))
    system = DiagonalSystem(a, B, C)
    reduced, _ = balanced_truncation(system, 5)
    sigma = hankel_singular_values(system.controllability_gramian(), system.observability_gramian())
    balanced = torch.diag(sigma).to(torch.complex128)
    torch.testing.assert_close(reduced.controllability_gramian(), balanced, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reduced.observability_gramian(), balanced, rtol=1e-6, atol=1e-6)


def test_feedthrough_is_kept():
    D = torch.tensor([[2.0]])
    reduced, _ = balanced_truncation(
        DiagonalSystem(torch.tensor([0.5, 0.4]), torch.ones(2, 1), torch.ones(1, 2), D), 1
    )
    assert reduced.D == D


def test_repeated_singular_values_count_once_in_the_bound():
    """Two copies of one system, side by side, have its σ twice over and its error."""
    a = torch.tensor([0.8, -0.3, 0.5])
    B, C = torch.tensor([[1.0], [2.0], [0.5]]), torch.tensor([[1.0, -1.0, 3.0]])
    single = DiagonalSystem(a, B, C)
    B2, C2 = (torch.tensor(block_diag(x, x)) for x in (B.numpy(), C.numpy()))
    double = DiagonalSystem(torch.cat([a, a]), B2, C2)
    for r in (1, 2):
        _, bound = balanced_truncation(single, r)
        reduced, double_bound = balanced_truncation(double, 2 * r)
        assert double_bound == pytest.approx(bound, rel=1e-9)
        omega = frequency_grid(double)
        assert peak(double.frequency_response(omega) - reduced.frequency_response(omega)) <= double_bound


def test_distinct_singular_values_all_count():
    system = DiagonalSystem(torch.zeros(3), torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    _, bound = balanced_truncation(system, 1)
    assert bound == pytest.approx(2 * (2 + 1))


def test_beyond_the_minimal_order_the_states_are_zero():
    """Twin poles, a mode that no input reaches and one that no output sees: order 2 of 5."""
    a = torch.tensor([0.9, 0.9, 0.5, 0.7, -0.4])
    B = torch.tensor([[1.0], [2.0], [1.0], [0.0], [3.0]])
    C = torch.tensor([[1.0, 1.0, 2.0, 5.0, 0.0]])
    system = DiagonalSystem(a, B, C)
    omega = frequency_grid(system)
    response = system.frequency_response(omega)
    for r in (2, 3, 4, 5):
        reduced, bound = balanced_truncation(system, r)
        assert bound <= 1e-6 * peak(response)
        assert peak(response - reduced.frequency_response(omega)) <= 1e-8 * peak(response)
        assert reduced.poles.abs().max() < 1


def test_states_below_the_numerical_rank_count_as_cut():
    weights = torch.diag(torch.tensor([1.0, 1e-6]))
    reduced, bound = balanced_truncation(DiagonalSystem(torch.zeros(2), weights, weights), 2)
    assert not reduced.B[1].any()
    assert bound == pytest.approx(2e-12)


@pytest.mark.parametrize("r", [1, 3])
def test_a_system_that_does_nothing_reduces_to_zeros(r):
    reduced, bound = balanced_truncation(DiagonalSystem(torch.full((3,), 0.5), torch.zeros(3, 1), torch.ones(1, 3)), r)
    assert bound == 0
    for x in (reduced.A, reduced.B, reduced.C):
        assert not x.any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_crowded_real_poles_stay_stable(seed):
    """64 poles as S4D-Real sets them: all but a handful of the Hankel singular values are rounding noise."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.exp(-0.001 * torch.arange(1, 65, dtype=torch.float64))
    system = DiagonalSystem(a, torch.randn(64, 1, generator=generator), torch.randn(1, 64, generator=generator))
    omega = frequency_grid(system)
    response = system.frequency_response(omega)
    for r in (1, 4, 16, 64):
        reduced, bound = balanced_truncation(system, r)
        assert reduced.poles.abs().max() < 1
        assert peak(response - reduced.frequency_response(omega)) <= bound + 1e-8 * peak(response)


def test_only_stable_systems_are_reduced():
    with pytest.raises(ValueError, match="not stable"):
        balanced_truncation(StateSpace(torch.eye(2), torch.ones(2, 1), torch.ones(1, 2)), 1)


@pytest.mark.parametrize("r", [0, 5, -1])
def test_sizes_out_of_range_are_refused(r):
    L = gramian_factor(random_gramian(4))
    with pytest.raises(ValueError, match=r"1\.\.4"):
        projection_maps(L, L, r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_maps_are_biorthogonal_and_balance_both_gramians(dtype):
    P, Q = random_gramian(6, dtype=dtype, seed=1, batch=(2, 1)), random_gramian(6, dtype=dtype, seed=2, batch=(3,))
    Rm, Lm = projection_maps(gramian_factor(Q), gramian_factor(P), 4)
    assert Rm.shape == Lm.shape == (2, 3, 6, 4)
    sigma = torch.diag_embed(hankel_singular_values(P, Q)[..., :4]).to(Rm.dtype)
    P, Q = P.to(Rm.dtype), Q.to(Rm.dtype)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(Lm.mH @ Rm, torch.eye(4, dtype=Rm.dtype).expand(2, 3, 4, 4), **close)
    torch.testing.assert_close(Lm.mH @ P @ Lm, sigma, **close)
    torch.testing.assert_close(Rm.mH @ Q @ Rm, sigma, **close)


def test_maps_are_the_best_low_rank_product():
    """Rm Lm^H is oblique, but L_Q^H Rm Lm^H L_P is the truncated SVD of L_Q^H L_P: what `project` relies on."""
    L_P, L_Q = gramian_factor(random_gramian(6, seed=3)), gramian_factor(random_gramian(6, seed=4))
    Rm, Lm = projection_maps(L_Q, L_P, 2)
    U, s, Vh = torch.linalg.svd(L_Q.mH @ L_P)
    torch.testing.assert_close(L_Q.mH @ Rm @ Lm.mH @ L_P, U[:, :2] * s[:2] @ Vh[:2])


def test_maps_of_a_batch_whose_members_differ_in_rank():
    P = torch.stack([random_gramian(5, rank, seed=5) for rank in (5, 2, 0)])
    L_P, L_Q = gramian_factor(P), gramian_factor(random_gramian(5, seed=6))
    Rm, Lm = projection_maps(L_Q, L_P, 4)
    assert Rm.isfinite().all()
    assert Lm.isfinite().all()
    assert not Rm[2].any()
    assert not Lm[2].any()
    torch.testing.assert_close(Rm[1] @ Lm[1].mT @ P[1], P[1])  # the two directions that P has are kept
