"""Mixers are found by what they have; what only looks like one is named, with what it lacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from transformers import (
    KimiLinearConfig,
    KimiLinearModel,
    NemotronH_Omni_Reasoning_V3_Config,
    Qwen3NextConfig,
    Qwen3NextModel,
)
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import NemotronH_Omni_Reasoning_V3

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.layers import find_layers
from hf_compressm.modeling import modeling_compressm
from hf_compressm.modeling.state_sizes import get_state_sizes
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2
from tests.layers.lti_mixers import LRU, Net
from tests.layers.models import TYPES, build, make_config, tokens


@pytest.mark.parametrize("model_type", TYPES)
def test_a_mixer_of_another_name_is_found(model_type):
    model = build(model_type)
    found = [(layer.name, type(layer)) for layer in find_layers(model)]
    for module in model.modules():
        if hasattr(module, "A_log"):
            module.__class__ = type("SomethingNew", (type(module),), {})
    assert [(layer.name, type(layer)) for layer in find_layers(model)] == found


def small(config_class, **fields):
    return config_class(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Qwen3NextModel(
                small(
                    Qwen3NextConfig,
                    layer_types=["linear_attention"],
                    linear_num_key_heads=2,
                    linear_num_value_heads=2,
                    linear_key_head_dim=8,
                    linear_value_head_dim=8,
                    num_experts=2,
                )
            ),
            r"Qwen3NextGatedDeltaNet looks like one, but as a Mamba-2 mixer it lacks .*\bD\b.* in_proj",
        ),
        (
            lambda: KimiLinearModel(small(KimiLinearConfig, layer_types=["linear_attention"], n_routed_experts=2)),
            r"looks like one, but as a Mamba-2 mixer it lacks",
        ),
    ],
    ids=["qwen3_next", "kimi_linear"],
)
def test_lookalikes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        find_layers(make())


def test_mamba_3_is_named():
    """Its decays are computed from the input, and its B and C are normalised and biased."""
    model = nn.Module()
    model.mixer = type("Mamba3", (nn.Module,), {})()
    model.mixer.in_proj = model.mixer.out_proj = nn.Linear(4, 4)
    model.mixer.dt_bias, model.mixer.D, model.mixer.B_bias = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    with pytest.raises(ValueError, match=r"Mamba3 looks like one, but as a Mamba-2 mixer it lacks A_log.* has B_bias"):
        find_layers(model)


def test_a_mixer_with_something_more_is_not_read_wrong():
    model = tiny_mamba()
    for block in model.backbone.layers:
        block.mixer.z_norm = nn.LayerNorm(4)
    with pytest.raises(ValueError, match="MambaMixer looks like one, but as a Mamba mixer it has z_norm"):
        compress_(model, CompreSSMConfig(state_size=4), tokens())


def test_shapes_are_checked():
    model = tiny_mamba2()
    for block in model.backbone.layers:
        block.mixer.A_log = nn.Parameter(torch.zeros(8, 16))
    with pytest.raises(ValueError, match=r"as a Mamba-2 mixer it has A_log \[8, 16\] for \[8\]"):
        find_layers(model)


class Quantised(nn.Module):
    """A linear layer of torch.ao.quantization's, which computes its weight when it is asked for it."""

    def weight(self):
        return torch.zeros(1)


@pytest.mark.parametrize(("make", "name"), [(tiny_mamba, "x_proj"), (tiny_mamba2, "in_proj")])
def test_dynamically_quantised_mixers_are_named(make, name):
    model = make()
    for block in model.backbone.layers:
        setattr(block.mixer, name, Quantised())
    with pytest.raises(
        ValueError, match=rf"looks like one.* has no tensor {name}\.weight: it is quantised or computed"
    ):
        find_layers(model)


def test_known_layers_are_cut_beside_unknown_ones():
    model = tiny_mamba()
    model.extra = nn.Module()
    model.extra.A_log = nn.Parameter(torch.zeros(2))
    assert [type(layer.mixer) for layer in find_layers(model)] == [MambaMixer, MambaMixer]


def test_a_wrapped_text_model(tmp_path):
    """Sizes go into the text model's config, inside the whole one's."""
    vision = {
        "model_type": "radio",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 4,
        "image_size": 16,
        "video_temporal_patch_size": 2,
    }
    config = NemotronH_Omni_Reasoning_V3_Config(
        text_config=make_config("nemotron_h").to_dict(),
        vision_config=vision,
        projector_hidden_size=16,
        vision_hidden_size=16,
        image_token_id=60,
        video_token_id=61,
        audio_token_id=62,
    )
    input_ids = tokens().clamp(max=59)
    model = NemotronH_Omni_Reasoning_V3(config).eval()
    compress_(model, CompreSSMConfig(state_size={0: 8, 2: 12}), tokens(4, 24).clamp(max=59))
    assert get_state_sizes(model.config) == [8, 0, 12, 0, 0]
    model.save_pretrained(tmp_path)
    assert (tmp_path / f"{modeling_compressm.MODULE_NAME}.py").exists()
    again = NemotronH_Omni_Reasoning_V3.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=input_ids).logits, model(input_ids=input_ids).logits)
    arguments = {"max_new_tokens": 3, "do_sample": False}
    generated = [again.generate(input_ids=input_ids, use_cache=cache, **arguments) for cache in (True, False)]
    assert torch.equal(*generated)


class Wrapped(torch.Tensor):
    """A tensor of another kind, as torchao's: it is a floating-point number of two bytes and more."""


def give_wrapped(mixer):
    mixer.x_proj.weight = nn.Parameter(torch.zeros(20, 48).as_subclass(Wrapped))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda mixer: prune.l1_unstructured(mixer.x_proj, "weight", 0.5),
            r"mixer.x_proj.weight is computed .*prune.remove",
        ),
        (lambda mixer: prune.l1_unstructured(mixer, "A_log", 0.5), "mixer.A_log is computed"),
        (lambda mixer: spectral_norm(mixer.x_proj), "x_proj.weight is computed .*remove_spectral_norm"),
        (lambda mixer: parametrizations.spectral_norm(mixer.x_proj), "x_proj.weight .*remove_parametrizations"),
        (lambda mixer: parametrizations.weight_norm(mixer.in_proj), "in_proj.weight is computed"),
        (lambda mixer: parametrize.register_parametrization(mixer, "A_log", nn.Identity()), "mixer.A_log is computed"),
        (give_wrapped, "x_proj.weight is a Wrapped, which can't be given new data.*quantise the slim one"),
        (lambda mixer: setattr(mixer, "layer_idx", 0), "layers.0.mixer and .*layers.1.mixer both have layer_idx 0"),
    ],
)
def test_weights_that_can_not_be_given_new_data_and_copied_layers_are_refused(change, message):
    model = tiny_mamba()
    change(model.backbone.layers[1].mixer)
    with pytest.raises(ValueError, match=message):
        find_layers(model)


@pytest.mark.parametrize(
    ("make", "share", "message"),
    [
        (tiny_mamba, "mixer", "layers.0.mixer and backbone.layers.1.mixer are one mixer"),
        (tiny_mamba2, "mixer", "are one mixer"),
        (
            tiny_mamba,
            "mixer.x_proj",
            "layers.0.mixer.x_proj.weight and .*layers.1.mixer.x_proj.weight are one parameter",
        ),
        (tiny_mamba2, "mixer.in_proj.weight", "layers.0.mixer.in_proj.weight and .* are one parameter"),
    ],
)
def test_what_layers_share_is_refused(make, share, message):
    model = make()
    owner, _, name = share.rpartition(".")
    first, second = (block.get_submodule(owner) for block in model.backbone.layers)
    setattr(second, name, getattr(first, name))
    with pytest.raises(ValueError, match=message):
        compress_(model, CompreSSMConfig(state_size=4, realization="select"), object())


def test_what_a_cut_leaves_alone_may_be_shared(token_ids):
    model = tiny_mamba()
    first, second = (block.mixer for block in model.backbone.layers)
    second.out_proj = first.out_proj
    assert compress_(model, CompreSSMConfig(state_size=4), token_ids).sizes == {0: 4, 1: 4}
    plain = Net(VOCABULARY, 6, lambda: LRU(6, 12))
    plain.mixers[1] = plain.mixers[0]  # its size is told by its shapes
    assert compress_(plain, CompreSSMConfig(state_size=4)).sizes == {0: 4}


def test_what_a_mask_has_pruned_for_good_is_cut(token_ids):
    model = tiny_mamba()
    prune.l1_unstructured(model.backbone.layers[1].mixer.x_proj, "weight", 0.5)
    prune.remove(model.backbone.layers[1].mixer.x_proj, "weight")
    assert compress_(model, CompreSSMConfig(state_size=4), token_ids).sizes == {0: 4, 1: 4}
