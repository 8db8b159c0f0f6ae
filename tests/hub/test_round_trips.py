"""Saved models load again: with the plugin, with trusted remote code, with neither, and after being saved again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.hub import load_model
from hf_compressm.modeling import modeling_compressm
from hf_compressm.modeling.state_sizes import get_state_sizes, get_unprojected_state_sizes, set_state_sizes
from tests.modeling.models import LAYERS, NOT_UNIFORM, UNIFORM, build, mamba2_config, mamba_config, slim, tokens

ALL = UNIFORM | NOT_UNIFORM
CODE = "modeling_compressm.py"


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in ALL.items()}


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("round_trips")
    for name, model in models.items():
        model.save_pretrained(folder / "saved" / name)
    torch.save(tokens(), folder / "input_ids.pt")
    return folder


@pytest.fixture(scope="module")
def elsewhere(folder):
    """The results of a process without the plugin."""
    environment = os.environ | {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("without_plugin.py")), folder],
        env=environment,
        check=True,
        timeout=240,
    )
    results = torch.load(folder / "results.pt")
    assert not results["hf_compressm imported"]
    return results


def assert_same(logits: torch.Tensor, model) -> None:
    torch.testing.assert_close(logits, model(tokens()).logits.detach(), atol=1e-6, rtol=1e-6)


def read_config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def check_saved(path: Path, name: str) -> None:
    """A stock checkpoint if uniform; else one that names its code, has it, and passes for a stock one in all else."""
    config = read_config(path)
    prefix = "Mamba2" if "mamba2" in name else "Mamba"
    assert config["model_type"] == prefix.lower()
    assert config["architectures"] == [f"{prefix}ForCausalLM"]
    if name in UNIFORM:
        assert not (path / CODE).exists()
        assert not {"auto_map", "per_layer_config", "unprojected_state_size"} & config.keys()
    else:
        assert (path / CODE).read_text() == modeling_compressm.SOURCE
        assert config["auto_map"] == {
            "AutoModel": f"modeling_compressm.{prefix}Model",
            "AutoModelForCausalLM": f"modeling_compressm.{prefix}ForCausalLM",
        }


@pytest.mark.parametrize("name", ALL)
def test_what_is_saved(folder, name):
    check_saved(folder / "saved" / name, name)


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_models_are_stock(elsewhere, models, name):
    for logits in elsewhere[name]["stock"]:
        assert_same(logits, models[name])


@pytest.mark.parametrize("name", NOT_UNIFORM)
def test_other_models_never_load_wrong(elsewhere, name):
    assert elsewhere[name]["stock"] == ["AmbiguousGlobalPerLayerAttributeError"] * 2


@pytest.mark.parametrize("name", ALL)
def test_remote_code(elsewhere, models, name):
    results, model = elsewhere[name], models[name]
    assert_same(results["logits"], model)
    assert results["class"] == type(model).__name__
    torch.testing.assert_close(results["base"], model.backbone(tokens())[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(*results["generated"])
    torch.testing.assert_close(results["mapped"], results["logits"], atol=0.5, rtol=0.1)


@pytest.mark.parametrize("name", ALL)
def test_saved_again_by_remote_code(elsewhere, folder, models, name):
    path = folder / "saved_again" / name
    check_saved(path, name)
    assert (path / "model.safetensors.index.json").exists()
    assert_same(elsewhere[name]["again"], models[name])
    assert_same(AutoModelForCausalLM.from_pretrained(path)(tokens()).logits, models[name])


@pytest.mark.parametrize("name", ALL)
def test_plugin(folder, models, name, tmp_path):
    """No flag is needed, and the model is an ordinary one, saved in shards and loaded any number of times."""
    path = folder / "saved" / name
    for again in (tmp_path / "1", tmp_path / "2"):
        model = AutoModelForCausalLM.from_pretrained(path)
        assert type(model) is type(models[name])
        assert get_state_sizes(model.config) == get_state_sizes(models[name].config)
        assert get_unprojected_state_sizes(model.config) == get_unprojected_state_sizes(models[name].config)
        assert_same(model(tokens()).logits, models[name])
        model.save_pretrained(again, max_shard_size="4KB")
        check_saved(again, name)
        path = again
    base = AutoModel.from_pretrained(path)(tokens())[0]
    torch.testing.assert_close(base, models[name].backbone(tokens())[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_plugin_in_bfloat16_on_a_device_map(folder, models, name):
    model = AutoModelForCausalLM.from_pretrained(folder / "saved" / name, dtype="bfloat16", device_map="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(tokens()).logits, models[name](tokens()).logits, atol=0.5, rtol=0.1)


def test_a_checkpoint_that_lacks_its_projections_is_refused(tmp_path):
    """The weights of a stock model, the config of a projected one: they are two models."""
    build(mamba2_config()).save_pretrained(tmp_path)
    config = mamba2_config()
    set_state_sizes(config, dict.fromkeys(range(LAYERS), 8), dict.fromkeys(range(LAYERS), 8))
    with pytest.raises(ValueError, match="no BC_projection for layer 0"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    fresh = AutoModelForCausalLM.from_config(config)
    for layer in fresh.backbone.layers:
        assert torch.equal(layer.mixer.BC_projection, torch.eye(8).expand(2 * layer.mixer.n_groups, -1, -1))


@pytest.mark.parametrize("name", ["mamba_mixed", "mamba2_projected", "mamba_uniform"])
def test_remote_code_of_a_model_whose_source_had_some_of_its_own(models, name, tmp_path, monkeypatch):
    """Its config and model files are not beside the slim model, and would not build it; its tokenizer's entry stays."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = build(mamba_config() if name.startswith("mamba_") else mamba2_config())
    source.save_pretrained(tmp_path / "source")
    own = {
        "AutoConfig": "configuration_own.C",
        "AutoModelForCausalLM": "modeling_own.M",
        "AutoModel": "modeling_own.B",
    }
    config = read_config(tmp_path / "source") | {"auto_map": own | {"AutoTokenizer": ["tokenization_own.T", None]}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path / "source")
    if name == "mamba_uniform":  # a stock checkpoint as its source is
        model.save_pretrained(tmp_path / "again")
        assert read_config(tmp_path / "again")["auto_map"] == config["auto_map"]
        return
    compress_(model, CompreSSMConfig(state_size={0: 3} if name == "mamba_mixed" else 4), tokens(4, 24))
    model.save_pretrained(tmp_path / "slim")
    assert read_config(tmp_path / "slim")["auto_map"].keys() == {"AutoModel", "AutoModelForCausalLM", "AutoTokenizer"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", trust_remote_code=True)
    assert get_state_sizes(again.config) == get_state_sizes(model.config)
    assert_same(again(tokens()).logits, model)


def test_disk_offload(folder, models, tmp_path):
    devices = {"backbone.embeddings": "cpu", "backbone.norm_f": "cpu", "lm_head": "cpu", "backbone.layers": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        folder / "saved" / "mamba2_projected", device_map=devices, offload_folder=tmp_path
    )
    assert_same(model(tokens()).logits, models["mamba2_projected"])


def test_plugin_with_remote_code_trusted(folder, models, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = AutoModelForCausalLM.from_pretrained(folder / "saved" / "mamba2_projected", trust_remote_code=True)
    assert_same(model(tokens()).logits, models["mamba2_projected"])
    model.save_pretrained(tmp_path / "mixed")
    assert (tmp_path / "mixed" / CODE).exists()


def test_a_model_of_remote_code_that_becomes_uniform_is_stock(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = AutoModelForCausalLM.from_pretrained(folder / "saved" / "mamba_mixed", trust_remote_code=True)
    set_state_sizes(model, dict.fromkeys(range(LAYERS), 2))
    model.save_pretrained(tmp_path / "uniform")
    assert "auto_map" not in read_config(tmp_path / "uniform")
    assert not (tmp_path / "uniform" / CODE).exists()


def test_trainer_saves_the_code(tmp_path):
    model = slim(mamba_config(), [5, 8, 2])
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=4)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()
    for path in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        assert (path / CODE).exists()
    model.eval()
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, model)
    Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("name", ["mamba_uniform", "mamba_mixed"])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained", "config"])
def test_uploads_hold_the_code(models, name, way, tmp_path, monkeypatch):
    """Also into a folder that held an older save."""
    uploaded = set()

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations, **kwargs):
            uploaded.update(operation.path_in_repo for operation in operations)

        def create_branch(self, **kwargs):
            pass

    card = SimpleNamespace(save=lambda path: Path(path).touch())
    for module in ("utils.hub", "modeling_utils", "configuration_utils"):
        monkeypatch.setattr(f"transformers.{module}.hf_api", Hub)
        monkeypatch.setattr(f"transformers.{module}.create_and_tag_model_card", lambda *a, **k: card, raising=False)
    if way == "push_to_hub":
        models[name].push_to_hub("someone/slim")
    else:
        models[name].save_pretrained(tmp_path)
        for file in tmp_path.iterdir():
            os.utime(file, (0, 0))
        saved = models[name] if way == "save_pretrained" else models[name].config
        saved.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="someone/slim")
    assert "config.json" in uploaded
    assert (CODE in uploaded) == (name == "mamba_mixed")
