"""A `Trainer` from inside: its folders, what it loads, and who calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

PUSH_FROM_CHECKPOINT = "_push_from_checkpoint"


def checkpoint_parent(trainer: Any) -> str:
    """The folder in which a `Trainer` makes its checkpoint folders."""
    return str(trainer._get_output_dir(trial=None))


def before_loading_(trainer: Any, prepare_: Callable[[str], bool]) -> None:
    """Have a `Trainer` call `prepare_` with the folder of a checkpoint before it loads weights from it. In place.

    It returns whether it has loaded them itself, so that the `Trainer` does not.
    """
    load, load_best = trainer._load_from_checkpoint, trainer._load_best_model
    prepare = trainer._prepare_for_training

    def prepare_for_training(steps: int, batches: Any, folder: str | None) -> Any:
        fsdp1 = trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1
        if folder is not None and (fsdp1 or trainer.is_deepspeed_enabled):
            prepare_(folder)
        return prepare(steps, batches, folder)

    def load_from_checkpoint(folder: str, *args: Any, **kwargs: Any) -> None:
        if not prepare_(folder):
            load(folder, *args, **kwargs)

    def load_best_model() -> None:
        if not prepare_(trainer.state.best_model_checkpoint):
            load_best()

    trainer._load_from_checkpoint, trainer._load_best_model = load_from_checkpoint, load_best_model
    trainer._prepare_for_training = prepare_for_training


def calling_trainer() -> tuple[Any, dict[str, Any]]:
    """The `Trainer` that sends the event whose handler asks, and the local variables of its method that does.

    Events get neither the trainer nor the checkpoint that a run was resumed from. None and nothing where no trainer
    is among the callers.
    """
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner, frame.f_locals
        frame = frame.f_back
    return None, {}
