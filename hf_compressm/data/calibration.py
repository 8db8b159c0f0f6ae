"""The tokens that the statistics are taken on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .batches import Batch, batches_of, check_batches
from .texts import CALIBRATION, SEQUENCES, windows

logger = logging.get_logger(__name__)


def calibration_batches(data: Any, model: PreTrainedModel, tokenizer: Any = None) -> list[Batch]:
    """Turn calibration data into a list of batches of `input_ids` and `attention_mask`.

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
        logger.info("hf_compressm: calibrating on the text that the package ships.")
        data = windows(CALIBRATION.read_text(encoding="utf-8"), tokenizer)
    elif data is None:
        logger.info("hf_compressm: no calibration data and no tokenizer, calibrating on samples of the model itself.")
        data = sample(model)
    batches = batches_of(data, tokenizer)
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
    settings = {"do_sample": True, "max_length": length, "min_length": length, "pad_token_id": 0}
    with _seeded(model.device):
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)  # type: ignore[operator]


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Random numbers of a fixed seed, of the CPU's and, for a GPU, its generators; then they go on where they were."""
    gpus = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        # Not by torch.manual_seed, which would reseed a GPU also where the model is not on one.
        torch.default_generator.manual_seed(0)
        if gpus:
            torch.cuda.manual_seed_all(0)
        yield
