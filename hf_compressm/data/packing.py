"""Samples that were packed in one row, each in a row of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def unpacked(
    hidden_states: Tensor, mask: Tensor | None, gradient: Tensor | None, seq_idx: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The samples of packed rows, padded on the left: their hidden states, mask and gradient.

    Args:
        hidden_states, gradient: [batch, length, ...], or None.
        mask: [batch, length], or None.
        seq_idx: which sample each token belongs to, [batch, length]; those of one sample stand together.
    """
    lengths = [torch.unique_consecutive(numbers, return_counts=True)[1].tolist() for numbers in seq_idx]
    longest = max(map(max, lengths))

    def rows(packed: Tensor) -> Tensor:
        samples = [sample for row, counts in zip(packed, lengths, strict=True) for sample in row.split(counts)]
        out = packed.new_zeros(len(samples), longest, *packed.shape[2:])
        for row, sample in zip(out, samples, strict=True):
            row[longest - len(sample) :] = sample
        return out

    mask = torch.ones_like(seq_idx) if mask is None else mask
    return rows(hidden_states), rows(mask), None if gradient is None else rows(gradient)
