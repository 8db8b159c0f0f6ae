"""What the processes of a run share, and what Accelerate knows of them."""

from __future__ import annotations

from typing import Any

import torch


def process_store() -> Any:
    """The key-value store that all processes of the default group share."""
    return torch.distributed.distributed_c10d._get_default_store()


def accelerate_state() -> list[dict[str, Any]]:
    """The dictionaries that hold Accelerate's global state: what device and processes there are, precision, accumulation."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [owner._shared_state for owner in (PartialState, AcceleratorState, GradientState)]
