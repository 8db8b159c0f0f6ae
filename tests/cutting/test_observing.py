"""Statistics weighed by the loss: the gradient is the true one, and their costs are nats."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_compressm import CompreSSMConfig, measure
from hf_compressm.cutting.divergence import Divergence
from hf_compressm.cutting.inputs import Inputs
from hf_compressm.cutting.observing import _loss, observe_by_loss
from hf_compressm.cutting.sensitivity import errors
from hf_compressm.cutting.trials import cut_for_a_while
from hf_compressm.layers import find_layers, realize
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2
from tests.layers.models import TYPES, build, tokens

MODELS = {"mamba": tiny_mamba, "mamba2": tiny_mamba2, "mamba2-groups": lambda: tiny_mamba2(groups=2)}


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_loss_by_the_scans_output(token_ids, name):
    """Against finite differences: what is added to the scan's output goes through D."""
    model = MODELS[name]().double()
    layer = find_layers(model)[0]
    batch = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "labels": token_ids}
    inputs = Inputs()
    statistics = [entry.statistics(mean_lti=False) for entry in find_layers(model)]
    observe_by_loss(model, find_layers(model), statistics, batch, inputs)
    with torch.no_grad():
        system = layer.read(*inputs[0][0])
    u = (system.u if hasattr(system, "u") else system.x).double()
    expected = (system.gate.double() * u).sum((0, 1))  # dL / dD, per channel or head
    expected = expected.sum(-1) if expected.dim() == 2 else expected
    model(**batch).loss.backward()
    torch.testing.assert_close(layer.mixer.D.grad, expected.to(layer.mixer.D.grad), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_architecture_can_be_weighed_by_its_loss(model_type):
    model = build(model_type)
    before = model(tokens()).logits
    config = CompreSSMConfig(weights="fisher", tolerance=0, realization="select")
    measurement = measure(model, tokens(4, 16), config)
    assert measurement.weights == "fisher"
    for entry in measurement.statistics:
        assert entry.tokens == 64
        for moments in entry.groups:
            assert torch.isfinite(moments.contribution).all()
            assert moments.contribution.diagonal().sum() > 0
    assert torch.equal(model(tokens()).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_nats(name):
    """Of a cut small enough for the second order, the predicted divergence is the measured one, in its order of size."""
    model = MODELS[name]()
    ids = torch.randint(0, VOCABULARY, (24, 40), generator=torch.Generator().manual_seed(5))
    config = CompreSSMConfig(weights="fisher", tolerance=0, selection="greedy")
    measurement = measure(model, ids, config)
    layers = measurement.layers
    paths = realize(layers, measurement.statistics, config, "select")
    divergence = Divergence(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    for layer, path, lost in zip(layers, paths, errors(layers, measurement.statistics, paths, "fisher"), strict=True):
        size = layer.state_size - 1
        with cut_for_a_while(model, [layer], {layer.index: path[size]}):
            measured = divergence()
        assert 0.2 < measured / float(lost[size - 1]) < 5


def test_frozen_parameters_are_no_hindrance(token_ids):
    model, frozen = tiny_mamba2(), tiny_mamba2().requires_grad_(False)
    config = CompreSSMConfig(weights="fisher", tolerance=0)
    one, two = (measure(each, token_ids, config).statistics for each in (model, frozen))
    assert all(torch.equal(a.P, b.P) for a, b in zip(one, two, strict=True))


def test_auto_weighs_by_the_loss_where_it_is_quick(token_ids):
    assert measure(tiny_mamba2(), token_ids).weights == "fisher"
    assert measure(tiny_mamba(), token_ids).weights == "gate"  # a loop on a CPU
    assert measure(tiny_mamba2(), token_ids, CompreSSMConfig(tolerance=0.1)).weights == "gate"
    with pytest.raises(ValueError, match="no head"):
        measure(tiny_mamba2().backbone, token_ids, CompreSSMConfig(weights="fisher"))


def test_labels_are_drawn_from_the_predictions():
    """So the gradient by the logits, p less 1 at the label, is 0 on average, and adds up to 0 in each row."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]]).expand(50_000, 4).log_softmax(-1)
    mask = torch.ones(1, len(logits))
    mask[0, :10] = 0
    output = SimpleNamespace(logits=logits[None])
    end, gradient = _loss(output, {"attention_mask": mask}, seed=0)
    assert end is output.logits
    assert gradient is not None
    assert torch.equal(gradient[0, :10], torch.zeros(10, 4))
    assert gradient.sum(-1).abs().max() < 1e-6
    p = logits[0].exp()
    assert ((gradient[0].mean(0)).abs() < 4 * (p * (1 - p) / len(logits)).sqrt()).all()
    assert torch.equal(gradient[0, 10:].argmin(-1).bincount() > 0, torch.ones(4, dtype=torch.bool))
