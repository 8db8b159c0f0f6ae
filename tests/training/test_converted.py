"""Checkpoints whose weights have other names and shapes than the model's: a Trainer saves such ones, and can't load them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback
from hf_compressm.training.converted import load_converted_
from tests.conftest import tiny_mamba
from tests.layers.models import build
from tests.training.conftest import dataset, losses, make_trainer, sizes

CONFIG = {"state_size": 8, "start": 0, "end": 4, "num_reductions": 2, "refit": 0}  # after steps 2 and 4
SETTINGS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "score"}


class Watch(TrainerCallback):
    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = copy.deepcopy(model.state_dict())


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@torch.no_grad()
def other(model_type):
    model = build(model_type)
    for parameter in model.parameters():
        parameter.mul_(0.5)
    return model


@pytest.mark.parametrize("model_type", ["jamba", "granitemoehybrid", "nemotron_h"])
def test_a_resumed_run_is_the_whole_run_and_the_best_model_is_loaded(model_type, tmp_path):
    model, callback, watch = build(model_type), CompreSSMCallback(CONFIG), Watch()
    scores = iter([0.0, 0.0, 1.0, 0.0, 0.0])
    whole = make_trainer(
        tmp_path,
        model,
        callbacks=[callback, watch],
        eval_dataset=dataset(2),
        compute_metrics=lambda _: {"score": next(scores)},
        **SETTINGS,
        **BEST,
    )
    whole.train()
    assert [set(attempt.sizes.values()) for attempt in callback.history][1] == {8}
    assert sizes(model) == list(callback.history[0].sizes.values())
    assert same(model.state_dict(), watch.weights[3])
    again, its = other(model_type), Watch()
    resumed = make_trainer(tmp_path / "again", again, callbacks=[CompreSSMCallback(CONFIG), its], max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(its.weights[5], watch.weights[5])
    assert {step: loss for step, loss in losses(whole).items() if step > 3}.items() <= losses(resumed).items()


def test_other_checkpoints_are_the_trainers(tmp_path):
    """Those with the model's own names, of another model, and in another form."""
    model = build("jamba")
    tiny_mamba().save_pretrained(tmp_path / "mamba")
    before = copy.deepcopy(model.state_dict())
    assert not load_converted_(tiny_mamba(), str(tmp_path / "mamba"))
    assert not load_converted_(model, str(tmp_path))
    assert not load_converted_(model, str(tmp_path / "mamba"))
    assert same(model.state_dict(), before)
