"""Truncated diagonal systems: against scipy's Lyapunov solver on the real system with twice the states."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_discrete_lyapunov

from hf_compressm.hankel.lti import LTIStatistics, ModalSystem, TruncatedPath
from hf_compressm.hankel.spectra import hankel_spectra


@st.composite
def systems(draw):
    """One or several side by side, of any numbers of states, inputs and outputs; with states that say the same, too."""
    n, m, p = (draw(st.integers(1, most)) for most in (7, 3, 3))
    side_by_side = draw(st.sampled_from([(), (1,), (3,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    radius = draw(st.floats(0.1, 0.995)) * torch.rand(*side_by_side, n, generator=generator).double()
    a = torch.polar(radius, 2 * math.pi * torch.rand(*side_by_side, n, generator=generator).double())
    if draw(st.booleans()) and n > 1:
        a[..., -1] = a[..., 0]
    shapes = (*side_by_side, n, m), (*side_by_side, p, n)
    return ModalSystem(a, *(torch.randn(shape, dtype=torch.complex128, generator=generator) for shape in shapes))


def each(system):
    """The systems, one by one, as numpy matrices (A, B, C) of the real ones: the states' real parts, then imaginary ones."""
    many = LTIStatistics(system).system
    for a, B, C in zip(many.a, many.B, many.C, strict=True):
        A = torch.cat([torch.cat([a.real.diag(), -a.imag.diag()], 1), torch.cat([a.imag.diag(), a.real.diag()], 1)])
        yield A.numpy(), torch.cat([B.real, B.imag]).numpy(), torch.cat([C.real, -C.imag], 1).numpy()


def energy(system):
    """The square of the H2 norm, from the real systems' Gramians."""
    return sum((C @ solve_discrete_lyapunov(A, B @ B.T) @ C.T).trace() for A, B, C in each(system))


def gains(system):
    """The largest singular value of each real system's transfer function, over many frequencies."""
    angles = torch.cat(
        [system.a.angle().flatten(), -system.a.angle().flatten(), torch.linspace(-math.pi, math.pi, 300)]
    )
    for A, B, C in each(system):
        A, B, C = (torch.from_numpy(x).to(torch.complex128) for x in (A, B, C))
        resolvent = torch.linalg.solve(torch.exp(1j * angles)[:, None, None] * torch.eye(len(A)) - A, B)
        yield torch.linalg.matrix_norm(C @ resolvent, 2).max().item()


@settings(max_examples=40, deadline=None)
@given(system=systems(), share=st.floats(0, 1))
def test_what_is_left_is_stable_and_within_the_bound(system, share):
    path, n = TruncatedPath(system), system.size
    r = 1 + int(share * (n - 1))
    cut = path[r]
    assert cut.a.shape == (*system.a.shape[:-1], r)
    assert cut.a.abs().max() < 1
    error, rounding = system.minus(cut), 1e-6 * max(gains(system))
    assert max(gains(error)) <= cut.bound + rounding
    assert cut.error == pytest.approx(energy(error) / energy(system), abs=1e-7)
    assert path[n].error < 1e-7
    assert path[n].bound <= rounding


@settings(max_examples=30, deadline=None)
@given(system=systems())
def test_energies_and_spectra_are_scipys(system):
    assert system.energy() == pytest.approx(energy(system), rel=1e-8)
    sigma = []
    for A, B, C in each(system):
        P, Q = (torch.from_numpy(solve_discrete_lyapunov(*of)) for of in ((A, B @ B.T), (A.T, C.T @ C)))
        squares = torch.linalg.eigvals(P @ Q).real.clamp_min(0).sort(descending=True).values
        sigma.append(squares.sqrt().view(-1, 2).sum(1))  # what a complex state carries
    (spectrum,) = hankel_spectra([LTIStatistics(system)])
    expected = torch.stack(sigma).mean(0, keepdim=True)
    torch.testing.assert_close(spectrum, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


def test_all_states_balanced_have_equal_diagonal_gramians():
    torch.manual_seed(0)
    a = torch.polar(0.5 + 0.45 * torch.rand(6).double(), 6 * torch.rand(6).double())
    path = TruncatedPath(ModalSystem(a, torch.randn(6, 2).to(a.dtype), torch.randn(3, 6).to(a.dtype)))
    (one,) = path._each
    A, B, C = one.Lm.mT @ one.A @ one.Rm, one.Lm.mT @ one.B, one.C @ one.Rm
    for of in ((A, B @ B.mT), (A.mT, C.mT @ C)):
        gramian = torch.from_numpy(solve_discrete_lyapunov(*(x.numpy() for x in of)))
        torch.testing.assert_close(gramian, one.sigma.diag(), rtol=1e-9, atol=1e-9)


def test_large_spectra_agree_with_the_truncations():
    """Beyond 32 states they go another way."""
    torch.manual_seed(0)
    B, C = torch.randn(2, 40, 40, dtype=torch.complex128)
    system = ModalSystem(0.9 * torch.exp(6j * torch.rand(40).double()), B, C)
    (spectrum,) = hankel_spectra([LTIStatistics(system)])
    (one,) = TruncatedPath(system)._each
    torch.testing.assert_close(spectrum[0], one.sigma.view(-1, 2).sum(1))


def test_places_beyond_the_rank_take_old_states_that_do_nothing_yet():
    a = torch.tensor([0.9, 0.9, 0.9, 0.5], dtype=torch.complex128)
    system = ModalSystem(a, torch.ones(4, 1), torch.ones(1, 4))  # two states would do
    cut = TruncatedPath(system)[3]
    assert (cut.C == 0).sum() == 1
    assert (cut.B.abs() > 0.1).all()
    assert system.minus(cut).energy() < 1e-12 * system.energy()


def test_new_states_have_the_mean_power_of_the_old_ones():
    torch.manual_seed(0)
    a = torch.polar(torch.rand(5).double(), 6 * torch.rand(5).double())
    system = ModalSystem(a, torch.randn(5, 2).to(a.dtype), torch.randn(3, 5).to(a.dtype))
    cut = TruncatedPath(system)[3]
    power, before = (ModalSystem(one.a, one.B, one.C).moments()[0].diagonal().real for one in (cut, system))
    torch.testing.assert_close(power, before.mean().expand(len(power)))


@pytest.mark.parametrize(
    ("a", "message"), [([0.5, 1.0], "not stable"), ([0.5, math.nan], "not finite"), ([0.5], "do not fit together")]
)
def test_what_is_no_stable_system_is_refused(a, message):
    with pytest.raises(ValueError, match=message):
        LTIStatistics(ModalSystem(torch.tensor(a), torch.ones(2, 1), torch.ones(1, 2)))
    with pytest.raises(ValueError, match=message):
        TruncatedPath(ModalSystem(torch.tensor(a), torch.ones(2, 1), torch.ones(1, 2)))
