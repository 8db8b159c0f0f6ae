"""Every Mamba-2 architecture with its layers, and its heads, projected."""

from __future__ import annotations

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.layers import find_layers
from hf_compressm.modeling.modeling_compressm import project_, project_heads_
from tests.conftest import cache_of, tiny_mamba2
from tests.layers.models import MAMBA_1, TYPES, N, build, tokens

MAMBA_2 = [name for name in TYPES if name not in MAMBA_1]


@pytest.mark.parametrize(
    ("model_type", "options"),
    [*((name, {}) for name in MAMBA_2), ("falcon_h1", {"mamba_rms_norm": False})],
)
def test_projections_of_full_size_change_nothing(model_type, options):
    """Each Mamba-2 mixer as a projection of the layer, and of each head: whole, in pieces with a cache, and in gradients."""
    models = [build(model_type, **options) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for layer in find_layers(models[1]):
        T = torch.eye(N) + 0.1 * torch.randn(2, N, N, generator=generator)
        project_(layer.mixer, torch.cat([torch.linalg.inv(T).mT, T]))
    for layer in find_layers(models[2]):
        T = torch.eye(N) + 0.1 * torch.randn(8, N, N, generator=generator)
        maps = [torch.cat(list(part), dim=1) for part in (torch.linalg.inv(T).mT, T)]
        project_heads_(layer.mixer, [N] * 8, torch.stack(maps))
    found = []
    for model in models:
        with torch.no_grad():
            whole = model(tokens()).logits
            first = model(tokens()[:, :9], use_cache=True)
            position = {} if model_type == "mamba2" else {"position_ids": torch.full((2, 1), 9)}
            step = model(tokens()[:, 9:10], **cache_of(first), use_cache=True, **position).logits
        model.train()(tokens(), labels=tokens()).loss.backward()
        found.append((whole, step, find_layers(model)[0].mixer.in_proj.weight.grad))
    for stock, *others in zip(*found, strict=True):
        assert all((other - stock).norm() < 1e-4 * stock.norm() for other in others)
    for layer in find_layers(models[0]):
        layer.mixer.A_log.data += 8  # at once forgotten
    assert (models[0].eval()(tokens()).logits - found[0][0]).norm() > 1e-3 * found[0][0].norm()


@pytest.mark.parametrize("model_type", MAMBA_2)
def test_the_state_by_head_takes_the_bytes_that_the_report_says(full, model_type):
    model = full(model_type)
    report = compress_(model, CompreSSMConfig(ratio=0.4, realization="project_heads"), tokens(4, 24))
    (cache,) = cache_of(model(tokens(), use_cache=True)).values()
    states = [cache.get_recurrent_state(layer.index) for layer in find_layers(model)]
    assert sum(state.numel() * 4 for state in states) / 2 == report.state_bytes_after
    assert report.states_after == round(0.4 * report.states_before)


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_the_magnitude_of_a_projected_state_is_that_of_its_columns(groups):
    """Maps that permute the states permute it, and what maps multiply multiplies it."""
    stock, projected = (find_layers(tiny_mamba2(groups=groups))[0] for _ in range(2))
    found, order = stock.magnitude(), torch.randperm(N, generator=torch.Generator().manual_seed(0))[:6]
    maps = torch.eye(N)[:, order].repeat(2 * groups, 1, 1)
    maps[-1, :, 2] *= 3
    project_(projected.mixer, maps)
    expected = found[:, order]
    expected[-1, 2] *= 3
    torch.testing.assert_close(projected.magnitude(), expected)


def test_the_largest_states_of_a_projected_layer_stay(token_ids):
    model = tiny_mamba2(32)
    compress_(model, CompreSSMConfig(state_size=16, realization="project"), token_ids)
    for layer in find_layers(model):
        layer.mixer.BC_projection.data[:, :, ::2] *= 0.01
    maps = [layer.mixer.BC_projection.detach().clone() for layer in find_layers(model)]
    compress_(model, CompreSSMConfig(state_size=8, realization="select", selection="magnitude"), token_ids)
    for layer, before in zip(find_layers(model), maps, strict=True):
        assert torch.equal(layer.mixer.BC_projection, before[:, :, 1::2])
