"""FSDP1 and 2 cut like one process: parameters that are sharded over 2 and 3 processes, their moments and their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.utils import merge_fsdp_weights
from transformers import AutoModelForCausalLM

from tests.processes import launch, once
from tests.training.conftest import distance, sizes
from tests.training.sharded_run import VARIANTS, assert_undone, digest, run, run_all

pytestmark = pytest.mark.distributed

# FSDP1 can't run the model of several dtypes, and on CPUs torch crashes where it saves whole state dictionaries.
FSDP2 = [name for name, options in VARIANTS.items() if "deepspeed" not in options and name != "restored"]
FSDP1 = [name for name in FSDP2 if name not in ("full", "mixed")]
ON_TWO = [*(f"{name}:fsdp2" for name in FSDP2), *(f"{name}:fsdp1" for name in FSDP1)]
ON_TWO += [f"{name}:fsdp2@full-fsdp2-2/checkpoint-3" for name in ("full", "restored")]
ON_TWO += ["sharded:fsdp1@sharded-fsdp1-2/checkpoint-3"]
ON_TWO += [
    "lti:fsdp2@lti-fsdp2-2/checkpoint-3",
    "lti:ddp",
    "fitted:ddp",
    "full:launched",
    "failing:fsdp2",
    "failing:fsdp1",
    "refused:fsdp2",
]
ON_THREE = [f"sharded:{way}@sharded-{way}-2/checkpoint-3" for way in ("fsdp2", "fsdp1")]
ALONE = ["none", "full", "sharded", "options", "fitted", "lti"]
RESUMED = {"fsdp2": "full", "fsdp1": "sharded"}
RUNS = [("fsdp2", name) for name in [*FSDP2, "full-resumed"]] + [
    ("fsdp1", name) for name in [*FSDP1, "sharded-resumed"]
]
ways = pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def make(folder: Path) -> None:
        for runs, processes in ((ON_TWO, 2), (ON_THREE, 3)):
            launch(folder, processes, run_all, folder, runs, processes)
        for name in ALONE:
            (folder / f"{name}-alone-1-0.json").write_text(json.dumps(run(folder / f"{name}-1", name, 1)))

    return once(tmp_path_factory, "fsdp", make)


@pytest.fixture(scope="module")
def results(folder):
    return lambda way, name, processes=2, rank=0: json.loads(
        (folder / f"{name}-{way}-{processes}-{rank}.json").read_text()
    )


@pytest.mark.parametrize(("way", "name"), RUNS)
def test_the_processes_know_the_same_and_hold_a_part_each(results, way, name):
    first, second = results(way, name), results(way, name, rank=1)
    for key in ("hash", "sizes", "spectra", "kept"):
        assert first[key] == second[key]
    assert first["here"] + second["here"] == first["whole"]
    assert abs(first["here"] - second["here"]) < 0.02 * first["whole"]
    assert first["trained"]  # all parameters are the optimizer's


@pytest.mark.parametrize(
    ("way", "name"),
    [("fsdp2", name) for name in ALONE] + [("fsdp1", n) for n in ALONE if n in FSDP1] + [("ddp", "lti")],
)
def test_it_follows_the_run_of_one_process(results, way, name):
    alone, sharded = results("alone", name, 1), results(way, name)
    assert distance(alone, sharded) < 1e-4
    assert alone["sizes"] == sharded["sizes"]
    assert alone["kept"] == sharded["kept"]
    assert len(alone["spectra"]) == len(sharded["spectra"]) == (0 if name == "none" else 2)


def test_the_comparison_tells_a_cut_from_none(results):
    assert distance(results("fsdp2", "full"), results("alone", "none", 1)) > 1e-3


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp1"])
def test_fits_are_those_of_one_process(results, way):
    """On the batches of all processes; process 0 reads the weights that it fits, and the other gathers them."""
    sharded, alone = results(way, "fitted"), results("alone", "fitted", 1)
    assert sharded["sizes"] == alone["sizes"] == [16, 8]
    assert sharded["kept"] == alone["kept"]
    assert distance(sharded, alone) < 1e-5


def test_a_resumed_run_is_the_whole_run(results):
    assert results("fsdp2", "lti")["losses"] == results("fsdp2", "lti-resumed")["losses"]
    for name in ("full-resumed", "restored-resumed"):
        whole, resumed = results("fsdp2", "full"), results("fsdp2", name)
        assert whole["losses"] == resumed["losses"]
        assert whole["last"] == resumed["last"]  # of weights and moments, before the best model was loaded


def test_under_fsdp1_but_for_the_moments(results):
    """Which accelerate does not bring back from FSDP1's SHARDED checkpoints, cut or not: the weights are the same, for one step."""
    whole, resumed = results("fsdp1", "sharded")["losses"], results("fsdp1", "sharded-resumed")["losses"]
    assert whole["4"] == resumed["4"]
    assert abs(whole["6"] - resumed["6"]) < 0.01


def test_accelerates_config_file_does_as_the_arguments_do(results):
    assert results("launched", "full")["losses"] == results("fsdp2", "full")["losses"]
    assert results("launched", "full")["last"] == results("fsdp2", "full")["last"]


@ways
def test_it_goes_on_with_another_number_of_processes(results, way):
    """From a SHARDED checkpoint between the cuts, whose recorded batches are dealt out anew."""
    resumed, alone = results(way, "sharded-resumed", 3), results("alone", "sharded", 1)
    assert distance(resumed, alone) < (1e-4 if way == "fsdp2" else 0.01)
    assert len(resumed["spectra"]) == 2


@pytest.mark.parametrize(("way", "name"), [("fsdp2", "full"), ("fsdp2", "sharded"), ("fsdp1", "sharded")])
def test_the_best_model_may_have_other_sizes(folder, results, way, name):
    state = json.loads((folder / f"{name}-{way}-2" / "checkpoint-6" / "trainer_state.json").read_text())
    first, last = (
        [*attempt["sizes"].values()]
        for attempt in state["stateful_callbacks"]["CompreSSMCallback"]["attributes"]["history"]
    )
    assert results(way, name)["sizes"] == first != last


def test_a_saved_model_loads_anywhere(folder, results):
    loaded = AutoModelForCausalLM.from_pretrained(folder / "full-fsdp2-2" / "saved")
    assert sizes(loaded) == results("fsdp2", "full")["sizes"]
    assert digest(loaded) == results("fsdp2", "full")["weights"]


@ways
def test_so_does_a_sharded_checkpoint_once_it_is_merged(folder, results, way):
    checkpoint = folder / f"sharded-{way}-2" / "checkpoint-3"
    merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(checkpoint))
    assert digest(AutoModelForCausalLM.from_pretrained(checkpoint)) == results(way, "sharded")["weights"]  # the best


@ways
def test_an_undone_cut_leaves_no_trace(results, way):
    assert results(way, "rollback")["hash"] == results(way, "none")["hash"]
    assert results(way, "rollback")["losses"] == results(way, "none")["losses"]


@ways
def test_nor_does_one_that_fails(results, way):
    failing = results(way, "failing")
    assert_undone(failing, results(way, "failing", rank=1))
    assert "is sharded" in failing["cut"]["alone"]


def test_a_model_of_several_dtypes_trains_in_mixed_precision(results):
    mixed = results("fsdp2", "mixed")
    assert sum(mixed["sizes"]) == 8
    assert distance(mixed, results("fsdp2", "full")) < 0.05


def test_what_does_not_work_is_refused_with_the_cure(results):
    refused = results("fsdp2", "refused")
    assert "bf16=True" in refused["dtypes"]
    assert "mixer.A_log in float32" in refused["dtypes"]
    assert "2 dimensions" in refused["mesh"]
    assert "drop cpu_offload" in refused["offload"]
    assert "checked on torch" in refused["version"]
    assert refused["good"] == ""
    assert "use_orig_params: true" in refused["flat"]
    assert "hybrid" in refused["hybrid"]
