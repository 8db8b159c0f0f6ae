"""Cuts by head, from the call to the reloaded model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.cutting.first_states import cut_to_first_states_
from hf_compressm.layers import find_layers, new_data
from hf_compressm.modeling.state_sizes import get_head_state_sizes, get_state_sizes
from hf_compressm.reporting.record import get_report
from hf_compressm.reporting.report import CompressionReport
from tests.conftest import VOCABULARY, cache_of, tiny_mamba, tiny_mamba2

BY_HEAD = {"realization": "project_heads"}


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("weights", ["gate", "fisher"])
def test_sizes_by_head_lose_less_than_one_size(token_ids, groups, weights):
    """And about as much as they say, on the tokens that they were fitted to."""
    measurement = measure(tiny_mamba2(groups=groups), token_ids, CompreSSMConfig(state_size=8, weights=weights))
    errors = {}
    for realization in ("project", "project_heads"):
        plan = measurement.plan(CompreSSMConfig(state_size=8, weights=weights, realization=realization))
        model = tiny_mamba2(groups=groups)
        full = logits(model, token_ids)
        plan.apply_(model)
        errors[realization] = float((logits(model, token_ids) - full).norm() / full.norm())
    assert errors["project_heads"] < 0.7 * errors["project"]


def test_the_error_is_about_as_predicted(token_ids):
    """What a layer loses of its weighed output, on what it was measured on; B and C are taken as independent."""
    model = tiny_mamba2()
    layer, hidden_states = find_layers(model)[0], torch.randn(4, 60, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        statistics, system = layer.statistics(mean_lti=False), layer.read(hidden_states, None)
        statistics.update(system)
        path = layer.realizations["project_heads"].paths([layer], [statistics], CompreSSMConfig())[0]
        for size in (2, 4, 8, 12):
            cut = path[size]
            lost = whole = 0.0
            for head, projection in enumerate(cut.groups[0].heads):
                projector = (projection.C_projection @ projection.B_projection.mT).float()
                states = torch.zeros(4, 8, 16)
                for t in range(60):
                    drive = (system.delta[:, t, head, None] * system.x[:, t, head])[..., None] * system.B[
                        :, t, 0, None
                    ]
                    states = states * torch.exp(system.delta[:, t, head] * system.A[head])[:, None, None] + drive
                    output = (states * system.C[:, t, 0, None]).sum(-1)
                    slim = ((states @ projector.mT) * system.C[:, t, 0, None]).sum(-1)
                    gate = system.gate[:, t, head]
                    lost += float((gate * (output - slim)).square().sum())
                    whole += float((gate * output).square().sum())
            assert whole == pytest.approx(float(statistics.groups[0].contribution.sum()), rel=1e-4)
            assert 0.5 < lost / whole / cut.error < 2


def test_bytes_in_the_cache_are_those_of_the_report(token_ids):
    model = tiny_mamba2(groups=2)
    report = compress_(model, CompreSSMConfig(ratio=0.4, **BY_HEAD), token_ids)
    (cache,) = cache_of(model(token_ids, use_cache=True)).values()
    states = [cache.get_recurrent_state(row.index) for row in report.layers]
    assert report.state_bytes_after == sum(state.numel() * 4 for state in states) / len(token_ids)
    for row in report.layers:
        assert sum(row.head_sizes) == 8 * row.new_size
        assert row.realization == "project_heads"
    assert report.states_after == round(0.4 * report.states_before)


def test_a_report_shows_the_sizes_of_the_heads(token_ids):
    report = measure(tiny_mamba2(layers=3), token_ids).plan(CompreSSMConfig(state_size={0: 6, 2: 3}, **BY_HEAD)).report
    of_heads = [row.head_sizes for row in report.layers]
    assert of_heads[1] is None
    assert f"16 -> 6 (heads {min(of_heads[0])} to {max(of_heads[0])})" in str(report)
    (image,) = (image for axes in report.plot().axes for image in axes.images)
    assert image.get_array().T.tolist() == [sorted(of_heads[0]), [16] * 8, sorted(of_heads[2])]
    assert CompressionReport.from_dict(report.to_dict()) == report


def test_a_saved_model_says_and_has_the_sizes_of_its_heads(token_ids, tmp_path):
    model = tiny_mamba2()
    report = compress_(model, CompreSSMConfig(state_size={1: 5}, **BY_HEAD), token_ids)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(token_ids).logits, model(token_ids).logits)
    assert get_state_sizes(again.config) == [16, 5]
    assert get_head_state_sizes(again.config) == [None, report.layers[1].head_sizes]
    assert get_report(again) == report
    assert [layer.head_state_sizes for layer in find_layers(again)] == [None, tuple(report.layers[1].head_sizes)]


def test_a_projected_layer_is_projected_by_head(token_ids):
    """What is left of the projection's states is projected on, as good as they are."""
    model = tiny_mamba2(groups=2)
    compress_(model, CompreSSMConfig(state_size=12), token_ids)
    before = logits(model, token_ids)
    report = compress_(model, CompreSSMConfig(state_size=11, **BY_HEAD), token_ids)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert float((logits(model, token_ids) - before).norm() / before.norm()) < 0.05


def test_a_budget_takes_fewer_states_by_head():
    states, ids = [], torch.randint(0, VOCABULARY, (24, 40), generator=torch.Generator().manual_seed(1))
    for realization in ("project", "project_heads"):
        config = CompreSSMConfig(max_divergence=0.005, multiple_of=1, realization=realization)
        report = compress_(tiny_mamba2(), config, ids)
        assert report.divergence.measured <= 0.005
        states.append(report.states_after)
    assert states[1] < states[0]


def test_training_goes_on(token_ids):
    model = tiny_mamba2()
    compress_(model, CompreSSMConfig(state_size=4, **BY_HEAD), token_ids)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_what_is_left_of_a_layer_is_measured_and_cut_as_if_at_once():
    """Balanced states that are cut are balanced again: on the same inputs, two cuts are one, in sizes and in what is scanned."""
    model = tiny_mamba2(groups=2)
    layer, hidden_states = find_layers(model)[0], torch.randn(4, 60, 32, generator=torch.Generator().manual_seed(0))
    found, kept = {}, {}
    for name, sizes in (("at once", [5]), ("in two steps", [9, 5])):
        one, kept[name] = copy.deepcopy(layer), torch.ones(2)
        for size in sizes:
            with torch.no_grad():
                statistics = one.statistics(mean_lti=False)
                statistics.update(one.read(hidden_states, None))
                cut = one.realizations["project_heads"].paths([one], [statistics], CompreSSMConfig())[0][size]
                kept[name] *= torch.tensor([1 - group.error for group in cut.groups])
                added = sum(p.numel() for p in one.mixer.parameters()) + cut.added_parameters(one)
                cut.apply_(one, new_data(one, cut.parameter_cuts(one)))
            assert sum(p.numel() for p in one.mixer.parameters()) == added
        L, R = (side.split(one.head_state_sizes, dim=1) for side in one.mixer.BC_projection.detach())
        found[name] = one.head_state_sizes, [a @ b.mT for a, b in zip(L, R, strict=True)]
    assert found["at once"][0] == found["in two steps"][0]
    torch.testing.assert_close(kept["at once"], kept["in two steps"], rtol=1e-3, atol=0)
    for a, b in zip(found["at once"][1], found["in two steps"][1], strict=True):
        assert (a - b).norm() < 1e-3 * a.norm()


def test_it_is_cut_again(token_ids):
    """Some layers by head, some whole: by budget and by tolerance, and the spectra are those of the states that are left."""
    model = tiny_mamba2(layers=3)
    first = compress_(model, CompreSSMConfig(state_size={0: 8, 2: 5}, **BY_HEAD), token_ids)
    before, measurement = logits(model, token_ids), measure(model, token_ids, CompreSSMConfig(tolerance=0.05))
    for row, old in zip(measurement.report().layers, first.layers, strict=True):
        assert row.head_sizes == old.head_sizes
        counts = [sum(value > 1e-6 * max(s) for value in s) for s in row.hankel_singular_values]
        assert old.head_sizes is None or all(n <= size for n, size in zip(counts, old.head_sizes, strict=True))
    assert measurement.plan(CompreSSMConfig(tolerance=0.05)).report.sizes[0] <= 8
    report = measurement.plan(CompreSSMConfig(ratio=0.9)).apply_(model)
    assert report.states_after == round(0.9 * 29)
    assert report.realization == "project_heads"
    assert [layer.head_state_sizes for layer in find_layers(model)] == [
        None if row.head_sizes is None else tuple(row.head_sizes) for row in report.layers
    ]
    assert all(0.5 < row.energy_kept <= 1 for row in report.layers)
    assert float((logits(model, token_ids) - before).norm() / before.norm()) < 0.1
    cut_to_first_states_(model, 3)
    assert get_state_sizes(model.config) == [3, 3, 3]
    assert logits(model, token_ids).isfinite().all()


def test_it_is_cut_by_head_alone(token_ids):
    model = tiny_mamba2()
    compress_(model, CompreSSMConfig(state_size={0: 4}, **BY_HEAD), token_ids)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for options in ({"realization": "project"}, {"realization": "select"}, {"selection": "random"}):
        with pytest.raises(ValueError, match=r"layer 0 .* can only be cut by head"):
            compress_(model, CompreSSMConfig(state_size=3, **options), token_ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert get_head_state_sizes(model.config)[1] is None


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny_mamba, {}, "Mamba-2 layers"),
        (tiny_mamba2, {"uniform": True}, "uniform"),
    ],
)
def test_what_has_no_projection_by_head_is_refused(token_ids, make, options, message):
    with pytest.raises(ValueError, match=message):
        compress_(make(), CompreSSMConfig(state_size=4, **BY_HEAD, **options), token_ids)


def test_first_states(token_ids):
    """For benchmarks: all heads alike, also of a layer that is projected already."""
    model = tiny_mamba2(groups=2)
    for size, realization in ((12, "project"), (8, "project"), (5, "project_heads")):
        cut_to_first_states_(model, size, realization)
    assert [layer.head_state_sizes for layer in find_layers(model)] == [(5,) * 8] * 2
    assert model(token_ids).logits.isfinite().all()
