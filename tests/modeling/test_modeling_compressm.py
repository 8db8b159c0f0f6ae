import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForCausalLM, Mamba2Model
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import hf_compressm
from hf_compressm.modeling import modeling_compressm
from hf_compressm.modeling.modeling_compressm import ProjectedMixer, install, project_
from tests.conftest import cache_of
from tests.modeling.models import (
    LAYERS,
    NOT_UNIFORM,
    STATE_SIZE,
    build,
    greedy,
    left_padded,
    mamba2_config,
    mamba_config,
    slim,
    tokens,
)

projected = pytest.mark.parametrize("name", ["mamba2_projected", "mamba2_projected_by_head"])


def mixers(model):
    return [layer.mixer for layer in model.backbone.layers]


def change_basis_(model, seed: int = 0) -> None:
    """Project every layer by an invertible T and its inverse transpose: C'ᵀ B' = Cᵀ B."""
    generator = torch.Generator().manual_seed(seed)
    for mixer in mixers(model):
        T = torch.eye(STATE_SIZE) + 0.1 * torch.randn(mixer.n_groups, STATE_SIZE, STATE_SIZE, generator=generator)
        project_(mixer, torch.cat([torch.linalg.inv(T).mT, T]))


def test_a_change_of_basis_changes_nothing():
    model = build(mamba2_config())
    stock = model(tokens()).logits
    change_basis_(model)
    assert all(isinstance(mixer, ProjectedMixer) for mixer in mixers(model))
    torch.testing.assert_close(model(tokens()).logits, stock, atol=1e-5, rtol=1e-4)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    padding=st.integers(0, 8),
    step=st.integers(1, 9),
    bias=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_the_identity_is_the_stock_mixer_bit_for_bit(batch, length, padding, step, bias):
    """In every form of the scan: a prefill and then pieces of any length, with left padding."""
    model = build(mamba2_config(num_hidden_layers=1, use_bias=bias, use_conv_bias=not bias))
    twin = build(mamba2_config(num_hidden_layers=1, use_bias=bias, use_conv_bias=not bias))
    for mixer in mixers(twin):
        project_(mixer, torch.eye(STATE_SIZE).expand(2 * mixer.n_groups, -1, -1))
    input_ids = tokens(batch, length + 9)
    mask = torch.ones_like(input_ids)
    mask[0, : min(padding, length - 1)] = 0

    caches = [{}, {}]
    for start, stop in [(0, length), *((i, min(i + step, length + 9)) for i in range(length, length + 9, step))]:
        outputs = [
            each(input_ids[:, start:stop], attention_mask=mask[:, start:stop], **cache, use_cache=True)
            for each, cache in zip((model, twin), caches, strict=True)
        ]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        caches = [cache_of(output) for output in outputs]


def test_training_agrees_with_the_stock_mixer_and_trains_the_projections():
    model, twin = build(mamba2_config()), build(mamba2_config())
    change_basis_(twin)
    for each in (model, twin):
        each.train()
        each(tokens(), labels=tokens()).loss.backward()
    for mixer, projected in zip(mixers(model), mixers(twin), strict=True):
        assert projected.BC_projection.grad.abs().min() > 0
        torch.testing.assert_close(projected.in_proj.weight.grad, mixer.in_proj.weight.grad, atol=1e-4, rtol=1e-3)


@projected
def test_gradient_checkpointing_changes_no_gradient(name):
    grads = []
    for checkpointing in (False, True):
        model = NOT_UNIFORM[name]().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        grads.append([mixer.BC_projection.grad for mixer in mixers(model) if hasattr(mixer, "BC_projection")])
    torch.testing.assert_close(*grads)


def test_the_state_in_the_cache_has_the_projected_size():
    model = NOT_UNIFORM["mamba2_projected_in_part"]()
    (cache,) = cache_of(model(tokens(), use_cache=True)).values()
    assert [cache.get_recurrent_state(i).shape[-1] for i in range(LAYERS)] == [3, 8, 4]
    assert [mixer.ssm_state_size for mixer in mixers(model)] == [3, 8, 4]
    assert mixers(model)[0].unprojected_state_size == 8
    assert mixers(model)[0].conv1d.weight.shape == mixers(model)[1].conv1d.weight.shape


@pytest.mark.parametrize("name", NOT_UNIFORM)
def test_generation_with_and_without_cache_agrees(name):
    model = NOT_UNIFORM[name]()
    for inputs in ({"input_ids": tokens()}, left_padded(tokens())):
        assert torch.equal(greedy(model, inputs, use_cache=True), greedy(model, inputs, use_cache=False))


@projected
def test_left_padding_is_not_seen(name):
    model = NOT_UNIFORM[name]()
    inputs = left_padded(tokens())
    padded = model(**inputs).logits[0, 3:]
    torch.testing.assert_close(padded, model(inputs["input_ids"][:1, 3:]).logits[0], atol=1e-5, rtol=1e-5)


@projected
def test_beam_search(name):
    model = NOT_UNIFORM[name]()
    with_cache, without = (
        model.generate(tokens(), max_new_tokens=4, num_beams=3, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert with_cache.shape == (2, 15)
    assert torch.equal(with_cache, without)


def test_projecting_twice_replaces_the_maps():
    model = build(mamba2_config())
    change_basis_(model)
    for mixer in mixers(model):
        project_(mixer, mixer.BC_projection[..., :3])
        assert mixer.BC_projection.shape == (4, STATE_SIZE, 3)
        assert (mixer.ssm_state_size, mixer.unprojected_state_size) == (3, STATE_SIZE)
    assert model(tokens()).logits.isfinite().all()


def test_projecting_follows_the_dtype_of_the_mixer():
    model = build(mamba2_config()).to(torch.bfloat16)
    project_(mixers(model)[0], torch.eye(STATE_SIZE, dtype=torch.float64).expand(4, -1, -1))
    assert mixers(model)[0].BC_projection.dtype == torch.bfloat16
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("shape", [(2, STATE_SIZE, 3), (4, 3, STATE_SIZE), (4, STATE_SIZE)])
def test_a_projection_of_the_wrong_shape_is_refused(shape):
    mixer = mixers(build(mamba2_config()))[0]
    with pytest.raises(ValueError, match="BC_projection of layer 0"):
        project_(mixer, torch.ones(shape))
    assert type(mixer) is Mamba2Mixer


@projected
def test_autocast(name):
    model = NOT_UNIFORM[name]()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens()).logits
    torch.testing.assert_close(logits, model(tokens()).logits, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("name", NOT_UNIFORM)
def test_fresh_models_from_config(name):
    """`from_config` initialises layers of all sizes; projections start by selecting the first states."""
    config = NOT_UNIFORM[name]().config
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model = auto_class.from_config(config)
        assert model(tokens())[0].isfinite().all()
        found = [module for module in model.modules() if isinstance(module, ProjectedMixer)]
        for mixer in found:
            N = mixer.unprojected_state_size
            sizes = getattr(mixer, "head_state_sizes", [mixer.ssm_state_size])
            first = torch.cat([torch.eye(N, size) for size in sizes], dim=1)
            assert torch.equal(mixer.BC_projection, first.expand_as(mixer.BC_projection))
        assert bool(found) == ("projected" in name)


def test_a_layer_can_be_built_from_its_own_config():
    config = NOT_UNIFORM["mamba2_projected_in_part"]().config
    mixer = Mamba2Mixer(config.per_layer_config[0], 0)
    assert (mixer.ssm_state_size, mixer.unprojected_state_size) == (3, 8)
    assert Mamba2Model(config).layers[1].mixer.ssm_state_size == 8
    assert config.per_layer_config[0].state_size == 3


def test_stock_configs_build_stock_models():
    for config in (mamba_config(), mamba2_config()):
        assert not any(hasattr(mixer, "unprojected_state_size") for mixer in mixers(build(config)))


def test_installing_again_wraps_nothing(tmp_path):
    before = Mamba2Mixer.__init__
    install()
    path = tmp_path / "copy.py"
    path.write_text(modeling_compressm.SOURCE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("a_copy", path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules["a_copy"] = copy  # dataclasses look there
    try:
        spec.loader.exec_module(copy)
    finally:
        del sys.modules["a_copy"]
    assert Mamba2Mixer.__init__ is before
    assert copy.ProjectedMixer is not ProjectedMixer
    slim(mamba2_config(), [3, 3, 3], {0: 8, 1: 8, 2: 8})


@pytest.mark.parametrize("version", ["4.57.3", "5.9.0.dev0"])
def test_an_older_transformers_is_told_what_is_needed(monkeypatch, version):
    """Before any name that it lacks is asked for."""
    monkeypatch.setattr("transformers.__version__", version)
    monkeypatch.delattr("transformers.PreTrainedConfig")
    with pytest.raises(
        ImportError, match=rf"needs transformers 5\.23 or newer, and {version} is installed: pip install"
    ):
        exec(compile(modeling_compressm.SOURCE, "copy", "exec"), {"__name__": "copy", "__file__": __file__})


def test_the_oldest_transformers_is_that_of_the_package():
    project = Path(hf_compressm.__file__).parents[1] / "pyproject.toml"
    assert f'"transformers>={modeling_compressm.NEEDS},' in project.read_text()


def test_the_file_stands_alone():
    tree = ast.parse(Path(modeling_compressm.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {
        "copy",
        "dataclasses",
        "functools",
        "importlib",
        "collections",
        "pathlib",
        "typing",
        "torch",
        "transformers",
        "triton",
    }
    assert {name.split(".")[0] for name in imported} <= allowed
