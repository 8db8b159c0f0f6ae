"""Runs of the callback in each of several processes, for test_distributed.py."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import TrainerCallback

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.backends.ddp import find_ddp
from hf_compressm.hankel import moments
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.training.conftest import dataset, losses, make_trainer, sizes

VARIANTS = {
    "plain": {},
    "none": {},
    "mamba2": {},
    # A mixer has new parameters at the first cut, and these have other sizes at the second. They are right up to rotations,
    # after which plain descent goes the same way.
    "by head": {"optim": "sgd", "learning_rate": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "resume": {"save_strategy": "steps", "save_steps": 2},
    "large": {},  # 8 states count as too many to fit all: 5 candidates are chosen
    "comm_hook": {"ddp_find_unused_parameters": False, "activation_checkpointing": True},
    "static_graph": {"ddp_static_graph": True},
    "rollback": {"metric_for_best_model": "badness", "greater_is_better": False},
}


class CountingHook(TrainerCallback):
    """Reduces gradients as DDP itself does, in a communication hook of the user's."""

    calls = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        find_ddp(self.trainer.model_wrapped).register_comm_hook(None, self.reduce)

    def reduce(self, state, bucket):
        self.calls += 1
        return allreduce_hook(None, bucket)


def digest(model: Any, optimizer: Any) -> str:
    """Of the parameters and the optimizer's state."""
    found = hashlib.sha256()
    for tensor in [*model.parameters(), *(e for p in model.parameters() for e in optimizer.state[p].values())]:
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def run(out: Path, variant: str, processes: int, rank: int, checkpoint: str | None = None) -> dict:
    model = tiny_mamba2() if variant in ("mamba2", "by head") else tiny_mamba()
    target = {"state_size": 8} if variant in ("mamba2", "by head") else {"ratio": 0.5}
    target |= {"realization": "project_heads"} if variant == "by head" else {}
    config = CompreSSMConfig(start=0, end=4, num_reductions=2, calibration_batches=2, **target)
    settings = {"max_steps": 7, "per_device_train_batch_size": 4 // processes}
    settings |= {"ddp_backend": "gloo"} if processes > 1 else {}
    if variant == "rollback":  # a metric that any change makes worse
        calls = iter(range(100))
        config = replace(config, rollback=0.0)
        settings |= {"eval_dataset": dataset(4), "compute_metrics": lambda _: {"badness": next(calls)}}
    callback = CompreSSMCallback(config)
    callbacks = [] if variant == "none" else [callback]
    trainer = make_trainer(out, model, callbacks=callbacks, **settings, **VARIANTS[variant])
    hook = CountingHook()
    if variant == "comm_hook":
        hook.trainer = trainer
        trainer.add_callback(hook)
    with patch.object(moments, "MAX_READOUT", 40 if variant == "large" else moments.MAX_READOUT):
        trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "rank": rank,
        "losses": losses(trainer),
        "sizes": sizes(model),
        "hash": digest(model, trainer.optimizer),
        "hook_calls": hook.calls,
        "spectra": [attempt.hankel_singular_values for attempt in callback.history],
    }


def run_all(folder: Path, variants: list[str], world: int) -> None:
    rank = int(os.environ["RANK"])
    for name in variants:
        result = run(folder / name, name, world, rank)
        (folder / f"{name}-{world}-{rank}.json").write_text(json.dumps(result))
        if name == "resume":
            result = run(folder / "again", name, world, rank, str(folder / name / "checkpoint-2"))
            (folder / f"resumed-{world}-{rank}.json").write_text(json.dumps(result))
