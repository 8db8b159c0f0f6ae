"""Healing in two processes: what one process with the same batches comes to, the same bits in both, and each text learnt from."""

from __future__ import annotations

import json

import pytest
import torch

from hf_compressm import compress_
from hf_compressm.healing import heal
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.healing import several_run
from tests.healing.several_run import IDS, LOOP
from tests.processes import launch


def far(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def rows(read: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(row) for row in read}


def steps(*read: list[list[int]]) -> list[list[list[int]]]:
    """What was learnt from in each step, eight sequences of all processes together."""
    share = 8 // len(read)
    return [sorted(row for each in read for row in each[at : at + share]) for at in range(0, len(read[0]), share)]


@pytest.mark.distributed
def test_two_processes_heal_as_one(tmp_path):
    tiny_mamba2().save_pretrained(tmp_path / "full")
    launch(tmp_path, 2, several_run.everything, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    one = {"pretrained": several_run.pretrained(tmp_path / "full"), "own": several_run.loop("own")}

    for name in ("pretrained", "own", "own stream", "same stream", "accelerated"):
        assert first[name]["hash"] == second[name]["hash"], name
        assert first[name].get("end") == second[name].get("end"), name
        assert first[name]["tokens"] == second[name]["tokens"], name
        assert first[name]["tokens"] == sum(len(row) for each in (first, second) for row in each[name]["read"]), name
        assert first[name]["after"] < first[name]["before"] or "stream" in name, name
        assert not rows(first[name]["read"][:4]) & rows(second[name]["read"][:4]), name
    for name, found in one.items():
        assert steps(first[name]["read"], second[name]["read"]) == steps(found["read"]), name
        assert first[name]["sizes"] == {str(index): size for index, size in found["sizes"].items()}, name
        for key in ("tokens", "held_out"):
            assert first[name][key] == found[key], (name, key)
        for key in ("before", "after"):
            assert first[name][key] == pytest.approx(found[key], rel=1e-4), (name, key)
        assert far(first[name]["weights"], found["weights"]) < 2e-5, name
    assert first["own"]["losses"] == pytest.approx(one["own"]["losses"], abs=1e-5)
    assert rows(first["own stream"]["read"]) <= rows(IDS[:24].tolist())
    assert rows(second["own stream"]["read"]) <= rows(IDS[24:].tolist())

    assert first["decides"][1:] == second["decides"][1:]
    assert first["decides"][0] > 4
    assert second["decides"][0] == 0

    assert "longest calibration sequence has 4 tokens" in first["refusals"]["data"]
    assert "differ in heal: it is 700 in process 1 and 800 in process 0" in second["refusals"]["config"]


def test_processes_that_can_not_heal_together(mamba, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # and nothing that tells of the others
    with pytest.raises(ValueError, match="does not know the others: start them with torchrun"):
        compress_(mamba, LOOP, IDS)
    with monkeypatch.context() as sharded:
        sharded.setattr(heal, "is_sharded", lambda parameter: True)
        with pytest.raises(ValueError, match="it is sharded: heal it before"):
            compress_(mamba, LOOP, IDS)
    monkeypatch.setattr(heal, "processes", lambda: 2)
    monkeypatch.setattr(heal.dist, "get_backend", lambda: "nccl")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "on the CPU" in heal._what_keeps_apart(torch.device("cpu"))
    assert "device_map={'': 1}" in heal._what_keeps_apart(torch.device("cuda", 0))
    assert not heal._what_keeps_apart(torch.device("cuda", 1))
    assert mamba.config.state_size == tiny_mamba().config.state_size
