"""The systems that a layer is on what its mixer read, for fits that go through them again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .contracts import MixerInputs

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
        for read in self._joined():
            with torch.no_grad():
                found = self.layer.read(*(None if x is None else x.to(self.layer.device) for x in read))
            yield found if self._head is None else found[self._head]

    def _joined(self) -> Iterator[tuple[Tensor | None, ...]]:
        """Neighbours of one length together: many small scans would take longer."""
        some: MixerInputs = []
        for read in [*self.inputs, None]:
            rows = sum(len(hidden_states) for hidden_states, _, _ in some)
            if some and (read is None or not self._fits(some[0], rows, read)):
                yield tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*some, strict=True))
                some = []
            if read is not None:
                some.append(read)

    def _fits(self, first: tuple[Any, ...], rows: int, read: tuple[Any, ...]) -> bool:
        alike = all(
            (a is None) == (b is None) and (a is None or (a.shape[1:] == b.shape[1:] and a.device == b.device))
            for a, b in zip(first, read, strict=True)
        )
        return alike and (rows + len(read[0])) * read[0].shape[1] * self.layer.channels <= TOGETHER
