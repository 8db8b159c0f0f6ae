"""Perplexity: the figure that goes with a cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..interrupts import restoring
from .calibration import check_batches
from .texts import EVALUATION, LENGTH, windows

# Enough tokens for a perplexity that holds to a percent, few enough for a CPU.
SEQUENCES = 8
BATCH = 2


def evaluation_ids(tokenizer: Any) -> Tensor:
    """Token ids [8, 512] of the shipped evaluation text."""
    return windows(EVALUATION.read_text(encoding="utf-8"), tokenizer, SEQUENCES, LENGTH)


def describe(ids: Tensor) -> str:
    """What `evaluation_ids` gives, in words, for tables and model cards."""
    return f"English prose shipped with hf_compressm, {len(ids)} x {ids.shape[1]} tokens"


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor, advance: Callable[[int], Any] = lambda count: None) -> float:
    """The model's perplexity on token ids [n, L], every sequence from an empty state.

    Args:
        model: a causal language model, on any device.
        ids: token ids [n, L].
        advance: called with the number of sequences that were just read, for a progress bar.

    Returns:
        exp of the mean negative log-likelihood of a token.

    Raises:
        ValueError: if an id is beyond the model's vocabulary.
    """
    check_batches([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], model)
    losses = []
    with evaluating(model):
        for batch in ids.to(model.device).split(BATCH):
            losses += [float(model(batch, labels=batch, use_cache=False).loss)] * len(batch)
            advance(len(batch))
    mean = sum(losses) / len(losses)
    return math.exp(mean) if mean < 700 else math.inf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in modes:
            module.training = training

    with restoring(restore):
        model.eval()
        yield
