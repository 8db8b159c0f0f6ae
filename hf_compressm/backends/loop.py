"""A training loop of one's own, as backends see it."""

from __future__ import annotations

import gc
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..compat.wrapping import uncompiled


class Loop:
    """What a loop has of a `Trainer`: a model, and what is wrapped around it.

    Args:
        model: as the loop calls it, or the one inside.

    Attributes:
        model: the one inside.
        model_wrapped: the DistributedDataParallel around it if there is one, whichever of them was given; else what was given.
    """

    def __init__(self, model: Any) -> None:
        self.model_wrapped = model
        self.model = uncompiled(model)
        if isinstance(self.model, DistributedDataParallel):
            self.model = uncompiled(self.model.module)
        else:
            self.model_wrapped = _wrapper_of(self.model) or model


def _wrapper_of(model: Any) -> DistributedDataParallel | None:
    """The wrapper of a model that was given without it: if it did not hear of a cut, it would keep the old shapes."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    kinds = {DistributedDataParallel, *DistributedDataParallel.__subclasses__()}
    wrappers = [found for found in gc.get_objects() if type(found) in kinds]
    return next((found for found in wrappers if uncompiled(getattr(found, "module", None)) is model), None)
