"""Checkpoints are loaded as they are on disk, or refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMConfig, compress_, compress_pretrained
from hf_compressm.hub import default_device_map, load_model
from tests.conftest import tiny_mamba, tiny_mamba2

WEIGHTS = "model.safetensors"
MODELS = {"mamba": tiny_mamba, "mamba2": tiny_mamba2}


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model.eval()(ids).logits


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def truncated(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def empty_file(folder):
    (folder / WEIGHTS).write_bytes(b"")


def no_mixer_weight(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["backbone.layers.1.mixer.A_log"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def truncated_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def no_shard(folder):
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def no_index(folder):
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "config.json"),
        (broken_config, "not a valid JSON"),
        (no_weights, "model.safetensors"),
        (truncated, "half written"),
        (empty_file, "half written"),
        (no_mixer_weight, r"layers\.1\.mixer\.A_log"),
        (truncated_pickle, "half written"),
        (no_shard, "half written"),
        (no_index, "model.safetensors"),
    ],
)
def test_half_written_checkpoints_are_refused(tmp_path, mamba, token_ids, damage, message):
    sharded = {"max_shard_size": "10KB"} if damage in (no_shard, no_index) else {}
    mamba.save_pretrained(tmp_path, **sharded)
    damage(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match=message):
        compress_pretrained(tmp_path, CompreSSMConfig(state_size=4), calibration_data=token_ids)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_of_another_size_is_refused(tmp_path, mamba, token_ids):
    mamba.save_pretrained(tmp_path)
    tiny_mamba(state_size=6).config.save_pretrained(tmp_path)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=r"other shapes .*layers\.0\.mixer\.A_log"):
            compress_pretrained(tmp_path, CompreSSMConfig(state_size=4), calibration_data=token_ids, **options)
    mamba.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"other shapes .*embeddings"):
        compress_pretrained(tmp_path, calibration_data=token_ids, vocab_size=5)


def test_quantised_checkpoints_are_refused(tmp_path, mamba):
    mamba.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    mamba.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised"):
        compress_pretrained(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_stock_loading_rescales_trained_weights(tmp_path, name):
    """Why `load_model` takes care: remove that when this fails."""
    model = MODELS[name]()
    model.config.rescale_prenorm_residual = True
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ratio = again.backbone.layers[0].mixer.out_proj.weight / model.backbone.layers[0].mixer.out_proj.weight
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2**-0.5))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("give_config", [False, True])
def test_checkpoints_with_rescaling_load_as_they_are_on_disk(tmp_path, token_ids, name, give_config):
    model = MODELS[name]()
    model.config.rescale_prenorm_residual = True
    model.save_pretrained(tmp_path)
    kwargs = {"config": model.config} if give_config else {}
    assert torch.equal(
        logits(load_model(tmp_path, dtype=torch.float32, **kwargs), token_ids), logits(model, token_ids)
    )
    assert model.config.rescale_prenorm_residual


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("from_disk", [False, True])
def test_slim_models_with_rescaling_reload_exactly(tmp_path, token_ids, name, from_disk):
    model = MODELS[name]()
    model.config.rescale_prenorm_residual = True
    model.save_pretrained(tmp_path / "full")
    config = CompreSSMConfig(state_size=4)
    if from_disk:
        model = compress_pretrained(tmp_path / "full", config, calibration_data=token_ids, dtype=torch.float32)
    else:
        compress_(model, config, token_ids)
    model.save_pretrained(tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype=torch.float32)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


@pytest.mark.parametrize(
    ("gpus", "launched", "expected"),
    [
        (0, {}, None),
        (4, {}, {"": 3}),
        (2, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {"": 1}),
        (1, {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None),
        (2, {"WORLD_SIZE": "2"}, None),
    ],
)
def test_a_checkpoint_goes_to_the_gpu_of_its_process(monkeypatch, gpus, launched, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus - 1)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert default_device_map() == expected


def test_unless_the_caller_names_another_place(monkeypatch, tmp_path, mamba, token_ids):
    mamba.save_pretrained(tmp_path)
    monkeypatch.setattr("hf_compressm.compress.default_device_map", lambda: {"": "meta"})
    with pytest.raises(ValueError, match="meta"):
        compress_pretrained(tmp_path, CompreSSMConfig(state_size=4), calibration_data=token_ids)
    slim = compress_pretrained(tmp_path, CompreSSMConfig(state_size=4), calibration_data=token_ids, device_map="cpu")
    assert slim.device.type == "cpu"


def test_weights_without_a_place_are_refused(tmp_path, mamba2, token_ids):
    """Else a smaller or an unprojected model would be loaded, without a word."""
    compress_(mamba2, CompreSSMConfig(state_size=8), token_ids)
    mamba2.save_pretrained(tmp_path / "projected")
    tiny_mamba2().config.save_pretrained(tmp_path / "projected")
    tiny_mamba(layers=3).save_pretrained(tmp_path / "deep")
    tiny_mamba(layers=2).config.save_pretrained(tmp_path / "deep")
    for name, weight in (("projected", r"layers\.0\.mixer\.BC_projection"), ("deep", r"layers\.2\.mixer\.A_log")):
        with pytest.raises(ValueError, match=f"no place for: backbone.{weight}"):
            load_model(tmp_path / name)


def test_a_projection_that_is_missing_is_refused(tmp_path, mamba2, token_ids):
    compress_(mamba2, CompreSSMConfig(state_size=8), token_ids)
    mamba2.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path), token_ids), logits(mamba2, token_ids))
    weights = load_file(tmp_path / WEIGHTS)
    del weights["backbone.layers.1.mixer.BC_projection"]
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="no BC_projection for layer 1"):
            load(tmp_path)
