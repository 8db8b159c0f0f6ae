"""One process: nothing to add up, nothing to agree on."""

from __future__ import annotations

from typing import Any, ClassVar

from .agreement import processes
from .backend import Backend


class OneProcess(Backend):
    """A loop or a `Trainer` in one process."""

    takes_new_parameters: ClassVar[bool] = True

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """Any that no other backend takes."""
        return True

    def refuse(self) -> None:
        """One of several processes, which would each decide alone.

        Raises:
            ValueError: with what to do instead.
        """
        if processes() > 1:
            raise ValueError(
                f"This is one of {processes()} processes, and each would cut its copy of the model alone: call compress_ on "
                "all of them, with the model as DistributedDataParallel or Accelerate wrapped it; or cut it in one process "
                "before the others start (compress_pretrained, then save_pretrained), and load the slim one in all. Nothing "
                "was changed."
            )
