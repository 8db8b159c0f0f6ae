"""The estimate command on a config alone: what does not depend on the clock is right, and times are there."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hf_compressm.cli import app, estimating
from hf_compressm.layers import find_layers
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.layers.models import TYPES, build


def run(model, folder, *arguments: str):
    model.config.save_pretrained(folder)
    return CliRunner().invoke(app, ["estimate", str(folder), *arguments])


@pytest.mark.parametrize(
    ("make", "arguments", "after"),
    [
        (tiny_mamba, ["--state-size", "3"], {"state_size=3": [6, 2 * 48 * 3 * 4]}),
        (tiny_mamba2, ["--ratio", "0.5"], {"ratio=0.5": [16, 2 * 64 * 8 * 4]}),
        (
            tiny_mamba2,
            [],
            {"if half of the states stay": [16, 2 * 64 * 8 * 4], "if a quarter stays": [8, 2 * 64 * 4 * 4]},
        ),
    ],
)
def test_sizes(make, arguments, after, tmp_path):
    model = make()
    result = run(model, tmp_path, *arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    layers = find_layers(model)
    assert found["layers"] == len(layers)
    assert found["states"] == sum(layer.state_size for layer in layers)
    assert found["state_bytes"] == sum(layer.state_size * layer.channels * 4 for layer in layers)
    assert found["after"] == after
    assert found["model_bytes"] == sum(p.nbytes for p in model.parameters())
    assert found["model_bytes"] + 2 * 2**30 < found["peak_bytes"] < 3 * 2**30
    # Sizes that are named need no look at the layers, and a projection no fit.
    assert ("sizes, layer by layer" in found["seconds"]) == ("--state-size" not in arguments)
    assert ("refit" in found["seconds"]) == (make is tiny_mamba)
    assert all(seconds > 0 for seconds in found["seconds"].values())


@pytest.mark.parametrize("model_type", TYPES)
def test_every_architecture(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr(estimating, "TIMED", {"cpu": 16})
    result = run(build(model_type), tmp_path, "--ratio", "0.5")
    assert result.exit_code == 0, result.output
    for row in ("layers with a state", "memory of a cut, at most", "seconds to measure"):
        assert row in result.stdout


def test_what_can_not_be_estimated_is_refused(tmp_path):
    result = run(tiny_mamba(), tmp_path, "--realization", "project")
    assert (result.exit_code, "select" in result.stderr) == (1, True)
    result = run(tiny_mamba(8), tmp_path, "--state-size", "64")
    assert (result.exit_code, "can't be cut to 64" in " ".join(result.stderr.split())) == (1, True)
    result = run(tiny_mamba(), tmp_path, "--dtype", "int8")
    assert (result.exit_code, "bfloat16" in result.stderr) == (1, True)
