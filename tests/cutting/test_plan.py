"""Measure once, plan many, look before you cut."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.layers import find_layers
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2

CUTS = {
    "select": (tiny_mamba2, {"state_size": 8, "realization": "select"}),
    "read-out": (tiny_mamba, {"state_size": 5, "refit": 0}),
    "refit": (tiny_mamba, {"ratio": 0.5}),
    "project": (tiny_mamba2, {"state_size": {0: 4, 1: 9}}),
    "project_heads": (tiny_mamba2, {"ratio": 0.4, "realization": "project_heads"}),
    "baseline": (tiny_mamba, {"state_size": 5, "selection": "ghost"}),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_plan_shows_the_report_of_the_cut(token_ids, name):
    make, options = CUTS[name]
    model, config = make(), CompreSSMConfig(**options)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plan = measure(model, token_ids, config).plan(config)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert plan.report.parameters_before == sum(p.numel() for p in model.parameters())
    assert plan.apply_(model) is plan.report
    assert plan.report.parameters_after == sum(p.numel() for p in model.parameters())
    other = make()
    assert compress_(other, config, token_ids) == plan.report
    assert torch.equal(other(token_ids).logits, model(token_ids).logits)


def test_a_projected_layer_is_planned_for_again(token_ids):
    model = tiny_mamba2()
    for size in (9, 4):
        config = CompreSSMConfig(state_size=size)
        plan = measure(model, token_ids, config).plan(config)
        plan.apply_(model)
        assert plan.report.parameters_after == sum(p.numel() for p in model.parameters())


def test_one_measurement_serves_many_plans(token_ids):
    """On copies of the model, also by way of another process."""
    model = tiny_mamba()
    measurement = measure(model, token_ids, CompreSSMConfig(tolerance=0.05))
    for options in (
        {"state_size": 3},
        {"ratio": 0.5},
        {"tolerance": 0.3},
        {"state_size": 4, "selection": "magnitude"},
    ):
        plan = pickle.loads(pickle.dumps(measurement.plan(CompreSSMConfig(**options)).cpu()))
        one, two = copy.deepcopy(model), tiny_mamba()
        plan.apply_(one)
        compress_(two, CompreSSMConfig(**options), token_ids)
        assert torch.equal(one(token_ids).logits, two(token_ids).logits)


@pytest.mark.parametrize("weights", ["fisher", "gate"])
def test_a_measurement_for_a_projection_leaves_out_what_only_selections_want(token_ids, weights):
    model = tiny_mamba2(groups=2)
    config = CompreSSMConfig(ratio=0.5, weights=weights, multiple_of=1, refit=0)
    select = replace(config, realization="select")
    some, every = (measure(model, token_ids, each) for each in (config, select))
    for one, other in zip(some.statistics, every.statistics, strict=True):
        assert not any(moments.contribution.any() for moments in one.groups)
        torch.testing.assert_close(one.output_energies(), other.output_energies(), rtol=1e-5, atol=0)
    assert some.plan(config).report == every.plan(config).report
    assert every.plan(select).realizations
    with pytest.raises(
        ValueError, match="left out what realization='select' chooses states by: measure with this config"
    ):
        some.plan(select)


def test_the_report_of_a_measurement_is_the_spectra(token_ids):
    from hf_compressm import hankel_singular_values

    model = tiny_mamba2(groups=2)
    measured = measure(model, token_ids, CompreSSMConfig(tolerance=0))
    assert measured.report() == hankel_singular_values(model, token_ids)


@pytest.mark.parametrize(
    ("measured", "planned", "message"),
    [
        ({"estimator": "mean_lti"}, {}, "estimator"),
        ({"refit": 0}, {"state_size": 4}, "refit"),
        ({"tolerance": 0.1}, {"max_divergence": 0.1}, "held no data back"),
        ({"weights": "fisher"}, {"tolerance": 0.1}, "weights='fisher'"),
        ({"weights": "gate"}, {"ratio": 0.5, "weights": "fisher"}, "weights='gate'"),
        ({}, {"state_size": 9}, "can't be cut to 9"),
    ],
)
def test_what_was_not_measured_can_not_be_planned(mamba, token_ids, measured, planned, message):
    with pytest.raises(ValueError, match=message):
        measure(mamba, token_ids, CompreSSMConfig(**measured)).plan(CompreSSMConfig(**planned))


def test_a_plan_is_for_layers_of_the_sizes_that_were_measured(mamba, token_ids):
    measurement = measure(mamba, token_ids, CompreSSMConfig(state_size=4))
    plan = measurement.plan(CompreSSMConfig(state_size=4))
    for other in (tiny_mamba(state_size=6), tiny_mamba(layers=3), tiny_mamba2(state_size=8)):
        with pytest.raises(ValueError, match="measure this model"):
            plan.apply_(other)
    plan.apply_(mamba)
    with pytest.raises(ValueError, match="measure this model"):
        plan.apply_(mamba)
    with pytest.raises(ValueError, match="measure it again"):
        measurement.plan(CompreSSMConfig(state_size=2))


@pytest.mark.parametrize("name", CUTS)
def test_a_plan_is_sent_without_what_it_was_made_of(token_ids, name):
    make, options = CUTS[name]
    config = CompreSSMConfig(**options)
    plan = measure(make(), token_ids, config).plan(config).cpu()
    assert len(pickle.dumps(plan.realizations)) < 1.2 * sum(map(numbers_in, plan.realizations.values())) + 16_000


def numbers_in(value) -> int:
    """Bytes of the tensors in a dataclass."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, tuple | list):
        return sum(map(numbers_in, value))
    return sum(numbers_in(getattr(value, field.name)) for field in fields(value)) if is_dataclass(value) else 0


@pytest.mark.parametrize("name", CUTS)
def test_output_errors_are_on_tokens_that_nothing_was_fitted_to(name):
    """By hand, from what the full and the cut mixers give on the held-out sequences; of little data, none is held back."""
    make, options = CUTS[name]
    ids = torch.randint(0, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(4))
    apart = ids[[7, 15]]
    model, config = make(), CompreSSMConfig(**options, weights="gate")
    if config.ratio is None:
        full = copy.deepcopy(model)
        report = compress_(model, config, ids)
        assert report.held_out_tokens == apart.numel()
        for before, after, row in zip(find_layers(full), find_layers(model), report.layers, strict=True):
            read: list = []
            handle = before.mixer.register_forward_pre_hook(
                lambda m, args, kwargs, read=read: read.append(args[0]), with_kwargs=True
            )
            with torch.no_grad():
                full(apart)
                handle.remove()
                wanted = before.mixer(read[0])
                lost = (after.mixer(read[0]) - wanted).square().sum() / wanted.square().sum()
            assert row.output_error == pytest.approx(float(lost), rel=1e-3, abs=1e-9)
    assert compress_(make(), config, ids[:7]).held_out_tokens == 0
