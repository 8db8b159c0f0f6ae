"""Ways to train in which a model can't be cut, each with what to do instead."""

from __future__ import annotations

from typing import Any

from torch import nn

from .backend import Backend


class ShardedOtherwise(Backend):
    """The parameters or the optimizer's states are spread over the processes in a way that can't follow a cut."""

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """If the trainer says so."""
        return _name(trainer) is not None

    def refuse(self) -> None:
        """Always.

        Raises:
            ValueError: with what to do instead.
        """
        raise ValueError(
            f"CompreSSMCallback can't cut under {_name(self.trainer)}: train with FSDP2 (fsdp=True with fsdp_config={{'version': 2}}, "
            "or fsdp_version: 2 in accelerate's config), with DDP (torchrun) or in one process, or call compress_pretrained "
            "before or after the training."
        )


def _name(trainer: Any) -> str | None:
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        return "a model that was sharded when it was loaded"
    if getattr(trainer, "is_fsdp_xla_enabled", False):
        return "FSDP of XLA"
    return None


class DataParallel(Backend):
    """One process copies the model to several GPUs at each step."""

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """If the trainer wrapped the model so."""
        return isinstance(trainer.model_wrapped, nn.DataParallel)

    def refuse(self) -> None:
        """Always.

        Raises:
            ValueError: with what to do instead.
        """
        raise ValueError(
            "CompreSSMCallback does not work with DataParallel: start one process per GPU with torchrun, or show one GPU "
            "to this process (CUDA_VISIBLE_DEVICES)."
        )
