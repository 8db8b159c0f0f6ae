"""Runs of the callback where each process holds a part, for test_fsdp.py and test_deepspeed.py.

A run is `NAME:WAY`, with one of `VARIANTS` or `CHECKS`, and one of `WAYS` or ddp; or `NAME:WAY@CHECKPOINT`, resumed from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_
from hf_compressm.backends import find_backend
from hf_compressm.backends.fsdp1 import FSDP1
from hf_compressm.backends.fsdp2 import FSDP2
from hf_compressm.compat import fsdp2 as fsdp2_room
from hf_compressm.compat.fsdp2 import fsdp2_parameters
from hf_compressm.compat.parts import Part
from hf_compressm.compat.sharding import held, is_sharded, parameter_count, whole
from hf_compressm.compat.used import CHECKED
from hf_compressm.compat.wrapping import inside
from hf_compressm.cutting import apply
from hf_compressm.layers import find_layers, set_data_
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2
from tests.layers import lti_mixers
from tests.training.conftest import dataset, losses, sizes

BATCH = 6  # of all processes together
EVALUATES = {"metric_for_best_model": "badness", "greater_is_better": False}  # which grows each time
# The best is the first checkpoint, between the two cuts.
SAVES = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
SAVES |= EVALUATES | {"load_best_model_at_end": True}
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}

# For each run the model, its target, and what differs in the Trainer's arguments and in FSDP's; those with DeepSpeed's are
# DeepSpeed's alone.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"args": SAVES},
    "sharded": {"model": "mamba2", "args": SAVES, "fsdp": SHARDED},
    "options": {
        "args": {"gradient_accumulation_steps": 2, "optim": "sgd", "optim_args": "momentum=0.9"},
        "fsdp": {"activation_checkpointing": True, "reshard_after_forward": False},
    },
    "fitted": {"model": "mamba2", "target": {"ratio": 0.75, "multiple_of": 8, "weights": "gate", "refit": 1}},
    "weighed": {  # by the loss, on samples of each process's own
        "model": "mamba2",
        "target": {"ratio": 0.75, "multiple_of": 8},
        "zero": {"stage3_param_persistence_threshold": 0},
    },
    "restored": {"args": SAVES | {"restore_callback_states_from_checkpoint": True}},
    "rollback": {"target": {"ratio": 0.5, "rollback": 0.0}, "args": EVALUATES},
    "mixed": {"model": "mixed", "args": {"bf16": True}},
    "lti": {
        "model": "lti",
        "target": {"state_size": 6},
        "args": {"save_strategy": "steps", "save_steps": 3},
        "fsdp": SHARDED,
    },
    "selected": {"model": "lti", "target": {"state_size": 6, "realization": "select"}, "deepspeed": {}},
    "loaded": {"args": SAVES, "loaded": True, "deepspeed": {}},
    "universal": {"args": SAVES, "deepspeed": {"checkpoint": {"load_universal": True}}},
}


def fsdp(version: int) -> Any:
    whole = (
        {"sync_module_states": False, "cpu_ram_efficient_loading": False, "use_orig_params": True}
        if version == 1
        else {}
    )

    def settings(sharding: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        own = options.get("fsdp", {})
        if version == 1 and "reshard_after_forward" in own:
            own = own | {"reshard_after_forward": "shard_grad_op"}
        return {"fsdp": True, "fsdp_config": sharding | whole | {"version": version} | own}

    return settings


def zero(stage: int) -> Any:
    def settings(sharding: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        auto = [
            "train_micro_batch_size_per_gpu",
            "train_batch_size",
            "gradient_accumulation_steps",
            "gradient_clipping",
        ]
        optimization = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True} | options.get("zero", {})
        config = {"zero_optimization": optimization, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": "auto"}}
        return {"deepspeed": dict.fromkeys(auto, "auto") | config | options.get("deepspeed", {})}

    return settings


WAYS: dict[str, Any] = {"fsdp2": fsdp(2), "fsdp1": fsdp(1)} | {f"zero{stage}": zero(stage) for stage in (0, 1, 2, 3)}
WAYS["ddp"] = lambda sharding, options: {}


def launched(sharding: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """FSDP2 as `accelerate launch --config_file` sets it up, beside TrainingArguments that do not name it."""
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_processes": 2}
    names = {"transformer_layer_cls_to_wrap": sharding["transformer_layer_cls_to_wrap"][0]}
    fsdp = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"} | names
    config["fsdp_config"] = {f"fsdp_{name}": value for name, value in fsdp.items()}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        parsed = launch_command_parser().parse_args(["--config_file", file.name, "script.py"])
        os.environ |= prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    return {}


WAYS["launched"] = launched


def make(out: Path, variant: str, processes: int, way: str = "fsdp2") -> tuple[Trainer, CompreSSMCallback]:
    options = VARIANTS[variant]
    kind = options.get("model", "mamba")
    model: Any = tiny_mamba2() if kind == "mamba2" else tiny_mamba()
    if kind == "lti":
        torch.manual_seed(0)
        model = lti_mixers.Net(VOCABULARY, 6, lambda: lti_mixers.LRU(6, 12))
    if kind == "mixed":  # as models are whose decays are kept in float32
        model.to(torch.bfloat16)
        for layer in find_layers(model):
            layer.mixer.A_log.data, layer.mixer.D.data = layer.mixer.A_log.data.float(), layer.mixer.D.data.float()
    target = options.get("target", {"state_size": 8} if kind == "mamba2" else {"ratio": 0.5})
    config = CompreSSMConfig(start=0, end=4, num_reductions=2, calibration_batches=2, **target)
    block = model.mixers[0] if kind == "lti" else model.backbone.layers[0]
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": [type(block).__name__]}
    settings = {"max_steps": 6, "per_device_train_batch_size": BATCH // processes, "learning_rate": 1e-3}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    settings |= options.get("args", {}) | ({"ddp_backend": "gloo"} if processes > 1 else {})
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:  # of an earlier run
        del os.environ[name]
    if processes > 1:
        settings |= WAYS[way](sharding, options)
    plain = out.with_name(f"{out.name}-plain")
    if options.get("loaded"):
        model.save_pretrained(plain)  # by process 0
    args = TrainingArguments(str(out), **settings)
    if options.get("loaded"):  # after the arguments, so that under ZeRO-3 no process ever has it whole
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        torch.distributed.barrier()
        model = AutoModelForCausalLM.from_pretrained(plain)
        assert not any(parameter.numel() for parameter in model.parameters())
    if processes > 1 and way in ("fsdp1", "fsdp2", "launched"):
        # Accelerate leaves FSDP out where several processes have CPUs, which torch's FSDP runs on.
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    callback, badness = CompreSSMCallback(config), iter(range(100))
    evaluated = {"eval_dataset": dataset(6), "compute_metrics": lambda _: {"badness": next(badness)}}
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset(),
        callbacks=[] if variant == "none" else [callback],
        **(evaluated if "metric_for_best_model" in settings else {}),
    )
    return trainer, callback


def digest(model: Any, state: Any = None) -> str:
    """Of all parameters, whole, and of what an optimizer's state knows of them."""
    sha = hashlib.sha256()
    for parameter in model.parameters():
        for tensor in [held(parameter), *(state or {}).get(parameter, {}).values()]:
            sha.update(torch.as_tensor(whole(tensor)).detach().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


class Last(TrainerCallback):
    """What a run ends with, before the best model is loaded."""

    trainer: Any = None
    state: Any = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.state = state_of(self.trainer)


def local(part: Any) -> torch.Tensor:
    return part.local if isinstance(part, Part) else part.to_local() if is_sharded(part) else part


def run(out: Path, variant: str, processes: int, way: str = "fsdp2", checkpoint: str | None = None) -> dict[str, Any]:
    trainer = make(out, variant, processes, way)[0]
    last = Last()
    last.trainer = trainer
    trainer.add_callback(last)
    trainer.train(resume_from_checkpoint=checkpoint)
    # Another than at first, if its state was restored.
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, CompreSSMCallback)]
    callback = callbacks[0] if callbacks else CompreSSMCallback()
    backend, model = find_backend(trainer), inside(trainer.model)
    backend.settle_()
    states = backend.states_of(trainer.optimizer)
    trained = {id(p) for group in states.param_groups for p in group["params"]}
    parts = [held(p) for p in model.parameters()]
    result = {
        "losses": losses(trainer),
        "last": last.state,
        "sizes": sizes(model),
        "hash": digest(model, states.state),
        "weights": digest(model),
        "spectra": [attempt.hankel_singular_values for attempt in callback.history],
        "kept": callback.kept,
        "trained": all(id(parameter) in trained for parameter in model.parameters()),
        "whole": parameter_count(model),
        "here": sum(local(part).numel() for part in parts),
    }
    if variant in ("full", "gathered"):
        trainer.save_model(str(out / "saved"))
    return result


# What goes wrong on purpose.
def message(part: Any) -> str:
    try:
        part()
    except ValueError as error:
        return str(error)
    return ""


def state_of(trainer: Trainer) -> list[Any]:
    model = inside(trainer.model)
    return [digest(model, find_backend(trainer).states_of(trainer.optimizer).state), *sizes(model)]


def failing(out: Path, processes: int, way: str) -> dict[str, Any]:
    """A cut that fails once all parameters have their new shapes, and one after which the evaluation for rollback does."""
    return {place: fail_in(place, out / place, processes, way) for place in ("cut", "evaluation")}


def fail_in(place: str, out: Path, processes: int, way: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    class Before(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen["before"] = state_of(seen["trainer"])

    def fail(*args):
        seen["during"] = sizes(inside(seen["trainer"].model))
        if seen["during"] == seen["before"][1:]:  # the evaluation before the cut
            return {"badness": 0.0}
        raise ValueError("on purpose")

    target = {"ratio": 0.5} | ({"rollback": 0.0} if place == "evaluation" else {})
    with patch.dict(VARIANTS, {"plain": {"target": target, "args": EVALUATES}}):
        seen["trainer"] = trainer = make(out, "plain", processes, way)[0]
    trainer.callback_handler.callbacks.insert(0, Before())
    trainer.compute_metrics = fail
    with patch.object(apply, "write_sizes_", fail if place == "cut" else apply.write_sizes_):
        seen["message"] = message(trainer.train)
    trainer.compute_metrics = None
    seen["after"] = state_of(trainer)
    layer = find_layers(inside(trainer.model))[0]
    if way != "zero2":
        seen["alone"] = message(lambda: set_data_(layer.mixer.A_log, torch.zeros(48, 2)))
    seen["evaluated"] = trainer.evaluate(dataset(6))["eval_loss"]
    del seen["trainer"]
    return seen


def assert_undone(failing: dict[str, Any], other: dict[str, Any]) -> None:
    """What `failing` tells of two processes."""
    for place, found in failing.items():
        assert found["during"] != found["before"][1:]
        assert found["before"] == found["after"] == other[place]["after"]
        assert found["message"] == "on purpose"
        assert found["evaluated"] > 0  # the model still runs


def refused(out: Path, processes: int, way: str) -> dict[str, Any]:
    """What FSDP2 itself can't train, or this can't cut."""

    def backend(mesh: Any = None) -> FSDP2:
        return FSDP2(SimpleNamespace(model_wrapped=fully_shard(tiny_mamba(), mesh=mesh)))

    with patch.dict(VARIANTS, {"dtypes": {"model": "mixed"}}):
        dtypes = message(make(out, "dtypes", processes)[0].train)
    mesh = init_device_mesh("cpu", (1, processes), mesh_dim_names=("replicate", "shard"))
    with patch.object(fsdp2_room, "FSDP2_ARGUMENTS", []):
        version = message(backend().refuse)
    offloading = backend()
    with patch.object(fsdp2_parameters(offloading.model)[0][0], "offload_to_cpu", True):
        offloaded = message(offloading.refuse)
    good = message(backend().refuse)
    unit = FullyShardedDataParallel(tiny_mamba(), device_id=torch.device("cpu"), use_orig_params=True)
    found = {}
    for name, attribute, value in (
        ("flat", "_use_orig_params", False),
        ("hybrid", "sharding_strategy", ShardingStrategy.HYBRID_SHARD),
    ):
        with patch.object(unit, attribute, value):
            found[name] = message(lambda: FSDP1(SimpleNamespace(model_wrapped=unit)).refuse())
    return found | {
        "dtypes": dtypes,
        "mesh": message(backend(mesh).refuse),
        "version": version,
        "offload": offloaded,
        "good": good,
    }


def refused_zero(out: Path, processes: int, way: str) -> dict[str, Any]:
    """What the callback can't make anew under DeepSpeed."""
    found = {}
    offload = {"offload_optimizer": {"device": "cpu"}}
    for name, way, options in (("stage", "zero0", {}), ("offload", "zero2", {"zero": offload})):
        with patch.dict(VARIANTS, {name: options}):
            found[name] = message(make(out, name, processes, way)[0].train)
    with patch.dict(VARIANTS, {"adagrad": {"args": {"optim": "adagrad"}}}):
        found["optimizer"] = message(make(out, "adagrad", processes, "zero2")[0].train)
    with patch.dict(VARIANTS, {"plain": {}}), patch.dict(CHECKED, {"deepspeed": ("0.1.",)}):
        trainer = make(out, "plain", processes, "zero2")[0]
        found["version"] = message(trainer.train)
    found["anew"] = message(make(out, "lti", processes, "zero2")[0].train)
    found["loop"] = message(lambda: compress_(trainer.model, CompreSSMConfig(ratio=0.5), dataset(4)))
    return found


CHECKS = {"failing": failing, "refused": refused, "refused_zero": refused_zero}


def without_ops() -> None:
    """DeepSpeed compiles nothing, which takes minutes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed import ops

    ops.__compatible_ops__.update(dict.fromkeys(ops.__compatible_ops__, False))


def without_offload() -> None:
    """FSDP1's whole state dictionaries are not moved to the CPU, where they are: torch frees them under way, and crashes."""
    for kind in (FullStateDictConfig, FullOptimStateDictConfig):

        def init(self: Any, *args: Any, init: Any = kind.__init__, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            self.offload_to_cpu = False

        kind.__init__ = init


def run_all(folder: Path, runs: list[str], processes: int) -> None:
    """In each process of a group; a file of results for each run."""
    torch.set_num_threads(1)
    if any("zero" in entry for entry in runs):
        without_ops()
    if any("fsdp1" in entry for entry in runs):
        without_offload()
    for entry in runs:
        name, _, origin = entry.partition("@")
        name, _, way = name.partition(":")
        label = f"{name}{'-resumed' * bool(origin)}-{way}-{processes}"
        if name in CHECKS:
            result = CHECKS[name](folder / label, processes, way)
        else:
            result = run(folder / label, name, processes, way, str(folder / origin) if origin else None)
        (folder / f"{label}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result))
