"""Ranks against their definitions, and the allocation against brute force."""

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compressm.hankel.ranks import allocate_ranks, allowed_sizes, energy_rank, powers_of_two, round_up

# Integers are exact in float64, so that Fraction can say what the rank is.
spectra = st.lists(st.integers(0, 10**6), min_size=1, max_size=12).map(lambda x: sorted(x, reverse=True))
percent = st.integers(0, 99)


def exact_rank(sigma, tolerance):
    return next(r for r in range(len(sigma) + 1) if sum(sigma[:r]) >= (1 - tolerance) * sum(sigma))


@settings(max_examples=300, deadline=None)
@given(sigma=spectra, percent=percent)
def test_energy_rank_is_its_definition(sigma, percent):
    rank = energy_rank(torch.tensor(sigma), percent / 100)
    expected = max(1, exact_rank(sigma, Fraction(percent, 100))) if percent else len(sigma)
    assert rank == expected
    assert rank.dtype == torch.int64


@settings(max_examples=100, deadline=None)
@given(
    sigma=st.lists(st.floats(0, 1e30), min_size=1, max_size=12).map(lambda x: sorted(x, reverse=True)),
    tolerances=st.tuples(*2 * [st.floats(0, 1, exclude_max=True)]).map(sorted),
)
def test_energy_rank_falls_as_the_tolerance_rises(sigma, tolerances):
    sigma = torch.tensor(sigma, dtype=torch.float64)
    strict, loose = (int(energy_rank(sigma, tolerance)) for tolerance in tolerances)
    assert 1 <= loose <= strict <= len(sigma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tolerance_zero_means_no_cut(dtype):
    assert energy_rank(torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=dtype), 0) == 4
    assert energy_rank(torch.zeros(4, dtype=dtype), 0.0) == 4
    assert energy_rank(torch.tensor([1.0, 1e-20, 1e-30], dtype=dtype), 0) == 3


def test_zero_spectrum_has_rank_one():
    assert energy_rank(torch.zeros(5), 0.05) == 1


def test_trailing_zeros_go_at_the_least_tolerance():
    assert energy_rank(torch.tensor([3.0, 1.0, 0.0, 0.0]), 1e-9) == 2


def test_small_tolerances_are_not_lost_in_the_slack_for_rounding():
    assert energy_rank(torch.tensor([1.0, 1e-9], dtype=torch.float64), 1e-10) == 2
    assert energy_rank(torch.tensor([1.0, 1e-9], dtype=torch.float64), 1e-8) == 1


@pytest.mark.parametrize("n", [3, 10, 100, 128])
@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_at_the_threshold_do_not_hang_on_rounding(n, scale, dtype):
    sigma = torch.full((n,), scale, dtype=dtype)
    for cut in range(1, n):
        assert energy_rank(sigma, cut / n) == n - cut


def test_energy_rank_of_a_batch():
    sigma = torch.tensor([[[8.0, 1.0, 1.0], [1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0], [10.0, 0.0, 0.0]]])
    assert energy_rank(sigma, 0.2).tolist() == [[1, 3], [1, 1]]
    assert energy_rank(sigma, 0).tolist() == [[3, 3], [3, 3]]


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, 2.0, float("nan")])
def test_energy_rank_refuses_a_tolerance_that_is_no_share(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        energy_rank(torch.ones(3), tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("tolerance", [0, 0.1])
def test_energy_rank_refuses_spectra_that_are_none(value, tolerance):
    with pytest.raises(ValueError, match="singular values"):
        energy_rank(torch.tensor([1.0, value]), tolerance)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((5, 1, 1, 16), 5),
        ((5, 4, 1, 16), 8),
        ((8, 4, 1, 16), 8),
        ((3, 1, 6, 16), 6),
        ((3, 4, 6, 16), 8),
        ((13, 8, 1, 15), 15),
        ((1, 1, 16, 8), 8),
        ((20, 1, 1, 16), 16),
        ((20, 16, 1, None), 32),
    ],
)
def test_round_up(arguments, expected):
    assert round_up(*arguments) == expected


def expected_sizes(n, minimum, multiple_of):
    return [r for r in range(1, n + 1) if r == n or (r >= minimum and r % multiple_of == 0)]


@given(n=st.integers(1, 40), minimum=st.integers(1, 40), multiple_of=st.integers(1, 9))
def test_allowed_sizes(n, minimum, multiple_of):
    assert allowed_sizes(n, minimum, multiple_of) == expected_sizes(n, minimum, multiple_of)


@pytest.mark.parametrize(
    ("n", "minimum", "expected"),
    [
        (128, 16, [16, 32, 64, 128]),
        (100, 16, [16, 32, 64, 100]),
        (64, 20, [32, 64]),
        (16, 16, [16]),
        (12, 16, [12]),
        (5, 1, [1, 2, 4, 5]),
        (1, 1, [1]),
    ],
)
def test_powers_of_two(n, minimum, expected):
    assert powers_of_two(n, minimum) == expected


def test_allocation_over_given_sizes_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    costs = [
        torch.rand(n, dtype=torch.float64, generator=generator).sort(descending=True).values for n in (64, 64, 40)
    ]
    sizes = [powers_of_two(len(table), 16) for table in costs]
    for total in (48, 70, 100, 131, 168, 500):
        feasible = [choice for choice in itertools.product(*sizes) if sum(choice) <= total]
        reachable = max(map(sum, feasible))
        best = min(
            (choice for choice in feasible if sum(choice) == reachable),
            key=lambda choice: sum(float(table[r - 1]) for table, r in zip(costs, choice, strict=True)),
        )
        assert allocate_ranks(costs, total, sizes) == list(best)
    with pytest.raises(ValueError, match="need at least 48"):
        allocate_ranks(costs, 47, sizes)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    share=st.floats(0, 1.2),
    minimum=st.integers(1, 4),
    multiple_of=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    noise=st.sampled_from([0.0, 0.1, 10.0]),
)
def test_allocation_equals_brute_force(sizes, share, minimum, multiple_of, seed, noise):
    generator = torch.Generator().manual_seed(seed)
    costs = []
    for n in sizes:
        falling = torch.rand(n, dtype=torch.float64, generator=generator).flip(0).cumsum(0).flip(0)
        costs.append(falling + noise * torch.rand(n, dtype=torch.float64, generator=generator))
    total = round(share * sum(sizes))

    allowed = [expected_sizes(n, minimum, multiple_of) for n in sizes]
    feasible = [choice for choice in itertools.product(*allowed) if sum(choice) <= total]
    if not feasible:
        with pytest.raises(ValueError, match="cannot be shared"):
            allocate_ranks(costs, total, allowed)
        return

    def cost(ranks):
        return sum(table[r - 1].item() for table, r in zip(costs, ranks, strict=True))

    reachable = max(map(sum, feasible))
    best = min(cost(choice) for choice in feasible if sum(choice) == reachable)
    ranks = allocate_ranks(costs, total, allowed)
    assert tuple(ranks) in feasible
    assert sum(ranks) == reachable
    assert cost(ranks) == pytest.approx(best, abs=1e-12)


def test_allocation_gives_states_to_the_layer_that_needs_them():
    needy, easy = torch.tensor([9.0, 6.0, 3.0, 0.0]), torch.tensor([0.2, 0.1, 0.0, 0.0])
    assert allocate_ranks([easy, needy, easy], 6, [range(1, 5)] * 3) == [1, 4, 1]


def test_allocation_of_everything_is_no_cut():
    for total in (12, 100):
        assert allocate_ranks([torch.rand(5), torch.rand(7)], total, [[4, 5], [4, 7]]) == [5, 7]


def test_allocation_names_the_least_total():
    with pytest.raises(ValueError, match="2 layers that need at least 8"):
        allocate_ranks([torch.rand(16), torch.rand(16)], 7, [[4, 8, 12, 16]] * 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_allocation_refuses_costs_that_are_not_finite(value):
    with pytest.raises(ValueError, match="finite"):
        allocate_ranks([torch.tensor([1.0, value])], 1, [[1, 2]])


def test_allocation_at_full_size_is_the_greedy_one_where_costs_are_convex():
    generator = torch.Generator().manual_seed(0)
    gains = torch.rand(24, 128, generator=generator, dtype=torch.float64).sort(dim=1, descending=True).values
    ranks = allocate_ranks(list(gains.sum(1, keepdim=True) - gains.cumsum(1)), 24 * 64, [range(1, 129)] * 24)
    # Each layer's first state, then the largest gains of all.
    taken = torch.zeros(24 * 127, dtype=torch.long)
    taken[gains[:, 1:].flatten().argsort(descending=True)[: 24 * 63]] = 1
    assert ranks == (1 + taken.view(24, 127).sum(1)).tolist()
