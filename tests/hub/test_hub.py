"""True round trips: what is pushed to a Hub, and what fresh processes make of it, with and without the plugin."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import hf_compressm
from tests.hub.hub_server import HubServer

ROOT = Path(__file__).parents[2]
CODE, CARD, FIGURE = "modeling_compressm.py", "README.md", "spectra.png"
REFERENCE = Path(hf_compressm.__file__).parent / "reference"
MIXED = ["me/compressed", "me/model", "me/saved", "me/private", "me/trained"]


def start(hub: HubServer, folder: Path, *arguments: object, token: str | None = "hf_me") -> Any:
    """A process with an empty cache."""
    home = folder / f"home_{len(list(folder.glob('home_*')))}"
    environment = hub.environment(home, token) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=folder)


def client(hub: HubServer, folder: Path, job: str, **kwargs: Any) -> dict[str, Any]:
    done = start(hub, folder, Path(__file__).with_name("hub_client.py"), job, folder, **kwargs)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{job}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub():
    def large(repo: str, name: str) -> bool:
        return repo != "me/small" and name.endswith((".safetensors", ".png"))

    with HubServer(large) as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, folder):
    return client(hub, folder, "push")


def card(hub: HubServer, name: str) -> tuple[dict[str, Any], str]:
    text = hub.repositories[name].files[CARD].decode()
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_one_commit_holds_everything(hub, pushed):
    repository = hub.repositories["me/compressed"]
    assert len(repository.commits) == 2  # the first is the empty repository
    expected = {CARD, FIGURE, CODE, "compressm.json", "config.json", "generation_config.json", "model.safetensors"}
    assert repository.files.keys() == expected | {"tokenizer.json", "tokenizer_config.json"}
    assert repository.files[FIGURE].startswith(b"\x89PNG")


def test_the_card(hub, pushed):
    metadata, text = card(hub, "me/compressed")
    assert metadata["library_name"] == "transformers"
    assert {"compressm", "mamba"} <= set(metadata["tags"])
    assert "base_model" not in metadata  # it was a folder
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["type"] == "perplexity"
    assert f"| {result['metrics'][0]['value']:.2f} |" in text
    assert "48 of 96 SSM states" in text
    assert "1 x 512 tokens" in text
    assert text.count("| 16 |") == 6  # the table of layers
    assert 'from_pretrained("me/compressed", trust_remote_code=True)' in text
    assert "2510.02823" in text
    assert str(REFERENCE) not in text


def test_a_card_of_ones_own_is_kept(hub, pushed):
    metadata, text = card(hub, "me/model")
    assert metadata["license"] == "mit"
    assert {"mine", "compressm"} <= set(metadata["tags"])
    assert text.count("My own words.") == text.count("## A smaller state") == 1
    assert "10 of 16 SSM states" in text


def test_cards_of_all_ways(hub, pushed):
    for name in MIXED:
        metadata, text = card(hub, name)
        assert "compressm" in metadata["tags"]
        assert f"![Hankel singular values of every layer]({FIGURE})" in text
        assert FIGURE in hub.repositories[name].files
    assert "trust_remote_code" not in card(hub, "me/small")[1]
    assert "[More Information Needed]" not in card(hub, "me/saved")[1]
    metadata, text = card(hub, "me/trained")
    assert "generated_from_trainer" in metadata["tags"]
    assert "Training hyperparameters" in text  # the trainer's own part
    assert "10 of 16 SSM states" in text  # over both cuts


def test_every_commit_of_a_trainer_can_be_loaded(hub, pushed):
    """It copies weights and config out of its checkpoints, and would leave the code behind."""
    for name, least in (("me/trained", 3), ("me/tuned", 1)):
        mixed = [c for c in hub.repositories[name].commits if b"per_layer_config" in c.get("config.json", b"")]
        assert len(mixed) >= least
        assert all(CODE in commit for commit in mixed)


@pytest.mark.parametrize("job", ["with_plugin", "without_plugin"])
def test_round_trips(hub, folder, pushed, job):
    results = client(hub, folder, job)
    assert results["plugin"] == (job == "with_plugin")
    for name, expected in pushed.items():
        if name in results:
            torch.testing.assert_close(results[name], expected, atol=1e-5, rtol=1e-5)
    assert results.keys() >= set(MIXED)
    assert results["text"].strip() == "Call me Ishmael."
    assert results["card"]["tags"]
    assert CODE in results["files"]


def test_large_and_small_files(hub, pushed):
    weights = hub.repositories["me/private"].files["model.safetensors"]
    assert weights in hub.objects.values()
    assert hub.repositories["me/small"].files["model.safetensors"] not in hub.objects.values()


def test_refusals_say_what_to_do(hub, folder, pushed):
    before = set(hub.repositories)
    messages = client(hub, folder, "fail")
    for name in ("wrong token", "no token", "wrong token, early"):
        assert "hf auth login" in messages[name], name
    assert "may not write" in messages["not mine"]
    assert "me/missing" in messages["missing"]
    assert "me/private" in messages["private"]
    assert hub.repositories["me/private"].private
    assert set(hub.repositories) == before


CLI = "import time; time.sleep = lambda seconds: None; from hf_compressm.cli import app; app()"


def compress(hub: HubServer, folder: Path, *arguments: object, **kwargs: Any) -> Any:
    text = folder / "calibration.txt"
    text.write_text((REFERENCE / "calibration.txt").read_text()[:600])
    model = REFERENCE / "mamba-small"
    settings = ("--state-size", 4, "--refit", 0, "--no-evaluate", "--calibration", text)
    return start(hub, folder, "-c", CLI, "compress", model, *arguments, *settings, **kwargs)


@pytest.mark.parametrize("where", ["/storage/", "/commit/"])
def test_an_interrupted_push(hub, tmp_path, where):
    """Nothing of it is published; the next one completes it, and sends nothing twice that had arrived."""
    name = f"me/interrupted-{where.strip('/')}"
    hub.fail = lambda method, path: where in path
    try:
        done = compress(hub, tmp_path, tmp_path / "slim", "--push-to-hub", name)
    finally:
        hub.fail = lambda method, path: False
    assert done.returncode == 1, done.stderr
    assert "push again" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert (tmp_path / "slim" / "model.safetensors").exists()
    assert hub.repositories[name].files == {}

    hub.log.clear()
    done = compress(hub, tmp_path, "--push-to-hub", name, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed_to"] == name
    assert {CARD, "model.safetensors", "tokenizer.json"} <= hub.repositories[name].files.keys()
    sent = [line for line in hub.log if line.startswith("PUT")]
    assert bool(sent) == (where == "/storage/")


def test_a_wrong_token_is_refused_before_the_work(hub, tmp_path):
    done = compress(hub, tmp_path, tmp_path / "slim", "--push-to-hub", "me/slim", token="hf_wrong")
    assert done.returncode == 1
    assert "hf auth login" in " ".join(done.stderr.split())
    assert not (tmp_path / "slim").exists()
    assert "me/slim" not in hub.repositories
