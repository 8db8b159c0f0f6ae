"""Run a model again from a block on: what those before it give is as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..hankel import budgets
from ..layers import Layer
from .observing import hooks
from .passes import blocks_of, replaced_forwards


class Outputs:
    """What a model's blocks give on some batches, to begin further passes with; on the CPU if it is much.

    Args:
        model, layers: the model, and those of its layers that later passes begin at.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._blocks, inside = blocks_of(model, layers)
        self._first = {
            layer.index: position
            for layer in layers
            for position, block in enumerate(self._blocks)
            if layer.index in inside and any(module is layer.mixer for module in block.modules())
        }
        self._kept: dict[tuple[int, int], Any] = {}
        self._bytes = 0

    @contextmanager
    def kept(self, batch: int) -> Iterator[None]:
        """Keep what the blocks give in the forward pass in here, as that of a batch of this number."""

        def hook_of(position: int) -> Any:
            def hook(block: Any, args: tuple[Any, ...], output: Any) -> None:
                self._kept[batch, position] = self._put(output)

            return hook

        with hooks(block.register_forward_hook(hook_of(i)) for i, block in enumerate(self._blocks)):
            yield

    @contextmanager
    def resumed(self, batch: int, layer: Layer) -> Iterator[None]:
        """Begin the forward pass in here, on a batch of `kept`, at the block of a layer: nothing before it has changed."""
        first = self._first.get(layer.index, 0)
        before = self._kept.get((batch, first - 1)) if first else None
        if before is None:
            yield
            return
        device, output = before
        given = _to(output, device)
        with replaced_forwards(self._blocks[:first], lambda forward: lambda *args, **kwargs: given):
            yield

    def _put(self, output: Any) -> tuple[torch.device, Any] | None:
        """With the device that it belongs on; None for what is no tensor and no tuple of them."""
        parts = output if isinstance(output, tuple) else (output,)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not tensors or not all(part is None or isinstance(part, Tensor) for part in parts):
            return None
        self._bytes += sum(tensor.nbytes for tensor in tensors)
        device = tensors[0].device
        return device, output if self._bytes <= budgets.OUTPUTS else _to(output, torch.device("cpu"))


def _to(output: Any, device: torch.device) -> Any:
    if isinstance(output, tuple):
        return tuple(None if part is None else part.to(device) for part in output)
    return output.to(device)
