"""The tokens that the statistics are taken on."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..compat.offloading import device_of
from ..interrupts import same_random_numbers
from .batches import BATCH, MIN_LENGTH, Batch, batches_of, check_batches
from .packing import apart
from .texts import CALIBRATION, LENGTH, windows

logger = logging.get_logger(__name__)

# Of 512 tokens each, from the text that the package ships: as many as pay on a GPU, and as a CPU gets through.
GPU_SEQUENCES, CPU_SEQUENCES = 64, 16
# Of all held-out tokens together, times the size of the vocabulary.
HELD_OUT_CLASSES = 2**28


def calibration_batches(data: Any, model: PreTrainedModel, tokenizer: Any = None) -> list[Batch]:
    """Turn calibration data into a list of batches of `input_ids` and `attention_mask`, as `apart` has them.

    Args:
        data: in any form of `batches_of`; or None: the shipped text if the model's tokenizer is given, else samples of
            the model itself.
        model: the model that will read them.
        tokenizer: needed for texts.

    Raises:
        ValueError: if there are no sequences, they are shorter than 8 tokens, an id is beyond the vocabulary, or a mask is
            none.
        TypeError: if the data is of another kind, or texts come without a tokenizer.
    """
    if data is None and tokenizer is not None:
        data = windows(CALIBRATION.read_text(encoding="utf-8"), tokenizer, sequences_for(model))
        shape = " x ".join(map(str, data.shape))
        logger.info(f"hf_compressm: calibrating on {shape} tokens of the text that the package ships.")
    elif data is None:
        logger.warning(
            "hf_compressm: no calibration data and no tokenizer, so that samples of the model itself are measured: a text like that of its "
            "use (calibration_data=), or its tokenizer for the text that the package ships, is better."
        )
        data = sample(model)
    batches = list(apart(batches_of(data, tokenizer), model))
    check_batches(batches, model)
    return batches


def sequences_for(model: PreTrainedModel) -> int:
    """How many sequences of a text to measure a model on, by where it is."""
    return CPU_SEQUENCES if device_of(model).type == "cpu" else GPU_SEQUENCES


def hold_out(
    batches: list[Batch], model: PreTrainedModel, every: int = 4, share: int = 1, least: int = MIN_LENGTH
) -> tuple[list[Batch], list[Batch]]:
    """Part the sequences in those to measure and fit on, and one of `every`, spread over all of them, to judge a cut by.

    Of these no more is taken than predictions of 2^28 classes (a GiB) can be kept of, by all of so many processes that
    share in them. A single sequence is parted in time.

    Raises:
        ValueError: if less than `least` tokens would be held out.
    """
    rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for batch in batches for i in _rows(batch)]
    if len(rows) == 1:
        (row,) = rows
        cut = row["input_ids"].shape[1] * 3 // 4
        rows = [{name: tensor[:, part] for name, tensor in row.items()} for part in (slice(cut), slice(cut, None))]
        if rows[1]["attention_mask"].sum() < least:
            raise ValueError(
                f"A max_divergence is measured on tokens that nothing was fitted to, and one sequence of {cut * 4 // 3} "
                f"tokens is too little to hold any back: give at least two sequences, better {GPU_SEQUENCES} of {LENGTH} tokens."
            )
        return [rows[0]], [rows[1]]
    vocabulary = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    most = max(1, HELD_OUT_CLASSES // (share * vocabulary * max(row["input_ids"].shape[1] for row in rows)))
    apart = set(range(len(rows) - 1, 0, -every)[:most])
    tokens = sum(int(rows[i]["attention_mask"].sum()) for i in apart)
    if tokens < least:
        raise ValueError(
            f"max_divergence and heal go by tokens that nothing was fitted to, and the {len(apart)} of {len(rows)} sequences "
            f"that are held back for them have {tokens} together, less than {least}: give longer or more sequences, better "
            f"{GPU_SEQUENCES} of {LENGTH} tokens."
        )
    return (_joined([row for i, row in enumerate(rows) if i not in apart]), _joined([rows[i] for i in sorted(apart)]))


def _rows(batch: Batch) -> range:
    return range(len(batch["input_ids"]))


def _joined(rows: list[Batch]) -> list[Batch]:
    """In batches of neighbours of one length."""
    batches: list[list[Batch]] = []
    for row in rows:
        last = batches[-1][0] if batches else {}
        alike = last.keys() == row.keys() and last["input_ids"].shape == row["input_ids"].shape
        if alike and len(batches[-1]) < BATCH:
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
    ids = torch.full((sequences, 1), start, device=device_of(model))
    settings = {"do_sample": True, "max_length": length, "min_length": length, "pad_token_id": 0}
    with same_random_numbers():
        # Not by torch.manual_seed, which would reseed a GPU also where the model is not on one.
        torch.default_generator.manual_seed(0)
        if ids.is_cuda:
            torch.cuda.manual_seed_all(0)
        sampled: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)  # type: ignore[operator]
    return sampled
