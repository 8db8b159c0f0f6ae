"""The benchmark command on a config alone: every row is there, and what does not depend on the clock is right."""

from __future__ import annotations

import json
import math
import weakref
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from hf_compressm.cli import app, speed
from hf_compressm.cutting.first_states import cut_to_first_states_
from hf_compressm.layers import find_layers
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.layers.models import TYPES, build, tokens

FAST = [
    "--length",
    "8",
    "--batch",
    "2",
    "--decode-batch",
    "3",
    "--repeats",
    "1",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]


def run(model, folder, *arguments: str):
    model.config.save_pretrained(folder)
    return CliRunner().invoke(app, ["benchmark", str(folder), *FAST, *arguments])


@pytest.mark.parametrize("realization", ["project", "select"])
def test_mamba2_sizes(tmp_path, realization):
    sizes = ["--state-size", "8", "--realization", realization, "--json"]
    result = run(tiny_mamba2(), tmp_path, *sizes)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["missing_kernels"] == ["mamba_ssm", "causal_conv1d"]
    own, slim = answer["results"]
    assert (own["state size"], slim["state size"]) == (16, 8)
    # 2 layers, 8 heads of 8, float32
    assert own["state bytes per sequence"] == 2 * 8 * 8 * 16 * 4 == 2 * slim["state bytes per sequence"]
    assert own.keys() == slim.keys() >= {"training, 2 x 8", "prefill, 2 x 8", "decoding, batch 3"}
    assert all(value > 0 for column in (own, slim) for value in column.values())


def test_an_eighth_by_default_and_the_slow_path_is_said(tmp_path):
    result = run(tiny_mamba(16), tmp_path)
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if "state size" in line)
    assert "16" in row
    assert "2 (0.12x)" in row
    assert "slow path" in result.stderr


def test_what_the_memory_does_not_hold(tmp_path, monkeypatch):
    """Is null in JSON, which has no NaN, and a dash in the table."""

    def out_of_memory(*args):
        raise torch.OutOfMemoryError

    def rows(name, text):
        return [line.split("│")[2:-1] for line in text.splitlines() if name in line]

    decoding = speed._decoding
    monkeypatch.setattr(speed, "_training", out_of_memory)
    monkeypatch.setattr(speed, "_decoding", lambda *args: out_of_memory() if next(full) else decoding(*args))
    full = iter(2 * [True, False])  # for the two sizes as they warm up, and as they are timed
    result = run(tiny_mamba(16), tmp_path, "--json")
    assert result.exit_code == 0, result.output
    own, slim = json.loads(result.stdout, parse_constant=pytest.fail)["results"]
    assert own["training, 2 x 8"] is own["decoding, batch 3"] is slim["training, 2 x 8"] is None
    assert slim["decoding, batch 3"] > 0
    full = iter(2 * [True, False])
    table = run(tiny_mamba(16), tmp_path).stdout
    assert [[cell.strip() for cell in row] for row in rows("training", table)] == [["-", "-"]]
    ((own, slim),) = rows("decoding", table)
    assert own.strip() == "-"
    assert float(slim.replace(",", "")) > 0


def test_sizes_in_any_order(tmp_path):
    result = run(tiny_mamba(8), tmp_path, "--state-size", "2", "--state-size", "4", "--json")
    assert result.exit_code == 0, result.output
    assert [column["state size"] for column in json.loads(result.stdout)["results"]] == [8, 2, 4]


def test_each_size_is_run_before_any_is_timed(tmp_path, monkeypatch):
    """What a process runs first is quicker."""
    runs, benchmark = [], speed.benchmark

    def noted(config, size, realization, device, work):
        runs.append((size, work.repeats))
        return benchmark(config, size, realization, device, work)

    monkeypatch.setattr(speed, "benchmark", noted)
    result = run(tiny_mamba(8), tmp_path, "--state-size", "2", "--state-size", "4", "--repeats", "3")
    assert result.exit_code == 0, result.output
    assert runs == [(None, 1), (2, 1), (4, 1), (None, 3), (2, 3), (4, 3)]


def test_a_row_that_the_memory_does_not_hold_leaves_nothing(monkeypatch):
    """No gradients, and none of what its frames held."""
    model, held = tiny_mamba(8), []

    def full(*args):
        there = torch.zeros(3)
        there.itself = lambda: there  # as in autograd's graphs and closures, not to be freed by counting references
        held.append(weakref.ref(there))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    monkeypatch.setattr(speed, "build", lambda *args: model)
    work = speed.Workload(8, 2, 2, (3,), torch.float32, 1)
    rows = speed.benchmark(model.config, None, "auto", torch.device("cpu"), work)
    next(rows)
    name, value = next(rows)
    assert (name, math.isnan(value)) == ("training, 2 x 8", True)
    assert held[0]() is None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("command", ["benchmark", "estimate"])
def test_the_device_is_the_current_one(command, tmp_path, monkeypatch):
    """Of which torch takes memory, clocks and graphs where it is not told another: a GPU that is not the first, too."""
    current = ["cuda:0"]

    @contextmanager
    def make_current(device):
        current.append(str(device))
        yield
        current.pop()

    def timed(*args, **options):
        assert current[-1] == "cuda:1"
        raise ValueError("it was timed")

    tiny_mamba().config.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "device", make_current)
    monkeypatch.setattr(f"hf_compressm.cli.{command}.find_device", torch.device)
    monkeypatch.setattr("hf_compressm.cli.speed.build", timed)
    monkeypatch.setattr("hf_compressm.cli.estimating.find_layers", timed)
    result = CliRunner().invoke(app, [command, str(tmp_path), "--device", "cuda:1"])
    assert "it was timed" in result.stderr, result.output


def test_refusals(tmp_path):
    result = run(tiny_mamba(4), tmp_path, "--state-size", "4")
    assert result.exit_code == 1
    assert "can't be cut to 4" in result.stderr
    assert run(tiny_mamba(4), tmp_path, "--dtype", "int8").exit_code == 1


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_every_architecture_can_be_timed(model_type):
    model = build(model_type)
    cut_to_first_states_(model, 8)
    assert {layer.state_size for layer in find_layers(model)} == {8}
    assert model(tokens()).logits.isfinite().all()
