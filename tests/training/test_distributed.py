"""Two processes cut like one: the same statistics, one decision, equal ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.ddp_run import run

pytestmark = pytest.mark.distributed

VARIANTS = [
    "plain",
    "mamba2",
    "accumulation",
    "bucket_view",
    "large",
    "resume",
    "rollback",
    "comm_hook",
    "static_graph",
    "none",
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    # Earlier runs in this process have left accelerate's settings behind.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment = inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(ROOT / "tests" / "training" / "ddp_run.py"), str(folder), ",".join(VARIANTS), "2"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("plain", "mamba2", "accumulation", "large", "none"):
        result = run(folder / "one" / name, name, 1, 0)
        (folder / f"{name}-1-0.json").write_text(json.dumps(result))

    def read(name: str, world: int, rank: int) -> dict:
        return json.loads((folder / f"{name}-{world}-{rank}.json").read_text())

    return read


def distance(one: dict, other: dict) -> float:
    return max(abs(one["losses"][step] - other["losses"][step]) for step in one["losses"])


@pytest.mark.parametrize("name", [*VARIANTS, "resumed"])
def test_the_processes_stay_bit_identical(results, name):
    first, second = results(name, 2, 0), results(name, 2, 1)
    assert first["hash"] == second["hash"]
    assert first["sizes"] == second["sizes"]
    assert first["spectra"] == second["spectra"]


@pytest.mark.parametrize("name", ["plain", "mamba2", "accumulation", "large"])
def test_two_processes_follow_the_run_of_one(results, name):
    two, one = results(name, 2, 0), results(name, 1, 0)
    assert two["sizes"] == one["sizes"]
    assert sum(two["sizes"]) < 16 * (2 if name == "mamba2" else 1)
    assert distance(two, one) < 1e-4
    assert distance(results("none", 2, 0), results("none", 1, 0)) < 1e-4


def test_the_comparison_tells_a_cut_from_none(results):
    assert distance(results("plain", 2, 0), results("none", 1, 0)) > 1e-3


@pytest.mark.parametrize("name", ["bucket_view", "static_graph"])
def test_ddp_settings_change_nothing(results, name):
    assert distance(results("plain", 2, 0), results(name, 2, 0)) < 1e-4


def test_a_communication_hook_goes_on_after_a_cut(results):
    with_hook = results("comm_hook", 2, 0)
    assert with_hook["hook_calls"] >= len(with_hook["losses"])
    assert distance(results("plain", 2, 0), with_hook) < 1e-4


def test_a_resumed_run_is_the_whole_run(results):
    assert results("resume", 2, 0)["hash"] == results("resumed", 2, 0)["hash"]
    assert results("resume", 2, 0)["losses"] == results("resumed", 2, 0)["losses"]


def test_an_undone_cut_leaves_no_trace(results):
    assert results("rollback", 2, 0)["sizes"] == [8, 8]
    assert len(results("rollback", 2, 0)["spectra"]) == 1
    assert results("rollback", 2, 0)["hash"] == results("none", 2, 0)["hash"]
    assert results("rollback", 2, 0)["losses"] == results("none", 2, 0)["losses"]


def test_the_script_for_several_gpus_runs_on_cpus():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "tests" / "gpu" / "several_gpus.py"),
        "--tiny",
        "--models",
        "mamba",
        "--backends",
        "ddp",
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| mamba |")][-2:]
    assert [row[1] for row in rows] == ["1", "2 DDP"]
    for row in rows:
        assert row[-3] == "yes"
        assert max(float(row[-2]), float(row[-1])) < 1e-4  # of other processes, and of the run that goes on
