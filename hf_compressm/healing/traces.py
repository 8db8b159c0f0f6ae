"""What a `Trainer` changes beside the weights, put back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ..backends import processes
from ..compat.offloading import device_of
from ..compat.processes import accelerate_state
from ..cutting.snapshot import Contents
from ..interrupts import restoring, same_random_numbers

# By which launchers tell a Trainer of processes, precision and sharding. What of it counts here, the model and its process tell.
LAUNCHERS = ("ACCELERATE_", "FSDP_", "LOCAL_RANK")


@contextmanager
def without_trace(model: Any) -> Iterator[None]:
    """Whatever a Trainer does to a model in here, but for its weights, and to the process, is undone.

    That is modes, hooks, wrapped methods and flags of the model's modules, its configs, gradients and `requires_grad`;
    random numbers of Python, numpy and torch; the current GPU; Accelerate's global state; and environment variables.
    """
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    configs |= {id(m.generation_config): m.generation_config for m in modules if hasattr(m, "generation_config")}
    owners = [owner for owner in [*modules, *configs.values()] if hasattr(owner, "__dict__")]
    contents = [Contents(vars(owner)) for owner in owners]
    contents += [
        Contents(value) for module in modules for value in vars(module).values() if isinstance(value, dict | set)
    ]
    contents += [Contents(state) for state in [*accelerate_state(), os.environ]]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def restore() -> None:
        for one in contents:
            one.restore_()
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        if gpu is not None:
            torch.cuda.set_device(gpu)

    with restoring(restore), same_random_numbers():
        here = _place(model)
        for name in list(os.environ):
            if name.startswith(LAUNCHERS):
                del os.environ[name]
        os.environ.update(here)
        yield


def _place(model: Any) -> dict[str, str]:
    """What tells a Trainer that this process is one of several, and which; nothing where it is alone."""
    if processes() == 1:
        return {}
    rank, device = dist.get_rank(), device_of(model)
    local = device.index if device.type == "cuda" else os.environ.get("LOCAL_RANK", rank)
    return {name: str(value) for name, value in (("RANK", rank), ("WORLD_SIZE", processes()), ("LOCAL_RANK", local))}
