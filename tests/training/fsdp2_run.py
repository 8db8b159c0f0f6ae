"""Runs of the callback under FSDP2, for test_fsdp2.py.

A run is one of `VARIANTS`; or `NAME@CHECKPOINT`, resumed from there; or `NAME:ddp`; or one of `CHECKS`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compat
from hf_compressm.backends.fsdp2 import FSDP2
from hf_compressm.compat import whole
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

# For each run the model, its target, and what differs in the Trainer's arguments and in FSDP's.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"args": SAVES},
    "sharded": {"model": "mamba2", "args": SAVES, "fsdp": SHARDED},
    "options": {
        "args": {"gradient_accumulation_steps": 2, "optim": "sgd", "optim_args": "momentum=0.9"},
        "fsdp": {"activation_checkpointing": True, "reshard_after_forward": False},
    },
    "fitted": {"model": "mamba2", "target": {"ratio": 0.75, "multiple_of": 8, "weights": "fisher", "refit": 1}},
    "rollback": {"target": {"ratio": 0.5, "rollback": 0.0}, "args": EVALUATES},
    "mixed": {"model": "mixed", "args": {"bf16": True}},
    "lti": {"model": "lti", "target": {"state_size": 6}, "args": {"save_strategy": "steps", "save_steps": 3}},
}


def make(out: Path, variant: str, processes: int, ddp: bool = False) -> tuple[Trainer, CompreSSMCallback]:
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
    if processes > 1 and not ddp:
        settings |= {"fsdp": True, "fsdp_config": sharding | options.get("fsdp", {})}
    args = TrainingArguments(str(out), **settings)
    if processes > 1:
        # Accelerate leaves FSDP out where several processes have CPUs, which torch's FSDP2 runs on.
        kind = DistributedType.MULTI_CPU if ddp else DistributedType.MULTI_GPU
        PartialState._shared_state["distributed_type"] = kind
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
        for tensor in [parameter, *(state or {}).get(parameter, {}).values()]:
            sha.update(whole(tensor).detach().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def run(out: Path, variant: str, processes: int, checkpoint: str | None = None, ddp: bool = False) -> dict[str, Any]:
    trainer, callback = make(out, variant, processes, ddp)
    trainer.train(resume_from_checkpoint=checkpoint)
    model = trainer.model
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    result = {
        "losses": losses(trainer),
        "sizes": sizes(model),
        "hash": digest(model, trainer.optimizer.state),
        "weights": digest(model),
        "spectra": [attempt.hankel_singular_values for attempt in callback.history],
        "kept": callback.kept,
        "trained": all(id(parameter) in held for parameter in model.parameters()),
        "whole": sum(p.numel() for p in model.parameters()),
        "here": sum((p.to_local() if compat.is_sharded(p) else p).numel() for p in model.parameters()),
    }
    if variant == "full":
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
    return [digest(trainer.model, trainer.optimizer.state), *sizes(trainer.model)]


def failing(out: Path, processes: int) -> dict[str, Any]:
    """A cut that fails once all parameters have their new shapes."""
    seen: dict[str, Any] = {}

    class Before(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen["before"] = state_of(seen["trainer"])

    def fail(*args):
        seen["during"] = sizes(seen["trainer"].model)
        raise ValueError("on purpose")

    with patch.dict(VARIANTS, {"plain": {}}):
        seen["trainer"] = trainer = make(out, "plain", processes)[0]
    trainer.callback_handler.callbacks.insert(0, Before())
    with patch.object(apply, "write_sizes_", fail):
        seen["message"] = message(trainer.train)
    seen["after"] = state_of(trainer)
    layer = find_layers(trainer.model)[0]
    seen["alone"] = message(lambda: set_data_(layer.mixer.A_log, torch.zeros(48, 2)))
    seen["evaluated"] = trainer.evaluate(dataset(6))["eval_loss"]
    del seen["trainer"]
    return seen


def refused(out: Path, processes: int) -> dict[str, Any]:
    """What FSDP2 itself can't train, or this can't cut."""

    def backend(mesh: Any = None) -> FSDP2:
        return FSDP2(SimpleNamespace(model_wrapped=fully_shard(tiny_mamba(), mesh=mesh)))

    with patch.dict(VARIANTS, {"dtypes": {"model": "mixed"}}):
        dtypes = message(make(out, "dtypes", processes)[0].train)
    mesh = init_device_mesh("cpu", (1, processes), mesh_dim_names=("replicate", "shard"))
    with patch.object(compat, "FSDP2_ARGUMENTS", []):
        version = message(backend().refuse)
    offloading = backend()
    with patch.object(compat.fsdp2_parameters(offloading.model)[0][0], "offload_to_cpu", True):
        offloaded = message(offloading.refuse)
    good = message(backend().refuse)
    return {
        "dtypes": dtypes,
        "mesh": message(backend(mesh).refuse),
        "version": version,
        "offload": offloaded,
        "good": good,
    }


CHECKS = {"failing": failing, "refused": refused}


def run_all(folder: Path, runs: list[str], processes: int) -> None:
    """In each process of a group; a file of results for each run."""
    torch.set_num_threads(1)
    for entry in runs:
        name, _, origin = entry.partition("@")
        name, _, ddp = name.partition(":")
        label = f"{name}{'-resumed' * bool(origin)}{'-ddp' * bool(ddp)}-{processes}"
        if name in CHECKS:
            result = CHECKS[name](folder / label, processes)
        else:
            result = run(folder / label, name, processes, str(folder / origin) if origin else None, bool(ddp))
        (folder / f"{label}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(result))
