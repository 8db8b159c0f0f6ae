"""Which backend a trainer trains with."""

from __future__ import annotations

from typing import Any

from .backend import Backend
from .ddp import DDP
from .deepspeed import DeepSpeed
from .fsdp1 import FSDP1
from .fsdp2 import FSDP2
from .one_process import OneProcess
from .refused import DataParallel, ShardedOtherwise

_BACKENDS: list[type[Backend]] = [ShardedOtherwise, DataParallel, DeepSpeed, FSDP2, FSDP1, DDP, OneProcess]


def register(backend: type[Backend]) -> type[Backend]:
    """Add a backend. It is asked first.

    Returns:
        the class, so that this serves as a decorator.
    """
    _BACKENDS.insert(0, backend)
    return backend


def find_backend(trainer: Any) -> Backend:
    """The first backend that takes a trainer."""
    return next(backend for backend in _BACKENDS if backend.takes(trainer))(trainer)
