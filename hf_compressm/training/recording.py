"""The training batches that the next attempt measures: recorded as they pass, saved with checkpoints between attempts."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Beside the checkpoint's other files, one for each process.
BATCHES_NAME = "compressm_batches_{rank}.pt"

Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model's forward was called with."""


class BatchRecorder:
    """The last batches that a model was trained on.

    Args:
        count: how many of them are kept.
    """

    def __init__(self, count: int) -> None:
        self.batches: deque[Batch] = deque(maxlen=count)
        self._hook: Any = None

    def start(self, wrapped: nn.Module) -> None:
        """Record what passes through a model, as the training loop calls it."""
        self._hook = wrapped.register_forward_pre_hook(self._record, with_kwargs=True)

    def stop(self) -> None:
        """Record no more, and forget what was recorded."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.batches.clear()

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self.batches.append(
                (args, {name: value for name, value in kwargs.items() if name != "num_items_in_batch"})
            )

    def on(self, device: torch.device) -> list[Batch]:
        """The batches on a device."""
        return [to_device(batch, device) for batch in self.batches]

    def save(self, folder: str, rank: int) -> None:
        """Write the batches to a checkpoint that is there, if they are of what can be read back; else a warning says so."""
        if not self.batches or not os.path.isdir(folder):
            return
        path = os.path.join(folder, BATCHES_NAME.format(rank=rank))
        try:
            torch.save(_of_tensors(self.on(torch.device("cpu"))), f"{path}.partial")
            _read(f"{path}.partial")
        except (ValueError, TypeError, AttributeError, pickle.PicklingError):
            os.remove(f"{path}.partial")
            kinds: set[str] = set()
            _with_each(list(self.batches), lambda value: kinds.add(type(value).__name__))
            logger.warning_once(
                "hf_compressm: checkpoints are saved without the batches that the next cut is measured on, since not all that these "
                f"hold can be read back ({', '.join(sorted(kinds))}): after resuming, it may be measured on fewer."
            )
        else:
            os.replace(f"{path}.partial", path)  # whole, or not there

    def load(self, folder: str | None, rank: int, processes: int = 1) -> None:
        """Read the batches of a checkpoint; without them, a warning says what that means.

        Where there were more or fewer processes, the rows of their batches are dealt out anew.

        Raises:
            ValueError: if they can't be read.
        """
        count = 0
        while os.path.isfile(os.path.join(folder or "", BATCHES_NAME.format(rank=count))):
            count += 1
        if folder is None or not count:
            logger.warning(
                f"hf_compressm: {BATCHES_NAME.format(rank=rank)} is not in the checkpoint, so that the next cut may be measured "
                "on fewer batches than without the interruption."
            )
            return
        numbers = [rank] if count == processes else range(count)
        parts = [_read(os.path.join(folder, BATCHES_NAME.format(rank=number))) for number in numbers]
        if count == processes:
            self.batches.extend(parts[0])
        else:
            self.batches.extend(_dealt(batches, rank, processes) for batches in zip(*parts, strict=False))


def _read(path: str) -> list[Batch]:
    try:
        return [
            (tuple(args), dict(kwargs)) for args, kwargs in torch.load(path, map_location="cpu", weights_only=True)
        ]
    except (RuntimeError, OSError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}): delete it, and the next cut is measured on the batches from "
            "here on; or resume from another checkpoint."
        ) from error


def _dealt(batches: Sequence[Batch], rank: int, processes: int) -> Batch:
    """A process's rows of the batches of several, where all that is in them goes by row and is equally long.

    Else it is the whole batch of one of them: each process has one.
    """
    values = [kwargs for _, kwargs in batches]
    tensors = [value for kwargs in values for value in kwargs.values()]
    if all(isinstance(value, Tensor) and value.dim() > 0 for value in tensors) and not any(
        args for args, _ in batches
    ):
        widths = [{name: value.shape[1:] for name, value in each.items()} for each in values]
        rows = [{len(value) for value in each.values()} for each in values]
        if (
            all(each == widths[0] for each in widths)
            and all(len(each) == 1 for each in rows)
            and sum(map(sum, rows)) >= processes
        ):
            return (), {name: torch.cat([each[name] for each in values])[rank::processes] for name in values[0]}
    return batches[rank % len(batches)]


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors in lists, tuples and dictionaries, on a device."""
    return _with_each(batch, lambda value: value.to(device) if isinstance(value, Tensor) else value)


def _of_tensors(batch: Any) -> Any:
    """With what is numpy's as numbers and tensors, which a checkpoint may hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        return torch.tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" else value

    return _with_each(batch, plain)


def _with_each(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of lists, tuples and dictionaries, with each value in them changed."""
    if isinstance(batch, dict):
        return {name: _with_each(value, change) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_with_each(value, change) for value in batch)
    return change(batch)
