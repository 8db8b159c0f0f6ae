"""Processes that differ, fail or are killed, for test_distributed.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.backends import agreement
from hf_compressm.backends import backend as backend_module
from hf_compressm.training import callback as callback_module
from tests.conftest import tiny_mamba
from tests.training.conftest import make_trainer, sizes
from tests.training.ddp_run import digest

CONFIG = CompreSSMConfig(start=0, end=4, num_reductions=2, calibration_batches=2, ratio=0.5)
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "ddp_backend": "gloo"}


def begin(folder: Path) -> None:
    """Process 1 has another schedule; fails when training begins; has no callback, after which its end is all that is left."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}

    def attempt(name: str, callbacks: list[Any]) -> None:
        model = tiny_mamba()
        trainer = make_trainer(folder, model, callbacks=callbacks, max_steps=6, ddp_backend="gloo")
        try:
            trainer.train()
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        found[f"{name} sizes"] = sizes(model)
        (folder / f"begin-{rank}.json").write_text(json.dumps(found))

    attempt("differs", [CompreSSMCallback(CONFIG if rank == 0 else CompreSSMConfig(**CONFIG.to_dict() | {"end": 3}))])
    with patch.object(
        callback_module, "find_trainable_layers", _fail if rank == 1 else callback_module.find_trainable_layers
    ):
        attempt("fails", [CompreSSMCallback(CONFIG)])
    attempt("absent", [CompreSSMCallback(CONFIG)] if rank == 0 else [])
    os._exit(0)


def _fail(model: Any) -> None:
    raise ValueError("nothing to train here")


def whole_and_killed(folder: Path) -> None:
    """A run to its end; and the same once more, in whose second cut process 1 dies."""
    model = tiny_mamba()
    trainer = make_trainer(folder / "whole", model, CONFIG, **SAVING)
    trainer.train()
    rank = dist.get_rank()
    (folder / f"whole-{rank}.json").write_text(
        json.dumps({"hash": digest(model, trainer.optimizer), "sizes": sizes(model)})
    )
    model, plain, cuts = tiny_mamba(), backend_module.set_data_, []

    def die(parameter: Any, data: Any) -> None:
        cuts.append(1)
        if rank == 1 and sizes(model) != [8, 8] and not trainer.state.global_step < 4:
            os._exit(9)
        plain(parameter, data)

    trainer = make_trainer(folder / "killed", model, CONFIG, **SAVING)
    with patch.object(backend_module, "set_data_", die), patch.object(agreement, "SILENCE", 3.0):
        try:
            trainer.train()
        except RuntimeError as error:
            result = {"message": str(error), "sizes": sizes(model)}
            (folder / f"killed-{rank}.json").write_text(json.dumps(result))
            os._exit(1)


def resume(folder: Path, checkpoint: str) -> None:
    """Go on where the killed run was last saved; first, where the writing of a checkpoint was cut short."""
    model = tiny_mamba()
    trainer = make_trainer(folder / "killed", model, CONFIG, **SAVING)
    result: dict[str, Any] = {}
    try:
        trainer.train(resume_from_checkpoint=True)
    except Exception as error:
        result["short"] = f"{type(error).__name__}: {error}"
    model = tiny_mamba()
    trainer = make_trainer(folder / "killed", model, CONFIG, **SAVING)
    trainer.train(resume_from_checkpoint=checkpoint)
    result |= {"hash": digest(model, trainer.optimizer), "sizes": sizes(model)}
    (folder / f"resumed-{dist.get_rank()}.json").write_text(json.dumps(result))
