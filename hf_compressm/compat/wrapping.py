"""What is around a model while it trains: compiled code, DDP, and the engines that hold it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel


def uncompiled(module: Any) -> Any:
    """The module inside of `torch.compile`'s wrapper, or itself."""
    return getattr(module, "_orig_mod", module)


def inside(wrapped: Any) -> Any:
    """The model inside of `torch.compile`'s wrapper, DeepSpeed's engine or FSDP1's, or itself."""
    module = uncompiled(wrapped)
    kinds = [("deepspeed", "DeepSpeedEngine"), ("torch.distributed.fsdp", "FullyShardedDataParallel")]
    # Of a library that is half imported, it may be missing.
    known = tuple(kind for home, name in kinds if (kind := getattr(sys.modules.get(home), name, None)) is not None)
    return uncompiled(module.module) if isinstance(module, known) else module


def forget_compiled_code() -> None:
    """Have torch.compile trace anew; only if something was compiled, since the reset imports inductor, which is slow."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
        dynamo.reset()


def comm_hooks(ddp: DistributedDataParallel) -> list[tuple[Callable[..., Any], Any]]:
    """The communication hooks of a DDP wrapper, with their states."""
    return list(ddp._comm_hooks)
