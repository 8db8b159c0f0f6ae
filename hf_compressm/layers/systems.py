"""The systems that a layer is on what its mixer read, for fits that go through them again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .contracts import MixerInput, MixerInputs

TOGETHER = 2**23
"""Numbers in a tensor [batch, length, channels] of a system."""


class Systems(Iterable[Any]):
    """A layer's systems, read anew each time that they are gone through, some sequences at a time.

    Args:
        layer: with its weights at hand while this is in use.
        inputs: what its mixer read, on any device.
    """

    def __init__(self, layer: Any, inputs: MixerInputs, head: int | None = None) -> None:
        self.layer, self.inputs, self._head = layer, inputs, head

    def head(self, number: int) -> Systems:
        """Those of one head, of a family that reads one for each."""
        return Systems(self.layer, self.inputs, number)

    def __iter__(self) -> Iterator[Any]:
        """Each of them, on the layer's device."""
        for read in joined(self.inputs, TOGETHER // self.layer.channels, self.layer.device):
            with torch.no_grad():
                found = self.layer.read(*read)
            yield found if self._head is None else found[self._head]


def joined(inputs: Iterable[MixerInput], tokens: int, device: torch.device) -> Iterator[MixerInput]:
    """Neighbours of one length as one input, since many small scans would take longer.

    Args:
        inputs: on any device; of many, the later ones are kept on the CPU.
        tokens: that are joined at most.
        device: where they are put.
    """
    some: MixerInputs = []
    for read in inputs:
        rows = len(read[0]) + sum(len(hidden_states) for hidden_states, _, _ in some)
        if some and (_shapes(some[0]) != _shapes(read) or rows * read[0].shape[1] > tokens):
            yield _as_one(some, device)
            some = []
        some.append(read)
    if some:
        yield _as_one(some, device)


def _shapes(read: MixerInput) -> list[torch.Size | None]:
    return [None if x is None else x.shape[1:] for x in read]


def _as_one(some: MixerInputs, device: torch.device) -> MixerInput:
    hidden_states, *others = zip(*some, strict=True)
    mask, gradient = (None if parts[0] is None else torch.cat([x.to(device) for x in parts]) for parts in others)
    return torch.cat([x.to(device) for x in hidden_states]), mask, gradient
