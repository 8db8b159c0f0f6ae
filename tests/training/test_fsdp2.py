"""FSDP2 cuts like one process: parameters that are sharded over 2 and 3 processes, their moments and their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from transformers import AutoModelForCausalLM

from tests.processes import launch, once
from tests.training.conftest import sizes
from tests.training.fsdp2_run import VARIANTS, digest, run, run_all

pytestmark = pytest.mark.distributed

ON_TWO = [
    *VARIANTS,
    "full@full-2/checkpoint-3",
    "lti@lti-2/checkpoint-3",
    "fitted:ddp",
    "lti:ddp",
    "failing",
    "refused",
]
ON_THREE = ["sharded@sharded-2/checkpoint-3"]
ALONE = ["none", "full", "sharded", "options", "lti"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def make(folder: Path) -> None:
        for runs, processes in ((ON_TWO, 2), (ON_THREE, 3)):
            launch(folder, processes, run_all, folder, runs, processes)
        for name in ALONE:
            (folder / f"{name}-1-0.json").write_text(json.dumps(run(folder / f"{name}-1", name, 1)))

    return once(tmp_path_factory, "fsdp2", make)


@pytest.fixture(scope="module")
def results(folder):
    return lambda name, processes=2, rank=0: json.loads((folder / f"{name}-{processes}-{rank}.json").read_text())


def distance(one: dict, other: dict) -> float:
    return max(abs(one["losses"][step] - other["losses"][step]) for step in one["losses"])


@pytest.mark.parametrize("name", [*VARIANTS, "full-resumed", "lti-resumed"])
def test_the_processes_know_the_same_and_hold_a_part_each(results, name):
    first, second = results(name), results(name, rank=1)
    for key in ("hash", "sizes", "spectra", "kept"):
        assert first[key] == second[key]
    assert first["here"] + second["here"] == first["whole"]
    assert abs(first["here"] - second["here"]) < 0.01 * first["whole"]
    assert first["trained"]  # all parameters are the optimizer's


@pytest.mark.parametrize("name", [*ALONE, "lti-ddp"])
def test_it_follows_the_run_of_one_process(results, name):
    alone, sharded = results(name.removesuffix("-ddp"), 1), results(name)
    assert distance(alone, sharded) < 1e-4
    assert alone["sizes"] == sharded["sizes"]
    assert alone["kept"] == sharded["kept"]
    assert len(alone["spectra"]) == len(sharded["spectra"]) == (0 if name == "none" else 2)


def test_the_comparison_tells_a_cut_from_none(results):
    assert distance(results("full"), results("none", 1)) > 1e-3


def test_fits_and_weights_by_the_loss_are_those_of_ddp(results):
    """Which sees the same batches in each process; process 0 reads the weights that it fits, and the other gathers them."""
    sharded, ddp = results("fitted"), results("fitted-ddp")
    assert sharded["sizes"] == ddp["sizes"] == [16, 8]
    assert sharded["kept"] == ddp["kept"]
    assert distance(sharded, ddp) < 1e-5


def test_a_resumed_run_is_the_whole_run(folder, results):
    for name in ("full", "lti"):
        assert results(name)["losses"] == results(f"{name}-resumed")["losses"]
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        whole, resumed = (
            torch.load(folder / run / "checkpoint-6" / name, weights_only=True) for run in ("full-2", "full-resumed-2")
        )
        torch.testing.assert_close(whole.get("state", whole), resumed.get("state", resumed), rtol=0, atol=0)


def test_it_goes_on_with_another_number_of_processes(results):
    """From a SHARDED checkpoint between the cuts, whose recorded batches are dealt out anew."""
    resumed, alone = results("sharded-resumed", 3), results("sharded", 1)
    assert distance(resumed, alone) < 1e-4
    assert len(resumed["spectra"]) == 2


@pytest.mark.parametrize("name", ["full", "sharded"])
def test_the_best_model_may_have_other_sizes(folder, results, name):
    state = json.loads((folder / f"{name}-2" / "checkpoint-6" / "trainer_state.json").read_text())
    first, last = (
        [*attempt["sizes"].values()]
        for attempt in state["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["history"]
    )
    assert results(name)["sizes"] == first != last


def test_a_saved_model_loads_anywhere(folder, results):
    loaded = AutoModelForCausalLM.from_pretrained(folder / "full-2" / "saved")
    assert sizes(loaded) == results("full")["sizes"]
    assert digest(loaded) == results("full")["weights"]


def test_so_does_a_sharded_checkpoint_once_it_is_merged(folder, results):
    checkpoint = folder / "sharded-2" / "checkpoint-3"
    merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(checkpoint))
    assert digest(AutoModelForCausalLM.from_pretrained(checkpoint)) == results("sharded")["weights"]  # the best


def test_an_undone_cut_leaves_no_trace(results):
    assert results("rollback")["hash"] == results("none")["hash"]
    assert results("rollback")["losses"] == results("none")["losses"]


def test_nor_does_one_that_fails(results):
    failing = results("failing")
    assert failing["during"] != failing["before"][1:]
    assert failing["before"] == failing["after"] == results("failing", rank=1)["after"]
    assert failing["message"] == "on purpose"
    assert failing["evaluated"] > 0  # the model still runs
    assert "is sharded" in failing["alone"]


def test_a_model_of_several_dtypes_trains_in_mixed_precision(results):
    mixed = results("mixed")
    assert sum(mixed["sizes"]) == 8
    assert distance(mixed, results("full")) < 0.05


def test_what_does_not_work_is_refused_with_the_cure(results):
    refused = results("refused")
    assert "bf16=True" in refused["dtypes"]
    assert "mixer.A_log in float32" in refused["dtypes"]
    assert "2 dimensions" in refused["mesh"]
    assert "drop cpu_offload" in refused["offload"]
    assert "checked on torch" in refused["version"]
    assert refused["good"] == ""
