"""The tokens that the statistics are taken on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .texts import CALIBRATION, LENGTH, windows

logger = logging.get_logger(__name__)

BATCH = 8
# Of 512 tokens each, from the text that the package ships: as many as pay on a GPU, and as a CPU gets through.
GPU_SEQUENCES, CPU_SEQUENCES = 64, 16
# The first tokens see an empty state; much shorter sequences would measure little else.
MIN_LENGTH = 8
# Of all held-out tokens together, times the size of the vocabulary.
HELD_OUT_CLASSES = 2**28

Batch = dict[str, Tensor]


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
        data = windows(CALIBRATION.read_text(encoding="utf-8"), tokenizer, sequences_for(model))
        shape = " x ".join(map(str, data.shape))
        logger.info(f"hf_compressm: calibrating on {shape} tokens of the text that the package ships.")
    elif data is None:
        logger.info("hf_compressm: no calibration data and no tokenizer, calibrating on samples of the model itself.")
        data = sample(model)
    if isinstance(data, Sequence) and not len(data):
        raise _empty()
    batches = list(_batches(data, tokenizer))
    check_batches(batches, model)
    return batches


def sequences_for(model: PreTrainedModel) -> int:
    """How many sequences of a text to measure a model on, by where it is."""
    return CPU_SEQUENCES if model.device.type == "cpu" else GPU_SEQUENCES


def hold_out(batches: list[Batch], model: PreTrainedModel) -> tuple[list[Batch], list[Batch]]:
    """Part the sequences in those to measure and fit on, and a quarter, spread over all of them, to judge a cut by.

    Of the quarter no more is taken than predictions of 2^28 classes (a GiB) can be kept of. A single sequence is parted
    in time.

    Raises:
        ValueError: if there is too little to part.
    """
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for batch in batches for i in _rows(batch)]
    if len(rows) == 1:
        (row,) = rows
        cut = row["input_ids"].shape[1] * 3 // 4
        rows = [{name: tensor[:, part] for name, tensor in row.items()} for part in (slice(cut), slice(cut, None))]
        if rows[1]["attention_mask"].sum() < MIN_LENGTH:
            raise ValueError(
                f"A max_divergence is measured on tokens that nothing was fitted to, and one sequence of {cut * 4 // 3} "
                f"tokens is too little to hold any back: give at least two sequences, better {GPU_SEQUENCES} of {LENGTH} tokens."
            )
        return [rows[0]], [rows[1]]
    vocabulary = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    most = max(1, HELD_OUT_CLASSES // (vocabulary * max(row["input_ids"].shape[1] for row in rows)))
    apart = set(range(len(rows) - 1, 0, -4)[:most])
    return (_joined([row for i, row in enumerate(rows) if i not in apart]), _joined([rows[i] for i in sorted(apart)]))


def _rows(batch: Batch) -> range:
    return range(len(batch["input_ids"]))


def _joined(rows: list[Batch]) -> list[Batch]:
    """In batches of neighbours of one length."""
    batches: list[list[Batch]] = []
    for row in rows:
        if batches and len(batches[-1]) < BATCH and batches[-1][0]["input_ids"].shape == row["input_ids"].shape:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [{name: torch.cat([row[name] for row in batch]) for name in batch[0]} for batch in batches]


@torch.no_grad()
def sample(model: PreTrainedModel, sequences: int = CPU_SEQUENCES, length: int = 128) -> Tensor:
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
