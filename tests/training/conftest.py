"""A small real Trainer run, on one thread: the models are so tiny that more of them only wait for each other."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.layers import find_layers
from tests.conftest import VOCABULARY


def dataset(size: int = 48, length: int = 12, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCABULARY, (size, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(folder: Any, model: Any, config: CompreSSMConfig | None = None, **kwargs: Any) -> Trainer:
    arguments = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    for_trainer = ("eval_dataset", "compute_metrics", "optimizers", "model_init")
    own = {key: kwargs.pop(key) for key in for_trainer if key in kwargs}
    callbacks = kwargs.pop("callbacks", [CompreSSMCallback(config)] if config is not None else [])
    args = TrainingArguments(str(folder), **(arguments | kwargs))
    return Trainer(model=model, args=args, train_dataset=dataset(), callbacks=callbacks, **own)


def losses(trainer: Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def sizes(model: Any) -> list[int]:
    return [layer.state_size for layer in find_layers(model)]


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Between the losses of two runs, at most."""
    return max(abs(one["losses"][step] - other["losses"][step]) for step in one["losses"])
