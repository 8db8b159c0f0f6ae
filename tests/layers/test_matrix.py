"""What every architecture does, one test for each thing, all of them over one list of model types."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_, hankel_singular_values, measure
from hf_compressm.cutting.snapshot import Snapshot
from hf_compressm.layers import find_layers
from hf_compressm.modeling import modeling_compressm
from hf_compressm.modeling.state_sizes import get_state_sizes
from tests import hub
from tests.conftest import cache_of
from tests.layers.models import MAMBA_1, STATE_SIZE_FIELD, TYPES, N, build, tokens
from tests.training.conftest import losses, make_trainer

CODE = "modeling_compressm.py"


@pytest.fixture(params=TYPES)
def model_type(request) -> str:
    return request.param


def sizes(model) -> list[int]:
    return [layer.state_size for layer in find_layers(model)]


def outside_the_mixers(model) -> dict[str, torch.Tensor]:
    inside = tuple(layer.name + "." for layer in find_layers(model))
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith(inside)}


@torch.no_grad()
def silence_(layer, group: int, states: list[int]) -> None:
    """Make B and C of some states zero, at every token."""
    mixer, size = layer.mixer, layer.state_size
    index = torch.tensor(states)
    if hasattr(mixer, "x_proj_weight"):
        mixer.x_proj_weight[group, mixer.time_step_rank + torch.cat([index, size + index])] = 0
    elif hasattr(mixer, "x_proj"):
        mixer.x_proj.weight[mixer.time_step_rank + torch.cat([index, size + index])] = 0
    else:
        rows = mixer.intermediate_size + group * size + torch.cat([index, layer.groups * size + index])
        mixer.in_proj.weight[mixer.intermediate_size + rows] = 0
        mixer.conv1d.bias[rows] = 0


@pytest.mark.parametrize("refit", [0, 2])
def test_states_that_do_nothing_go_and_nothing_changes(full, model_type, refit):
    """Others in each layer and group. Everything outside the mixers stays as it is, bit for bit."""
    model = full(model_type)
    silent = {}
    for layer in find_layers(model):
        for group in range(layer.groups):
            order = torch.randperm(N, generator=torch.Generator().manual_seed(10 * layer.index + group))
            silent[layer.index, group] = order[:8].tolist()
            silence_(layer, group, silent[layer.index, group])
    before, others = model(tokens()).logits, outside_the_mixers(model)
    config = CompreSSMConfig(state_size=8, selection="auto" if refit else "greedy", realization="select", refit=refit)
    report = compress_(model, config, tokens(4, 24))
    assert sizes(model) == [8] * len(report.layers)
    scale = before.abs().max()
    # Jamba's read-out is fitted to a few tokens, with its norms between the fit and the output.
    atol = 1e-2 if model_type == "jamba" and refit else 2e-5
    torch.testing.assert_close(model(tokens()).logits / scale, before / scale, atol=atol, rtol=0)
    after = outside_the_mixers(model)
    assert others.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in others.items())


def test_a_cut_by_default_loses_less_than_a_random_one(full, model_type):
    errors = {}
    for selection in ("auto", "random"):
        report = compress_(full(model_type), CompreSSMConfig(state_size=8, selection=selection), tokens(4, 24))
        errors[selection] = sum(layer.output_error for layer in report.layers)
    assert 0 <= errors["auto"] < 0.7 * errors["random"]


def test_spectra(full, model_type):
    model = full(model_type)
    layers = find_layers(model)
    report = hankel_singular_values(model, tokens(2, 12))
    for layer, row in zip(layers, report.layers, strict=True):
        spectrum = torch.tensor(row.hankel_singular_values)
        assert spectrum.shape == (layer.groups, N)
        assert (spectrum >= 0).all()
        assert (spectrum.diff() <= 1e-9).all()


def test_generation_with_and_without_cache_agrees(slim, model_type):
    model = slim(model_type)
    input_ids = tokens()
    logits = model(input_ids).logits
    step = model(input_ids[:, :7], use_cache=True)
    pieces = [step.logits]
    for i in range(7, 12):
        position = {} if model_type in ("mamba", "falcon_mamba", "mamba2") else {"position_ids": torch.full((2, 1), i)}
        step = model(input_ids[:, i : i + 1], **cache_of(step), use_cache=True, **position)
        pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits, atol=2e-5, rtol=1e-4)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0  # left padding
    arguments = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        model.generate(input_ids, use_cache=True, **arguments), model.generate(input_ids, use_cache=False, **arguments)
    )
    assert model.generate(input_ids, max_new_tokens=3, num_beams=2, do_sample=False).shape == (2, 15)


def test_saved_models_load_again(slim, model_type, tmp_path):
    model = slim(model_type)
    model.save_pretrained(tmp_path)
    assert (tmp_path / CODE).read_text() == modeling_compressm.SOURCE
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == model_type
    assert config["architectures"] == [type(model).__name__]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert sizes(again) == sizes(model)
    assert get_state_sizes(again.config) == get_state_sizes(model.config)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert AutoModelForCausalLM.from_config(model.config)(tokens()).logits.isfinite().all()
    if model_type not in MAMBA_1:  # which has layers that are projected by now
        return
    # And once more: from what was loaded, to one size for all, which is a stock checkpoint.
    compress_(again, CompreSSMConfig(state_size=4, realization="select"), tokens(4, 24))
    again.save_pretrained(tmp_path / "uniform")
    config = json.loads((tmp_path / "uniform" / "config.json").read_text())
    assert config[STATE_SIZE_FIELD[model_type]] == 4
    assert not (tmp_path / "uniform" / CODE).exists()
    uniform = AutoModelForCausalLM.from_pretrained(tmp_path / "uniform")
    assert torch.equal(uniform(tokens()).logits, again(tokens()).logits)


@pytest.fixture(scope="module")
def without_plugin(slim_models, tmp_path_factory):
    """What a process without the plugin makes of the saved models."""
    folder = tmp_path_factory.mktemp("architectures")
    for model_type, model in slim_models.items():
        model.save_pretrained(folder / "saved" / model_type)
    torch.save(tokens(), folder / "input_ids.pt")
    environment = os.environ | {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    script = Path(hub.__file__).with_name("without_plugin.py")
    subprocess.run([sys.executable, str(script), folder], env=environment, check=True, timeout=240)
    results = torch.load(folder / "results.pt")
    assert not results["hf_compressm imported"]
    return results


def test_remote_code(without_plugin, slim_models, model_type):
    """Stock transformers refuses the model; with its own code trusted it loads, generates and is saved whole again."""
    results, model = without_plugin[model_type], slim_models[model_type]
    assert results["stock"] == ["AmbiguousGlobalPerLayerAttributeError"] * 2
    assert results["class"] == type(model).__name__
    logits = model(tokens()).logits.detach()
    torch.testing.assert_close(results["logits"], logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(results["again"], logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(results["base"], model.base_model(tokens())[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(*results["generated"])
    torch.testing.assert_close(results["mapped"], logits, atol=0.5, rtol=0.1)  # bfloat16, device_map="auto"


def test_gradient_checkpointing_changes_no_gradient(slim, model_type):
    gradients = []
    for checkpointing in (False, True):
        model = slim(model_type).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(f"{layer.name}.A_log" in gradients[0] for layer in find_layers(model))
    torch.testing.assert_close(*gradients)


def test_a_trainer_run_with_a_cut_and_its_checkpoints(full, model_type, tmp_path):
    """The checkpoint after the cut loads by itself, and a run resumed from it ends as the first one."""
    config = CompreSSMConfig(state_size=8, start=0, end=2, num_reductions=1)
    runs = []
    for resume in (False, True):
        model = build(model_type)
        arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": 0}
        trainer = make_trainer(tmp_path, model, callbacks=[CompreSSMCallback(config)], **arguments)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        assert sizes(model) == [8] * len(sizes(model))
        runs.append((losses(trainer)[4], model.eval()(tokens()).logits))
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
        assert sizes(saved) == [8] * len(sizes(saved))
        assert getattr(saved.config, STATE_SIZE_FIELD[model_type]) == 8
        assert not (tmp_path / "checkpoint-3" / CODE).exists()
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-5)


def test_rollback_restores_the_model_exactly(full, model_type, tmp_path):
    model = full(model_type).eval()
    model.config.rescale_prenorm_residual = False  # a cut of trained weights switches it off
    before, config = model(tokens()).logits, model.config.to_dict()
    layers = find_layers(model)
    plan = measure(model, tokens(4, 24)).plan(CompreSSMConfig(state_size=8, realization="select", refit=0))
    optimizer = torch.optim.AdamW(model.parameters())
    snapshot = Snapshot(model, layers, [optimizer])
    plan.apply_(model, optimizer)
    assert not torch.equal(model(tokens()).logits, before)
    snapshot.restore_()
    assert torch.equal(model(tokens()).logits, before)
    assert model.config.to_dict() == config


def test_disk_offload(slim, model_type, tmp_path):
    """A slimmed model runs from disk; one that lies on disk can't be cut, and the error says what to do."""
    model = slim(model_type)
    model.save_pretrained(tmp_path)
    mixers = [layer.name.rpartition(".")[0] for layer in find_layers(model)]
    parts = {name: "cpu" for name, _ in model.base_model.named_children() if name != "layers"}
    prefix = model.base_model_prefix
    devices = {f"{prefix}.{name}": "cpu" for name in parts} | {"lm_head": "cpu"}
    devices |= {f"{prefix}.layers.{i}": "cpu" for i in range(len(model.base_model.layers))}
    on_disk = next(name for name in devices if mixers[0].startswith(name))
    devices[on_disk] = "disk"
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=devices, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(offloaded(tokens()).logits, model(tokens()).logits, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="meta device"):
        compress_(offloaded, CompreSSMConfig(state_size=4), tokens(4, 24))


def test_bfloat16(full, model_type):
    config = CompreSSMConfig(state_size=8, selection="greedy", realization="select")  # fits nothing to a few tokens
    model, exact = full(model_type).to(torch.bfloat16), full(model_type)
    for each in (model, exact):
        compress_(each, config, tokens(4, 24))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = exact(tokens()).logits
    difference = (model(tokens()).logits.float() - logits) / logits.std()
    assert difference.square().mean().sqrt() < 0.3
    assert model.generate(tokens(), max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_lora_on_a_slimmed_model(slim, model_type, tmp_path):
    model = slim(model_type)
    model.save_pretrained(tmp_path / "slim")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(trained) >= len(sizes(copy.deepcopy(adapted).unload()))
    assert all(grad.abs().max() > 0 for grad in trained)
    with pytest.raises(ValueError, match="carries an adapter"):
        compress_(model, CompreSSMConfig(state_size=4), tokens(4, 24))
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "slim"), tmp_path / "adapter")
    adapted.eval()
    expected = adapted(input_ids=tokens()).logits
    torch.testing.assert_close(again.eval()(input_ids=tokens()).logits, expected, atol=1e-6, rtol=1e-6)


def test_index_sets_differ_between_groups(full, model_type):
    model = full(model_type)
    layers = find_layers(model)
    plan = measure(model, tokens(4, 24)).plan(CompreSSMConfig(state_size=8, realization="select", selection="random"))
    groups = 1 if model_type in MAMBA_1 and model_type != "zamba" else 2
    for layer in layers:
        assert layer.groups == groups
        kept = plan.kept[layer.index]
        assert [len(group) for group in kept] == [8] * groups
        assert len({tuple(group) for group in kept}) == groups


@pytest.mark.parametrize("selection", ["ghost", "lti_modal", "magnitude", "random", "greedy"])
def test_baselines(full, model_type, selection):
    model = full(model_type)
    compress_(model, CompreSSMConfig(state_size=8, selection=selection, estimator="mean_lti"), tokens(2, 12))
    assert model(tokens()).logits.isfinite().all()


def test_buffers_that_depend_on_the_state_size_are_cut_too(full, slim):
    """Falcon-Mamba's ones, which only the fused kernel reads, and Falcon-H1's multipliers, one vector per layer."""
    for layer in find_layers(slim("falcon_mamba")):
        for norm in (layer.mixer.b_layernorm, layer.mixer.c_layernorm):
            assert torch.equal(norm.weight, torch.ones(layer.state_size))
    multipliers = full("falcon_h1").config.ssm_multipliers
    for layer in find_layers(slim("falcon_h1")):
        states = 2 * (layer.unprojected_state_size or layer.state_size)
        expected = torch.tensor(multipliers).repeat_interleave(torch.tensor([64, 64, states, states, 8]))
        assert torch.equal(layer.mixer.mup_vector.flatten(), expected)
        assert layer.mixer.groups_time_state_size == states
