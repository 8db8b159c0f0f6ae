"""Two processes cut like one: the same statistics, one decision, equal ranks."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.gpu import several_gpus
from tests.processes import launch, once
from tests.training.conftest import distance
from tests.training.ddp_run import run, run_all
from tests.training.faults_run import begin, resume, whole_and_killed

pytestmark = pytest.mark.distributed

VARIANTS = [
    "plain",
    "mamba2",
    "by head",
    "accumulation",
    "large",
    "resume",
    "rollback",
    "comm_hook",
    "static_graph",
    "none",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def make(folder: Path) -> None:
        launch(folder, 2, run_all, folder, VARIANTS, 2)
        for name in ("plain", "mamba2", "by head", "accumulation", "large", "none"):
            result = run(folder / "one" / name, name, 1, 0)
            (folder / f"{name}-1-0.json").write_text(json.dumps(result))

    folder = once(tmp_path_factory, "ddp", make)

    def read(name: str, world: int, rank: int) -> dict:
        return json.loads((folder / f"{name}-{world}-{rank}.json").read_text())

    return read


@pytest.mark.parametrize("name", [*VARIANTS, "resumed"])
def test_the_processes_stay_bit_identical(results, name):
    first, second = results(name, 2, 0), results(name, 2, 1)
    assert first["hash"] == second["hash"]
    assert first["sizes"] == second["sizes"]
    assert first["spectra"] == second["spectra"]


@pytest.mark.parametrize("name", ["plain", "mamba2", "by head", "accumulation", "large"])
def test_two_processes_follow_the_run_of_one(results, name):
    two, one = results(name, 2, 0), results(name, 1, 0)
    assert two["sizes"] == one["sizes"]
    assert sum(two["sizes"]) < 16 * (2 if name in ("mamba2", "by head") else 1)
    assert distance(two, one) < 1e-4
    assert distance(results("none", 2, 0), results("none", 1, 0)) < 1e-4


def test_the_comparison_tells_a_cut_from_none(results):
    assert distance(results("plain", 2, 0), results("none", 1, 0)) > 1e-3


@pytest.mark.parametrize("name", ["comm_hook", "static_graph"])
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


def test_processes_that_differ(tmp_path):
    """All of them say so, before the first step."""
    launch(tmp_path, 2, begin, tmp_path, timeout=60)
    first, second = (json.loads((tmp_path / f"begin-{rank}.json").read_text()) for rank in (0, 1))
    for each in (first, second):
        assert "ValueError" in each["differs"]
        assert "differ in end: it is 3 in process 1 and 4 in process 0" in each["differs"]
        assert "ValueError" in each["fails"]
        assert "nothing to train here" in each["fails"]
        assert each["differs sizes"] == each["fails sizes"] == each["absent sizes"] == [8, 8]
    assert "Process 1 of 2 has no CompreSSMCallback" in first["absent"]
    assert "absent" in second  # it knows of no callback, and ends with the connection


def test_a_process_killed_in_a_cut(tmp_path):
    """The other says so and undoes its part; the last whole checkpoint resumes, to the run that was not disturbed."""
    codes = launch(tmp_path, 2, whole_and_killed, tmp_path, codes=True, timeout=120)
    assert codes == [1, 9], (tmp_path / "output-0.txt").read_text()[-3000:]
    whole = [json.loads((tmp_path / f"whole-{rank}.json").read_text()) for rank in (0, 1)]
    killed = json.loads((tmp_path / "killed-0.json").read_text())
    assert "Process 1 of 2 did not come to the cut" in killed["message"]
    assert sum(whole[0]["sizes"]) < sum(killed["sizes"]) < 16
    saved = sorted((tmp_path / "killed").glob("checkpoint-*"))
    assert [path.name for path in saved] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    short = shutil.copytree(saved[-1], tmp_path / "killed" / "checkpoint-4")  # cut short in the weights
    (short / "trainer_state.json").unlink()
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:2000])
    launch(tmp_path, 2, resume, tmp_path, str(saved[-1]))
    resumed = [json.loads((tmp_path / f"resumed-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["hash"] for each in resumed] == [each["hash"] for each in whole]
    assert all("deserializing" in each["short"] for each in resumed)  # a half-written one is not read as whole


def test_the_script_for_several_gpus_runs_on_cpus(tmp_path, monkeypatch, capsys):
    """All of it but torchrun."""
    numbers = count()

    def run(command: list[str], **kwargs) -> SimpleNamespace:
        processes = int(command[command.index("--nproc_per_node") + 1]) if "--nproc_per_node" in command else 1
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        launch(folder, processes, main_of_script, command[command.index(several_gpus.__file__) + 1 :])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(several_gpus.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["several_gpus.py", "--tiny", "--models", "mamba", "--backends", "ddp"])
    several_gpus.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| mamba |")][-2:]
    assert [row[1] for row in rows] == ["1", "2 DDP"]
    for row in rows:
        assert row[-3] == "yes"
        assert max(float(row[-2]), float(row[-1])) < 1e-4  # of other processes, and of the run that goes on


def main_of_script(arguments: list[str]) -> None:
    sys.argv = ["several_gpus.py", *arguments]
    several_gpus.main()
