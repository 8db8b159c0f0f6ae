"""Healing goes through a Trainer, and nothing of that is left; what it can't do is refused before anything changes."""

from __future__ import annotations

import copy
import gc
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_, measure
from hf_compressm.data.healing import HealingText
from hf_compressm.healing import heal
from hf_compressm.healing.trainer import HealingTrainer
from tests.conftest import tiny_mamba, tiny_mamba2

IDS = torch.randint(0, 61, (16, 24), generator=torch.Generator().manual_seed(1))
HEAL = CompreSSMConfig(state_size=4, refit=0, heal=500)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(heal, "STEP_TOKENS", 200)
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)  # which a Trainer does twice


def picture(model: Any) -> dict[str, Any]:
    """Of all but the weights."""
    return {
        "modules": {
            name: (type(module), sorted(vars(module)), [len(v) for v in vars(module).values() if isinstance(v, dict)])
            for name, module in model.named_modules()
        },
        "modes": [module.training for module in model.modules()],
        "forward": [module.forward for module in model.modules()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "parameters": [id(parameter) for parameter in model.parameters()],
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }


def process() -> dict[str, Any]:
    """Of the process that healing runs in."""
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "accelerate": [dict(vars(state())) for state in (PartialState, AcceleratorState, GradientState)],
        "environment": dict(os.environ),
        "here": sorted(path.name for path in Path().iterdir()),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(monkeypatch, tmp_path, fails):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate launch sets it
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as alone:
        alone.delenv("LOCAL_RANK")
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, cut = tiny_mamba2(), tiny_mamba2()
    for one in (model, cut):
        one.config.use_cache = True
        one.train()
        one.backbone.layers[0].eval()
        one.backbone.embeddings.weight.requires_grad_(False)
        one.backbone.norm_f.weight.grad = torch.ones(32)
    if fails:
        steps = iter(range(2))
        stock = HealingTrainer.compute_loss
        monkeypatch.setattr(
            HealingTrainer, "compute_loss", lambda *args, **kwargs: (next(steps), stock(*args, **kwargs))[1]
        )
    compress_(cut, CompreSSMConfig(state_size=4), IDS)
    random.seed(1)
    before = process()
    shape = picture(cut) | {"parameters": None, "forward": None}
    if fails:
        with pytest.raises(StopIteration):
            compress_(model, HEAL, IDS)
    else:
        compress_(model, HEAL, IDS)
    for name, value in process().items():
        assert value == before[name], name
    now = picture(model) | {"parameters": None, "forward": None}
    for name in shape:
        assert now[name] == shape[name], name
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model.backbone.norm_f.weight.grad, torch.ones(32))
    assert [parameter.grad is None for parameter in model.parameters()].count(False) == 1
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.gradient_accumulation_steps == 3


def learnt_from(monkeypatch) -> list[list[int]]:
    """The sequences that the Trainer learns from."""
    read: list[list[int]] = []
    stock = HealingTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        read.extend(
            row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        )
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(HealingTrainer, "compute_loss", compute_loss)
    return read


class Counted(list):
    """Counts how many of it were asked for."""

    asked = 0

    def __getitem__(self, at: Any) -> Any:
        Counted.asked += 1
        return super().__getitem__(at)


@pytest.mark.parametrize("kind", ["tensor", "lengths", "loader", "generator"])
def test_what_is_held_out_is_not_learnt_from(monkeypatch, kind):
    read = learnt_from(monkeypatch)
    rows = [row[: 24 - 3 * (i % 4)] if kind == "lengths" else row for i, row in enumerate(IDS)]
    data: Any = {
        "tensor": lambda: IDS,
        "lengths": lambda: [row.tolist() for row in rows],
        "loader": lambda: DataLoader([{"input_ids": row} for row in rows], batch_size=3),
        "generator": lambda: (IDS[i : i + 3] for i in range(0, 16, 3)),
    }[kind]()
    model = tiny_mamba()
    report = compress_(model, CompreSSMConfig(state_size=4, refit=0, heal=900), data)
    held_out = [rows[i].tolist() for i in (3, 7, 11, 15)]
    every = [row.tolist() for row in rows]
    assert report.healing.held_out_tokens == sum(map(len, held_out))
    assert report.healing.tokens == sum(map(len, read)) > sum(map(len, every))  # more than once over it
    assert {tuple(row) for row in read} == {tuple(row) for row in every} - {tuple(row) for row in held_out}


def test_of_much_data_a_part_is_measured_and_a_stream_is_read_as_it_is_needed(monkeypatch, mamba):
    monkeypatch.setattr("hf_compressm.data.healing.sequences_for", lambda model: 8)
    many = torch.randint(0, 61, (100, 12), generator=torch.Generator().manual_seed(2))
    measured = torch.cat([batch["input_ids"] for batch in HealingText(many, mamba, None, 1000).measured])
    assert torch.equal(measured, many[torch.linspace(0, 99, 8).round().long()])
    read = learnt_from(monkeypatch)
    rows = Counted(many)
    report = compress_(mamba, CompreSSMConfig(state_size=4, refit=0, heal=480), DataLoader(rows, batch_size=4))
    assert read == [row.tolist() for i, row in enumerate(many[: len(read) + 2]) if i not in (3, 7)]
    assert report.healing.tokens == 12 * len(read)
    assert Counted.asked < 80


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: tiny_mamba().backbone, "no head"),
        (lambda: tiny_mamba().half(), "float16"),
    ],
)
def test_models_that_are_refused(make, match):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        compress_(model, HEAL, IDS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_settings_that_are_refused(mamba, monkeypatch):
    with pytest.raises(ValueError, match="at least two"):
        compress_(mamba, HEAL, IDS[:1])
    with pytest.raises(ValueError, match="all sequences are the same"):
        compress_(mamba, HEAL, IDS[:1].repeat(4, 1))
    with pytest.raises(ValueError, match="is not healed"):
        measure(mamba, IDS, HEAL).plan(HEAL)
    with pytest.raises(ValueError, match="training heals"):
        CompreSSMCallback(CompreSSMConfig(tolerance=0.1, heal=1000))
    with pytest.raises(ValueError, match="heal_parameters must be one of cut, all"):
        CompreSSMConfig(heal=1000, heal_parameters="some")
    assert mamba.config.state_size == 8


def test_nothing_cut_is_nothing_to_heal(mamba):
    report = compress_(mamba, CompreSSMConfig(tolerance=0, heal=1000), IDS)
    assert report.healing is None
    assert report.states_after == report.states_before
