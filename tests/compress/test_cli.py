"""The command line on the models that the package ships."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_compressm
from hf_compressm.cli import app

MAMBA = str(Path(hf_compressm.__file__).parent / "reference" / "mamba-tiny")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_demo(tmp_path):
    result = run("demo", "--output", str(tmp_path / "demo"))
    assert result.exit_code == 0, result.output
    for name in ("mamba-tiny", "mamba2-tiny"):
        assert (tmp_path / "demo" / f"{name}.png").exists()
        assert name in result.output


def test_compress_and_analyze(tmp_path):
    folder = tmp_path / "slim"
    result = run("compress", MAMBA, str(folder), "--state-size", "6", "--uniform")
    assert result.exit_code == 0, result.output
    assert AutoModelForCausalLM.from_pretrained(folder).config.state_size == 6
    assert (folder / "tokenizer.json").exists()
    result = run("analyze", str(folder), "--figure", str(tmp_path / "spectra.png"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "spectra.png").exists()


def test_refusals_write_nothing(tmp_path):
    folder = tmp_path / "slim"
    assert run("compress", MAMBA, str(folder), "--state-size", "16").exit_code == 1
    assert run("compress", MAMBA, str(folder), "--ratio", "0.5", "--state-size", "4").exit_code == 1
    assert run("compress", str(tmp_path / "nowhere"), str(folder)).exit_code == 1
    assert not folder.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert run("compress", MAMBA, str(tmp_path / "full")).exit_code == 1
