"""One process: nothing to add up, nothing to agree on."""

from __future__ import annotations

from typing import Any

from .backend import Backend


class OneProcess(Backend):
    """A loop or a `Trainer` in one process."""

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """Any that no other backend takes."""
        return True
