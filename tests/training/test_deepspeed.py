"""DeepSpeed's ZeRO-1, 2 and 3 cut like one process: weights and moments that are dealt out over 2 processes, and their checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.processes import launch, once
from tests.training.conftest import distance, sizes
from tests.training.sharded_run import assert_undone, digest, run, run_all

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

STAGES = ["zero1", "zero2", "zero3"]
RUNS = [f"full:{way}" for way in STAGES] + [f"full:{way}@full-{way}-2/checkpoint-3" for way in ("zero2", "zero3")]
RUNS += [
    f"{name}:zero3" for name in ("sharded", "options", "fitted", "weighed", "selected", "none", "rollback", "loaded")
]
RUNS += [f"{name}:zero2" for name in ("failing", "mixed", "refused_zero")]
ALONE = ["none", "full", "sharded", "options", "fitted", "selected"]
UNIVERSAL = ["zero2", "zero3"]
stages = pytest.mark.parametrize("way", STAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def make(folder: Path) -> None:
        launch(folder, 2, run_all, folder, RUNS, 2)
        for way in UNIVERSAL:
            make_universal(folder / f"full-{way}-2" / "checkpoint-3")
        launch(folder, 3, run_all, folder, [f"universal:{way}@full-{way}-2/checkpoint-3" for way in UNIVERSAL], 3)
        for name in ALONE:
            (folder / f"{name}-alone-1-0.json").write_text(json.dumps(run(folder / f"{name}-1", name, 1)))

    return once(tmp_path_factory, "deepspeed", make)


@pytest.fixture(scope="module")
def results(folder):
    return lambda way, name, rank=0, processes=2: json.loads(
        (folder / f"{name}-{way}-{1 if way == 'alone' else processes}-{rank}.json").read_text()
    )


def make_universal(checkpoint: Path) -> None:
    """As DeepSpeed's documentation says."""
    tag = (checkpoint / "latest").read_text()
    folders = ["--input_folder", str(checkpoint / tag), "--output_folder", str(checkpoint / f"{tag}_universal")]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run([*command, *workers], check=True, capture_output=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    (checkpoint / "latest_universal").write_text(f"{tag}_universal")


@pytest.mark.parametrize("entry", [entry for entry in RUNS if not entry.startswith(("failing", "refused"))])
def test_the_processes_know_the_same(results, entry):
    name, _, origin = entry.partition("@")
    name, _, way = name.partition(":")
    first, second = (results(way, name + "-resumed" * bool(origin), rank) for rank in (0, 1))
    for key in ("hash", "sizes", "spectra", "kept"):
        assert first[key] == second[key]
    assert first["trained"]  # all parameters are the optimizer's
    if way == "zero3":  # each holds a part
        assert first["here"] + second["here"] == first["whole"]


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *((way, "full") for way in STAGES),
        ("zero3", "sharded"),
        ("zero3", "options"),
        ("zero3", "fitted"),
        ("zero3", "selected"),
    ],
)
def test_it_follows_the_run_of_one_process(results, way, name):
    alone, spread = results("alone", name), results(way, name)
    assert distance(alone, spread) < 1e-4
    assert alone["sizes"] == spread["sizes"]
    assert alone["kept"] == spread["kept"]
    assert len(spread["spectra"]) == 2
    assert distance(alone, results("alone", "none")) > 1e-3


def test_a_model_may_be_loaded_in_parts(results):
    whole, parts = results("zero3", "full"), results("zero3", "loaded")
    assert whole["losses"] == parts["losses"]
    assert whole["last"] == parts["last"]


@pytest.mark.parametrize("way", UNIVERSAL)
def test_a_resumed_run_is_the_whole_run(results, way):
    """From a checkpoint between the cuts."""
    whole, resumed = results(way, "full"), results(way, "full-resumed")
    assert whole["losses"] == resumed["losses"]
    assert whole["last"] == resumed["last"]  # weights and moments, before the best model was loaded


@pytest.mark.parametrize("way", UNIVERSAL)
def test_it_goes_on_with_another_number_of_processes(results, way):
    """From DeepSpeed's universal form of the checkpoint: it takes no other on another number of processes."""
    resumed = results(way, "universal-resumed", processes=3)
    assert distance(resumed, results("alone", "full")) < 1e-4
    assert len(resumed["spectra"]) == 2


@stages
def test_the_best_model_has_other_sizes_and_loads_anywhere(folder, results, way):
    best, last = results(way, "full"), results(way, "full")["last"][1:]
    assert best["sizes"] != last
    loaded = AutoModelForCausalLM.from_pretrained(folder / f"full-{way}-2" / "saved")
    assert sizes(loaded) == best["sizes"]
    assert digest(loaded) == best["weights"]


def test_an_undone_cut_leaves_no_trace(results):
    assert results("zero3", "rollback")["hash"] == results("zero3", "none")["hash"]
    assert results("zero3", "rollback")["losses"] == results("zero3", "none")["losses"]


def test_nor_does_one_that_fails(results):
    assert_undone(results("zero2", "failing"), results("zero2", "failing", 1))


def test_weights_in_float32_follow_those_in_bfloat16(results):
    mixed = results("zero2", "mixed")
    assert sum(mixed["sizes"]) == 8
    assert distance(mixed, results("zero2", "full")) < 0.05


def test_what_does_not_work_is_refused_with_the_cure(results):
    refused = results("zero2", "refused_zero")
    assert "stage 0" in refused["stage"]
    assert "offload_optimizer" in refused["offload"]
    assert "take AdamW" in refused["optimizer"]
    assert "checked on DeepSpeed" in refused["version"]
    assert "realization='select'" in refused["anew"]
    assert "what DeepSpeed holds" in refused["loop"]
