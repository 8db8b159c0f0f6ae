"""What the callback puts on a model goes with its trainer, and stays behind when the model is saved or copied whole."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.layers import find_layers
from tests.conftest import tiny_mamba
from tests.training.conftest import dataset, make_trainer, sizes

CONFIG = CompreSSMConfig(state_size=4, start=0, end=2, num_reductions=1)


def hooks(model):
    return [len(layer.mixer._load_state_dict_pre_hooks) for layer in find_layers(model)]


def pickled(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_model_is_as_any_other_once_its_trainer_is_gone(tmp_path):
    model = tiny_mamba()
    trainer = make_trainer(tmp_path, model, CONFIG, max_steps=3)
    trainer.train()
    assert hooks(model) == [1, 1]
    del trainer
    gc.collect()
    assert hooks(model) == [0, 0]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(tiny_mamba().state_dict())
    assert sizes(pickled(model)) == sizes(model) == [4, 4]


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_a_copy_of_a_model_in_training_does_not_resize(tmp_path, copied):
    model = tiny_mamba()
    trainer = make_trainer(tmp_path, model, CONFIG, max_steps=3)
    other = copied(model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(tiny_mamba(6).state_dict())
    assert sizes(other) == sizes(trainer.model) == [8, 8]
    model.load_state_dict(tiny_mamba(6).state_dict())
    assert sizes(model) == [6, 6]


def test_the_trainer_that_loads_has_the_hooks(tmp_path):
    """Also where another one was made since for the same model, and where that one is gone."""
    model = tiny_mamba()
    best = {
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": dataset(2),
        "metric_for_best_model": "score",
        "load_best_model_at_end": True,
    }
    scores = iter([1.0, 0.0, 0.0])
    first = make_trainer(tmp_path, model, CONFIG, compute_metrics=lambda _: {"score": next(scores)}, **best)
    second = make_trainer(tmp_path, model, CONFIG)
    assert hooks(model) == [1, 1]
    first.train()
    assert sizes(model) == [8, 8]
    assert model.compression_report is None
    del second
    gc.collect()
    assert hooks(model) == [1, 1]


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_a_copy_of_the_callback_has_what_it_found_and_no_trainer(tmp_path, copied):
    trainer = make_trainer(tmp_path, tiny_mamba(), CONFIG, max_steps=3)
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, CompreSSMCallback))
    trainer.train()
    callback.subclass_s_own = "kept"
    other = copied(callback)
    assert other.state() == callback.state()
    assert len(other.history) == 1
    assert other.subclass_s_own == "kept"
    assert callback.trainer is trainer
    with pytest.raises(ValueError, match="has no trainer"):
        _ = other.trainer
    model = tiny_mamba()
    make_trainer(tmp_path, model, callbacks=[other], max_steps=3).train()
    assert sizes(model) == [4, 4]
