"""Weights of a checkpoint that transformers converted when it was saved are loaded into the model that is there.

A `Trainer` saves with `save_pretrained`, which gives mixtures of experts and `nemotron_h` the names and shapes of the Hub, and loads
with `load_state_dict`, which knows no such names: it warns, and leaves these weights as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

logger = logging.get_logger(__name__)


def load_converted_(model: Any, folder: str) -> bool:
    """Load a checkpoint that has weights of names that a model does not have, as `from_pretrained` does. In place.

    Args:
        model: with the projections of the checkpoint; its layers take the sizes there by their hooks.
        folder: of the checkpoint.

    Returns:
        whether it was loaded: not if it has the model's names, or is that of another model.
    """
    if not isinstance(model, PreTrainedModel) or _names_in(Path(folder)) <= model.state_dict().keys():
        return False
    config = type(model.config).from_pretrained(folder)
    config.rescale_prenorm_residual = False  # else trained weights are taken for fresh ones, and divided
    widest = max((parameter.dtype for parameter in model.parameters()), key=lambda dtype: dtype.itemsize)
    found: Any = type(model).from_pretrained(folder, config=config, dtype=widest, output_loading_info=True)
    loaded, info = found
    if any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return False  # the Trainer says so
    model.load_state_dict(loaded.state_dict())
    logger.info(f"hf_compressm: loaded {folder}, whose weights have the names of the Hub.")
    return True


def _names_in(folder: Path) -> set[str]:
    """Of the weights in a checkpoint, as `save_pretrained` wrote it; none if it was not."""
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not single.is_file():
        return set()
    with safe_open(single, framework="pt") as tensors:
        return set(tensors.keys())
