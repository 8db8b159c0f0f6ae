"""Checkpoints of a shrinking run: each loads by itself, and a resumed run is the run that was never interrupted."""

from __future__ import annotations

import logging
import shutil
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.training.recording import BatchRecorder
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.training.conftest import losses, make_trainer, sizes

CONFIG = {
    "mamba": {"ratio": 0.5},
    "mamba2": {"state_size": {1: 8}},
    "by head": {"state_size": {1: 8}, "realization": "project_heads"},
}
MAKE = {"mamba": tiny_mamba, "mamba2": tiny_mamba2, "by head": tiny_mamba2}
SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8}


def config(kind: str) -> CompreSSMConfig:
    # Cuts after steps 3 and 6, each on the batches of the last three steps.
    return CompreSSMConfig(start=0, end=6, num_reductions=2, calibration_batches=3, **CONFIG[kind])


@pytest.fixture(scope="module", params=list(CONFIG))
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = make_trainer(folder, MAKE[request.param](), config(request.param), **SETTINGS)
    trainer.train()
    torch.set_num_threads(threads)
    return request.param, folder, trainer


# Before, at, between and after the cuts.
@pytest.mark.parametrize(("step", "restore"), [(2, True), (3, False), (4, True), (7, False)])
def test_a_resumed_run_is_the_whole_run(whole, tmp_path, step, restore):
    kind, folder, trainer = whole
    settings = SETTINGS | {"save_strategy": "no", "restore_callback_states_from_checkpoint": restore}
    model = MAKE[kind](seed=9)
    resumed = make_trainer(tmp_path, model, config(kind), **settings)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert sizes(model) == sizes(trainer.model)
    assert losses(resumed) == losses(trainer)
    for (name, one), two in zip(model.state_dict().items(), trainer.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    (mine,) = [cb for cb in resumed.callback_handler.callbacks if isinstance(cb, CompreSSMCallback)]
    assert [attempt.step for attempt in mine.history] == [3, 6]


def test_every_checkpoint_loads_by_itself(whole):
    kind, folder, trainer = whole
    seen = []
    for step in (1, 3, 6, 8):
        model = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}")
        seen.append(sizes(model))
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all(), name
    # A chosen Mamba-2 size of less than 16 is none of the tuned ones: layer 1 goes from 16 to 8 in one step.
    expected = {"mamba": [16, 12, 8, 8], "mamba2": [32, 32, 24, 24], "by head": [32, 28, 24, 24]}
    assert list(map(sum, seen)) == expected[kind]
    assert seen[-1] == sizes(trainer.model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])


def test_a_resume_without_the_recorded_batches_warns_and_goes_on(whole, tmp_path, caplog):
    kind, folder, trainer = whole
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "compressm_batches_0.pt").unlink()
    model = MAKE[kind](seed=9)
    resumed = make_trainer(tmp_path, model, config(kind), **(SETTINGS | {"save_strategy": "no"}))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sum(sizes(model)) == sum(sizes(trainer.model))


def test_batches_that_hold_numpys_numbers_are_saved_and_read(tmp_path):
    """As a collator may put them there."""
    recorder, ids = BatchRecorder(2), torch.arange(4)[None]
    batch = {"input_ids": ids, "count": np.int64(1), "weights": [np.ones(2), np.float32(0.5), np.bool_(True)]}
    recorder.batches.append(((), batch))
    recorder.save(str(tmp_path), 0)
    read = BatchRecorder(2)
    read.load(str(tmp_path), 0)
    ((args, found),) = read.batches
    assert args == ()
    assert torch.equal(found["input_ids"], ids)
    assert found["count"] == 1
    assert torch.equal(found["weights"][0], torch.ones(2, dtype=torch.float64))
    assert found["weights"][1:] == [0.5, True]


@pytest.mark.parametrize("other", [np.array(["a"], dtype=object), slice(3), lambda: None, threading.Lock()])
def test_batches_that_could_not_be_read_are_not_saved(tmp_path, caplog, monkeypatch, other):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    recorder = BatchRecorder(2)
    recorder.batches.append(((), {"input_ids": torch.arange(4)[None], "other": other}))
    recorder.save(str(tmp_path), 0)
    assert list(tmp_path.iterdir()) == []
    (warning,) = [record.message for record in caplog.records if "saved without the batches" in record.message]
    assert f"Tensor, {type(other).__name__})" in warning


def test_model_init_makes_models_that_resume_too(tmp_path):
    settings = SETTINGS | {"max_steps": 5}
    short = CompreSSMConfig(state_size=3, start=0, end=2, num_reductions=1)
    whole_run = make_trainer(tmp_path, None, short, model_init=lambda: tiny_mamba(), **settings)
    whole_run.train()
    trainer = make_trainer(tmp_path, None, short, model_init=lambda: tiny_mamba(), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sizes(trainer.model) == [3, 3]
    assert losses(trainer) == losses(whole_run)
