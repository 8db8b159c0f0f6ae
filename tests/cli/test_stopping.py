"""Whatever stops a command, at whatever moment: the exit code says so, and an output is whole or absent."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from typer.testing import CliRunner

from hf_compressm.cli import app
from hf_compressm.cli.console import new_folder
from tests.conftest import tiny_mamba

# Sends Ctrl-C when a module is imported.
INTERRUPTED = """
import os, signal, sys
moment, *sys.argv[1:] = sys.argv[1:]
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from hf_compressm_command import main
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "mamba"
    tiny_mamba().save_pretrained(folder)
    return folder


def compress(*arguments: object):
    return CliRunner().invoke(app, ["compress", *map(str, arguments), "--state-size", "4", "--refit", "0"])


@pytest.mark.parametrize("module", ["torch", "hf_compressm.cli.show"])
def test_ctrl_c_while_importing(module):
    command = [sys.executable, "-c", INTERRUPTED, module, "compress", "nowhere", "slim"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("moment", ["find_layers", "history_of", "save_pretrained"])
def test_ctrl_c_in_a_command(tmp_path, model, monkeypatch, moment):
    """Whatever Ctrl-C does outside of one."""
    owner = {"find_layers": "hf_compressm.compress.", "history_of": "hf_compressm.cutting.plan."}.get(moment)
    stock = PreTrainedModel.save_pretrained if owner is None else None

    def interrupt(*args, **kwargs):
        if stock is not None:
            stock(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("Ctrl-C did nothing")

    monkeypatch.setattr((owner or "transformers.PreTrainedModel.") + moment, interrupt)
    outside = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        result = compress(model, tmp_path / "slim")
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)
    assert result.exit_code == 130, result.output
    assert "stopped" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full_disk():
    """No file may become larger than a few KiB, which fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("empty_folder_is_there", [True, False])
@pytest.mark.parametrize("command", ["compress", "export"])
def test_a_full_disk(tmp_path, model, full_disk, command, empty_folder_is_there):
    if empty_folder_is_there:
        (tmp_path / "slim").mkdir()
    if command == "compress":
        result = compress(model, tmp_path / "slim")
    else:
        result = CliRunner().invoke(app, ["export", str(model), str(tmp_path / "slim")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "could not be written" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.rglob("*")] == ["slim"] * empty_folder_is_there


def test_an_empty_folder_is_replaced_at_once(tmp_path, monkeypatch):
    """It is there all the time: first empty, then whole."""
    seen = []

    def look(event: str, arguments: tuple) -> None:
        if event in ("os.rename", "os.rmdir") and str(tmp_path) in str(arguments):
            seen.append((event, (tmp_path / "slim").exists()))

    (tmp_path / "slim").mkdir()
    sys.addaudithook(look)
    with new_folder(tmp_path / "slim") as folder:
        (folder / "weights").write_text("w")
        assert list((tmp_path / "slim").iterdir()) == []
    assert seen == [("os.rename", True)]
    assert [path.name for path in (tmp_path / "slim").iterdir()] == ["weights"]


def test_what_dead_processes_left_is_swept(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    names = {
        f".slim.{process.pid}.partial": False,
        f".slim.{os.getpid()}.partial": False,
        f".slim.{os.getppid()}.partial": True,
        f".slim.v2.{process.pid}.partial": True,
        f".other.{process.pid}.partial": True,
        ".slim.mine.partial": True,
        "slim.partial": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("w")
    with new_folder(tmp_path / "slim") as folder:
        assert list(folder.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"slim", *(name for name, stays in names.items() if stays)}


def test_nothing_to_cut_writes_nothing(tmp_path, model):
    for target, reason in (
        (("--tolerance", "1e-9"), "raise tolerance"),
        (("--tolerance", "0.9", "--multiple-of", "8", "--uniform"), "multiple_of=1"),
        (("--ratio", "1"), "the target asks for none"),
    ):
        arguments = ["compress", str(model), str(tmp_path / "slim"), "--refit", "0", *target]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 3, result.output
        said = " ".join(result.stderr.split())
        assert "nothing to cut" in said
        assert reason in said
        assert "Nothing was written" in said
        assert "saved" not in said
    assert list(tmp_path.iterdir()) == []
