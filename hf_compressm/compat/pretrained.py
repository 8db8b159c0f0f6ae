"""Models of transformers: how they save, run and recompute."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

from torch import nn

UPLOAD = "_upload_modified_files"
SPLIT = "split_torch_state_dict_into_shards"


def commit_hash(config: Any) -> str | None:
    """The revision on the Hub that a config was loaded from, if known."""
    return getattr(config, "_commit_hash", None)


def has_head(model: Any) -> bool:
    """Whether a model makes predictions of its last hidden states; a plain module, whose output nobody knows, is none that does."""
    return getattr(model, "base_model", model) is not model


def recompute_activations_(model: Any) -> None:
    """Have a model compute its activations again in the backward pass; it was called by another name before 5.24."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


def stock_scans(modules: Iterable[nn.Module], name: str) -> list[tuple[Any, Callable[..., Any]]]:
    """The Python modules that have transformers' plain scan of that name for some of these mixers, and the scan.

    Since 5.24 it is a function of the module that is looked up when the mixer runs; none are found where it is not, or
    where mamba_ssm takes its place.
    """
    if find_spec("mamba_ssm") is not None:
        return []
    names = {base.__module__ for kind in {type(module) for module in modules} for base in kind.__mro__}
    homes = [sys.modules.get(home) for home in sorted(names)]
    return [(home, getattr(home, name)) for home in homes if hasattr(home, name)]
