"""Projections by head: Gramians of each head, their balance, and how the heads share the states."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_compressm.hankel.balanced_truncation import balance
from hf_compressm.hankel.by_head import HeadPaths, balance_heads
from hf_compressm.hankel.mamba2 import Mamba2Statistics
from hf_compressm.hankel.selective import Mamba2System
from hf_compressm.hankel.singular_values import gramian_factor

HEADS, GROUPS, N = 4, 2, 6


def system(length: int = 25) -> Mamba2System:
    generator = torch.Generator().manual_seed(0)
    valid = torch.ones(2, length)
    valid[0, :4] = 0

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, length, *shape, generator=generator)

    return Mamba2System(
        x=normal(HEADS, 3) * valid[..., None, None],
        delta=torch.rand(2, length, HEADS, generator=generator),
        A=-torch.rand(HEADS, generator=generator),
        B=normal(GROUPS, N),
        C=normal(GROUPS, N),
        gate=normal(HEADS, 3) * valid[..., None, None],
        valid=valid,
    )


def gramians(n: int = HEADS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(n + 1, N, N, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, N)
    P = factors @ factors.mT
    return P[:-1], P[-1]


def test_the_gramian_of_each_head_is_that_of_a_loop_in_float64():
    s, statistics = system(), Mamba2Statistics(HEADS, GROUPS, N, torch.device("cpu"))
    for rows in (slice(0, 1), slice(1, 2)):
        statistics.update(
            Mamba2System(**{name: value if name == "A" else value[rows] for name, value in vars(s).items()})
        )
    P = torch.zeros(HEADS, N, N, dtype=torch.float64)
    for row, head, channel in itertools.product(range(2), range(HEADS), range(3)):
        h, group = torch.zeros(N, dtype=torch.float64), head * GROUPS // HEADS
        for t in range(s.x.shape[1]):
            step = s.delta[row, t, head].double()
            h = (step * s.A[head].double()).exp() * h + step * s.x[row, t, head, channel] * s.B[row, t, group].double()
            P[head] += s.gate[row, t, head, channel].double() ** 2 * torch.outer(h, h)
    torch.testing.assert_close(statistics.P_of_heads, P, rtol=1e-5, atol=1e-5 * float(P.abs().max()))
    torch.testing.assert_close(statistics.P, P.unflatten(0, (GROUPS, -1)).sum(1), rtol=1e-5, atol=1e-4)


def test_the_mean_lti_gramian_of_a_group_is_the_sum_of_its_heads():
    statistics = Mamba2Statistics(HEADS, GROUPS, N, torch.device("cpu"), mean_lti=True)
    statistics.update(system())
    P = statistics.P_of_heads
    assert P.shape == (HEADS, N, N)
    torch.testing.assert_close(statistics.P, P.unflatten(0, (GROUPS, -1)).sum(1))


def test_a_head_is_balanced_as_any_system():
    """By one eigendecomposition for both factors: the same singular values, and the same projector of each size."""
    P, output = gramians()
    sigma, B_maps, C_maps = balance_heads(P, output)
    for head, Gramian in enumerate(P):
        expected, Rm, Lm = balance(gramian_factor(output), gramian_factor(Gramian), N)
        torch.testing.assert_close(sigma[head], expected, rtol=1e-6, atol=1e-9)
        for r in (1, 3, N):
            found = C_maps[head, :, :r] @ B_maps[head, :, :r].mT
            torch.testing.assert_close(found, Rm[:, :r] @ Lm[:, :r].mT, rtol=1e-6, atol=1e-7)
    # Both are diag(sigma) in the new coordinates.
    torch.testing.assert_close(B_maps.mT @ P @ B_maps, torch.diag_embed(sigma), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(C_maps.mT @ output @ C_maps, torch.diag_embed(sigma), rtol=1e-6, atol=1e-7)


def test_directions_without_energy_become_zeros():
    P, output = gramians()
    P[0] = torch.outer(P[0, 0], P[0, 0])
    P[1] = 0
    _, B_maps, C_maps = balance_heads(P, output)
    assert B_maps.isfinite().all()
    assert not B_maps[0, :, 1:].any()
    assert not C_maps[1].any()


@pytest.mark.parametrize("total", range(1, 13))
def test_no_way_to_share_the_states_loses_less(total):
    """Against all of them, on three heads whose energies differ."""
    P, output = gramians(3)
    P, output = P[:, :4, :4] * torch.tensor([1.0, 30.0, 5.0])[:, None, None], output[:4, :4]
    carried = balance_heads(P, output)[0].square()

    def lost(sizes) -> float:
        return sum(float(carried[head, size:].sum()) for head, size in enumerate(sizes))

    paths = HeadPaths(P, [output])
    sizes = paths.sizes(total)
    assert sum(sizes) == total
    ways = [way for way in itertools.product(range(5), repeat=3) if sum(way) == total]
    assert lost(sizes) == pytest.approx(min(map(lost, ways)), rel=1e-9, abs=1e-12)
    (group,) = paths[total]
    assert group.sizes == sizes
    assert group.error == pytest.approx(lost(sizes) / lost([0, 0, 0]), abs=1e-12)


def test_groups_share_one_total_and_tell_their_own_errors():
    P, output = gramians()
    paths = HeadPaths(P, [output, 100 * output])
    first, second = paths[12]
    assert sum(first.sizes) < sum(second.sizes)
    assert first.error > second.error
    assert all(head.B_projection.shape == (N, size) for head, size in zip(first.heads, first.sizes, strict=True))
