"""The scans against plain float64 loops over time."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compressm.kernels import chunked
from hf_compressm.kernels.reference import mamba2_states, mamba_states, observability_gramian


def sizes(**bounds: tuple[int, int]) -> dict[str, st.SearchStrategy[int]]:
    return {name: st.integers(*bound) for name, bound in bounds.items()}


@settings(max_examples=25, deadline=None)
@given(**sizes(batch=(1, 3), length=(1, 40), channels=(1, 4), n=(1, 9), chunk=(1, 20), seed=(0, 1000)))
def test_mamba_states_match_a_loop(batch, length, channels, n, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    u, delta = (torch.rand(batch, length, channels, generator=generator, dtype=torch.float64) for _ in range(2))
    A = -8 * torch.rand(channels, n, generator=generator, dtype=torch.float64)
    B = torch.randn(batch, length, n, generator=generator, dtype=torch.float64)
    seen = 0
    state = torch.zeros(batch, channels, n, dtype=torch.float64)
    for time, states in mamba_states(u, delta, A, B, chunk=chunk):
        for t in range(time.start, time.stop):
            for d in range(channels):
                abar = torch.diag_embed(torch.exp(delta[:, t, d, None] * A[d]))
                drive = delta[:, t, d, None] * u[:, t, d, None] * B[:, t]
                state[:, d] = (abar @ state[:, d, :, None])[..., 0] + drive
            torch.testing.assert_close(states[:, t - time.start], state)
            seen += 1
    assert seen == length


@settings(max_examples=25, deadline=None)
@given(**sizes(batch=(1, 2), length=(1, 30), groups=(1, 3), per_group=(1, 2), n=(1, 6), chunk=(1, 20), seed=(0, 1000)))
def test_mamba2_states_match_a_loop(batch, length, groups, per_group, n, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    heads, head_dim = groups * per_group, 3
    x = torch.randn(batch, length, heads, head_dim, generator=generator, dtype=torch.float64)
    delta = torch.rand(batch, length, heads, generator=generator, dtype=torch.float64)
    A = -8 * torch.rand(heads, generator=generator, dtype=torch.float64)
    B = torch.randn(batch, length, groups, n, generator=generator, dtype=torch.float64)
    state = torch.zeros(batch, heads, head_dim, n, dtype=torch.float64)
    for time, states in mamba2_states(x, delta, A, B, chunk=chunk):
        for t in range(time.start, time.stop):
            for h in range(heads):
                abar = torch.exp(delta[:, t, h] * A[h])[:, None, None]
                drive = delta[:, t, h, None, None] * x[:, t, h, :, None] * B[:, t, h // per_group, None, :]
                state[:, h] = abar * state[:, h] + drive
            torch.testing.assert_close(states[:, t - time.start], state)


@settings(max_examples=25, deadline=None)
@given(**sizes(batch=(1, 3), length=(1, 30), channels=(1, 4), n=(1, 6), chunk=(1, 20), pad=(0, 5), seed=(0, 1000)))
def test_observability_matches_the_backward_recursion(batch, length, channels, n, chunk, pad, seed):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.rand(batch, length, channels, generator=generator, dtype=torch.float64)
    A = -8 * torch.rand(channels, n, generator=generator, dtype=torch.float64)
    C = torch.randn(batch, length, n, generator=generator, dtype=torch.float64)
    valid = torch.ones(batch, length, dtype=torch.float64)
    valid[0, :pad] = 0
    expected = torch.zeros(channels, n, n, dtype=torch.float64)
    for b in range(batch):
        for d in range(channels):
            Q = torch.zeros(n, n, dtype=torch.float64)
            for t in reversed(range(length)):
                abar = torch.diag(torch.exp(delta[b, t + 1, d] * A[d])) if t + 1 < length else torch.zeros_like(Q)
                Q = valid[b, t] * torch.outer(C[b, t], C[b, t]) + abar @ Q @ abar
                expected[d] += valid[b, t] * Q
    torch.testing.assert_close(observability_gramian(delta, A, C, valid, chunk=chunk), expected)


def test_float32_stays_close_to_float64_over_a_long_scan():
    generator = torch.Generator().manual_seed(0)
    delta = 0.1 * torch.rand(2, 600, 5, generator=generator, dtype=torch.float64)
    A = -16 * torch.rand(5, 7, generator=generator, dtype=torch.float64)
    C = torch.randn(2, 600, 7, generator=generator, dtype=torch.float64)
    valid = torch.ones(2, 600, dtype=torch.float64)
    single = observability_gramian(delta.float(), A.float(), C.float(), valid.float())
    double = observability_gramian(delta, A, C, valid)
    assert (single - double).norm() < 1e-5 * double.norm()


@settings(max_examples=25, deadline=None)
@given(**sizes(batch=(1, 2), length=(1, 150), groups=(1, 2), per_group=(1, 2), n=(1, 6), pad=(0, 5), seed=(0, 1000)))
def test_gramians_by_chunks_are_those_of_the_states(batch, length, groups, per_group, n, pad, seed):
    generator = torch.Generator().manual_seed(seed)
    heads, head_dim = groups * per_group, 3
    valid = (torch.arange(length) >= pad).double()[None, :, None, None]
    x, gate = (valid * torch.randn(batch, length, heads, head_dim, generator=generator).double() for _ in range(2))
    delta = torch.rand(batch, length, heads, generator=generator).double()
    A = -8 * torch.rand(heads, generator=generator).double()
    B, C = (torch.randn(batch, length, groups, n, generator=generator).double() for _ in range(2))
    states = torch.cat([h.clone() for _, h in mamba2_states(x, delta, A, B)], dim=1)
    gated = gate[..., None] * states
    P = torch.einsum("blhpi,blhpj->hij", gated, gated)
    f = (gated * C.repeat_interleave(per_group, dim=2)[:, :, :, None]).unflatten(2, (groups, -1)).flatten(3, 4)
    M = torch.einsum("blgpi,blgpj->gij", f, f)
    torch.testing.assert_close(chunked.controllability(x, delta, A, B, gate), P)
    torch.testing.assert_close(chunked.contribution(x, delta, A, B, C, gate), M)
