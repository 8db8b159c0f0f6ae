"""A slim checkpoint with one size for all layers is its source with smaller tensors, and nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_compressm import CompreSSMConfig, compress_, compress_pretrained
from hf_compressm.cli import app
from hf_compressm.data.texts import CALIBRATION
from hf_compressm.hub import load_model, write_companions
from tests.conftest import tiny_mamba, tiny_mamba2

SHIPPED = CALIBRATION.parent / "mamba-small"
OTHER_FILES = {"LICENSE": b"do as you like", "chat_template.jinja": b"{{ messages }}\n"}
NOT_CARRIED = {"model.onnx": b"weights", "trainer_state.json": b"{}", "README.md": b"---\nlicense: mit\n---\nMine.\n"}


def older(folder, make, dtype=torch.float32):
    """A checkpoint as older versions wrote it: other names, an infinity, fields of its own; and more files."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    make(vocabulary=len(tokenizer)).to(dtype).save_pretrained(folder)
    shutil.copy(SHIPPED / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast",   "mine": 1}')
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    config |= {"ssm_cfg": {"layer": "mine"}, "author": "Ünal", "transformers_version": "4.40.0"}
    if "time_step_limit" in config:
        config["time_step_limit"] = [0.0, float("inf")]
    path.write_text(json.dumps(config, indent=2))
    for name, content in (OTHER_FILES | NOT_CARRIED).items():
        (folder / name).write_bytes(content)
    return config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2])
def test_only_the_size_changes(tmp_path, token_ids, make, dtype):
    source, slim = tmp_path / "source", tmp_path / "slim"
    config = older(source, make, dtype)
    size = config["state_size"] // 2
    target = CompreSSMConfig(state_size=size, uniform=True)
    compress_pretrained(source, target, calibration_data=token_ids).save_pretrained(slim)
    assert json.loads((slim / "config.json").read_text()) == config | {"state_size": size}

    before, after = (load_file(folder / "model.safetensors") for folder in (source, slim))
    assert list(before) == list(after)
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    changed = {name.rsplit(".", 2)[1] for name in before if before[name].shape != after[name].shape}
    assert changed <= {"mixer", "x_proj", "in_proj", "conv1d"}
    assert changed
    same = [name for name in before if "mixer" not in name]
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert torch.isfinite(load_model(slim)(token_ids[:1]).logits).all()


def test_what_was_changed_on_purpose_stays(tmp_path, token_ids):
    config = older(tmp_path / "source", tiny_mamba)
    model = load_model(tmp_path / "source")
    model.config.pad_token_id = 7
    model.to(torch.bfloat16)
    compress_(model, CompreSSMConfig(state_size=4), token_ids)
    model.save_pretrained(tmp_path / "slim")
    expected = config | {"state_size": 4, "pad_token_id": 7, "torch_dtype": "bfloat16"}
    assert json.loads((tmp_path / "slim" / "config.json").read_text()) == expected


def test_it_can_be_saved_over_its_source_and_cut_again(tmp_path, token_ids):
    config = older(tmp_path / "source", tiny_mamba)
    for size in (6, 3):
        model = compress_pretrained(tmp_path / "source", CompreSSMConfig(state_size=size), calibration_data=token_ids)
        model.save_pretrained(tmp_path / "source")
        write_companions(model, tmp_path / "source", AutoTokenizer.from_pretrained(tmp_path / "source"))
        assert json.loads((tmp_path / "source" / "config.json").read_text()) == config | {"state_size": size}


def test_layers_of_different_sizes_need_more_than_the_source_says(tmp_path, token_ids):
    older(tmp_path / "source", tiny_mamba)
    model = compress_pretrained(
        tmp_path / "source", CompreSSMConfig(state_size={0: 4, 1: 6}), calibration_data=token_ids
    )
    model.save_pretrained(tmp_path / "slim")
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["per_layer_config"]
    assert "author" in config


def test_shards_and_dtypes_are_those_of_the_source(tmp_path, token_ids):
    """Some weights in float32 among others in bfloat16, in shards that a fixed size would not give."""
    source, slim = tmp_path / "source", tmp_path / "slim"
    older(source, tiny_mamba, torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if "A_log" in name}
    (source / "model.safetensors").unlink()
    names, files = sorted(tensors), [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {name: files[i % 3] for i, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, source / file, {"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    model = compress_pretrained(source, CompreSSMConfig(state_size=4, refit=0), calibration_data=token_ids)
    model.save_pretrained(slim)
    assert json.loads((slim / "model.safetensors.index.json").read_text())["weight_map"] == weight_map
    for file in files:
        before, after = load_file(source / file), load_file(slim / file)
        assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert torch.isfinite(load_model(slim)(token_ids[:1]).logits).all()

    model.save_pretrained(tmp_path / "one", max_shard_size="1GB")
    assert load_file(tmp_path / "one" / "model.safetensors").keys() == tensors.keys()
    model.float().save_pretrained(tmp_path / "float")
    saved = [tensor for file in files for tensor in load_file(tmp_path / "float" / file).values()]
    assert {tensor.dtype for tensor in saved} == {torch.float32}


def test_a_source_that_is_gone(tmp_path, token_ids):
    older(tmp_path / "source", tiny_mamba)
    model = compress_pretrained(tmp_path / "source", CompreSSMConfig(state_size=4), calibration_data=token_ids)
    shutil.rmtree(tmp_path / "source")
    model.save_pretrained(tmp_path / "slim")
    assert load_model(tmp_path / "slim").config.state_size == 4


def test_the_command_carries_the_other_files_over(tmp_path):
    source, slim = tmp_path / "source", tmp_path / "slim"
    older(source, tiny_mamba)
    (tmp_path / "text").write_text(CALIBRATION.read_text("utf-8")[:600], encoding="utf-8")
    arguments = ["compress", source, slim, "--state-size", 4, "--refit", 0, "--calibration", tmp_path / "text"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    unchanged = [*OTHER_FILES, "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    assert all((slim / name).read_bytes() == (source / name).read_bytes() for name in unchanged)
    assert not (slim / "model.onnx").exists()
    assert not (slim / "trainer_state.json").exists()
    assert "Mine." in (slim / "README.md").read_text() or "compressm" in (slim / "README.md").read_text()


def test_another_tokenizer_takes_the_place_of_the_sources(tmp_path):
    older(tmp_path / "source", tiny_mamba)
    model = load_model(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.add_tokens(["<mine>"])
    (tmp_path / "slim").mkdir()
    write_companions(model, tmp_path / "slim", tokenizer)
    assert "<mine>" in AutoTokenizer.from_pretrained(tmp_path / "slim").get_vocab()
    assert (tmp_path / "slim" / "LICENSE").read_bytes() == OTHER_FILES["LICENSE"]


def test_a_tokenizer_with_several_chat_templates(tmp_path):
    """It keeps the others in a folder."""
    older(tmp_path / "source", tiny_mamba)
    (tmp_path / "source" / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.chat_template = {"default": "{{ messages }}", "short": "{{ messages[0] }}"}
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "slim").mkdir()
    write_companions(load_model(tmp_path / "source"), tmp_path / "slim", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "slim").chat_template == tokenizer.chat_template
