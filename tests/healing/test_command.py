"""`hf-compressm compress --heal`, and `compress_pretrained`."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from typer.testing import CliRunner

from hf_compressm import CompreSSMConfig, compress_pretrained, get_report
from hf_compressm.cli import app
from hf_compressm.data import healing as data
from hf_compressm.healing import heal
from tests.conftest import tiny_mamba2


def test_heal(monkeypatch, tmp_path):
    """On samples of the model, which has no tokenizer."""
    monkeypatch.setattr(heal, "STEP_TOKENS", 64)
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)  # which a Trainer does twice
    monkeypatch.setattr(data, "LENGTH", 16)
    monkeypatch.setattr(data, "sequences_for", lambda model: 8)
    tiny_mamba2().save_pretrained(tmp_path / "full")
    options = ("--state-size", "4", "--heal", "300", "--heal-parameters", "all", "--json")
    result = CliRunner().invoke(app, ["compress", str(tmp_path / "full"), str(tmp_path / "slim"), *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["healing"]
    assert found["tokens"] == 320
    assert found["parameters"] == "all"
    report = get_report(tmp_path / "slim")
    assert (report.healing.before, report.healing.after) == (found["before"], found["after"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "slim"]

    config = CompreSSMConfig(state_size=4, heal=300, heal_parameters="all")
    again = compress_pretrained(tmp_path / "full", config)
    assert again.compression_report.healing.before == found["before"]
    saved = compress_pretrained(tmp_path / "slim", CompreSSMConfig(tolerance=0))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(ids).logits, saved(ids).logits)


def test_wrong_values_are_said(tmp_path):
    for options, said in ((("--heal", "-1"), "at least 0"), (("--heal-parameters", "some"), "cut, all")):
        result = CliRunner().invoke(app, ["compress", str(tmp_path), str(tmp_path / "slim"), *options])
        assert result.exit_code == 1
        assert said in " ".join(result.output.split())


def test_several_processes_write_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["compress", str(tmp_path), str(tmp_path / "slim"), "--heal", "300"])
    assert result.exit_code == 1
    assert "Several processes would write the same model" in " ".join(result.output.split())
    with pytest.raises(ValueError, match="Several processes would push the same model"):
        compress_pretrained(tmp_path, push_to_hub="me/slim")
    assert not list(tmp_path.iterdir())
