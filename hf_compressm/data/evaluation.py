"""Perplexity: the figure that goes with a cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..compat.offloading import device_of
from ..interrupts import restoring
from .batches import check_batches
from .texts import EVALUATION, LENGTH, windows

# Spread over the whole text, so that they represent it; few enough for a CPU.
SEQUENCES = 16
BATCH = 2


def evaluation_ids(tokenizer: Any) -> Tensor:
    """Token ids [16, 512] of the shipped evaluation text."""
    return windows(EVALUATION.read_text(encoding="utf-8"), tokenizer, SEQUENCES, LENGTH)


def describe(ids: Tensor) -> str:
    """What `evaluation_ids` gives, in words, for tables and model cards."""
    return f"Python source and English prose shipped with hf_compressm, {len(ids)} x {ids.shape[1]} tokens"


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token.
        recall: the same over the tokens whose bigram (the token and the one before it) occurred earlier in the window:
            what a state is there to remember, and what suffers first when it shrinks. None if there is no such token.
    """

    perplexity: float
    recall: float | None


def perplexity(model: PreTrainedModel, ids: Tensor, advance: Callable[[int], Any] = lambda count: None) -> float:
    """The model's perplexity on token ids [n, L]; see `evaluate`."""
    return evaluate(model, ids, advance).perplexity


@torch.no_grad()
def evaluate(model: PreTrainedModel, ids: Tensor, advance: Callable[[int], Any] = lambda count: None) -> Evaluation:
    """The model's perplexity on token ids [n, L], every sequence from an empty state.

    Args:
        model: a causal language model, on any device.
        ids: token ids [n, L].
        advance: called with the number of sequences that were just read, for a progress bar.

    Raises:
        ValueError: if an id is beyond the model's vocabulary.
    """
    check_batches([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], model)
    lost, recalled = [], []
    with evaluating(model):
        for batch in ids.to(device_of(model)).split(BATCH if device_of(model).type == "cpu" else 8 * BATCH):
            logits = model(batch, use_cache=False).logits[:, :-1].float()
            loss = F.cross_entropy(logits.mT, batch[:, 1:], reduction="none")
            lost.append(loss.double().sum())
            recalled.append(loss[repeated_bigrams(batch)].double())
            advance(len(batch))
    again = torch.cat(recalled)
    mean = float(torch.stack(lost).sum()) / (len(ids) * (ids.shape[1] - 1))
    return Evaluation(_exp(mean), _exp(float(again.mean())) if len(again) else None)


def repeated_bigrams(ids: Tensor) -> Tensor:
    """Of the tokens after the first, [n, L - 1], which end a bigram that occurred earlier in their row."""
    pairs = ids[:, :-1] * (int(ids.max()) + 1) + ids[:, 1:]
    ordered, order = pairs.sort(dim=1, stable=True)
    again = torch.zeros_like(pairs, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(again).scatter(1, order, again)


def _exp(mean: float) -> float:
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
