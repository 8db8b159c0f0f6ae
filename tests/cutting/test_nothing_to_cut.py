"""Where nothing is cut, the user is told why, and what changes it; the model is as it was."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from hf_compressm import CompreSSMConfig, compress_, measure
from tests.conftest import tiny_mamba, tiny_mamba2


@pytest.fixture
def warnings(caplog):
    logging.enable_propagation()
    yield lambda: [record.message for record in caplog.records if "nothing to cut" in record.message]
    logging.disable_propagation()


@pytest.mark.parametrize(
    ("make", "target", "reason"),
    [
        (tiny_mamba, {"tolerance": 1e-9}, "tolerance=1e-09 leaves every layer its states: raise tolerance, or name"),
        (tiny_mamba, {"ratio": 0.99}, "lower ratio, or name a state_size"),
        (tiny_mamba, {"tolerance": 0.9, "min_state_size": 9}, "min_state_size=9, and the layers have 8 states: lower"),
        (
            tiny_mamba,
            {"tolerance": 0.9, "multiple_of": 8},
            "no smaller size is one to choose: multiple_of=1 allows any",
        ),
        (tiny_mamba, {"tolerance": 0.001, "uniform": True}, "uniform=True gives all the size of the layer"),
        (tiny_mamba2, {"tolerance": 0.05, "uniform": True, "multiple_of": 16}, "no smaller size is one to choose"),
        (tiny_mamba2, {"tolerance": 0.001, "multiple_of": 8}, "raise tolerance, round less (multiple_of=1"),
    ],
)
def test_the_reason_and_the_knob(warnings, token_ids, make, target, reason):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    cut = CompreSSMConfig(**target, refit=0)
    plan = measure(model, token_ids, cut).plan(cut)
    assert not plan.realizations
    assert warnings() == []
    plan.apply_(model)
    (warning,) = warnings()
    assert reason in warning
    assert model.config.to_dict() == config
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("target", [{"tolerance": 0}, {"ratio": 1}, {"state_size": 4}])
def test_no_warning_where_none_was_asked_for_or_one_was_made(warnings, mamba, token_ids, target):
    compress_(mamba, CompreSSMConfig(**target), token_ids)
    assert warnings() == []


def test_one_size_for_layers_of_several(token_ids):
    """It is one that all of them can have, or the model is refused."""
    model = tiny_mamba()
    compress_(model, CompreSSMConfig(state_size={1: 6}), token_ids)
    with pytest.raises(ValueError, match=r"needs 8 states.* are \[1, 2, 3, 4, 5, 6\]"):
        compress_(model, CompreSSMConfig(tolerance=1e-9, uniform=True), token_ids)
    assert set(compress_(model, CompreSSMConfig(tolerance=0.5, uniform=True), token_ids).sizes.values()) < set(
        range(6)
    )
    with pytest.raises(ValueError, match="ask for fewer than 6"):
        compress_(tiny_mamba(6), CompreSSMConfig(state_size=6), token_ids)


def test_a_projected_model_can_not_become_a_stock_checkpoint(mamba2, token_ids):
    compress_(mamba2, CompreSSMConfig(state_size=8), token_ids)
    for target in ({"state_size": 4}, {"tolerance": 0.5}):
        with pytest.raises(ValueError, match="layer 0 scans a projected state"):
            compress_(mamba2, CompreSSMConfig(**target, uniform=True), token_ids)
    assert mamba2.backbone.layers[0].mixer.ssm_state_size == 8
