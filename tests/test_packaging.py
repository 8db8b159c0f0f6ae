"""What is installed: declared dependencies are those that are imported, and wheel and sdist hold what they need."""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import hf_compressm

PACKAGE = Path(hf_compressm.__file__).parent
ROOT = PACKAGE.parent
EXTRAS = {"mamba_ssm", "causal_conv1d", "triton", "torchao", "peft"}
"""Used where they are installed; torch brings Triton where there is a GPU."""
IN_A_WHEEL = """
import hf_compressm, hf_compressm_command
from transformers import AutoModelForCausalLM
from hf_compressm.data.texts import CALIBRATION
assert hf_compressm.__file__.startswith({folder!r}), hf_compressm.__file__
assert CALIBRATION.read_text(encoding="utf-8")
AutoModelForCausalLM.from_pretrained(CALIBRATION.parent / "mamba2-small")
"""


def imported() -> set[str]:
    trees = [ast.parse(path.read_text("utf-8")) for path in [*PACKAGE.rglob("*.py"), ROOT / "hf_compressm_command.py"]]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and node.module]
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"hf_compressm"}


def test_what_is_imported_is_declared_and_the_other_way_round():
    requirements = [line for line in metadata.requires("hf_compressm") or [] if "extra ==" not in line]
    declared = {re.split(r"[<>=!~ ;\[]", line)[0].replace("-", "_").lower() for line in requirements}
    assert declared == imported() - EXTRAS


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel, the sdist, and a wheel made from that."""
    folder = tmp_path_factory.mktemp("dist")

    def build(target: str, source: Path, to: Path) -> Path:
        command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(to)]
        subprocess.run(command, cwd=source, check=True, capture_output=True)
        return next(to.iterdir())

    sdist = build("sdist", ROOT, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    again = build("wheel", next((folder / "unpacked").iterdir()), folder / "again")
    return build("wheel", ROOT, folder / "wheel"), sdist, again


def test_the_wheel_holds_the_package_and_nothing_else(built):
    wheel, _, again = built
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == ours | {"hf_compressm_command.py"}
    assert {"hf_compressm/py.typed", "hf_compressm/reference/TEXTS.md"} <= names
    assert any(name.endswith("LICENSE") for name in info)
    assert set(zipfile.ZipFile(again).namelist()) == names


def test_the_sdist_holds_what_tests_need(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "tests/conftest.py"} <= names
    assert "notebooks/1_hankel_singular_values.ipynb" in names


def test_the_wheel_works_by_itself(built, tmp_path):
    zipfile.ZipFile(built[0]).extractall(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    code = IN_A_WHEEL.format(folder=str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
