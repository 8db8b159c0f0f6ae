"""The refit of A, B, C and D, against a float64 loop and against layers that can be cut exactly."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.hankel.mamba import MambaStatistics
from hf_compressm.hankel.realization import Selection, select_with_readout
from hf_compressm.hankel.refit import RIDGE, parts_to_fit, refit, solve
from hf_compressm.hankel.selective import MambaSystem
from hf_compressm.kernels.reference import mamba_sensitivities

N = 6


def system(seed: int = 0, batch: int = 3, length: int = 40, channels: int = 5) -> MambaSystem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return MambaSystem(
        u=normal(batch, length, channels),
        delta=0.3 * normal(batch, length, channels).exp(),
        A=-normal(channels, N).exp(),
        B=normal(batch, length, N),
        C=normal(batch, length, N),
        gate=normal(batch, length, channels),
        valid=torch.ones(batch, length),
    )


def outputs(u, delta, A, B, C) -> torch.Tensor:
    """The recurrence as written in the paper, one token at a time, in float64."""
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    h, ys = torch.zeros(len(u), *A.shape, dtype=torch.float64), []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta * u)[:, t, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1)


def lost_energy(full: MambaSystem, fit) -> float:
    y = outputs(full.u, full.delta, full.A, full.B, full.C)
    B, C = full.B.double() @ fit.inputs.T, full.C.double() @ fit.readout.T
    new = outputs(full.u, full.delta, fit.A, B, C) + fit.skip * full.u
    return float(((y - new) * full.gate).square().sum() / (y * full.gate).square().sum())


def selection(full: MambaSystem, size: int) -> Selection:
    statistics = MambaStatistics(full.u.shape[2], N, torch.device("cpu"))
    statistics.update(full)
    return select_with_readout(statistics.groups[0])[size]


def test_sensitivities_are_the_derivatives_of_the_scan():
    full = system(length=37)
    log_rates = torch.log(-full.A.double()).requires_grad_()
    h = torch.zeros(len(full.u), *full.A.shape, dtype=torch.float64)
    u, delta, B = full.u.double(), full.delta.double(), full.B.double()
    expected = []
    for t in range(u.shape[1]):
        h = torch.exp(-delta[:, t, :, None] * log_rates.exp()) * h + (delta * u)[:, t, :, None] * B[:, t, None]
        # A state depends on its own rate alone, so that the gradient of the batch's sum is one of single states.
        expected.append([torch.autograd.grad(h[b].sum(), log_rates, retain_graph=True)[0] for b in range(len(h))])
    for time, _, sensitivity in mamba_sensitivities(full.u, full.delta, full.A, full.B, chunk=8):
        for t in range(time.start, time.stop):
            torch.testing.assert_close(
                sensitivity[:, t - time.start], torch.stack(expected[t]).float(), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_reported_error_is_that_of_the_cut_layer(size, rounds):
    full = system()
    fit = refit([full], selection(full, size), rounds)
    assert fit.error == pytest.approx(lost_energy(full, fit), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_rounding_of_float32_sums_does_not_flatter_the_fit(seed):
    """Features of rank 4: in all other directions the normal matrix is nothing but rounding, and not even definite."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2000, 4, generator=generator) @ torch.randn(4, 200, generator=generator)
    y = torch.randn(2000, generator=generator) + features[:, 0]
    normal, right = (features.mT @ features).double(), (features.mT @ y).double()
    solution = solve(normal, right, RIDGE)
    assert float(solution.abs().max()) < 1
    true = float((y.double() - features.double() @ solution).square().sum())
    said = float(y.double().square().sum() - 2 * solution @ right + solution @ normal @ solution)
    assert said == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("rounds", [1, 3])
def test_where_all_rows_are_too_many_to_fit_at_once_parts_are(monkeypatch, limit, rounds):
    monkeypatch.setattr("hf_compressm.hankel.moments.MAX_READOUT", limit * N)
    full = system()
    start = selection(full, 4)
    parts = parts_to_fit(start.readout, rounds)
    candidates = (start.readout.count_nonzero(dim=1) > 1).nonzero()[:, 0]
    assert len(candidates) == limit
    for first, other in parts:
        assert torch.equal(first, candidates)
        assert 1 <= len(other) <= limit
        assert not set(first.tolist()) & set(other.tolist())
    fit = refit([full], start, rounds)
    assert fit.error == pytest.approx(lost_energy(full, fit), rel=1e-3, abs=1e-6)
    assert fit.error < 0.9 * start.error
    fitted = {state for part in parts for states in part for state in states.tolist()}
    assert fitted == set(range(4)) or (limit, rounds) == (1, 1)
    for state in set(range(4)) - fitted:
        assert torch.equal(fit.readout[state], start.readout[state])


@pytest.mark.parametrize("size", [2, 4])
def test_more_rounds_lose_less_than_the_read_out_alone(size):
    full = system()
    start = selection(full, size)
    one, three = (refit([full], start, rounds).error for rounds in (1, 3))
    assert three < one < start.error


def test_states_that_only_differ_in_what_drives_them_merge_exactly():
    full = system()
    twin = full.A.clone()
    twin[:, 3:] = twin[:, :3]
    C = full.C.clone()
    C[..., 3:] = 2 * C[..., :3]
    merged = MambaSystem(full.u, full.delta, twin, full.B, C, full.gate, full.valid)
    assert selection(merged, 3).error > 0.01
    assert refit([merged], Selection(torch.arange(3), None, 1.0), 3).error < 1e-5


def test_a_batch_more_counts():
    first, second = system(0), system(1)
    second = MambaSystem(second.u, second.delta, first.A, second.B, second.C, second.gate, second.valid)
    joined = MambaSystem(
        **{
            name: first.A if name == "A" else torch.cat([getattr(first, name), getattr(second, name)])
            for name in ("u", "delta", "A", "B", "C", "gate", "valid")
        }
    )
    start = selection(joined, 3)
    apart, together = refit([first, second], start, 2), refit([joined], start, 2)
    torch.testing.assert_close(apart.readout, together.readout, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(apart.A, together.A, rtol=1e-4, atol=1e-5)


def test_padding_says_nothing():
    full = system()
    late = torch.zeros(3, 7, 5)

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.new_zeros(3, 7, x.shape[2]), x], dim=1)

    padded = MambaSystem(
        pad(full.u), pad(full.delta) + torch.cat([late + 0.5, torch.zeros_like(full.u)], 1), full.A, pad(full.B),
        pad(full.C), pad(full.gate), torch.cat([torch.zeros(3, 7), full.valid], 1),
    )  # fmt: skip
    start = selection(full, 3)
    torch.testing.assert_close(
        refit([full], start, 2).readout, refit([padded], start, 2).readout, rtol=1e-4, atol=1e-5
    )
