"""The texts that the package ships, and how a text becomes token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_REFERENCE = Path(__file__).parents[1] / "reference"
CALIBRATION = _REFERENCE / "calibration.txt"
"""Code and prose, for models that come with a tokenizer and no calibration data. What of: `reference/TEXTS.md`."""
EVALUATION = _REFERENCE / "evaluation.txt"
"""The like for perplexities, from other sources."""
LENGTH = 512

STATE_SPACES_TOKENIZER = "EleutherAI/gpt-neox-20b"
"""What the models of `state-spaces/*` were trained with; their repositories hold none."""


def every_window(text: str, tokenizer: Any) -> Tensor:
    """All of a text as token ids [sequences, 512], but for what is over at its end."""
    return windows(text, tokenizer, len(text))


def windows(text: str, tokenizer: Any, sequences: int, length: int = LENGTH) -> Tensor:
    """Cut a long text into token ids [sequences, length], spread evenly over the whole of it; fewer if it is shorter."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < length:
        return ids[None]
    every = ids[: len(ids) // length * length].view(-1, length)
    return every[torch.linspace(0, len(every) - 1, min(sequences, len(every)), dtype=torch.float32).round().long()]
