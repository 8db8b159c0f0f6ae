"""The layers' sensitivities: what they measure, that nothing is left changed, and that a ratio gains by them."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_compressm
from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.cutting.sensitivity import divergences
from hf_compressm.data.texts import windows
from hf_compressm.hub import load_tokenizer
from hf_compressm.layers import find_layers

from ..conftest import tiny_mamba, tiny_mamba2

REFERENCE = Path(hf_compressm.__file__).parent / "reference"


def kullback_leibler(full, slim) -> float:
    """The mean over tokens of sum_i p_i log(p_i / q_i), in float64."""
    p, q = full.logits.double().softmax(-1), slim.logits.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2])
@torch.no_grad()
def test_divergences_are_those_of_models_with_one_layer_cut(token_ids, make):
    model = make()
    plan = measure(model, token_ids).plan(CompreSSMConfig(state_size=4, refit=0))
    cuts = list(plan.realizations.values())
    measured = divergences(model, find_layers(model), cuts, lambda: model(token_ids).logits)
    for (index, cut), found in zip(plan.realizations.items(), measured, strict=True):
        other = copy.deepcopy(model)
        replace(plan, realizations={index: cut}).apply_(other)
        assert found == pytest.approx(kullback_leibler(model(token_ids), other(token_ids)), rel=1e-3, abs=1e-6)
        assert found > 1e-4


def test_an_error_on_the_way_leaves_the_model_as_it_was(token_ids):
    model = tiny_mamba()
    cuts = list(measure(model, token_ids).plan(CompreSSMConfig(state_size=4, refit=0)).realizations.values())
    mixers = [layer.mixer for layer in find_layers(model)]
    calls = []

    def predict():
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return model(token_ids).logits

    with pytest.raises(RuntimeError, match="out of memory"):
        divergences(model, find_layers(model), cuts, predict)
    assert [layer.mixer for layer in find_layers(model)] == mixers


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
@torch.no_grad()
def test_a_ratio_moves_trained_predictions_less_than_one_size_for_all(name):
    full = AutoModelForCausalLM.from_pretrained(REFERENCE / name).eval()
    tokenizer = load_tokenizer(REFERENCE / name)
    ids = windows((REFERENCE / "calibration.txt").read_text(encoding="utf-8"), tokenizer, 4, 256)

    def moved(**options) -> float:
        model = copy.deepcopy(full)
        report = compress_(model, CompreSSMConfig(ratio=0.25, refit=0, realization="select", **options), ids)
        assert sum(report.sizes.values()) == full.config.state_size
        return kullback_leibler(full(ids), model(ids))

    # Any multiple of 8 for Mamba-2, whose own sizes are too few here for two ways to share.
    step = {} if name == "mamba-tiny" else {"multiple_of": 8}
    assert moved(**step) < 0.95 * moved(uniform=True, **step)
