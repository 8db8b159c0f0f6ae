"""Everything private or unofficial of other libraries that this package touches, and nothing of its own.

`USED` names each, with the versions that it was checked on; a test looks whether all of them are still there. What takes
its place where it is missing is said at each function.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel

CHECKED = {"torch": ("2.11", "2.13"), "transformers": ("5.23", "5.24"), "accelerate": ("1.15",)}

USED = {
    "transformers.configuration_utils._commit_hash": "the revision that a config was loaded from",
    "transformers.modeling_utils.PreTrainedModel._upload_modified_files": "save_pretrained(push_to_hub=True) and "
    "push_to_hub write a card of their own after the model is saved, and only this comes after it",
    "transformers.trainer.Trainer._push_from_checkpoint": "copies weights and config to the folder that it uploads, and no "
    "other file; its event comes before the copies",
    "transformers.trainer.Trainer._get_output_dir": "where a checkpoint is being written, in a hyperparameter search, too",
    "torch.nn.parallel.distributed.DistributedDataParallel._comm_hooks": "to register them again with a new reducer",
    "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1PreTrainedModel._init_weights": "copies multipliers of one "
    "length to all layers (in modeling/modeling_compressm.py, which stands alone beside saved models)",
    "accelerate.state.PartialState._shared_state": "a Trainer resets Accelerate's global state, which Accelerators of others use",
    "accelerate.state.AcceleratorState._shared_state": "the same",
    "accelerate.state.GradientState._shared_state": "the same",
    "torch._dynamo.utils.counters": "whether anything was compiled that has to be compiled again",
}


UPLOAD = "_upload_modified_files"
PUSH_FROM_CHECKPOINT = "_push_from_checkpoint"


def commit_hash(config: Any) -> str | None:
    """The revision on the Hub that a config was loaded from, if known."""
    return getattr(config, "_commit_hash", None)


def checkpoint_parent(trainer: Any) -> str:
    """The folder in which a `Trainer` makes its checkpoint folders."""
    return trainer._get_output_dir(trial=None)


def comm_hooks(ddp: DistributedDataParallel) -> list[tuple[Callable, Any]]:
    """The communication hooks of a DDP wrapper, with their states."""
    return list(ddp._comm_hooks)


def accelerate_state() -> list[dict[str, Any]]:
    """The dictionaries that hold Accelerate's global state: what device and processes there are, precision, accumulation."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [owner._shared_state for owner in (PartialState, AcceleratorState, GradientState)]


def recompute_activations_(model: Any) -> None:
    """Have a model compute its activations again in the backward pass; it was called by another name before 5.24."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


def forget_compiled_code() -> None:
    """Have torch.compile trace anew; only if something was compiled, since the reset imports inductor, which is slow."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
        dynamo.reset()


def uncompiled(module: Any) -> Any:
    """The module inside of `torch.compile`'s wrapper, or itself."""
    return getattr(module, "_orig_mod", module)


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
