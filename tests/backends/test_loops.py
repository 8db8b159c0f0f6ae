"""`compress_` in a loop of one's own on several processes: the same cut on all, that of one process on all the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends import loops_run
from tests.processes import launch

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]

# What each refusal says on the process that is at fault, or on all; a process that hears of it says whose it is.
MESSAGES = {
    "data": "longest calibration sequence has 4 tokens",
    "config": "differ in ratio: it is 0.5 in process 1 and 0.6 in process 0",
    "optimizer": "differ in optimizer=",
    "weights": "differ in the model's weights",
    "other optimizer": "No optimizer holds",
    "sharded optimizer": "state in other processes",
    "target": "can't be cut to 99",
    "projection": "needs the Mamba-2 layers",
    "cut": "no memory left",
}


def distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_loops_on_two_processes(tmp_path):
    launch(tmp_path, 2, loops_run.everything, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    reference = {name: loops_run.loop(name) for name in ("unused", "mamba2", "budget", "lti", "none")}
    for name in loops_run.VARIANTS:
        assert first[name]["hash"] == second[name]["hash"], name
        assert first[name]["spectra"] == second[name]["spectra"], name
        if name == "large":  # by the first batch of each process
            continue
        one = reference.get(name, reference["unused"])
        assert first[name]["sizes"] == one["sizes"], name
        assert distance(first[name]["losses"], one["losses"]) < 1.5e-6, name
    for name in ("unused", "mamba2", "large", "budget", "lti"):
        assert sum(first[name]["sizes"]) < (32 if name == "mamba2" else 16)
        if name not in ("mamba2", "lti"):
            assert distance(first[name]["losses"], reference["none"]["losses"]) > 1e-4  # the comparison tells

    assert first["refusals"]["hash"] == second["refusals"]["hash"]
    assert sum(first["refusals"]["sizes"]) < 16
    assert first["refusals"]["later"] == second["refusals"]["later"] == first["refusals"]["never tried"]
    for name, part in MESSAGES.items():
        assert part in second["refusals"]["messages"][name], name
        assert part in first["refusals"]["messages"][name], name
    for name in ("data", "config", "optimizer", "weights", "cut"):
        assert "Process 1: " in first["refusals"]["messages"][name], name

    loop = first["accelerate"]
    assert loop["hash"] == second["accelerate"]["hash"] == loop["resumed_hash"] == second["accelerate"]["resumed_hash"]
    assert loop["after"] == loop["resumed"]
    assert "size mismatch" in loop["full-size"]


def test_three_processes_of_torchrun(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command = [*torchrun, "-m", "tests.backends.loops_run", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((tmp_path / f"three-{rank}.json").read_text()) for rank in range(3)]
    one = loops_run.loop("unused")
    assert len({each["hash"] for each in found}) == 1
    assert found[0]["sizes"] == one["sizes"]
    assert distance(found[0]["losses"], one["losses"]) < 1.5e-6
