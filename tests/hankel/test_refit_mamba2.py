"""The refit of a Mamba-2 layer's B and C, against float64 loops and against layers that can be cut exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from hf_compressm.hankel.refit_mamba2 import IndependentLoss, OwnLoss, Reading, Rows, controllability, refit_rows
from hf_compressm.hankel.selective import Mamba2System
from hf_compressm.kernels.chunked import ChunkedScan

HEADS, HEAD_DIM, GROUPS, N, HIDDEN, KERNEL = 4, 3, 2, 4, 6, 3


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(states: int = N) -> Rows:
    return Rows(
        normal(2, GROUPS, states, HIDDEN, seed=1),
        normal(2, GROUPS, states, KERNEL, seed=2),
        normal(2, GROUPS, states, seed=3),
        normal(2, GROUPS, states, seed=4),
    )


def maps(rows: Rows, u: torch.Tensor, act) -> tuple[torch.Tensor, torch.Tensor]:
    """B and C, token by token."""
    q = torch.einsum("blc,kgnc->blkgn", u, rows.weight) + (0 if rows.bias is None else rows.bias)
    out = torch.zeros_like(q) + rows.conv_bias
    for t in range(u.shape[1]):
        for k in range(KERNEL):
            if t - KERNEL + 1 + k >= 0:
                out[:, t] += rows.taps[..., k] * q[:, t - KERNEL + 1 + k]
    B, C = act(out).unbind(2)
    return B, C


def states(system: Mamba2System, B: torch.Tensor) -> torch.Tensor:
    """The recurrence as written in the paper, [batch, length, heads, head_dim, N]."""
    h, every = torch.zeros(*system.x.shape[:1], HEADS, HEAD_DIM, B.shape[-1], dtype=B.dtype), []
    for t in range(B.shape[1]):
        decay = torch.exp(system.delta[:, t] * system.A)[..., None, None]
        drive = (system.delta[:, t, :, None] * system.x[:, t])[..., None]
        h = decay * h + drive * B[:, t].repeat_interleave(HEADS // GROUPS, 1)[:, :, None]
        every.append(h)
    return torch.stack(every, 1)


def outputs(system: Mamba2System, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    return (states(system, B) * C.repeat_interleave(HEADS // GROUPS, 2)[:, :, :, None]).sum(-1)


def reading(full: Rows, batch: int = 3, length: int = 40, seed: int = 5, act=F.silu) -> Reading:
    u = normal(batch, length, HIDDEN, seed=seed)
    B, C = maps(full, u, act)
    system = Mamba2System(
        x=normal(batch, length, HEADS, HEAD_DIM, seed=seed + 1),
        delta=0.3 * normal(batch, length, HEADS, seed=seed + 2).exp(),
        A=-normal(HEADS, seed=6).exp(),
        B=B,
        C=C,
        gate=normal(batch, length, HEADS, HEAD_DIM, seed=seed + 3),
        valid=torch.ones(batch, length, dtype=torch.float64),
    )
    one = Reading(u, system, act)
    one.system = system  # for the loops
    return one


def lost(one: Reading, some: Rows) -> torch.Tensor:
    y = outputs(one.system, one.system.B, one.system.C) - outputs(one.system, *maps(some, one.u, one.act))
    return (y * one.gate).square().sum((0, 1, 3)).view(GROUPS, -1).sum(1)


@pytest.mark.parametrize("length", [1, 8, 20])
def test_the_scan_in_chunks_and_its_gradients_are_those_of_a_loop(length):
    system = reading(rows(), length=length).system
    B, C = (M.clone().requires_grad_() for M in (system.B, system.C))
    weight = normal(3, length, HEADS, HEAD_DIM, seed=9)
    found = ChunkedScan(system.delta[..., None] * system.x, system.delta * system.A, GROUPS, chunk=8)(B, C)
    expected = outputs(system, B, C)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), (B, C)), torch.autograd.grad((expected * weight).sum(), (B, C))
    )


def test_the_scan_in_chunks_does_not_overflow_where_decays_vanish():
    system = reading(rows()).system
    delta = system.delta.float().requires_grad_()
    fast = ChunkedScan(delta[..., None] * system.x.float(), -1e4 * delta, GROUPS, chunk=4)
    own = (system.x * (system.B * system.C).sum(-1).repeat_interleave(2, 2)[..., None]).float()
    y = fast(system.B.float(), system.C.float())
    torch.testing.assert_close(y, delta.detach()[..., None] * own, rtol=1e-3, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(delta.grad, own.sum(-1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_the_errors_are_those_of_the_cut_layer(bias):
    full = rows() if bias else replace(rows(), bias=None)
    some = full.map(lambda tensor: tensor[:, :, :2])
    readings = [reading(full), reading(full, length=25, seed=15)]
    own, independent = OwnLoss(readings), IndependentLoss(readings)
    torch.testing.assert_close(own(full) / own.energy, torch.zeros(GROUPS, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(own(some), sum(lost(one, some) for one in readings))
    # If any token's read-out met any token's state.
    expected = torch.zeros(GROUPS, dtype=torch.float64)
    H, H_some, C, C_some = [], [], [], []
    for one in readings:
        B_one, C_one = maps(some, one.u, one.act)
        gate = one.gate[..., None]
        H.append((states(one.system, one.system.B) * gate).flatten(0, 1))
        H_some.append((states(one.system, B_one) * gate).flatten(0, 1))
        C.append(one.system.C.flatten(0, 1))
        C_some.append(C_one.flatten(0, 1))
    for head in range(HEADS):
        group = head * GROUPS // HEADS
        full_y = torch.einsum("thn,sn->ths", torch.cat(H)[:, head], torch.cat(C)[:, group])
        some_y = torch.einsum("thn,sn->ths", torch.cat(H_some)[:, head], torch.cat(C_some)[:, group])
        expected[group] += (some_y - full_y).square().sum()
    torch.testing.assert_close(independent(some), expected)
    torch.testing.assert_close(
        independent(full) / independent.energy, torch.zeros(GROUPS, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_states_start_anew_after_a_span_in_the_controllability(monkeypatch):
    one = reading(rows(), length=40)
    monkeypatch.setattr("hf_compressm.hankel.refit_mamba2.SPAN", 16)
    K = controllability(one.system)
    assert K.shape == (9, GROUPS, 16, 16)
    late = {name: getattr(one.system, name)[:, 16:32] for name in ("x", "delta", "B", "C", "gate", "valid")}
    h = states(replace(one.system, **late), one.system.B[:, 16:32]) * one.gate[:, 16:32, ..., None]
    expected = torch.einsum("bthpn,bthpm->bhnm", h, h).unflatten(1, (GROUPS, -1)).sum(2)
    B = one.system.B[:, 16:32].transpose(1, 2)
    torch.testing.assert_close(B.mT @ K.unflatten(0, (3, 3))[:, 1] @ B, expected)


def test_states_that_do_the_same_merge_exactly():
    """With no activation, one state can do what two do: the other's rows go into its own."""
    full = rows().map(torch.clone)
    for tensor in full.tensors().values():
        tensor[:, :, 2:] = tensor[:, :, :2]
    some = full.map(lambda tensor: tensor[:, :, :2])
    train, held = [reading(full, act=lambda q: q)], [reading(full, seed=25, act=lambda q: q)]
    fitted, left = refit_rows(train, held, some, (300, 30))
    assert max(left) < 1e-6
    torch.testing.assert_close(lost(held[0], fitted), lost(held[0], some) * torch.tensor(left, dtype=torch.float64))


def test_a_fit_is_judged_on_what_it_was_not_fitted_to_and_never_worse():
    full = rows()
    some = full.map(lambda tensor: tensor[:, :, :2])
    train, held = [reading(full, length=200)], [reading(full, seed=25)]
    fitted, left = refit_rows(train, held, some, (100, 10))
    before, after = lost(held[0], some), lost(held[0], fitted)
    assert min(left) < 0.5
    torch.testing.assert_close(after / before, torch.tensor(left, dtype=torch.float64))
    # Held-out data that contradicts the fit: everything stays.
    other = [reading(full.map(torch.negative), seed=25)]
    kept, left = refit_rows(train[:1], other, some.map(torch.negative), (100, 10))
    assert all(share <= 1 for share in left)
    for group, share in enumerate(left):
        if share == 1:
            assert all(
                torch.equal(kept.tensors()[name][:, group], -old[:, group]) for name, old in some.tensors().items()
            )


def test_one_group_may_keep_its_rows_where_the_other_is_fitted():
    full = rows().map(torch.clone)
    full.weight[:, 0, 2:] = 0
    full.taps[:, 0, 2:] = 0
    full.conv_bias[:, 0, 2:] = 0
    full.bias[:, 0, 2:] = 0
    some = full.map(lambda tensor: tensor[:, :, :2])
    fitted, (first, second) = refit_rows([reading(full, length=200)], [reading(full, seed=25)], some, (100, 10))
    assert first == 1
    assert second < 0.5
    assert all(torch.equal(new[:, 0], some.tensors()[name][:, 0]) for name, new in fitted.tensors().items())
