"""Layers with norms on B and C."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_compressm.hankel.headwise import HeadwiseStatistics
from hf_compressm.hankel.normalised import NormalisedStatistics, refit_normalised
from hf_compressm.hankel.realization import Selection, select_with_readout
from hf_compressm.hankel.refit import parts_to_fit
from hf_compressm.hankel.selective import MambaSystem
from hf_compressm.hankel.spectra import hankel_spectra
from hf_compressm.kernels.reference import mamba_states

CHANNELS, N, R = 6, 8, 4


def norm(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


def make_system(gamma=None, seed=0, length=96) -> MambaSystem:
    """B and C of rank 3 in what drives them, as in a trained layer, so that a few states can do."""
    g = torch.Generator().manual_seed(seed)
    drive = torch.randn(2, length, 3, generator=g)
    weights = torch.Generator().manual_seed(9)
    B = norm(drive @ torch.randn(3, N, generator=weights) + 0.2)
    C = norm(drive @ torch.randn(3, N, generator=weights) - 0.1)
    return MambaSystem(
        u=torch.randn(2, length, CHANNELS, generator=g),
        delta=0.1 + torch.rand(2, length, CHANNELS, generator=g),
        A=-torch.arange(1, N + 1).float().expand(CHANNELS, -1) / 4,
        B=B,
        C=C if gamma is None else gamma * C,
        gate=torch.rand(2, length, CHANNELS, generator=g) + 0.5,
        valid=torch.ones(2, length),
    )


def output(system: MambaSystem) -> torch.Tensor:
    pieces = [
        torch.einsum("btdn,btn->btd", h, system.C[:, time])
        for time, h in mamba_states(system.u, system.delta, system.A, system.B)
    ]
    return torch.cat(pieces, dim=1)


def cut_output(system: MambaSystem, cut, gamma=None) -> torch.Tensor:
    B, C = system.B.double(), system.C.double() if gamma is None else (system.C / gamma).double()
    A = system.A.double()[:, cut.kept] if cut.A is None else cut.A
    slim = replace(
        system,
        A=A,
        B=norm(B @ cut.inputs.mT),
        C=cut.gain * norm(C @ cut.readout.mT),
        u=system.u.double(),
        delta=system.delta.double(),
    )
    y = output(slim)
    return y if cut.skip is None else y + cut.skip * system.u


GAMMA = torch.tensor([1.0, 0.5, -0.7, 2.0, 1.2, 0.9, 1.1, 0.8])


@pytest.mark.parametrize("gamma", [None, GAMMA], ids=["no weights", "weights"])
def test_states_that_do_nothing_go_exactly(gamma):
    """Half of B and C is zero at every token, so that norms over the other half differ from the full ones by a factor."""
    system = make_system(gamma)
    mask = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0])
    C = system.C if gamma is None else system.C / gamma
    system = replace(system, B=norm(system.B * mask), C=norm(C * mask) if gamma is None else gamma * norm(C * mask))
    statistics = NormalisedStatistics(CHANNELS, N, torch.device("cpu"))
    statistics.update(system)
    kept = mask.nonzero().flatten()
    for readout in (None, torch.eye(N, dtype=torch.float64)[kept]):
        cut = statistics.realize(Selection(kept, readout, 0.0), gamma)
        torch.testing.assert_close(cut_output(system, cut, gamma).float(), output(system), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gamma", [None, GAMMA], ids=["no weights", "weights"])
def test_where_all_rows_are_too_many_to_fit_at_once_parts_are(monkeypatch, gamma):
    monkeypatch.setattr("hf_compressm.hankel.moments.MAX_READOUT", N)
    system = make_system(gamma)
    statistics = NormalisedStatistics(CHANNELS, N, torch.device("cpu"))
    statistics.update(system)
    start = statistics.realize(select_with_readout(statistics.groups[0])[R], gamma)
    (before, cut), full = (refit_normalised([system], start, rounds, gamma) for rounds in (0, 2)), output(system)
    difference = system.gate * (cut_output(system, cut, gamma) - full)
    true = float(difference.square().sum() / (system.gate * full).square().sum())
    assert cut.error == pytest.approx(true, rel=1e-2, abs=1e-5)
    assert cut.error < 0.9 * before.error
    fitted = {state for part in parts_to_fit(start.readout, 2) for states in part for state in states.tolist()}
    (stays,) = set(range(R)) - fitted
    assert torch.equal(cut.inputs[stays], start.inputs[stays])
    assert torch.equal(cut.readout[stays], start.readout[stays])


@pytest.mark.parametrize("gamma", [None, GAMMA], ids=["no weights", "weights"])
def test_the_refit_is_better_than_its_start_and_says_how_good_it_is(gamma):
    system = make_system(gamma)
    statistics = NormalisedStatistics(CHANNELS, N, torch.device("cpu"))
    statistics.update(system)
    greedy = statistics.realize(Selection(torch.arange(R), None, 1.0), gamma)
    fitted = statistics.realize(select_with_readout(statistics.groups[0])[R], gamma)
    full = output(system)

    def error(cut) -> float:
        difference = system.gate * (cut_output(system, cut, gamma) - full)
        return float(difference.square().sum() / (system.gate * full).square().sum())

    for start in (greedy, fitted):
        errors = []
        for rounds in (0, 1, 3):
            cut = refit_normalised([system], start, rounds, gamma)
            assert cut.error == pytest.approx(error(cut), rel=1e-2, abs=1e-5)
            errors.append(cut.error)
        assert errors[0] <= error(start) + 1e-6
        assert errors[2] <= errors[1] < errors[0]
    assert error(fitted) < error(greedy)
    assert errors[2] < 0.7 * error(fitted)
    # It holds on tokens that it was not fitted to.
    system = make_system(gamma, seed=1)
    full = output(system)
    assert error(cut) < error(fitted)


def test_one_gain_for_all_where_the_norms_have_no_weights():
    system = make_system()
    statistics = NormalisedStatistics(CHANNELS, N, torch.device("cpu"))
    statistics.update(system)
    cut = refit_normalised([system], statistics.realize(Selection(torch.arange(R), None, 1.0), None), 1, None)
    assert cut.gain.unique().numel() == 1


def test_heads_are_layers_of_their_own():
    systems = [make_system(seed=0), make_system(seed=1)]
    both = HeadwiseStatistics(2, CHANNELS, N, torch.device("cpu"))
    both.update(systems)
    for head, system in enumerate(systems):
        alone = HeadwiseStatistics(1, CHANNELS, N, torch.device("cpu"))
        alone.update([system])
        assert torch.equal(hankel_spectra([both])[0][head], hankel_spectra([alone])[0][0])
        assert torch.equal(both.modal_gain()[head], alone.modal_gain()[0])
        assert torch.equal(both.groups[head].contribution, alone.groups[0].contribution)
    assert both.tokens == systems[0].valid.sum()
