"""More states never give more error: read-outs of every size of every N, also where not all states can be fitted."""

from __future__ import annotations

import copy
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compressm import CompreSSMConfig, measure
from hf_compressm.hankel import moments
from hf_compressm.hankel.mamba import MambaStatistics
from hf_compressm.hankel.realization import Selection, select_with_readout
from hf_compressm.hankel.selective import MambaSystem
from hf_compressm.kernels.reference import mamba_states
from tests.conftest import VOCABULARY, tiny_mamba

CHANNELS, ROWS, LENGTH = 16, 8, 64


def trained_like(N: int, rank: int, noise: float, decades: float, seed: int) -> list[MambaSystem]:
    """A layer as training leaves it, on two sets of tokens: few directions drive B and C, and the states' sizes decay."""
    weights = torch.Generator().manual_seed(seed)
    B_map, C_map = (torch.randn(rank, N, generator=weights) * torch.logspace(0, -1, rank)[:, None] for _ in range(2))
    importance = torch.logspace(0, -decades, N)[torch.randperm(N, generator=weights)]
    rates = torch.logspace(-1, 1, N)[torch.randperm(N, generator=weights)]
    A = -rates * (1 + 0.1 * torch.rand(CHANNELS, N, generator=weights))
    systems = []
    for part in range(2):
        tokens = torch.Generator().manual_seed(1000 * seed + part)

        def normal(*shape: int, tokens: torch.Generator = tokens) -> Tensor:
            return torch.randn(ROWS, LENGTH, *shape, generator=tokens)

        drive = normal(rank)
        systems.append(
            MambaSystem(
                u=normal(CHANNELS),
                delta=0.1 + 0.5 * torch.rand(ROWS, LENGTH, CHANNELS, generator=tokens),
                A=A,
                B=drive @ B_map + noise * normal(N),
                C=(drive @ C_map + noise * normal(N)) * importance,
                gate=normal(CHANNELS),
                valid=torch.ones(ROWS, LENGTH),
            )
        )
    return systems


def fitted(system: MambaSystem) -> tuple[dict[int, Selection], int]:
    """The read-out of every size, and the number of candidates."""
    statistics = MambaStatistics(CHANNELS, system.A.shape[1], torch.device("cpu"), mean_lti=True)
    statistics.update(system)
    return select_with_readout(statistics.groups[0]), len(statistics.groups[0].candidates)


def lost(system: MambaSystem, selections: list[Selection]) -> list[float]:
    """The share of the output's energy that each of them loses."""
    # y - y' = sum_n (C_n - (R C)_n) h_n, where R has rows of zeros for the states that go.
    maps = torch.eye(system.A.shape[1]).repeat(len(selections), 1, 1)
    for entry, selection in zip(maps, selections, strict=True):
        entry[selection.kept] -= selection.readout.float()
    total, parts = 0.0, torch.zeros(len(selections))
    for time, h in mamba_states(system.u, system.delta, system.A, system.B):
        h = (h * system.gate[:, time, :, None]).flatten(0, 1)
        C = system.C[:, time].flatten(0, 1)
        total += float((h @ C[..., None]).square().sum())
        parts += (h @ (maps.flatten(0, 1) @ C.mT).view(*maps.shape[:2], -1).permute(2, 1, 0)).square().sum((0, 1))
    return (parts / total).tolist()


def rises(errors: list[float], slack: float) -> list[tuple[float, float]]:
    """Neighbours of which the larger size loses more than the smaller by more than a share."""
    return [(a, b) for a, b in pairwise(errors) if b > (1 + slack) * a + 1e-6]


@pytest.mark.parametrize("N", [16, 32, 64, 65, 96, 128, 256])
@settings(derandomize=True, max_examples=3, deadline=None)
@given(rank=st.integers(4, 12), noise=st.floats(0, 0.2), decades=st.floats(0.5, 2), seed=st.integers(0, 2**20))
def test_more_states_never_lose_more(N, rank, noise, decades, seed):
    """With normal matrices an eighth as large as in use: of 32 states and more, only some can have any read-out."""
    seen, unseen = trained_like(N, rank, noise, decades, seed)
    with patch.object(moments, "MAX_READOUT", 512):
        path, candidates = fitted(seen)
    assert sorted(path) == list(range(1, N + 1))
    assert candidates == min(N, 512 // N)
    # Of many states every eighth size, and all around the border.
    sizes = [r for r in path if N <= 64 or r % 8 == 0 or abs(r - candidates) < 8]
    selections = [path[r] for r in sorted(sizes)]
    assert not rises([path[r].error for r in sorted(path)], slack=0)
    in_sample = lost(seen, selections)
    assert not rises(in_sample, slack=0)
    assert all(error <= selection.error + 1e-5 for error, selection in zip(in_sample, selections, strict=True))
    # What is fitted to 8192 outputs may fit others a little worse.
    assert not rises(lost(unseen, selections), slack=0.25)


@pytest.mark.parametrize(("N", "rounds"), [(96, 2), (128, 0)])
def test_a_models_predictions_do_not_jump_where_the_candidates_end(N, rounds):
    candidates = 6
    model = tiny_mamba(state_size=N, layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("x_proj.weight"):  # B and C of low rank, and states of decaying importance
                for rows in (parameter[4 : 4 + N], parameter[4 + N :]):
                    U, S, V = torch.linalg.svd(rows, full_matrices=False)
                    rows.copy_(U[:, :4] * S[:4] @ V[:4] * torch.logspace(0, -1, N)[:, None])
                    rows *= 3
    seen, unseen = torch.randint(0, VOCABULARY, (2, 24, 24), generator=torch.Generator().manual_seed(3))
    errors, kinds = [], []
    with patch.object(moments, "MAX_READOUT", candidates * N), torch.no_grad():
        full = model(unseen).logits
        measurement = measure(model, seen, CompreSSMConfig(refit=rounds, estimator="mean_lti"))
        for size in (candidates - 1, candidates, candidates + 1, candidates + 2):
            slim = copy.deepcopy(model)
            plan = measurement.plan(CompreSSMConfig(state_size=size, refit=rounds, estimator="mean_lti"))
            plan.apply_(slim)
            errors.append(float((slim(unseen).logits - full).square().mean() / full.var()))
            kinds += [row.realization for row in plan.report.layers]
    assert set(kinds) == {"refit" if rounds else "read-out"}
    assert not rises(errors, slack=0.25)
