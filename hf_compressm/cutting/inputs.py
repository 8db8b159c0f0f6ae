"""What the mixers read of the calibration data, kept for fits within a stated share of the memory."""

from __future__ import annotations

from torch import Tensor
from transformers.utils import logging

from ..hankel import budgets
from ..layers import MixerInputs

logger = logging.get_logger(__name__)


class Inputs(dict[int, MixerInputs]):
    """By layer index: on the device as long as they are few, then on the CPU, in the precision that they were read in.

    Of very many, the first are kept (`budgets.INPUTS_ON_CPU`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.full = False

    def keep(self, index: int, read: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        """Add what a mixer read."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in read if tensor is not None)
        if index in self and self.bytes + size > budgets.INPUTS + budgets.INPUTS_ON_CPU:
            if not self.full:
                tokens = sum(hidden_states[..., 0].numel() for hidden_states, _, _ in self[index])
                logger.info(f"hf_compressm: layers are fitted on the first {tokens} tokens, for want of memory.")
            self.full = True
            return
        self.bytes += size
        if self.bytes > budgets.INPUTS:
            hidden_states, mask, gradient = read
            read = (hidden_states.cpu(), mask, None if gradient is None else gradient.cpu())
        self.setdefault(index, []).append(read)
