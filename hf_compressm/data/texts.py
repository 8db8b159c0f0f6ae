"""The texts that the package ships, and how a text becomes token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_REFERENCE = Path(__file__).parents[1] / "reference"
CALIBRATION = _REFERENCE / "calibration.txt"
"""Prose for models that come with a tokenizer and no calibration data."""
EVALUATION = _REFERENCE / "evaluation.txt"
"""Prose for perplexities, other than the calibration text."""
SEQUENCES, LENGTH = 8, 512

STATE_SPACES_TOKENIZER = "EleutherAI/gpt-neox-20b"
"""What the models of `state-spaces/*` were trained with; their repositories hold none."""


def windows(text: str, tokenizer: Any, sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """Cut the start of a long text into token ids [sequences, length], or fewer if the text is shorter."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: sequences * length], dtype=torch.long)
    return ids[: len(ids) // length * length].view(-1, length) if len(ids) >= length else ids[None]
