"""Each tiny model is built once, and once cut; tests that change one take a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
from transformers import PreTrainedModel

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.layers import find_layers
from tests.layers import models


@cache
def _full(model_type: str) -> PreTrainedModel:
    return models.build(model_type)


@cache
def _slim(model_type: str) -> PreTrainedModel:
    """The first layer at 8 states, the others at 12. With Mamba-2, the first is projected from these to 6, and the last by
    head, to 4."""
    model = copy.deepcopy(_full(model_type))
    first, *rest = (layer.index for layer in find_layers(model))
    cuts = [(8, "select", {first: 8} | dict.fromkeys(rest, 12))]
    if model_type not in models.MAMBA_1:
        cuts += [(1, "project", {first: 6}), (1, "project_heads", {rest[-1]: 4})]
    for multiple_of, realization, sizes in cuts:
        config = CompreSSMConfig(state_size=sizes, realization=realization, multiple_of=multiple_of)
        compress_(model, config, models.tokens(4, 24))
    return model


@pytest.fixture
def full() -> Callable[[str], PreTrainedModel]:
    return lambda model_type: copy.deepcopy(_full(model_type))


@pytest.fixture
def slim() -> Callable[[str], PreTrainedModel]:
    return lambda model_type: copy.deepcopy(_slim(model_type))


@pytest.fixture(scope="session")
def slim_models() -> dict[str, PreTrainedModel]:
    """All of them, not to be changed."""
    return {model_type: _slim(model_type) for model_type in models.TYPES}
