"""Calibration data, in whatever form people have it, as batches of `input_ids` and `attention_mask`.

Where rows are packed with several samples, what tells these goes along: `seq_idx`, or `position_ids` that start again.

| given | read as |
|---|---|
| tensor or numpy array [n, L] | token ids |
| list of lists, arrays or tensors [L] | token ids, padded on the left |
| list of texts | what the tokenizer makes of them |
| dictionary, `datasets.Dataset` or DataFrame | its `input_ids`, with its `attention_mask` if it has one, or its `text` |
| DataLoader, or list of tensors [n, L] or dictionaries of them | batches of its own |
| list of dictionaries of one row each, streamed `datasets.IterableDataset`, or any iterable of rows | its rows, 8 at a time |

Of what has no end in sight (all but tables and lists) only the first 2^18 tokens are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging

from .texts import LENGTH

logger = logging.get_logger(__name__)

Batch = dict[str, Tensor]

BATCH = 8
STREAM_TOKENS = 2**18
# The first tokens see an empty state; much shorter sequences would measure little else.
MIN_LENGTH = 8


def batches_of(data: Any, tokenizer: Any = None) -> list[Batch]:
    """Batches of token ids and masks, int64 [n, L] each.

    Args:
        data: in one of the forms above. Rows are taken 8 at a time, batches as they come.
        tokenizer: needed for texts.

    Raises:
        ValueError: if there are no sequences, or a mask does not fit its ids or holds other numbers than 0 and 1.
        TypeError: if the data is of another kind, or texts come without a tokenizer.
    """
    batches: list[Batch] = []
    tokens, stream = 0, is_stream(data)
    for batch in read_batches(data, tokenizer):
        if stream and tokens >= STREAM_TOKENS:
            logger.info(f"hf_compressm: read the first {tokens} tokens of the calibration data, which go on.")
            break
        batches.append(batch)
        tokens += batch["input_ids"].numel()
    if not batches:
        raise _empty()
    return batches


def read_batches(data: Any, tokenizer: Any = None) -> Iterator[Batch]:
    """The same one after another, as they are asked for, to the end of the data."""
    if hasattr(data, "tolist") and not isinstance(data, Tensor | np.ndarray):  # a column of a DataFrame
        data = data.tolist()
    if _holds_rows(data):
        yield from _rows(data, tokenizer, BATCH)
        return
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise TypeError(
            f"Calibration data of type {type(data).__name__} is not known: give a LongTensor or integer array [n, L], a "
            "list of texts, a datasets.Dataset, DataFrame or dictionary with `input_ids` or `text`, or a DataLoader."
        )
    for batch in _in_batches(data):
        if not _holds_rows(batch):
            raise TypeError(
                f"The batches of calibration data hold token ids [n, L], got {type(batch).__name__}: let the DataLoader "
                "give dictionaries with `input_ids`."
            )
        yield from _rows(batch, tokenizer)


def is_stream(data: Any) -> bool:
    """Whether it gives its batches or rows one after another, with no end in sight: all but tables and lists."""
    listed = hasattr(data, "tolist") or isinstance(data, Sequence) or _holds_rows(data)
    return isinstance(data, Iterable) and not listed


def _in_batches(data: Iterable[Any]) -> Iterator[Any]:
    """Batches as they come; of single rows, as streamed datasets give them, tables of 8."""
    rows: list[Any] = []
    for item in data:
        row = _row(item)
        if row is None:
            yield item
            continue
        rows.append(row)
        if len(rows) == BATCH:
            yield _table(rows)
            rows = []
    if rows:
        yield _table(rows)


def _row(item: Any) -> dict[str, Any] | None:
    """A row of a table, by its columns; None for a batch."""
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, Mapping):
        return {"input_ids": item} if _is_row(item) else None
    if "input_ids" in item:
        names = ("input_ids", "attention_mask", "seq_idx", "position_ids")
        return {name: item[name] for name in names if name in item} if _is_row(item["input_ids"]) else None
    return {"text": item["text"]} if isinstance(item.get("text"), str) else None


def _is_row(ids: Any) -> bool:
    """Whether these are the token ids of one sequence, if they are any."""
    if isinstance(ids, Tensor):
        return ids.ndim == 1
    if isinstance(ids, np.ndarray):
        return ids.ndim == 1 and ids.dtype.kind in "biuf"  # others are texts
    return isinstance(ids, Sequence) and (not ids or isinstance(ids[0], Integral))


def _table(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)}


def _holds_rows(data: Any) -> bool:
    """Whether it is one table of sequences, and not several batches of them."""
    if isinstance(data, Tensor | np.ndarray) or _columns(data) is not None:
        return True
    if not isinstance(data, Sequence) or isinstance(data, str | bytes):
        return False
    first = data[0] if len(data) else None
    return first.ndim < 2 if isinstance(first, Tensor | np.ndarray) else _columns(first) is None


def _columns(data: Any) -> list[Any] | None:
    """The names of a table's columns, or None. A dataset that is streamed has no length, and may not know them."""
    names = data.keys() if isinstance(data, Mapping) else getattr(data, "column_names", getattr(data, "columns", None))
    return None if names is None or not isinstance(data, Sized) else list(names)


def _rows(data: Any, tokenizer: Any, at_a_time: int | None = None) -> Iterator[Batch]:
    """The sequences of a table in batches of so many (None: in one), padded if they differ in length."""
    masks: Any = None
    told: dict[str, Any] = {}
    columns = _columns(data)
    if columns is not None:
        name = next((name for name in ("input_ids", "text") if name in columns), None)
        if name is None:
            raise TypeError(f"Calibration data needs `input_ids` or `text`, it has {columns}.")
        if name == "input_ids" and "attention_mask" in columns:
            masks = data["attention_mask"]
        if name == "input_ids":
            told = _samples_told(data, columns)
        data = data[name]
        if isinstance(data, str | bytes) or not isinstance(data, Iterable):
            raise TypeError(f"`{name}` holds token ids [n, L] or a list of texts, got {type(data).__name__}.")
    if isinstance(data, Tensor | np.ndarray) and data.ndim != 1:
        ids = _ids(data, "[n, L]")
        mask = torch.ones_like(ids) if masks is None else _mask(masks, ids)
        step = at_a_time or max(1, len(ids))
        every = {"input_ids": ids, "attention_mask": mask} | {
            key: _beside(key, value, ids) for key, value in told.items()
        }
        for start in range(0, len(ids), step):
            yield {key: value[start : start + step] for key, value in every.items()}
        return
    sequences = list(data)
    if not sequences:
        raise _empty()
    if any(isinstance(sequence, str) for sequence in sequences):
        sequences = _tokenized(sequences, tokenizer)
    rows = [_ids(sequence, "[L] in each row") for sequence in sequences]
    masks = [torch.ones_like(ids) for ids in rows] if masks is None else list(masks)
    if len(masks) != len(rows):
        raise ValueError(f"There are {len(rows)} calibration sequences and {len(masks)} masks: give one for each.")
    row_masks = [_mask(mask, ids) for mask, ids in zip(masks, rows, strict=True)]
    listed = {"input_ids": rows, "attention_mask": row_masks}
    for key, values in told.items():
        listed[key] = [_beside(key, value, ids) for value, ids in zip(values, rows, strict=True)]
    step = at_a_time or len(rows)
    for start in range(0, len(rows), step):
        # On the left, so that the scan meets padding before it has a state.
        yield {
            key: pad_sequence(some[start : start + step], batch_first=True, padding_side="left")
            for key, some in listed.items()
        }


def _samples_told(data: Any, columns: list[Any]) -> dict[str, Any]:
    """What a table tells of the samples in its rows."""
    told = {name: data[name] for name in ("seq_idx", "position_ids") if name in columns and data[name] is not None}
    if not told and "cu_seq_lens_q" in columns:
        begins, ends = _tensor(data["cu_seq_lens_q"]), _tensor(data["input_ids"])
        if begins is not None and ends is not None and begins.dim() == 1 and len(ends) == 1:
            lengths = begins.diff().tolist()
            told["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    return told


def _beside(name: str, values: Any, ids: Tensor) -> Tensor:
    """Whole numbers of the shape of token ids."""
    numbers = _tensor(values)
    if numbers is None or numbers.dtype.is_floating_point or numbers.shape != ids.shape:
        found = type(values).__name__ if numbers is None else f"{list(numbers.shape)}"
        raise ValueError(
            f"{name} of the calibration data has to be whole numbers of the shape of its token ids, {list(ids.shape)}, and is "
            f"{found}: leave it out, or give a number for each token."
        )
    return numbers.to(ids.device, torch.int64)


def _tokenized(texts: list[Any], tokenizer: Any) -> list[list[int]]:
    if tokenizer is None:
        raise TypeError("Calibration texts need a tokenizer: pass tokenizer=, or token ids [n, L].")
    if not callable(tokenizer):
        raise TypeError(
            f"tokenizer= takes a tokenizer, got {type(tokenizer).__name__}: AutoTokenizer.from_pretrained(...) loads one."
        )
    other = next((text for text in texts if not isinstance(text, str)), None)
    if other is not None:
        raise TypeError(f"A list of calibration texts holds {type(other).__name__}, too: give texts only.")
    return [tokenizer(str(text), truncation=True, max_length=LENGTH)["input_ids"] for text in texts]


def _ids(values: Any, shape: str) -> Tensor:
    """Token ids of that shape as int64."""
    ids = _tensor(values)
    if ids is None or ids.dim() != shape.count(",") + 1 or ids.dtype != torch.int64:
        found = type(values).__name__ if ids is None else f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        one = " For one sequence, give [1, L]." if ids is not None and ids.dim() < 2 else ""
        raise TypeError(f"Calibration data holds token ids, whole numbers {shape}, got {found}.{one}")
    return ids


def _mask(values: Any, ids: Tensor) -> Tensor:
    """The attention mask of token ids as int64."""
    mask = _tensor(values)
    if mask is None or not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "An attention mask of the calibration data holds other values than 0 and 1: 1 is a token, 0 is padding."
        )
    if mask.shape != ids.shape:
        raise ValueError(
            f"An attention mask of the calibration data is {list(mask.shape)} and its token ids are {list(ids.shape)}: "
            "give a mask of the same shape."
        )
    return mask.to(ids.device, torch.int64)


def _tensor(values: Any) -> Tensor | None:
    """Numbers in rows of one length as a tensor, whole ones as int64; None for anything else."""
    if isinstance(values, Tensor):
        tensor = values.detach()
    elif not isinstance(values, np.ndarray | Sequence) or isinstance(values, str | bytes):
        return None
    elif isinstance(values, Sequence) and not values:
        return torch.zeros(0, dtype=torch.int64)
    else:
        try:
            array = np.array(values, order="C")
        except ValueError:  # rows of several lengths
            return None
        if (
            array.dtype.kind not in "biuf"
            or not array.ndim
            or (array.dtype.kind in "iu" and any(isinstance(value, bool) for value in values))
        ):
            return None
        tensor = torch.from_numpy(array.astype({"b": bool, "f": np.float64}.get(array.dtype.kind, np.int64)))
    if tensor.is_complex():
        return None
    return tensor if tensor.dtype == torch.bool or tensor.is_floating_point() else tensor.long()


def _empty() -> ValueError:
    return ValueError("The calibration data is empty: give at least one sequence.")


def check_batches(batches: list[Batch], model: PreTrainedModel) -> None:
    """Refuse batches that the model can't read, or that are too short to tell anything.

    Raises:
        ValueError, TypeError: as `calibration_batches`.
    """
    for batch in batches:
        _ids(batch["input_ids"], "[n, L]")
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
