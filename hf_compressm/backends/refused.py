"""Ways to train in which a model can't be cut, each with what to do instead."""

from __future__ import annotations

from typing import Any

from torch import nn

from .backend import Backend

_SHARDED = {
    "is_deepspeed_enabled": "DeepSpeed",
    "is_fsdp_enabled": "FSDP",
    "is_distributed_loading_by_transformers": "a model that was sharded when it was loaded",
}


class Sharded(Backend):
    """The parameters are spread over the processes."""

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """If the trainer says so."""
        return any(getattr(trainer, flag, False) for flag in _SHARDED)

    def refuse(self) -> None:
        """Always.

        Raises:
            ValueError: with what to do instead.
        """
        name = next(name for flag, name in _SHARDED.items() if getattr(self.trainer, flag, False))
        raise ValueError(
            f"CompreSSMCallback can't cut under {name} yet: train in one process or with DDP (torchrun), or call "
            "compress_pretrained before or after the training."
        )


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
