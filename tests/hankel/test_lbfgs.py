"""L-BFGS against scipy's."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der

from hf_compressm.hankel.lbfgs import LBFGS


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


@pytest.mark.parametrize("history", [5, 50])
def test_it_finds_the_minimum_as_quickly_as_scipy(history):
    start = torch.linspace(-1, 2, 12, dtype=torch.float64)
    search = LBFGS(rosenbrock, start, history)
    theirs = minimize(
        rosen, start.numpy(), jac=rosen_der, method="L-BFGS-B", options={"maxcor": history, "gtol": 1e-6}
    )
    search.run(round(1.5 * theirs.nfev))
    assert search.value < 1e-6
    assert search.value == pytest.approx(float(rosenbrock(search.x)))
    torch.testing.assert_close(search.x, torch.ones_like(start), rtol=0, atol=1e-2)


def test_it_never_goes_up_and_stops_where_there_is_no_way_down():
    search = LBFGS(lambda x: (x - 3).pow(4).sum(), torch.zeros(3), 4)
    values = [search.value]
    while search.run(1) and search.evaluations < 200:
        values.append(search.value)
    assert values == sorted(values, reverse=True)
    assert search.value < 1e-6
    flat = LBFGS(lambda x: (0 * x).sum(), torch.ones(3), 4)
    assert not flat.run(10)
    assert torch.equal(flat.x, torch.ones(3))


def test_values_that_are_not_finite_are_stepped_back_from():
    search = LBFGS(lambda x: x.sum() - x.log().sum(), torch.tensor([1e-3, 5.0]), 4)  # NaN below 0
    search.run(60)
    torch.testing.assert_close(search.x, torch.ones(2), rtol=0, atol=1e-2)
