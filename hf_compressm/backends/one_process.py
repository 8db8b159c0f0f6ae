"""One process: nothing to add up, nothing to agree on."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .backend import Backend


class OneProcess(Backend):
    """A loop or a `Trainer` in one process."""

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """Any that no other backend takes."""
        return True

    def refuse(self) -> None:
        """One of several processes, which would each decide alone.

        Raises:
            ValueError: with what to do instead.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"This is one of {dist.get_world_size()} processes, and each would cut its copy of the model alone: give "
                "CompreSSMCallback to a Trainer, or cut the model in one process before the others start "
                "(compress_pretrained, then save_pretrained) and load the slim one in all. Nothing was changed."
            )
