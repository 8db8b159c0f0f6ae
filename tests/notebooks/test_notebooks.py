"""The notebooks run from top to bottom, and are kept with their outputs and without traces of where they ran."""

from __future__ import annotations

import os
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The kernel, a process of its own, shall import the package that is tested.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parents[1]), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    begin = time.perf_counter()
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    print(f"{path.name}: {time.perf_counter() - begin:.0f} s")
    kept = nbformat.read(path, as_version=4)
    assert [len(_figures(cell)) for cell in notebook.cells] == [len(_figures(cell)) for cell in kept.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert sum(len(_figures(cell)) for cell in code) >= 1
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
    for text in (cell.source + str([o.get("text") for o in cell.get("outputs", [])]) for cell in notebook.cells):
        assert not any(folder in text for folder in ("/home/", "/root/", "/tmp/", "/work/", "/Users/"))


def _figures(cell):
    return [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
