"""The layers' sensitivities: what they measure, that nothing is left changed, and that a ratio gains by them."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_compressm
from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.cutting.divergence import Divergence
from hf_compressm.cutting.sensitivity import POINTS, cost_curves, errors
from hf_compressm.cutting.trials import cut_for_a_while
from hf_compressm.data.texts import windows
from hf_compressm.hankel.ranks import allocate_ranks
from hf_compressm.hub import load_tokenizer
from hf_compressm.layers import find_layers, realize

from ..conftest import tiny_mamba, tiny_mamba2

REFERENCE = Path(hf_compressm.__file__).parent / "reference"


def batch(ids) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def kullback_leibler(full, slim) -> float:
    """The mean over tokens of sum_i p_i log(p_i / q_i), in float64."""
    p, q = full.logits.double().softmax(-1), slim.logits.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def planned(model, token_ids):
    config = CompreSSMConfig(state_size=4, refit=0)
    return measure(model, token_ids, config).plan(config)


@pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2])
@torch.no_grad()
def test_divergences_are_those_of_models_with_one_layer_cut(token_ids, make):
    model = make()
    plan = planned(model, token_ids)
    divergence = Divergence(model, [batch(token_ids)])
    assert divergence() == 0
    for layer in find_layers(model):
        with cut_for_a_while(model, [layer], plan.realizations):
            found = divergence()
        other = copy.deepcopy(model)
        replace(plan, realizations={layer.index: plan.realizations[layer.index]}).apply_(other)
        assert found == pytest.approx(kullback_leibler(model(token_ids), other(token_ids)), rel=1e-3, abs=1e-6)
        assert found > 1e-4
    assert divergence() == 0


def test_padding_does_not_count(token_ids):
    model = tiny_mamba()
    plan = planned(model, token_ids)
    padded = torch.cat([torch.zeros(4, 5, dtype=torch.long), token_ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    found = []
    for data in (batch(token_ids), {"input_ids": padded, "attention_mask": mask}):
        divergence = Divergence(model, [data])
        with cut_for_a_while(model, find_layers(model), plan.realizations):
            found.append(divergence())
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_model_without_a_head_moves_by_its_hidden_states(token_ids):
    model = tiny_mamba().backbone
    divergence = Divergence(model, [batch(token_ids)])
    before = model(token_ids)[0].detach()
    with torch.no_grad():
        model.layers[0].mixer.D.zero_()
        after = model(token_ids)[0]
    assert divergence() == pytest.approx(float((after - before).square().sum() / before.square().sum()), rel=1e-4)


@pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2])
def test_cost_curves_are_what_was_measured_where_it_was(token_ids, make):
    model = make()
    measurement = measure(model, token_ids, CompreSSMConfig(tolerance=0, realization="select"))
    layers, paths = (
        measurement.layers,
        realize(measurement.layers, measurement.statistics, CompreSSMConfig(), "select"),
    )
    choices = [list(range(1, layer.state_size + 1)) for layer in layers]
    divergence = Divergence(model, [batch(token_ids)])
    lost = errors(layers, measurement.statistics, paths, "gate")
    curves = cost_curves(model, layers, paths, choices, lost, divergence)
    for layer, path, curve in zip(layers, paths, curves, strict=True):
        for share in POINTS:
            size = round(share * layer.state_size)
            with cut_for_a_while(model, [layer], {layer.index: path[size]}):
                assert float(curve[size - 1]) == pytest.approx(divergence(), rel=1e-4)
        assert float(curve[-1]) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("make", [tiny_mamba, lambda: tiny_mamba().backbone], ids=["with a head", "without"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_are_infinitely_far(token_ids, make, broken):
    model = make()
    divergence = Divergence(model, [batch(token_ids)])
    with torch.no_grad():
        find_layers(model)[1].mixer.D.fill_(broken)
    assert divergence() == float("inf")


def test_a_size_that_breaks_the_predictions_costs_more_than_any_other(token_ids):
    model, config = tiny_mamba(), CompreSSMConfig(ratio=0.75, refit=0)
    measurement = measure(model, token_ids, config)
    paths = realize(measurement.layers, measurement.statistics, config, "select")
    for group in paths[0][2].groups:
        group.readout.fill_(float("nan"))
    choices, divergence = [[2, 6, 8]] * 2, Divergence(model, [batch(token_ids)])
    lost = errors(measurement.layers, measurement.statistics, paths, "gate")
    curves = cost_curves(model, measurement.layers, paths, choices, lost, divergence)
    assert all(torch.isfinite(curve).all() for curve in curves)
    assert allocate_ranks(curves, 10, choices)[0] == 8


def test_an_error_on_the_way_leaves_the_model_as_it_was(token_ids):
    model = tiny_mamba()
    plan = planned(model, token_ids)
    mixers = [layer.mixer for layer in find_layers(model)]

    def fail() -> None:
        with cut_for_a_while(model, find_layers(model), plan.realizations):
            assert all(layer.mixer is not mixer for layer, mixer in zip(find_layers(model), mixers, strict=True))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="memory"):
        fail()
    assert [layer.mixer for layer in find_layers(model)] == mixers


@pytest.mark.parametrize("name", ["mamba-small", "mamba2-small"])
@torch.no_grad()
def test_a_ratio_moves_trained_predictions_less_than_one_size_for_all(name):
    full = AutoModelForCausalLM.from_pretrained(REFERENCE / name).eval()
    tokenizer = load_tokenizer(REFERENCE / name)
    ids = windows((REFERENCE / "calibration.txt").read_text(encoding="utf-8"), tokenizer, 4, 96)

    def moved(**options) -> float:
        model = copy.deepcopy(full)
        report = compress_(model, CompreSSMConfig(ratio=0.25, refit=0, realization="select", **options), ids)
        assert sum(report.sizes.values()) * 4 == full.config.state_size * full.config.num_hidden_layers
        return kullback_leibler(full(ids), model(ids))

    # Any multiple of 8 for Mamba-2, whose own sizes are too few here for two ways to share.
    step = {} if name == "mamba-small" else {"multiple_of": 8}
    assert moved(**step) < 0.95 * moved(uniform=True, **step)
