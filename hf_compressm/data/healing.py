"""The tokens that a cut model is healed on: the user's, those of the shipped text, or samples of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.utils import logging

from ..compat.offloading import device_of
from .batches import BATCH, Batch, batches_of, check_batches, is_stream, read_batches
from .calibration import sample, sequences_for
from .packing import apart
from .texts import CALIBRATION, LENGTH, every_window

logger = logging.get_logger(__name__)

SAMPLES = 256
"""Of a model without a tokenizer; on a CPU as few as are measured."""


class HealingText:
    """What a cut is measured on, and what the cut model learns from: all that is not held out.

    Args:
        data, model, tokenizer: as for `calibration_batches`. A stream, such as a DataLoader, is read as it is needed, again
            from its beginning when it ends.
        tokens: to learn from.

    Attributes:
        shared: whether all processes read this text and share it out, or each has a stream of its own.
        rows: to learn from, once some are held out: a dataset of sequences [1, length].

    Raises:
        ValueError: if there are less than two sequences.
    """

    def __init__(self, data: Any, model: PreTrainedModel, tokenizer: Any, tokens: int) -> None:
        self._most = most = sequences_for(model)
        self.shared = True
        self.rows: list[Batch] | IterableDataset[Batch] = []
        self._stream: Callable[[], Iterator[Batch]] | None = None
        if data is None and tokenizer is not None:
            data = every_window(CALIBRATION.read_text(encoding="utf-8"), tokenizer)
            logger.info(
                f"hf_compressm: healing on {data.numel()} tokens of the text that the package ships; better is text like "
                "that of the model's use."
            )
        elif data is None:
            logger.info("hf_compressm: no text and no tokenizer, healing on samples of the model itself.")
            data = sample(model, SAMPLES if device_of(model).type == "cuda" else most, LENGTH)
        if is_stream(data):

            def read() -> Iterator[Batch]:
                return _rows(apart(read_batches(data, tokenizer), model))

            if iter(data) is data:  # it can't be read again
                self._rows = list(_up_to(read(), tokens))
            else:
                self._rows, self._stream = list(islice(read(), most)), read
        else:
            self._rows = list(_rows(apart(batches_of(data, tokenizer), model)))
        check_batches(self._rows, model)
        if len(self._rows) < 2:
            raise ValueError(
                f"Healing learns from some of the text and is judged by the rest, and there is one sequence: give at least "
                f"two, better as many as there are tokens to learn from ({tokens})."
            )

    def pool_(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        """Put the texts of all processes together, if they are not the same. In place.

        Args:
            gather: the items of all processes, from those of each.
        """
        mine = sha256()
        for row in self._rows:
            mine.update(_key(row))
        if len(set(gather([mine.digest()]))) > 1:
            self._rows, self.shared = gather(self._rows), self._stream is None

    @property
    def measured(self) -> list[Batch]:
        """What to measure on: all of it, or, where it is much, some sequences that are spread over it or the first of a stream."""
        count = min(self._most, len(self._rows))
        spread = torch.linspace(0, len(self._rows) - 1, count, dtype=torch.float32).round().long().tolist()
        rows = [self._rows[i] for i in spread]
        plain = [row for row in rows if "position_ids" not in row]
        packed = [row for row in rows if "position_ids" in row]  # statistics would take their padding for tokens
        return [collate(plain[at : at + BATCH]) for at in range(0, len(plain), BATCH)] + packed

    @property
    def tokens_per_sequence(self) -> float:
        """On average, without padding."""
        return sum(int(row["attention_mask"].sum()) for row in self._rows) / len(self._rows)

    @property
    def longest(self) -> int:
        """The length of the longest sequence."""
        return max(row["input_ids"].shape[1] for row in self._rows)

    def hold_out_(self, held_out: Iterable[Mapping[str, Tensor]]) -> None:
        """Learn from all sequences but these. In place.

        Raises:
            ValueError: if there are no others.
        """
        held = {_key(row) for row in _rows(held_out)}
        others = [row for row in self._rows if _key(row) not in held]
        if not others:
            raise ValueError(
                "Healing learns from text that is not held out, and all sequences are the same: give others. Nothing was changed."
            )
        self.rows = others if self._stream is None else _Stream(self._stream, held)


class _Stream(IterableDataset[Batch]):
    """The sequences of a stream, but for those that are held out, again and again."""

    def __init__(self, read: Callable[[], Iterator[Batch]], held_out: set[bytes]) -> None:
        self.read, self.held_out = read, held_out

    def __iter__(self) -> Iterator[Batch]:
        found = True
        while found:
            found = False
            for row in self.read():
                if _key(row) not in self.held_out:
                    found = True
                    yield row


def collate(rows: Sequence[Mapping[str, Tensor]]) -> Batch:
    """Sequences [1, length], padded on the left, as a batch.

    Where some are packed they are padded on the right, and each token there is a sample of its own: `position_ids` are read
    without a mask, and nothing that is read later moves a prediction.
    """
    packed = any("position_ids" in row for row in rows)
    if packed:
        rows = [{"position_ids": torch.arange(row["input_ids"].shape[1])[None]} | dict(row) for row in rows]
    side = "right" if packed else "left"
    return {
        name: pad_sequence([row[name][0] for row in rows], batch_first=True, padding_side=side) for name in rows[0]
    }


def _rows(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Batch]:
    """The sequences [1, length] of batches, on the CPU, without the padding before them."""
    for batch in batches:
        here = {name: tensor.cpu() for name, tensor in batch.items()}
        for number, mask in enumerate(here["attention_mask"]):
            start = int(mask.argmax())
            yield {name: tensor[number : number + 1, start:] for name, tensor in here.items()}


def _up_to(rows: Iterable[Batch], tokens: int) -> Iterator[Batch]:
    for row in rows:
        yield row
        tokens -= int(row["attention_mask"].sum())
        if tokens <= 0:
            return


def _key(row: Mapping[str, Tensor]) -> bytes:
    """What tells a sequence from others."""
    return row["input_ids"][row["attention_mask"].bool()].numpy().tobytes()
