"""Samples that were packed in one row, each in a row of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def unpacked(hidden_states: Tensor, mask: Tensor | None, seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """The samples of packed rows, padded on the left, and their mask.

    Args:
        hidden_states: [batch, length, hidden].
        mask: [batch, length], or None.
        seq_idx: which sample each token belongs to, [batch, length]; those of one sample stand together.
    """
    mask = torch.ones_like(seq_idx) if mask is None else mask
    samples = []
    for row, valid, numbers in zip(hidden_states, mask, seq_idx, strict=True):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        samples += list(zip(row.split(lengths), valid.split(lengths), strict=True))
    length = max(len(sample) for sample, _ in samples)
    rows = hidden_states.new_zeros(len(samples), length, hidden_states.shape[-1])
    valid_rows = mask.new_zeros(len(samples), length)
    for number, (sample, valid) in enumerate(samples):
        rows[number, length - len(sample) :] = sample
        valid_rows[number, length - len(sample) :] = valid
    return rows, valid_rows
