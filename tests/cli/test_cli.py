"""The command line on the models that the package ships, and on ones that are smaller still."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner

import hf_compressm
from hf_compressm import hub
from hf_compressm.cli import app
from hf_compressm.data.texts import windows
from hf_compressm.layers import find_layers
from tests.conftest import tiny_mamba

REFERENCE = Path(hf_compressm.__file__).parent / "reference"
MAMBA, MAMBA2 = (str(REFERENCE / name) for name in ("mamba-small", "mamba2-small"))


def run(*arguments: object):
    quick = ("--refit", "0") if arguments[:1] == ("compress",) else ()
    return CliRunner().invoke(app, [*(str(argument) for argument in arguments), *quick])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A model of four layers that take no time, with the tokenizer of the shipped ones."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(MAMBA)
    tokenizer.save_pretrained(folder)
    tiny_mamba(state_size=16, layers=4, vocabulary=len(tokenizer)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Few tokens, so that measuring takes no time."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text((REFERENCE / "calibration.txt").read_text(encoding="utf-8")[:600], encoding="utf-8")
    return path


def test_demo(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_compressm.data.evaluation.LENGTH", 64)
    monkeypatch.setattr("hf_compressm.data.calibration.windows", partial(windows, length=64))
    result = run("demo", "--output", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "demo" / "spectra.png").stat().st_size > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    for name in ("mamba-small", "mamba2-small"):
        row = next(line for line in result.stdout.splitlines() if f" {name} " in line)
        before, after = map(float, re.findall(r"\d+\.\d+", row))
        # Reloading with out_proj rescaled, or with random layers, would show here.
        assert after < 1.06 * before
        states = [
            layer.state_size for layer in find_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / name))
        ]
        assert sum(states) < len(states) * (16 if name == "mamba-small" else 128)


def test_compress_and_analyze(tmp_path, text, checkpoint):
    folder = tmp_path / "new" / "slim"
    result = run("compress", checkpoint, folder, "--state-size", 6, "--uniform", "--calibration", text)
    assert result.exit_code == 0, result.output
    assert "16 -> 6" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(folder).config.state_size == 6
    assert (folder / "tokenizer.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["slim"]
    result = run("analyze", folder, "--figure", tmp_path / "spectra.png", "--calibration", text)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "spectra.png").exists()


def test_json_is_all_there_is_on_stdout(tmp_path, text, checkpoint):
    result = run("compress", checkpoint, tmp_path / "slim", "--ratio", 0.5, "--json", "--calibration", text)
    report = json.loads(result.stdout)
    assert sum(layer["new_size"] for layer in report["layers"]) == 32
    assert report["state_bytes_after"] * 2 == report["state_bytes_before"]
    assert "saved in" in result.stderr
    report = json.loads(run("analyze", checkpoint, "--json", "--calibration", text).stdout)
    assert [len(layer["hankel_singular_values"][0]) for layer in report["layers"]] == [16] * 4


def test_dry_run_writes_nothing(tmp_path, text, checkpoint):
    result = run(
        "compress",
        checkpoint,
        tmp_path / "slim",
        "--state-size",
        6,
        "--dry-run",
        "--no-evaluate",
        "--calibration",
        text,
    )
    assert result.exit_code == 0, result.output
    assert "16 -> 6" in result.stdout
    assert (
        run("compress", checkpoint, "--state-size", 6, "--dry-run", "--no-evaluate", "--calibration", text).exit_code
        == 0
    )
    assert list(tmp_path.iterdir()) == []


def test_realization(tmp_path, text, checkpoint):
    settings = ("--state-size", 16, "--calibration", text, "--json", "--dry-run", "--no-evaluate", "--realization")
    for kind in ("select", "project"):
        assert json.loads(run("compress", MAMBA2, *settings, kind).stdout)["realization"] == kind
    result = run("compress", checkpoint, *settings, "project")
    assert result.exit_code == 1
    assert "Mamba-2" in result.stderr
    assert "auto, select, project" in run("compress", checkpoint, *settings, "other").stderr


@pytest.fixture
def pushed(monkeypatch):
    """What is handed to the Hub; true pushes are in tests/hub."""
    pushed = []

    def publish(model, name, *, tokenizer, private):
        pushed.append((name, tokenizer is not None, private, model.compression_report.perplexity))
        return name

    monkeypatch.setattr("hf_compressm.hub.check_login", lambda: None)
    monkeypatch.setattr("hf_compressm.hub.publish", publish)
    monkeypatch.setattr("hf_compressm.data.evaluation.SEQUENCES", 1)
    monkeypatch.setattr("hf_compressm.data.evaluation.LENGTH", 128)
    return pushed


@pytest.mark.parametrize("folder", [True, False])
def test_push_to_hub(pushed, tmp_path, text, folder):
    output = [tmp_path / "slim"] if folder else []
    result = run("compress", MAMBA, *output, "--push-to-hub", "me/slim", "--private", "--calibration", text)
    assert result.exit_code == 0, result.output
    ((*what, perplexity),) = pushed
    assert what == ["me/slim", True, True]
    assert 1 < perplexity.before < perplexity.after < 100
    assert "pushed to me/slim" in result.stderr
    assert (tmp_path / "slim").exists() == folder


def test_no_evaluation(pushed, text, checkpoint):
    result = run("compress", checkpoint, "--push-to-hub", "me/slim", "--no-evaluate", "--json", "--calibration", text)
    assert pushed == [("me/slim", True, None, None)]
    assert json.loads(result.stdout)["pushed_to"] == "me/slim"


def test_a_push_that_fails_leaves_the_folder(pushed, monkeypatch, tmp_path, text, checkpoint):
    def refuse(*args, **kwargs):
        raise OSError("401: no such token")

    monkeypatch.setattr("hf_compressm.hub.publish", refuse)
    result = run(
        "compress", checkpoint, tmp_path / "slim", "--push-to-hub", "me/slim", "--json", "--calibration", text
    )
    assert result.exit_code == 1
    assert "401" in result.stderr
    assert "saved in" in result.stderr
    assert result.stdout == ""
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "slim") is not None


def test_what_a_dry_run_would_cost(pushed, text):
    result = run("compress", MAMBA, "--state-size", 2, "--dry-run", "--json", "--calibration", text)
    report = json.loads(result.stdout)
    assert report["saved_in"] is report["pushed_to"] is None
    assert report["perplexity"]["before"] < report["perplexity"]["after"]
    assert "1 x 128 tokens" in report["perplexity"]["data"]
    assert pushed == []


def test_export(tmp_path, text, checkpoint):
    uniform = ("--state-size", 6, "--uniform", "--calibration", text)
    assert run("compress", checkpoint, tmp_path / "slim", *uniform).exit_code == 0
    assert run("export", tmp_path / "slim", tmp_path / "original").exit_code == 0
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert config["ssm_cfg"]["d_state"] == 6
    assert run("compress", checkpoint, tmp_path / "mixed", "--ratio", 0.5, "--calibration", text).exit_code == 0
    result = run("export", tmp_path / "mixed", tmp_path / "refused")
    assert result.exit_code == 1
    assert "uniform=True" in result.stderr
    assert not (tmp_path / "refused").exists()


def test_version():
    assert run("--version").stdout.startswith("hf_compressm 0.")


@pytest.mark.parametrize(("failure", "code"), [(KeyboardInterrupt, 130), (OSError("no space left"), 1)])
@pytest.mark.parametrize("when", ["while measuring", "while saving"])
def test_what_stops_it_leaves_no_folder(monkeypatch, tmp_path, text, failure, code, when, checkpoint):
    def fail(*args, **kwargs):
        raise failure

    if when == "while measuring":
        monkeypatch.setattr("hf_compressm.compress.measure", fail)
    else:  # the weights are there, the tokenizer is not
        monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
    result = run("compress", checkpoint, tmp_path / "slim", "--calibration", text)
    assert result.exit_code == code, result.output
    assert list(tmp_path.iterdir()) == []
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--state-size", 16), "16 states"),
        (("--state-size", 0), "at least 1"),
        (("--ratio", 0.5, "--state-size", 4), "one target"),
        (("--tolerance", 1), "[0, 1)"),
        (("--calibration", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_refusals_write_nothing(tmp_path, arguments, message, checkpoint):
    result = run("compress", checkpoint, tmp_path / "slim", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "slim", "--private"), "give --push-to-hub NAME"),
        (("compress", "slim", "--heal-parameters", "all"), "give --heal TOKENS"),
        (("compress", "."), "is the current folder"),
        (("export", "."), "is the current folder"),
        (("analyze", "--tolerance", 0.05, "--frontier"), "not for --frontier"),
        (("analyze", "--tolerance", 0.05, "--json"), "not for --json"),
    ],
)
def test_what_would_do_nothing_or_elsewhere_is_refused(tmp_path, monkeypatch, arguments, message, checkpoint):
    monkeypatch.chdir(tmp_path)
    command, *options = arguments
    result = run(command, checkpoint, *options)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_refuses_models_and_folders(tmp_path, checkpoint):
    assert run("compress", tmp_path / "nowhere", tmp_path / "slim").exit_code == 1
    shutil.copytree(checkpoint, tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for command in (("compress", tmp_path / "half", tmp_path / "slim"), ("analyze", tmp_path / "half")):
        result = run(*command)
        assert result.exit_code == 1
        assert "half written" in result.stderr
    assert not (tmp_path / "slim").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for command in (("compress", checkpoint, tmp_path / "full"), ("demo", "--output", tmp_path / "full")):
        result = run(*command)
        assert result.exit_code == 1
        assert "not an empty folder" in " ".join(result.stderr.split())
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    assert "folder" in run("compress", checkpoint).stderr


def test_a_model_without_a_tokenizer(tmp_path, text):
    tiny_mamba().save_pretrained(tmp_path / "bare")
    result = run("compress", tmp_path / "bare", tmp_path / "slim", "--state-size", 4)
    assert result.exit_code == 0, result.output
    assert "no tokenizer" in result.stderr
    assert run("compress", tmp_path / "bare", tmp_path / "other", "--calibration", text).exit_code == 1


def test_an_output_that_can_not_be_written_is_told_at_once(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compressm.cli.compress.load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    result = run("compress", checkpoint, tmp_path / "file" / "slim")
    assert result.exit_code == 1
    assert "is a file: name another" in " ".join(result.stderr.split())
    monkeypatch.setattr("os.access", lambda *_: False)
    result = run("compress", checkpoint, tmp_path / "new" / "slim")
    assert result.exit_code == 1
    assert "is read-only: name another" in " ".join(result.stderr.split())


def test_a_device_that_is_not_here(checkpoint, text, tmp_path):
    for arguments in (("compress", checkpoint, tmp_path / "slim"), ("analyze", checkpoint)):
        result = run(*arguments, "--device", "cuda:7", "--calibration", text)
        assert result.exit_code == 1
        assert "--device must be one of what is here, cpu" in result.stderr
    assert run("compress", checkpoint, "--dry-run", "--device", "cpu", "--calibration", text).exit_code == 0


def test_a_model_that_is_spread(checkpoint, text, monkeypatch):
    """Over all devices that are here."""
    maps = []
    load = hub.load_model
    monkeypatch.setattr(hub, "load_model", lambda *args, **options: maps.append(options) or load(*args, **options))
    for arguments in (
        ("compress", checkpoint, "--dry-run", "--state-size", 4, "--no-evaluate"),
        ("analyze", checkpoint),
    ):
        result = run(*arguments, "--device", "auto", "--calibration", text)
        assert result.exit_code == 0, result.output
    assert maps == [{"device_map": "auto"}] * 2
    assert "or auto, which spreads" in " ".join(run("analyze", "--help").output.replace("│", "").split())


def test_a_gpu_that_is_full(checkpoint, text, tmp_path, monkeypatch):
    def out_of_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("hf_compressm.compress.measure", out_of_memory)
    result = run("compress", checkpoint, tmp_path / "slim", "--calibration", text)
    assert result.exit_code == 1
    message = " ".join(result.stderr.split())
    for part in ("The GPU's memory does not hold it", "2.00 GiB", "--device auto spreads", "--device cpu"):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_help_tells_the_whole_story():
    for command in ((), ("compress",), ("analyze",), ("export",), ("demo",)):
        result = run(*command, "--help")
        assert result.exit_code == 0
    text = " ".join(run("compress", "--help").output.split())
    for option in (
        "--tolerance",
        "--dry-run",
        "--push-to-hub",
        "--json",
        "--calibration",
        "--realization",
        "--evaluate",
    ):
        assert option in text


def test_show(tmp_path, text, checkpoint):
    run("compress", checkpoint, tmp_path / "slim", "--state-size", 6, "--calibration", text)
    result = run("show", tmp_path / "slim")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("16 -> 6") == 4
    assert "cut 1 of 1" in result.stderr
    (cut,) = json.loads(run("show", tmp_path / "slim", "--json").stdout)
    assert cut["config"]["state_size"] == 6
    result = run("show", checkpoint)
    assert result.exit_code == 1
    assert "compressm.json" in result.stderr
