"""Samples that were packed in one row: where they begin, whether a model keeps them apart, and each in a row of its own.

Of transformers' models, those of bamba, falcon_h1, granitemoehybrid, nemotron_h and zamba2 begin each sample with an empty
state if `seq_idx` tells them the samples (and the kernels are installed, without which they refuse it). The others drop it, and
`position_ids` or `cu_seq_lens_q` alone are for the attention layers: there the state runs on from one sample to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..compat.offloading import device_of
from ..layers import Layer, find_layers
from .evaluation import evaluating

logger = logging.get_logger(__name__)

TOLD_BY = ("seq_idx", "position_ids", "cu_seq_lens_q")
"""By what a batch may tell its samples."""


def samples_in(batch: Mapping[str, Any]) -> Tensor | None:
    """Which sample each token belongs to, int32 [n, L]; None where each row is one.

    Args:
        batch: with `input_ids` [n, L]; and `seq_idx` [n, L], `position_ids` [n, L] that start again, or `cu_seq_lens_q`: where
            the samples of a single row begin, and the last one ends.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    told, positions, ends = (batch.get(name) for name in TOLD_BY)
    numbers = None
    if told is not None:
        numbers = torch.as_tensor(told).to(ids.device)
    elif positions is not None and torch.as_tensor(positions).shape == ids.shape:
        positions = torch.as_tensor(positions).to(ids.device)
        begins = positions.diff(dim=1) != 1
        if mask is not None:  # positions jump at padding, too
            begins &= (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        numbers = torch.nn.functional.pad(begins.cumsum(1), (1, 0))
    elif ends is not None and len(ids) == 1:
        tokens = torch.arange(ids.shape[1], device=ids.device)
        numbers = torch.searchsorted(torch.as_tensor(ends).to(ids.device).long()[1:], tokens, right=True)[None]
    if numbers is None or not bool((numbers.diff(dim=1) != 0).any()):
        return None
    return numbers.int()


def apart(batches: Iterable[dict[str, Tensor]], model: Any) -> Iterator[dict[str, Tensor]]:
    """Batches as a model reads them: packed rows as their samples, padded on the left, if it keeps these apart.

    Where the state runs on from one to the next they stay as they are, and a warning says so once. Their `position_ids` stay
    with them, by which attention layers may keep them apart. Rows without a token, such as blank lines, are left out: there is
    nothing to measure on them, to judge by or to learn from.
    """
    layers, heeds = find_layers(model), None
    for batch in _with_tokens(batches):
        packed = samples_in(batch)
        plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if packed is None:
            yield plain
            continue
        heeds = heeds_seq_idx(model, layers) if heeds is None else heeds
        if heeds and "seq_idx" in batch:
            ids, mask, _ = unpacked(plain["input_ids"], plain["attention_mask"], None, packed)
            yield from _with_tokens([{"input_ids": ids, "attention_mask": mask}])
        else:
            warn_of_borders(model, heeds)
            yield plain | {name: batch[name] for name in ("position_ids",) if name in batch}


def _with_tokens(batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        found = batch["attention_mask"].any(1)
        if found.all():
            yield batch
        elif found.any():
            yield {name: tensor[found] for name, tensor in batch.items()}


class _ReachedError(Exception):
    """The first mixer was called."""


@torch.no_grad()
def heeds_seq_idx(model: Any, layers: Sequence[Layer]) -> bool:
    """Whether the mixers begin samples anew that `seq_idx` tells: they do if they get it. It is looked at by a call."""
    if not all(layer.keeps_samples_apart for layer in layers):
        return False
    found: list[bool] = []

    def look(mixer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.append(kwargs.get("seq_idx") is not None)
        raise _ReachedError

    handle = layers[0].mixer.register_forward_pre_hook(look, with_kwargs=True)
    ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
    try:
        with evaluating(model):
            model(input_ids=ids, seq_idx=ids.int(), use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return found == [True]


def warn_of_borders(model: Any, heeds: bool) -> None:
    """Say once that the state runs over the borders of packed samples."""
    cure = (
        "It keeps them apart where seq_idx is in the batch, too: DataCollatorWithFlattening(return_seq_idx=True), with mamba_ssm "
        "and causal_conv1d installed."
        if heeds
        else "If samples shall not see those before them, pad them instead of packing them."
    )
    logger.warning_once(
        f"hf_compressm: the rows hold packed samples, and the layers of {type(model).__name__} carry their state on from one "
        f"sample to the next; so do the statistics, to agree with it. {cure}"
    )


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
