"""Hankel singular values against their definition, and where the definition goes NaN."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compressm.hankel.balanced_truncation import balance
from hf_compressm.hankel.factorisations import TOGETHER
from hf_compressm.hankel.mamba import MambaStatistics
from hf_compressm.hankel.singular_values import cross_factor, gramian_factor, hankel_singular_values
from hf_compressm.hankel.spectra import BATCHED, hankel_spectra
from hf_compressm.hankel.systems import DiagonalSystem

from .test_systems import diagonal_systems


def random_gramian(n, rank=None, *, seed=0, dtype=torch.float64, batch=()):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(*batch, n, n if rank is None else rank, dtype=dtype, generator=generator)
    return factor @ factor.mH


def definition(P, Q):
    """sqrt(eig(P Q)), descending."""
    eigenvalues = torch.linalg.eigvals(P @ Q).real
    return eigenvalues.clamp(min=0).sqrt().sort(descending=True).values


@settings(max_examples=60, deadline=None)
@given(system=diagonal_systems())
def test_they_are_the_square_roots_of_the_eigenvalues_of_pq(system):
    P, Q = system.controllability_gramian(), system.observability_gramian()
    sigma = hankel_singular_values(P, Q)
    assert sigma.dtype == torch.float64
    assert (sigma[:-1] >= sigma[1:]).all()
    # eig(PQ) loses half the digits: only its largest values are a fair witness.
    conditioned = sigma > 1e-3 * sigma[0]
    torch.testing.assert_close(sigma[conditioned], definition(P, Q)[conditioned], rtol=1e-5, atol=0)
    # Exact identities at every size: sum σ^2 = trace(P Q), and σ_1 is bounded by the Gramians' norms.
    torch.testing.assert_close((sigma**2).sum(), (P @ Q).trace().real, rtol=1e-9, atol=0)


def test_they_are_the_singular_values_of_the_hankel_matrix():
    """The definition that uses no Gramian: σ of the block Hankel matrix H_ij = C A^(i+j) B of the impulse response."""
    generator = torch.Generator().manual_seed(0)
    a = torch.tensor([0.7, -0.6, 0.5j, -0.2 - 0.4j], dtype=torch.complex128)
    B, C = (torch.randn(*shape, dtype=a.dtype, generator=generator) for shape in ((4, 2), (3, 4)))
    system = DiagonalSystem(a, B, C)
    h = system.impulse_response(241)[1:]
    hankel = torch.cat([torch.cat([h[i + j] for j in range(120)], dim=1) for i in range(120)], dim=0)
    sigma = hankel_singular_values(system.controllability_gramian(), system.observability_gramian())
    torch.testing.assert_close(sigma, torch.linalg.svdvals(hankel)[:4], rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(system=diagonal_systems(), seed=st.integers(0, 2**32 - 1))
def test_they_do_not_depend_on_the_coordinates(system, seed):
    P, Q = system.controllability_gramian(), system.observability_gramian()
    n = len(P)
    T = (
        torch.eye(n, dtype=P.dtype)
        + torch.randn(n, n, dtype=P.dtype, generator=torch.Generator().manual_seed(seed)) / n
    )
    T_inverse = torch.linalg.inv(T)
    sigma = hankel_singular_values(P, Q)
    transformed = hankel_singular_values(T @ P @ T.mH, T_inverse.mH @ Q @ T_inverse)
    # A Gramian is known to machine precision, so its factor, and with it σ, to its square root.
    scale = (torch.linalg.norm(P) * torch.linalg.norm(Q)).sqrt() * torch.linalg.cond(T)
    assert (transformed - sigma).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_the_factor_reproduces_the_gramian(dtype, rank):
    P = random_gramian(6, rank, dtype=dtype, batch=(2, 3))
    L = gramian_factor(P)
    assert L.shape == P.shape
    assert L.dtype == dtype
    torch.testing.assert_close(L @ L.mH, P, rtol=1e-12, atol=1e-12)


def test_the_factor_drops_negative_eigenvalues_only():
    L = gramian_factor(torch.diag(torch.tensor([4.0, -1e-3, 9.0])))
    torch.testing.assert_close(L @ L.mH, torch.diag(torch.tensor([4.0, 0.0, 9.0])).double())


def test_the_factor_takes_the_hermitian_part():
    P = random_gramian(4)
    skew = torch.triu(torch.full((4, 4), 0.1, dtype=P.dtype), 1)
    L = gramian_factor(P + skew - skew.mT)
    torch.testing.assert_close(L @ L.mH, P)


def test_batches_equal_their_members():
    P, Q = random_gramian(5, batch=(4, 1), seed=1), random_gramian(5, batch=(3,), seed=2)
    sigma = hankel_singular_values(P, Q)
    assert sigma.shape == (4, 3, 5)
    for i in range(4):
        for j in range(3):
            torch.testing.assert_close(sigma[i, j], hankel_singular_values(P[i, 0], Q[j]))


def test_real_and_complex_gramians_mix():
    P, Q = random_gramian(4, seed=1), random_gramian(4, seed=2, dtype=torch.complex128)
    torch.testing.assert_close(hankel_singular_values(P, Q), definition(P.to(Q.dtype), Q))
    assert cross_factor(gramian_factor(Q), gramian_factor(P)).dtype == torch.complex128


def test_near_singular_gramians_where_the_definition_goes_nan():
    P, Q = random_gramian(32, rank=3, seed=3), random_gramian(32, rank=5, seed=4)
    assert torch.linalg.eigvals(P @ Q).real.sqrt().isnan().any(), "the case is not hard enough to tell"
    sigma = hankel_singular_values(P, Q)
    assert sigma.isfinite().all()
    assert (sigma[3:] < 1e-6 * sigma[0]).all()
    torch.testing.assert_close(sigma[:3], definition(P, Q)[:3])


def test_float32_gramians():
    a = torch.exp(-0.01 * torch.arange(1.0, 65))  # the poles of S4D-Real crowd together: P is singular in float32
    P = torch.ones(64, 64) / (1 - torch.outer(a, a))
    assert torch.linalg.eigvalsh(P)[0] < 0, "the case is not hard enough to tell"
    sigma = hankel_singular_values(P, P)
    assert sigma.dtype == torch.float64
    assert sigma.isfinite().all()
    torch.testing.assert_close(sigma[:3], torch.linalg.eigvalsh(P.double()).flip(0)[:3], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_zero_gramians_give_zeros(dtype):
    zero, P = torch.zeros(3, 4, 4, dtype=dtype), random_gramian(4, dtype=dtype)
    for pair in ((zero, zero), (zero, P), (P, zero)):
        assert torch.equal(hankel_singular_values(*pair), torch.zeros(3, 4, dtype=torch.float64))


def test_scales_that_pq_would_lose():
    P = random_gramian(4)
    tiny = hankel_singular_values(1e-200 * P, 1e-200 * P)
    np.testing.assert_allclose(tiny, 1e-200 * hankel_singular_values(P, P), rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_gramian_that_is_not_finite_is_named(value):
    good, bad = torch.eye(3), torch.eye(3)
    bad[1, 2] = value
    with pytest.raises(ValueError, match="controllability Gramian P has entries that are not finite"):
        hankel_singular_values(bad, good)
    with pytest.raises(ValueError, match="observability Gramian Q has entries that are not finite"):
        hankel_singular_values(good, bad)


def test_large_gramians_on_threads():
    """What `hankel_spectra` does with many channels of a large state, of which one sees nothing."""
    n, channels = BATCHED + 8, 5
    layer = MambaStatistics(channels, n, torch.device("cpu"))
    layer.tokens += 1
    layer.weight += torch.arange(channels)
    layer.P = random_gramian(n, seed=1, batch=(channels,))
    layer.Q = random_gramian(n, rank=3, seed=2, batch=(channels,))
    layer.P[2] = 0
    (spectrum,) = hankel_spectra([layer])
    expected = layer.spectrum(hankel_singular_values(layer.P, layer.Q))
    torch.testing.assert_close(spectrum, expected, rtol=1e-6, atol=1e-7 * float(expected.max()))
    layer.Q[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="observability"):
        hankel_spectra([layer])


def test_no_factorisation_gets_more_than_its_part(monkeypatch):
    """On a GPU the workspace of a batch would be many times its size; and of all layers' Gramians only some are at hand."""
    taken = []

    def recording(factorise):
        def recorded(X):
            taken.append(X.shape[:-2].numel())
            return factorise(X)

        return recorded

    layers = [MambaStatistics(channels, 3, torch.device("cpu")) for channels in (700, 700, 2 * TOGETHER + 1, 5)]
    for seed, layer in enumerate(layers):
        layer.tokens += 2
        layer.weight += torch.rand(len(layer.weight), generator=torch.Generator().manual_seed(seed))
        layer.P, layer.Q = (random_gramian(3, seed=seed + i, batch=(len(layer.weight),)) for i in (0, 9))
    expected = []
    for layer in layers:
        few = zip(*(X.split(500) for X in layer.gramians()), strict=True)
        expected.append(layer.spectrum(torch.cat([hankel_singular_values(P, Q) for P, Q in few])))
    for name in ("eigh", "svdvals", "svd"):
        monkeypatch.setattr(torch.linalg, name, recording(getattr(torch.linalg, name)))
    for sigma, right in zip(hankel_spectra(layers), expected, strict=True):
        torch.testing.assert_close(sigma, right, rtol=1e-12, atol=1e-14)
    P, Q = layers[2].gramians()
    whole = balance(gramian_factor(Q), gramian_factor(P), 2)
    alone = balance(gramian_factor(Q[-1:]), gramian_factor(P[-1:]), 2)
    for many, one in zip(whole, alone, strict=True):
        torch.testing.assert_close(many[-1:], one, rtol=1e-12, atol=1e-12)
    assert max(taken) == TOGETHER
    # The layers before the third go with each other, the last one by itself.
    assert taken[:2] == [TOGETHER, 1400 - TOGETHER]
