"""What the mixers read of the calibration data, kept for fits within a stated share of the memory."""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor
from transformers.utils import logging

from ..backends import Backend
from ..hankel import budgets
from ..layers import MixerInputs
from ..layers.contracts import MixerInput

logger = logging.get_logger(__name__)


class Inputs(dict[int, MixerInputs]):
    """By layer index: on the device as long as they are few, then on the CPU, in the precision that they were read in.

    Of very many, the first are kept (`budgets.INPUTS_ON_CPU`).

    Args:
        share: of how many processes, which are put together, this is one.
    """

    def __init__(self, share: int = 1) -> None:
        super().__init__()
        self.share = share
        self.bytes = 0
        self.full = False

    def keep(self, index: int, read: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        """Add what a mixer read."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in read if tensor is not None)
        if index in self and self.share * (self.bytes + size) > budgets.INPUTS + budgets.INPUTS_ON_CPU:
            if not self.full:
                tokens = sum(hidden_states[..., 0].numel() for hidden_states, _, _ in self[index])
                logger.info(f"hf_compressm: layers are fitted on the first {tokens} tokens, for want of memory.")
            self.full = True
            return
        self.bytes += size
        if self.share * self.bytes > budgets.INPUTS:
            hidden_states, mask, gradient = read
            read = (hidden_states.cpu(), mask, None if gradient is None else gradient.cpu())
        self.setdefault(index, []).append(read)

    def bring_(self, backend: Backend) -> None:
        """Bring those of all processes to process 0, which fits, in the order of the batches; the others have none then. In place."""
        for index in sorted(self):
            device = self[index][0][0].device
            parts = backend.bring([_to(read, torch.device("cpu")) for read in self[index]])
            reads = [read for batch in zip_longest(*parts) for read in batch if read is not None]
            self[index] = [_to(read, device) for read in reads]


def _to(read: MixerInput, device: torch.device) -> MixerInput:
    hidden_states, mask, gradient = (None if tensor is None else tensor.to(device) for tensor in read)
    assert hidden_states is not None
    return hidden_states, mask, gradient
