"""The tokens that the statistics are taken on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .texts import CALIBRATION, LENGTH, SEQUENCES, windows

logger = logging.get_logger(__name__)

BATCH = 8
# The first tokens see an empty state; much shorter sequences would measure little else.
MIN_LENGTH = 8


def calibration_batches(data: Any, model: PreTrainedModel, tokenizer: Any = None) -> list[dict[str, Tensor]]:
    """Turn calibration data into a list of batches of `input_ids` and `attention_mask`.

    Args:
        data: LongTensor [n, L]; list of texts; `datasets.Dataset` with `input_ids` or `text`; an iterable of batches (a
            DataLoader); or None: the shipped text if the model's tokenizer is given, else samples of the model itself.
        model: the model that will read them.
        tokenizer: needed for texts.

    Raises:
        ValueError: if there are no sequences, they are shorter than 8 tokens, or an id is beyond the vocabulary.
        TypeError: if the data is of another kind, or texts come without a tokenizer.
    """
    if data is None and tokenizer is not None:
        logger.info("hf_compressm: calibrating on the text that the package ships.")
        data = windows(CALIBRATION.read_text(encoding="utf-8"), tokenizer)
    elif data is None:
        logger.info("hf_compressm: no calibration data and no tokenizer, calibrating on samples of the model itself.")
        data = sample(model)
    if isinstance(data, Sequence) and not len(data):
        raise _empty()
    batches = list(_batches(data, tokenizer))
    check_batches(batches, model)
    return batches


@torch.no_grad()
def sample(model: PreTrainedModel, sequences: int = SEQUENCES, length: int = 128) -> Tensor:
    """Sample sequences [sequences, length] from a language model, from its beginning-of-text token on.

    Raises:
        ValueError: if the model can't generate.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} can't generate its own calibration data: give calibration_data.")
    start = model.config.bos_token_id or 0
    ids = torch.full((sequences, 1), start, device=model.device)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    out = model.generate(  # type: ignore[operator]
        ids, do_sample=True, max_length=length, min_length=length, attention_mask=torch.ones_like(ids), pad_token_id=0
    )
    torch.random.set_rng_state(generator_state)
    return out


def _batches(data: Any, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    if isinstance(data, Tensor):
        if data.dim() != 2 or data.is_floating_point():
            raise TypeError(f"A calibration tensor holds token ids [n, L], got {data.dtype} {list(data.shape)}.")
        for ids in data.split(BATCH):
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif hasattr(data, "column_names"):
        column = "input_ids" if "input_ids" in data.column_names else "text"
        if column not in data.column_names:
            raise TypeError(f"A calibration dataset needs `input_ids` or `text`, it has {data.column_names}.")
        yield from _batches(list(data[column]), tokenizer)
    elif isinstance(data, Sequence) and not isinstance(data, str) and all(isinstance(item, str) for item in data):
        if tokenizer is None:
            raise TypeError("Calibration texts need a tokenizer: pass tokenizer=, or token ids [n, L].")
        for start in range(0, len(data), BATCH):
            texts = list(data[start : start + BATCH])
            yield from _padded([tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in texts])
    elif isinstance(data, Sequence) and not isinstance(data, str) and not isinstance(data[0], dict | Tensor):
        for start in range(0, len(data), BATCH):
            yield from _padded([list(ids) for ids in data[start : start + BATCH]])
    elif isinstance(data, Iterable) and not isinstance(data, str):
        for batch in data:
            ids = batch["input_ids"] if isinstance(batch, dict) or hasattr(batch, "keys") else batch
            mask = batch.get("attention_mask") if hasattr(batch, "get") else None
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    else:
        raise TypeError(
            f"Calibration data of type {type(data).__name__} is not known: give a LongTensor [n, L], a list of texts, a "
            "datasets.Dataset or a DataLoader."
        )


def _padded(sequences: list[list[int]]) -> Iterator[dict[str, Tensor]]:
    """Pad on the left, so that the scan meets padding before it has a state."""
    length = max(map(len, sequences), default=0)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        if sequence:
            ids[row, -len(sequence) :] = torch.tensor(sequence)
            mask[row, -len(sequence) :] = 1
    yield {"input_ids": ids, "attention_mask": mask}


def _empty() -> ValueError:
    return ValueError("The calibration data is empty: give at least one sequence.")


def check_batches(batches: list[dict[str, Tensor]], model: PreTrainedModel) -> None:
    """Refuse batches that the model can't read, or that are too short to tell anything.

    Raises:
        ValueError, TypeError: as `calibration_batches`.
    """
    for batch in batches:
        ids = batch["input_ids"]
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"The batches of calibration data must hold token ids [n, L], got {found}.")
    if not batches or any(batch["input_ids"].numel() == 0 for batch in batches):
        raise _empty()
    longest = max(int(batch["attention_mask"].sum(1).max()) for batch in batches)
    if longest < MIN_LENGTH:
        raise ValueError(
            f"The longest calibration sequence has {longest} tokens, too few for the scan to warm up: give sequences of "
            f"at least {MIN_LENGTH} tokens, better {LENGTH}."
        )
    vocabulary = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    low = min(int(batch["input_ids"].min()) for batch in batches)
    high = max(int(batch["input_ids"].max()) for batch in batches)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"Calibration token ids run from {low} to {high}, the model's vocabulary from 0 to {vocabulary - 1}: use the "
            "model's own tokenizer."
        )
