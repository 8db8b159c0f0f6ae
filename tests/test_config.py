"""A config is what the user meant: every spelling that is taken equals the plain one, every other is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
import torch

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_, compress_pretrained, measure
from hf_compressm import config as module

WHOLE = ("refit", "multiple_of", "min_state_size", "seed", "num_reductions", "calibration_batches", "state_size")


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "spelled", [4, 4.0, np.int64(4), np.uint8(4), np.float32(4), np.array(4), torch.tensor(4), Fraction(8, 2)]
)
def test_whole_numbers(name, spelled):
    config = CompreSSMConfig(**{name: spelled})
    assert type(getattr(config, name)) is int
    assert config == CompreSSMConfig(**{name: 4})
    assert json.dumps(config.to_dict()) == json.dumps(CompreSSMConfig(**{name: 4}).to_dict())


@pytest.mark.parametrize("name", ["max_divergence", "tolerance", "ratio", "start", "end", "min_reduction", "rollback"])
@pytest.mark.parametrize(
    "spelled", [0.0625, np.float64(0.0625), np.float16(0.0625), torch.tensor(0.0625), Fraction(1, 16)]
)
def test_numbers(name, spelled):
    config = CompreSSMConfig(**{name: spelled} | ({"end": 1} if name == "start" else {}))
    assert getattr(config, name) == 0.0625
    assert type(getattr(config, name)) is float
    json.dumps(config.to_dict())


@pytest.mark.parametrize(
    "spelled",
    [
        {0: 4, 2: 8},
        {"0": 4, "2": 8},
        {np.int64(0): np.int32(4), 2.0: 8.0},
        MappingProxyType({0: 4, 2: 8}),
    ],
)
def test_sizes_by_layer(spelled):
    config = CompreSSMConfig(state_size=spelled)
    assert config.state_size == {0: 4, 2: 8}
    assert [type(n) for pair in config.state_size.items() for n in pair] == [int] * 4
    assert CompreSSMConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_flags_and_names():
    assert CompreSSMConfig(uniform=np.True_).uniform is True
    assert type(CompreSSMConfig(realization=np.str_("select")).realization) is str


@pytest.mark.parametrize("config", [{"state_size": 4}, MappingProxyType({"state_size": 4})])
def test_a_dictionary_is_a_config(mamba, tmp_path, token_ids, config):
    plain = CompreSSMConfig(state_size=4)
    assert CompreSSMConfig.of(config) == CompreSSMCallback(config).config == plain
    mamba.save_pretrained(tmp_path)
    assert measure(mamba, token_ids, config).plan(config).config == plain
    slim = compress_pretrained(tmp_path, config, calibration_data=token_ids)
    assert slim.compression_report == compress_(mamba, config, token_ids)
    assert slim.compression_report.sizes == {0: 4, 1: 4}


def test_of():
    config = CompreSSMConfig(ratio=0.5)
    assert CompreSSMConfig.of(config) is config
    assert CompreSSMConfig.of(None) == CompreSSMConfig.of({}) == CompreSSMConfig()
    with pytest.raises(TypeError, match="no field 'tolerence': did you mean tolerance"):
        CompreSSMConfig.of({"tolerence": 0.1})
    with pytest.raises(TypeError, match="the fields are max_divergence, tolerance, state_size"):
        CompreSSMConfig.of({7: 0.1})
    for other in (8, "state_size=8", [0.05], False, CompreSSMConfig):
        with pytest.raises(TypeError, match="CompreSSMConfig"):
            CompreSSMConfig.of(other)


def test_every_field_has_a_check():
    assert list(module._FIELDS) == [field.name for field in fields(CompreSSMConfig)]


def test_sizes_below_the_minimum_contradict_it():
    for size in (4, {0: 8, 1: 4}):
        assert CompreSSMConfig(state_size=size, min_state_size=4).min_state_size == 4
        with pytest.raises(ValueError, match="min_state_size"):
            CompreSSMConfig(state_size=size, min_state_size=5)


def test_a_config_stays_valid_when_fields_are_replaced():
    with pytest.raises(ValueError, match="one target"):
        replace(CompreSSMConfig(tolerance=0.05), ratio=0.5)
    assert replace(CompreSSMConfig(state_size={0: 4}), state_size={"1": 3.0}).state_size == {1: 3}
