"""The Triton kernels against their twins in float64: in Triton's interpreter, and by `pytest -m gpu` on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton has no build for this platform", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"


def on_kernels(test):
    """A test that runs in the process that has the interpreter on, and on a GPU."""
    here = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
    return test if INTERPRETED else pytest.mark.gpu(here(test))


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def shapes(names: str, *cases: tuple[int, ...]) -> pytest.MarkDecorator:
    """Each in float32; in bfloat16, which differs only in how inputs are loaded, those of a few tokens."""
    rows = [(torch.float32, *case) for case in cases]
    rows += [(torch.bfloat16, *case) for case in cases if case[0] * case[1] <= 24]
    return pytest.mark.parametrize(("dtype", *names.split()), rows)


TOLERANCE = 2e-6 if INTERPRETED else 1e-5
"""Of the relative errors: inputs are taken as they are, in either dtype, and all arithmetic is in float32; a GPU's
exponential function is a fast one."""
SPLIT_TOLERANCE = 3e-5 if INTERPRETED else 1e-4
"""Of the contribution Gram, from products of numbers split into two bfloat16 ones, which the interpreter cuts off
and a GPU rounds."""


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_kernels_in_the_interpreter():
    """Triton reads the switch when it is first imported, so that these tests need a process of their own."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    error, norm = float((actual.double() - expected).norm()), float(expected.norm())
    assert error <= tolerance * norm, f"{error:.1e} off {norm:.1e}, more than {tolerance:.0e} of it"


def random_system(
    batch: int, length: int, inner: tuple[int, ...], maps: tuple[int, ...], pad: int, dtype: torch.dtype
):
    """Inputs, steps, B, C, gates and valid tokens; the first sequence starts with padding."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape, generator=generator)

    valid = torch.ones(batch, length)
    valid[0, :pad] = 0
    mask = valid.view(batch, length, *[1] * len(inner))
    delta = torch.rand(batch, length, inner[0], generator=generator)
    u, gate = normal(*inner) * mask, normal(*inner) * mask
    return (*(x.to(DEVICE, dtype) for x in (u, delta, normal(*maps), normal(*maps), gate)), valid.to(DEVICE))


def rates(*shape: int) -> Tensor:
    return -4 * torch.rand(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@on_kernels
@shapes("batch length channels N pad", (1, 67, 3, 8, 4), (1, 5, 33, 12, 0), (2, 5, 2, 16, 2), (1, 6, 3, 20, 0))
def test_gramians(dtype, batch, length, channels, N, pad):
    from hf_compressm.kernels.mamba import gramians
    from hf_compressm.kernels.reference import mamba_states, observability_gramian

    u, delta, B, C, _, valid = random_system(batch, length, (channels,), (N,), pad, dtype)
    A = rates(channels, N)
    P, Q = gramians(u, delta, A, B, C, valid)
    u, delta, A, B, C, valid = (x.double() for x in (u, delta, A, B, C, valid))
    h = torch.cat([part.clone() for _, part in mamba_states(u, delta, A, B)], dim=1)
    assert_near(P, torch.einsum("bl,bldi,bldj->dij", valid, h, h))
    assert_near(Q, observability_gramian(delta, A, C, valid))


@on_kernels
@shapes(
    "batch length channels N pad",
    (1, 67, 3, 8, 4),
    (1, 5, 65, 12, 0),
    (2, 5, 2, 16, 3),
    (1, 3, 4, 64, 0),
    (1, 4, 3, 160, 0),
)
def test_output_moments(dtype, batch, length, channels, N, pad):
    from hf_compressm.kernels.contribution import contribution
    from hf_compressm.kernels.mamba import CHUNK, chunk_starts, output_gram
    from hf_compressm.kernels.reference import mamba_states

    u, delta, B, C, gate, _ = random_system(batch, length, (channels,), (N,), pad, dtype)
    A = rates(channels, N)
    starts, y = chunk_starts(u, delta, A, B, C, gate)
    kept = torch.arange(0, N, 2, device=DEVICE)
    K, moved = output_gram(u, delta, A[:, kept], B[..., kept], gate, starts[:, :, kept], y)
    M = contribution(u, delta, A, B, C, gate)
    u, delta, A, B, C, gate = (x.double() for x in (u, delta, A, B, C, gate))
    h = torch.cat([part.clone() for _, part in mamba_states(u, delta, A, B)], dim=1)
    gated = gate[..., None] * h
    features = gated * C[:, :, None]
    assert not starts[:, 0].any()
    if length > CHUNK:
        assert_near(starts[:, 1], h[:, CHUNK - 1].mT)
    assert_near(y, features.sum(-1))
    assert_near(K, gated[..., kept].mT @ gated[..., kept])
    assert_near(moved, (gated[..., kept] * features.sum(-1, keepdim=True)).sum(2))
    assert_near(M, torch.einsum("bldi,bldj->ij", features, features), SPLIT_TOLERANCE)


@on_kernels
@shapes(
    "batch length heads head_dim groups N pad",
    (2, 37, 2, 8, 1, 8, 4),
    (1, 20, 4, 20, 2, 12, 0),
    (1, 7, 2, 16, 1, 128, 0),
    (1, 4, 1, 3, 1, 160, 0),
    (1, 1, 2, 4, 2, 16, 0),
    (2, 67, 2, 3, 2, 64, 3),
    (1, 67, 2, 2, 1, 128, 65),
    (1, 325, 2, 2, 2, 12, 4),
)
def test_mamba2(dtype, batch, length, heads, head_dim, groups, N, pad):
    from hf_compressm.kernels.mamba2 import contribution, controllability
    from hf_compressm.kernels.reference import mamba2_states, observability_reach

    x, delta, B, C, gate, valid = random_system(batch, length, (heads, head_dim), (groups, N), pad, dtype)
    A = rates(heads)
    P, G = controllability(x, delta, A, B, gate, valid)
    M = contribution(x, delta, A, B, C, gate)
    x, delta, A, B, C, gate, valid = (t.double() for t in (x, delta, A, B, C, gate, valid))
    h = torch.cat([part.clone() for _, part in mamba2_states(x, delta, A, B)], dim=1)
    gated = gate[..., None] * h
    features = gated * C.repeat_interleave(heads // groups, dim=2)[:, :, :, None]
    assert_near(P, torch.einsum("blhdi,blhdj->hij", gated, gated))
    assert_near(G, observability_reach(delta, A, valid))
    features = features.unflatten(2, (groups, -1)).flatten(3, 4)
    assert_near(M, torch.einsum("blgdi,blgdj->gij", features, features), SPLIT_TOLERANCE)
    assert torch.equal(M, M.mT)


@on_kernels
@pytest.mark.parametrize("limit", [4096, 12])
@pytest.mark.parametrize("mean_lti", [False, True])
def test_statistics_are_those_of_the_plain_scan(monkeypatch, limit, mean_lti):
    from hf_compressm import kernels
    from hf_compressm.hankel import moments
    from hf_compressm.hankel.mamba import MambaStatistics
    from hf_compressm.hankel.selective import MambaSystem

    monkeypatch.setattr(moments, "MAX_READOUT", limit)
    monkeypatch.setattr("hf_compressm.hankel.mamba.TOGETHER", 5)
    channels, N = 5, 6
    both = []
    for fused in (True, False):
        monkeypatch.setattr(kernels, "fused", lambda x, fused=fused: fused)
        statistics = MambaStatistics(channels, N, torch.device(DEVICE), mean_lti=mean_lti)
        for length in (20, 3):
            u, delta, B, C, gate, valid = random_system(2, length, (channels,), (N,), 2, torch.float32)
            statistics.update(MambaSystem(u, delta, rates(channels, N), B, C, gate, valid))
        both.append(statistics)
    (one,), (other,) = both[0].groups, both[1].groups
    c = other.candidates
    assert torch.equal(one.candidates, c)
    assert len(c) == min(N, limit // N)
    for name in ("P", "Q", "tokens", "weight", "rates"):
        assert_near(getattr(both[0], name), getattr(both[1], name).double())
    for name in ("output", "normal_pairs", "beside"):
        assert_near(getattr(one, name), getattr(other, name))
    assert_near(one.contribution, other.contribution, SPLIT_TOLERANCE)
    assert_near(one.cross[c], other.cross[c])


@on_kernels
@pytest.mark.parametrize("mean_lti", [False, True])
def test_mamba2_statistics_are_those_of_the_plain_scan(monkeypatch, mean_lti):
    from hf_compressm import kernels
    from hf_compressm.hankel.mamba2 import Mamba2Statistics
    from hf_compressm.hankel.selective import Mamba2System

    both = []
    for fused in (True, False):
        monkeypatch.setattr(kernels, "fused", lambda x, fused=fused: fused)
        statistics = Mamba2Statistics(4, 2, 8, torch.device(DEVICE), mean_lti=mean_lti)
        x, delta, B, C, gate, valid = random_system(2, 20, (4, 5), (2, 8), 2, torch.float32)
        statistics.update(Mamba2System(x, delta, rates(4), B, C, gate, valid))
        both.append(statistics)
    for name in ("tokens", "weight", "rates", "controllable", "observable"):
        assert_near(getattr(both[0], name), getattr(both[1], name))
    for one, other in zip(both[0].gramians(), both[1].gramians(), strict=True):
        assert_near(one, other)
    for one, other in zip(both[0].groups, both[1].groups, strict=True):
        assert_near(one.output, other.output)
        assert_near(one.contribution, other.contribution, SPLIT_TOLERANCE)


@on_kernels
@dtypes
@pytest.mark.parametrize("few", [0, 100])
def test_a_step_of_heads_of_any_sizes(monkeypatch, dtype, few):
    """The decoding step of the mixer by head, with inputs that are parts of larger tensors."""
    from hf_compressm.modeling import modeling_compressm
    from hf_compressm.modeling.modeling_compressm import step_of_heads, step_of_heads_reference

    monkeypatch.setattr(modeling_compressm, "FEW_PROGRAMS", few)
    sizes, generator = [5, 0, 40, 16], torch.Generator().manual_seed(0)
    S, heads, head_dim = sum(sizes), len(sizes), 12

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    state, maps = normal(3, S, head_dim), normal(2, 3, S).to(dtype)
    x, dt = (
        normal(3, heads * head_dim + 7).to(dtype)[:, 3:-4].view(3, heads, head_dim),
        normal(3, 9).to(dtype)[:, ::2][:, 1:],
    )
    A, D, dt_bias = rates(heads), normal(heads), 10 * normal(heads)
    column_head = torch.arange(heads).repeat_interleave(torch.tensor(sizes)).to(DEVICE)
    starts = torch.tensor([0, *sizes], device=DEVICE).cumsum(0)
    expected_state = state.double()
    exact = (t.double() for t in (x, dt, A, *maps, D, dt_bias))
    expected = step_of_heads_reference_double(expected_state, *exact, sizes)
    twin_state = state.clone()
    twin = step_of_heads_reference(twin_state, x, dt, A, *maps, D, dt_bias, column_head)
    output = step_of_heads(state, x, dt, A, *maps, D, dt_bias, starts)
    assert output.dtype == twin.dtype == dtype
    loose = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert_near(state, expected_state, 1e-6)
    assert_near(output, expected, loose)
    assert_near(twin_state, expected_state, loose)
    assert_near(twin, expected, loose)


@on_kernels
@dtypes
def test_the_gated_norm(monkeypatch, dtype):
    """As the stock one, by groups, of a gate that is part of a larger tensor."""
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    from hf_compressm.modeling import modeling_compressm

    norm, generator = MambaRMSNormGated(48, 24).to(dtype), torch.Generator().manual_seed(0)
    norm.weight.data.normal_(generator=generator)
    x, gate = (torch.randn(2, 3, 100, generator=generator).to(DEVICE, dtype)[..., :48] for _ in range(2))
    norm, x = norm.to(DEVICE), x.contiguous()
    expected = norm(x, gate).detach()
    launched = []

    class OnAGpu(Tensor):
        is_cuda = property(lambda self: launched.append(True) or True)

    with torch.no_grad():
        found = modeling_compressm.gated_norm(norm, x.as_subclass(OnAGpu) if INTERPRETED else x, gate).as_subclass(
            Tensor
        )
    assert launched or not INTERPRETED
    assert_near(found, expected.double(), 1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert modeling_compressm.gated_norm(norm, x, gate).grad_fn is not None


def step_of_heads_reference_double(state, x, dt, A, B, C, D, dt_bias, sizes) -> Tensor:
    """Head by head; changes the state in place."""
    outputs, start = [], 0
    for head, size in enumerate(sizes):
        columns, start = slice(start, start + size), start + size
        delta = torch.nn.functional.softplus(dt[:, head] + dt_bias[head])[:, None, None]
        drive = B[:, columns, None] * x[:, head, None] * delta
        state[:, columns] = state[:, columns] * torch.exp(delta * A[head]) + drive
        outputs.append((C[:, columns, None] * state[:, columns]).sum(1) + D[head] * x[:, head])
    return torch.stack(outputs, dim=1)
