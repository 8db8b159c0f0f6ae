"""Runs of the callback under FSDP2, for test_fsdp2.py: `torchrun fsdp2_run.py OUT PART PROCESSES`, a PART of `PARTS`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.compat import whole
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.training.conftest import dataset, losses, sizes

BATCH = 6  # of all processes together
SAVES = {"save_strategy": "steps", "save_steps": 2}
BEST = SAVES | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "badness"}

# For each run the model, the target, and what differs in the Trainer's arguments and in FSDP's.
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "plain": {},
    "mamba2": {"model": "mamba2"},
    "fisher": {"model": "mamba2", "target": {"ratio": 0.75, "multiple_of": 8, "weights": "fisher"}},
    "refit": {"target": {"ratio": 0.5, "refit": 1}},
    "accumulation": {"args": {"gradient_accumulation_steps": 2}},
    "bf16": {"args": {"bf16": True}},
    "checkpointing": {"fsdp": {"activation_checkpointing": True, "reshard_after_forward": False}},
    "sgd": {"args": {"optim": "sgd", "optim_args": "momentum=0.9"}},
    "full": {"args": SAVES},
    "sharded": {"args": SAVES, "fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "best_full": {"args": BEST | {"greater_is_better": False}},  # the first checkpoint, before the last cut
    "best_sharded": {"args": BEST | {"greater_is_better": False}, "fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "rollback": {"target": {"ratio": 0.5, "rollback": 0.0}, "args": {"metric_for_best_model": "badness", "greater_is_better": False}},
}


def make(out: Path, variant: str, processes: int) -> tuple[Trainer, CompreSSMCallback]:
    options = VARIANTS[variant]
    mamba2 = options.get("model") == "mamba2"
    model = tiny_mamba2() if mamba2 else tiny_mamba()
    target = options.get("target", {"state_size": 8} if mamba2 else {"ratio": 0.5})
    config = CompreSSMConfig(start=0, end=4, num_reductions=2, calibration_batches=2, **target)
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": [type(model.backbone.layers[0]).__name__]}
    settings = {"max_steps": 7, "per_device_train_batch_size": BATCH // processes, "learning_rate": 1e-3}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    settings |= options.get("args", {})
    if processes > 1:
        settings |= {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": sharding | options.get("fsdp", {})}
    args = TrainingArguments(str(out), **settings)
    if processes > 1:
        # Accelerate leaves FSDP out where several processes have CPUs, which torch's FSDP2 runs on.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    callback, badness = CompreSSMCallback(config), iter(range(100))
    evaluated = {"eval_dataset": dataset(4), "compute_metrics": lambda _: {"badness": next(badness)}}
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset(),
        callbacks=[] if variant == "none" else [callback],
        **(evaluated if "metric_for_best_model" in settings else {}),
    )
    return trainer, callback


def digest(trainer: Trainer, moments: bool = True) -> str:
    """Of all parameters, whole, and of what the optimizer knows of them."""
    sha, model = hashlib.sha256(), trainer.model
    state = trainer.optimizer.state
    for parameter in model.parameters():
        for tensor in [parameter, *(state.get(parameter, {}).values() if moments else [])]:
            sha.update(whole(tensor).detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def run(out: Path, variant: str, processes: int, rank: int, checkpoint: str | None = None) -> dict:
    trainer, callback = make(out, variant, processes)
    trainer.train(resume_from_checkpoint=checkpoint)
    result = {
        "rank": rank,
        "losses": losses(trainer),
        "sizes": sizes(trainer.model),
        "hash": digest(trainer),
        "weights": digest(trainer, moments=False),
        "spectra": [attempt.hankel_singular_values for attempt in callback.history],
        "kept": callback.kept,
    }
    if variant in ("full", "best_full"):
        trainer.save_model(str(out / "saved"))
    return result


if __name__ == "__main__":
    folder, variants, world = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
    torch.set_num_threads(1)
    process = int(os.environ.get("RANK", 0))
    for entry in variants:
        name, _, origin = entry.partition("@")
        checkpoint = str(folder / origin) if origin else None
        label = f"{name}-resumed" if origin else name
        result = run(folder / f"{label}-{world}", name, world, process, checkpoint)
        (folder / f"{label}-{world}-{process}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
