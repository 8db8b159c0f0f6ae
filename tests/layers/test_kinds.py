"""A report says what each layer got, more closely than which realization was asked for."""

from __future__ import annotations

import json

import pytest

from hf_compressm import CompreSSMConfig, measure
from hf_compressm.layers import find_layers
from hf_compressm.reporting.report import CompressionReport
from tests.layers.models import build, tokens


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "zamba", "mamba2"])
@pytest.mark.parametrize(
    ("settings", "mamba", "mamba2"),
    [
        ({}, "refit", "project"),
        ({"refit": 0}, "read-out", "project"),
        ({"realization": "select"}, "refit", "refit"),
        ({"realization": "select", "refit": 0}, "read-out", "select"),
        ({"selection": "greedy"}, "select", "select"),
    ],
)
def test_kinds(model_type, settings, mamba, mamba2):
    model = build(model_type)
    first, *_ = find_layers(model)
    config = CompreSSMConfig(state_size={first.index: 8}, **settings)
    report = measure(model, tokens(24, 48), config).plan(config).report
    expected = mamba2 if model_type == "mamba2" else mamba
    assert [row.realization for row in report.layers] == [expected] + [""] * (len(report.layers) - 1)
    assert CompressionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
