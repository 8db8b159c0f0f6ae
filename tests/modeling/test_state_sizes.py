import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BambaConfig, BertConfig, JambaConfig, PreTrainedConfig
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from hf_compressm.modeling.state_sizes import get_state_sizes, get_unprojected_state_sizes, set_state_sizes
from tests.modeling.models import LAYERS, build, mamba2_config, mamba_config


def layer_sizes(most: int = 8):
    return st.dictionaries(st.integers(0, LAYERS - 1), st.integers(1, most), min_size=1)


@given(cuts=st.lists(st.tuples(layer_sizes(), st.sets(st.integers(0, LAYERS - 1))), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_series_of_cuts_reads_back(cuts):
    """Also through a JSON file's worth of text, and stock exactly if uniform and unprojected."""
    config = mamba2_config()
    sizes, unprojected = [8] * LAYERS, [None] * LAYERS
    for cut, projected in cuts:
        set_state_sizes(config, cut, dict.fromkeys(projected & cut.keys(), 8))
        for i, size in cut.items():
            sizes[i], unprojected[i] = size, 8 if i in projected else None
        for read in (config, type(config)(**config.to_diff_dict())):
            assert get_state_sizes(read) == sizes
            assert get_unprojected_state_sizes(read) == unprojected

    stock = len(set(sizes)) == 1 and not any(unprojected)
    assert config.is_heterogeneous != stock
    assert hasattr(config, "auto_map") != stock
    if stock:
        assert config.to_diff_dict() == mamba2_config(state_size=sizes[0]).to_diff_dict()
    else:
        with pytest.raises(AmbiguousGlobalPerLayerAttributeError):
            _ = config.state_size


def test_a_model_or_its_config():
    model = build(mamba_config())
    set_state_sizes(model, {0: 2})
    assert get_state_sizes(model.config) == [2, 8, 8]
    assert model.config.auto_map == {
        "AutoModel": "modeling_compressm.MambaModel",
        "AutoModelForCausalLM": "modeling_compressm.MambaForCausalLM",
    }


def test_readers_that_know_one_size_fail_and_say_why():
    """What llama.cpp's converter does with the size, and what transformers 4 does with heads to prune."""
    config = mamba_config()
    set_state_sizes(config, {0: 2})
    values = config.to_diff_dict()
    with pytest.raises(struct.error):
        struct.pack("<I", values["state_size"] or 16)
    with pytest.raises(ValueError, match="this model needs transformers>=5"):
        [int(key) for key in values["pruned_heads"]]
    set_state_sizes(config, {0: 8})
    assert not hasattr(config, "pruned_heads")


def test_other_entries_of_auto_map_stay():
    config = mamba_config(auto_map={"AutoTokenizer": ["a.B", None], "AutoModel": "someone/else--modeling_compressm.C"})
    set_state_sizes(config, {0: 2})
    assert config.auto_map["AutoModel"] == "modeling_compressm.MambaModel"
    set_state_sizes(config, {0: 8})
    assert config.auto_map == {"AutoTokenizer": ["a.B", None]}


@pytest.mark.parametrize(
    ("sizes", "projected_from", "message"),
    [
        ({}, None, "empty"),
        ({3: 4}, None, "layers 0 to 2"),
        ({-1: 4}, None, "layers 0 to 2"),
        ({0: 0}, None, "at least 1"),
        ({0: 4}, {1: 8}, "names layer 1"),
        ({0: 4}, {0: 3}, "from 3 up to 4"),
    ],
)
def test_refused(sizes, projected_from, message):
    config = mamba2_config()
    with pytest.raises(ValueError, match=message):
        set_state_sizes(config, sizes, projected_from)
    assert config.to_diff_dict() == mamba2_config().to_diff_dict()


def test_mamba_cannot_project():
    with pytest.raises(ValueError, match="Only Mamba-2"):
        set_state_sizes(mamba_config(), {0: 4}, {0: 8})


@pytest.mark.parametrize("config_class", [JambaConfig, BambaConfig])
def test_a_hybrid_lists_the_layers_that_have_a_state(config_class):
    attention = {"attn_layer_offset": 1, "attn_layer_period": 4} if config_class is JambaConfig else {}
    config = config_class(num_hidden_layers=4, attn_layer_indices=[1], mamba_d_state=8, **attention)
    set_state_sizes(config, {2: 3})
    assert get_state_sizes(config) == [8, 0, 3, 8]
    assert config.to_dict()["per_layer_config"].keys() == {"0", "2", "3"}
    with pytest.raises(ValueError, match="Layer 1 of this model has no state"):
        set_state_sizes(config, {1: 4})
    set_state_sizes(config, {0: 3, 3: 3})
    assert config.mamba_d_state == 3
    assert not config.is_heterogeneous


class NewConfig(PreTrainedConfig):
    model_type = "new_ssm"
    state_size: int = 8
    num_hidden_layers: int = 4


def test_other_architectures_take_one_size():
    config = NewConfig()
    config.state_size = 8
    set_state_sizes(config, dict.fromkeys(range(4), 4))
    assert get_state_sizes(config) == [4] * 4
    with pytest.raises(ValueError, match="uniform=True"):
        set_state_sizes(config, {0: 4, 1: 4, 2: 4, 3: 3})
    with pytest.raises(ValueError, match="has no state size"):
        set_state_sizes(BertConfig(), {0: 4})


def test_the_weights_of_a_twice_cut_model_load(tmp_path):
    """Mixed first, then one size for all: a stock checkpoint again."""
    for sizes in ({0: 3, 1: 5, 2: 4}, {0: 3, 1: 3, 2: 3}):
        config = mamba_config()
        set_state_sizes(config, {0: 7})
        set_state_sizes(config, sizes)
        model = build(config)
        model.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert get_state_sizes(reloaded.config) == list(sizes.values())
        ids = torch.arange(1, 9)[None]
        assert torch.equal(reloaded(ids).logits, model(ids).logits)
