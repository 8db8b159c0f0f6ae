"""The Gramians and responses of systems.py against SciPy's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal
from scipy.linalg import solve_discrete_lyapunov

from hf_compressm.hankel.systems import DiagonalSystem, StateSpace, lti_gramian


@st.composite
def diagonal_systems(draw, max_radius=0.999):
    """Random stable diagonal systems: real, complex, or complex in conjugate pairs; with and without D."""
    n, m, p = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["real", "complex", "conjugate pairs"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Radii crowd towards the unit circle: 1 - radius is log-uniform.
    radius = np.minimum(1 - 10 ** -rng.uniform(0, 3, n), max_radius)
    if kind == "real":
        a, B, C = radius * rng.choice([-1, 1], n), rng.normal(size=(n, m)), rng.normal(size=(p, n))
    else:
        a = radius * np.exp(2j * np.pi * rng.uniform(size=n))
        B = rng.normal(size=(n, m)) + 1j * rng.normal(size=(n, m))
        C = rng.normal(size=(p, n)) + 1j * rng.normal(size=(p, n))
    if kind == "conjugate pairs":
        half = n // 2
        a = np.concatenate([a[:half], a[:half].conj(), a[2 * half :].real])
        B = np.concatenate([B[:half], B[:half].conj(), B[2 * half :].real])
        C = np.concatenate([C[:, :half], C[:, :half].conj(), C[:, 2 * half :].real], axis=1)
    D = torch.tensor(rng.normal(size=(p, m))) if draw(st.booleans()) else None
    return DiagonalSystem(torch.tensor(a), torch.tensor(B), torch.tensor(C), D)


def dense(system):
    return StateSpace(system.A, system.B, system.C, system.D)


def scipy_matrices(system):
    D = np.zeros((len(system.C), system.B.shape[1])) if system.D is None else system.D.numpy()
    return system.A.numpy(), system.B.numpy(), system.C.numpy(), D


def relative_error(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / (np.abs(expected).max() + np.finfo(float).tiny)


REAL_SYSTEM = DiagonalSystem(
    torch.tensor([0.9, -0.5, 0.3]),
    torch.tensor([[1.0, 0.0], [2.0, 1.0], [-1.0, 0.5]]),
    torch.tensor([[1.0, -1.0, 2.0]]),
    torch.tensor([[0.25, 0.5]]),
)


@settings(max_examples=50, deadline=None)
@given(system=diagonal_systems())
def test_gramians_solve_the_lyapunov_equations(system):
    A, B, C, _ = scipy_matrices(system)
    P = solve_discrete_lyapunov(A, B @ B.conj().T, method="direct")
    Q = solve_discrete_lyapunov(A.conj().T, C.conj().T @ C, method="direct")
    for candidate in (system, dense(system)):
        assert relative_error(candidate.controllability_gramian(), P) < 1e-9
        assert relative_error(candidate.observability_gramian(), Q) < 1e-9


def test_gramians_of_a_dense_system_that_is_not_normal():
    A = torch.tensor([[0.5, 3.0, 0.2j], [0.0, 0.8j, -1.0], [0.0, 0.0, -0.3]])
    system = StateSpace(A, torch.ones(3, 1), torch.tensor([[1.0, -2.0, 0.5]]))
    P, Q, B, C, A = (
        system.controllability_gramian(),
        system.observability_gramian(),
        system.B,
        system.C,
        system.A,
    )
    torch.testing.assert_close(A @ P @ A.mH + B @ B.mH, P)
    torch.testing.assert_close(A.mH @ Q @ A + C.mH @ C, Q)


@settings(max_examples=50, deadline=None)
@given(system=diagonal_systems())
def test_frequency_response_matches_the_transfer_function(system):
    omega = torch.linspace(-np.pi, np.pi, 23)
    A, B, C, D = scipy_matrices(system)
    z = np.exp(1j * omega.double().numpy())
    expected = np.stack([C @ np.linalg.inv(zk * np.eye(len(A)) - A) @ B + D for zk in z])
    for candidate in (system, dense(system)):
        response = candidate.frequency_response(omega)
        assert response.dtype == torch.complex128
        assert relative_error(response, expected) < 1e-9


@pytest.mark.parametrize("candidate", [REAL_SYSTEM, dense(REAL_SYSTEM)], ids=["diagonal", "dense"])
def test_responses_match_scipy_signal(candidate):
    A, B, C, D = scipy_matrices(REAL_SYSTEM)
    omega = torch.linspace(0.1, 3.0, 17, dtype=torch.float64)
    for i in range(2):  # dfreqresp takes one input at a time
        _, expected = signal.dfreqresp((A, B[:, [i]], C, D[:, [i]], 1.0), w=omega.numpy())
        assert relative_error(candidate.frequency_response(omega)[:, 0, i], expected) < 1e-10
    _, expected = signal.dimpulse((A, B, C, D, 1.0), n=9)
    assert relative_error(candidate.impulse_response(9), np.stack(expected, axis=-1)) < 1e-12

    u = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, y, _ = signal.dlsim((A, B, C, D, 1.0), u.numpy())
    h = candidate.impulse_response(30)
    convolved = torch.stack([sum(h[k - j] @ u[j] for j in range(k + 1)) for k in range(30)])
    assert relative_error(convolved, y) < 1e-12


@settings(max_examples=30, deadline=None)
@given(system=diagonal_systems(), length=st.integers(1, 12))
def test_impulse_response_is_the_state_recursion(system, length):
    A, B, C, D = scipy_matrices(system)
    expected = [D.astype(complex), *(C @ np.linalg.matrix_power(A, k) @ B for k in range(length - 1))]
    for candidate in (system, dense(system)):
        assert relative_error(candidate.impulse_response(length), np.stack(expected)) < 1e-10


def test_lti_gramian_broadcasts_over_channels():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(5, 3, generator=generator) * 0.99
    B = torch.randn(3, generator=generator)
    gramians = lti_gramian(a, torch.outer(B, B))  # B is shared by all channels
    assert gramians.shape == (5, 3, 3)
    assert gramians.dtype == torch.float64
    for a_d, P_d in zip(a.double().numpy(), gramians, strict=True):
        assert relative_error(P_d, solve_discrete_lyapunov(np.diag(a_d), torch.outer(B, B).numpy())) < 1e-12


def test_results_are_in_double_precision_whatever_the_inputs():
    assert REAL_SYSTEM.a.dtype == REAL_SYSTEM.controllability_gramian().dtype == torch.float64
    mixed = DiagonalSystem(torch.tensor([0.5j]), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    assert mixed.B.dtype == mixed.impulse_response(3).dtype == torch.complex128


@pytest.mark.parametrize("pole", [1.0, -1.0, 1.5, float("nan"), 0.6 + 0.8j, float("inf")])
def test_unstable_systems_are_refused(pole):
    a, B, C = torch.tensor([0.5, pole]), torch.ones(2, 1), torch.ones(1, 2)
    with pytest.raises(ValueError, match="not stable"):
        DiagonalSystem(a, B, C)
    with pytest.raises(ValueError, match="not stable"):
        lti_gramian(a, torch.eye(2))
    if np.isfinite(pole):
        system = StateSpace(torch.diag(1.001 * a), B, C)
        with pytest.raises(ValueError, match="not stable"):
            system.controllability_gramian()
        with pytest.raises(ValueError, match="not stable"):
            system.observability_gramian()


@pytest.mark.parametrize(
    ("B", "C", "D"),
    [((3, 1), (1, 2), None), ((2, 1), (1, 3), None), ((2, 3), (1, 2), (3, 1)), ((2,), (1, 2), None)],
)
def test_shapes_that_do_not_fit_are_refused(B, C, D):
    B, C, D = torch.ones(B), torch.ones(C), None if D is None else torch.ones(D)
    with pytest.raises(ValueError, match="do not fit"):
        DiagonalSystem(torch.zeros(2), B, C, D)
    with pytest.raises(ValueError, match="do not fit"):
        StateSpace(torch.zeros(2, 2), B, C, D)


def test_a_state_matrix_of_the_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        DiagonalSystem(torch.zeros(2, 2), torch.ones(2, 1), torch.ones(1, 2))
    with pytest.raises(ValueError, match="do not fit"):
        StateSpace(torch.zeros(2, 3), torch.ones(2, 1), torch.ones(1, 2))
