"""The trained models that the package ships: real weights, real text."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compressm
from hf_compressm import CompreSSMConfig, measure
from hf_compressm.data.texts import CALIBRATION, EVALUATION, windows

FOLDER = Path(hf_compressm.__file__).parent / "reference"
TEXTS = ((CALIBRATION, 128), (EVALUATION, 256))


@pytest.fixture(scope="module")
def loss_of():
    """From a model's name and a config to the mean loss of a token of held-out text after the cut; each is measured once."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "mamba-small")
    data, held_out = (windows(text.read_text("utf-8"), tokenizer, 4, length) for text, length in TEXTS)
    measured = {}

    @torch.no_grad()
    def loss(name: str, **target) -> float:
        if name not in measured:
            model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
            measured[name] = model, measure(model, data, CompreSSMConfig(state_size=4, realization="select"))
        model, measurement = measured[name]
        slim = copy.deepcopy(model)
        measurement.plan(CompreSSMConfig(**target)).apply_(slim)
        return float(slim.eval()(held_out, labels=held_out, use_cache=False).loss)

    return loss


@pytest.mark.parametrize(
    ("name", "size", "baselines"),
    [
        ("mamba-small", 4, ["greedy", "ghost", "lti_modal", "magnitude", "random"]),
        ("mamba2-small", 32, ["magnitude", "random"]),
    ],
)
def test_ours_beats_the_baselines_on_held_out_text(loss_of, name, size, baselines):
    ours = loss_of(name, state_size=size, realization="select", refit=1)
    for selection in baselines:
        assert ours < loss_of(name, state_size=size, realization="select", selection=selection), selection


def test_projection_costs_less_than_selection(loss_of):
    full = loss_of("mamba2-small", tolerance=0)
    projected = loss_of("mamba2-small", state_size=32)
    assert full < projected < full + 0.1
    assert projected < loss_of("mamba2-small", state_size=32, realization="select", refit=0)


def test_the_state_is_used(loss_of):
    full = loss_of("mamba-small", tolerance=0)
    assert loss_of("mamba-small", state_size=8, selection="random") > full + 0.2
