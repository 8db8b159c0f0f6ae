"""Models whose weights wait on the CPU between forward passes, by accelerate's hooks, are measured and cut like any other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from transformers import AutoModelForCausalLM

import hf_compressm.cutting.apply as apply_module
from hf_compressm import CompreSSMConfig, compress_, hankel_singular_values, measure
from hf_compressm.cutting.divergence import Divergence
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.layers.models import build, tokens

CPU = torch.device("cpu")
IDS = tokens(8, 24) % 61
CUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mamba": (tiny_mamba, {"max_divergence": 0.05, "weights": "fisher", "refit": 1}),
    "mamba, magnitude": (tiny_mamba, {"state_size": 4, "selection": "magnitude"}),
    "mamba2, project": (tiny_mamba2, {"ratio": 0.5}),
    "mamba2, select": (tiny_mamba2, {"state_size": 8, "realization": "select"}),
    "falcon_mamba": (lambda: build("falcon_mamba"), {"state_size": 8, "refit": 1}),
    "mamba2, untied": (lambda: build("mamba2", tie_word_embeddings=False), {"state_size": 8}),
    "falcon_h1": (lambda: build("falcon_h1"), {"state_size": 8}),
    "zamba": (lambda: build("zamba"), {"state_size": 8, "refit": 1}),
}


def offloaded(model: Any) -> Any:
    cpu_offload(model, CPU)
    model.hf_device_map = {"": "cpu"}  # as from_pretrained(device_map=...) notes it, by which save_pretrained goes
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.parametrize("name", CUTS)
def test_an_offloaded_model_becomes_what_a_plain_one_becomes(name, tmp_path):
    make, options = CUTS[name]
    plain, model = make(), offloaded(make())
    reports = [compress_(each, CompreSSMConfig(**options), IDS) for each in (plain, model)]
    assert reports[0].sizes == reports[1].sizes
    assert min(reports[0].sizes.values()) < min(row.old_size for row in reports[0].layers)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = plain(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    if name in ("mamba2, untied", "falcon_h1"):  # accelerate takes tied weights apart, and transformers saves them so
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, expected)
    remove_hook_from_module(model, recurse=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(IDS).logits, expected)


def test_measuring_leaves_an_offloaded_model_as_it_was():
    plain, model = tiny_mamba2(), offloaded(tiny_mamba2())
    before = model(IDS).logits
    found, expected = (hankel_singular_values(each, IDS).layers for each in (model, plain))
    assert found == expected
    batch = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    assert Divergence(model, batch)() == 0
    assert torch.equal(model(IDS).logits, before)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2])
def test_a_cut_that_fails_leaves_an_offloaded_model_as_it_was(make, monkeypatch):
    model = offloaded(make())
    before = model(IDS).logits
    config = CompreSSMConfig(state_size=4, refit=0)
    plan = measure(model, IDS, config).plan(config)
    sizes = copy.deepcopy(model.config.to_dict())

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(apply_module, "write_sizes_", fail)
    with pytest.raises(torch.OutOfMemoryError):
        plan.apply_(model)
    assert torch.equal(model(IDS).logits, before)
    assert model.config.to_dict() == sizes
    monkeypatch.undo()
    plan.apply_(model)
    assert not torch.equal(model(IDS).logits, before)


def test_weights_that_are_not_in_memory_are_refused(tmp_path):
    model = tiny_mamba()
    disk_offload(model, tmp_path, CPU)
    with torch.device("meta"):
        nowhere = type(model)(model.config)
    for each in (model, nowhere):
        with pytest.raises(ValueError, match="not in memory"):
            compress_(each, CompreSSMConfig(state_size=4), IDS)
