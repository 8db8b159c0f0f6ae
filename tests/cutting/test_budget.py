"""The user says how far the predictions may move, and gets the smallest state that keeps it."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.cutting.budget import TRIALS, Ladder, keep_budget
from hf_compressm.cutting.divergence import Divergence
from hf_compressm.layers import find_layers
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2

COSTS = [torch.tensor([9.0, 4.0, 1.0, 0.0]), torch.tensor([5.0, 0.5, 0.2, 0.0])]
CHOICES = [[1, 2, 3, 4], [1, 2, 4]]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(2))


def held_out(ids) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids[3::4], "attention_mask": torch.ones_like(ids[3::4])}]


def test_a_ladder_has_the_best_sizes_of_every_total():
    ladder = Ladder(COSTS, CHOICES, uniform=False)
    best: dict[int, float] = {}
    for sizes in itertools.product(*CHOICES):
        cost = sum(float(costs[size - 1]) for costs, size in zip(COSTS, sizes, strict=True))
        best[sum(sizes)] = min(best.get(sum(sizes), 1e9), cost)
    for number in range(len(ladder)):
        rung = ladder[number]
        assert rung.predicted == pytest.approx(best[sum(rung.sizes)])
        assert all(rung.predicted < cost for total, cost in best.items() if total < sum(rung.sizes))
    assert ladder[len(ladder) - 1].sizes == [4, 4]


def test_a_uniform_ladder_has_one_size():
    ladder = Ladder(COSTS, CHOICES, uniform=True)
    assert [ladder[number].sizes for number in range(len(ladder))] == [[1, 1], [2, 2], [4, 4]]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("budget", [0.01, 0.4, 1.7, 3.0, 100.0])
def test_the_lowest_rung_within_the_budget_is_found(budget, factor):
    """Whatever the factor between predicted and measured costs, and though it is not the same on every rung."""
    ladder = Ladder(COSTS, CHOICES, uniform=False)
    true = {tuple(ladder[n].sizes): ladder.predicted[n] * factor * (1 + 0.2 * (n % 2)) for n in range(len(ladder))}
    made, row, _ = keep_budget(ladder, budget, lambda sizes: tuple(sizes), lambda sizes: true[sizes], 7)
    within = [n for n in range(len(ladder)) if true[tuple(ladder[n].sizes)] <= budget]
    expected = ladder[within[0]].sizes
    assert (list(made) if made else [4, 4]) == expected
    assert row.measured == (true[made] if made else 0.0)
    assert row.measured <= row.asked == budget


def test_a_cut_is_found_where_the_curves_promise_too_much():
    """The trials would climb a rung at a time, and end before the first one within the budget."""
    costs = torch.logspace(0, -6, 64).double()
    ladder = Ladder([costs], [list(range(1, 65))], uniform=False)
    measured = {(size,): 1.0 if size < 30 else 0.01 for size in range(1, 65)}
    made, row, _ = keep_budget(ladder, 0.9, tuple, lambda sizes: measured[sizes], 7)
    assert 30 <= made[0] < 64
    assert row.measured == 0.01


@pytest.mark.parametrize("first", [40, 390, 399])
def test_the_last_trial_is_the_highest_rung_below_the_top(first):
    ladder = Ladder([0.97 ** torch.arange(400).double()], [list(range(1, 401))], uniform=False)
    tried = []
    made, row, _ = keep_budget(ladder, 1.0, tuple, lambda sizes: tried.append(sizes) or 0.5 + (sizes[0] < first), 7)
    assert first <= made[0] < 400
    assert row.measured == 0.5
    assert len(tried) <= TRIALS


@pytest.mark.parametrize("uniform", [False, True])
def test_the_last_rung_is_the_present_sizes_where_a_cut_is_free(uniform):
    ladder = Ladder([torch.tensor([2.0, 0.0, 0.0, 0.0])] * 2, [[1, 2, 3, 4]] * 2, uniform)
    assert [ladder[number].sizes for number in range(len(ladder))][-2:] == [[2, 2], [4, 4]]
    made, row, _ = keep_budget(ladder, 0.5, tuple, lambda sizes: 2.0 * sizes.count(1), 7)
    assert (made, row.measured) == ((2, 2), 0.0)


def test_states_that_do_nothing_are_cut(ids, mamba2):
    """Half of them, which read nothing."""
    with torch.no_grad():
        for layer in find_layers(mamba2):
            mixer = layer.mixer
            inner, N = mixer.intermediate_size, mixer.ssm_state_size
            mixer.in_proj.weight[2 * inner + N // 2 : 2 * inner + N] = 0
            mixer.conv1d.bias[inner + N // 2 : inner + N] = 0
    report = compress_(mamba2, CompreSSMConfig(max_divergence=1e-6, realization="select", refit=0), ids)
    assert report.sizes == {0: 8, 1: 8}
    assert report.divergence.measured == 0


def test_a_trial_that_breaks_the_model_tells_no_factor():
    ladder = Ladder(COSTS, CHOICES, uniform=False)
    made, row, factor = keep_budget(ladder, 100.0, tuple, lambda sizes: float("inf"), 7)
    assert (made, row.measured, factor) == ({}, 0.0, 1.0)
    assert all(math.isfinite(point.divergence) for point in ladder.tradeoff(factor))


@pytest.mark.parametrize("weights", ["fisher", "gate"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: tiny_mamba(16), {}),
        (lambda: tiny_mamba(16), {"uniform": True}),
        (lambda: tiny_mamba2(32, groups=2), {}),
        (lambda: tiny_mamba2(32), {"realization": "select"}),
    ],
    ids=["mamba", "uniform", "mamba2", "select"],
)
def test_the_budget_is_kept_as_measured_and_one_rung_less_breaks_it(ids, make, options, weights):
    model, budget = make(), 0.05
    full = copy.deepcopy(model)
    config = CompreSSMConfig(max_divergence=budget, weights=weights, **options)
    report = compress_(model, config, ids)
    row = report.divergence
    assert row.asked == budget
    assert row.tokens == ids[3::4].numel()
    assert row.measured <= budget
    # What the report says is what the model does, on the quarter of the data that was held out.
    moved = Divergence(full, held_out(ids))
    for layer, other in zip(find_layers(full), find_layers(model), strict=True):
        parent, _, name = layer.name.rpartition(".")
        setattr(full.get_submodule(parent), name, other.mixer)
    assert moved() == pytest.approx(row.measured, rel=1e-3)
    assert report.states_after < report.states_before
    if "uniform" in options:
        assert len(set(report.sizes.values())) == 1
    states = [point.states for point in report.tradeoff]
    costs = [point.divergence for point in report.tradeoff]
    assert states == sorted(states)
    assert costs == sorted(costs, reverse=True)
    assert states[-1] == report.states_before


def test_a_larger_budget_never_keeps_more_states(ids):
    measurement = measure(tiny_mamba(16), ids)
    kept = [measurement.plan(CompreSSMConfig(max_divergence=b)).report.states_after for b in (0.001, 0.01, 0.1, 1.0)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_it_is_the_default_after_training(ids):
    one, two = tiny_mamba(), tiny_mamba()
    assert compress_(one, None, ids) == compress_(two, CompreSSMConfig(max_divergence=0.01), ids)
    assert torch.equal(one(ids).logits, two(ids).logits)


def test_nothing_is_cut_where_one_state_less_breaks_it(ids):
    model = tiny_mamba2(16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = compress_(model, CompreSSMConfig(max_divergence=1e-9), ids)
    assert report.states_after == report.states_before
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_without_a_token_judge_nothing(ids):
    mask = torch.ones_like(ids)
    mask[3::4] = 0  # which would be held out
    report = compress_(
        tiny_mamba2(16), CompreSSMConfig(max_divergence=1e-9), {"input_ids": ids, "attention_mask": mask}
    )
    assert report.divergence.tokens == 3 * ids.shape[1]
    assert report.states_after == report.states_before


def test_planning_leaves_the_model_as_it_was(ids):
    model = tiny_mamba()
    mixers = [layer.mixer for layer in find_layers(model)]
    logits = model(ids).logits
    measure(model, ids).plan()
    assert [layer.mixer for layer in find_layers(model)] == mixers
    assert torch.equal(model(ids).logits, logits)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_without_a_head(ids):
    model = tiny_mamba(16).backbone
    report = compress_(model, CompreSSMConfig(max_divergence=0.02), ids)
    assert 0 < report.divergence.measured <= 0.02
    assert report.states_after < report.states_before


def test_one_sequence_is_parted_in_time_and_a_short_one_refused(ids):
    long = ids.reshape(1, -1)
    report = compress_(tiny_mamba(16), CompreSSMConfig(max_divergence=0.05), long)
    assert report.divergence.tokens == long.shape[1] // 4
    with pytest.raises(ValueError, match="two sequences"):
        compress_(tiny_mamba(), CompreSSMConfig(max_divergence=0.05), ids[:1, :20])
