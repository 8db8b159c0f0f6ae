"""The interface: add up statistics, decide once, resize parameters, and tell whatever holds the old shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..compat import forget_compiled_code
from ..hankel.statistics import Statistics
from ..layers import set_data_

T = TypeVar("T")


class Backend(ABC):
    """One way to train a model, on one or several processes.

    Args:
        trainer: the `Trainer` that trains it, if there is one.
    """

    def __init__(self, trainer: Any = None) -> None:
        self.trainer = trainer

    @classmethod
    @abstractmethod
    def takes(cls, trainer: Any) -> bool:
        """Whether a trainer trains in this way."""

    def refuse(self) -> None:
        """Say what can't be cut here, before the first step.

        Raises:
            ValueError: with what to do instead.
        """

    def share_candidates_(self, statistics: Sequence[Statistics], first: Callable[[], Sequence[Statistics]]) -> None:
        """Give all processes the same candidates for a read-out, where there are too many states to fit all of them.

        Args:
            statistics: of each layer, empty.
            first: measures the first batch.
        """

    def sum_(self, statistics: Sequence[Statistics]) -> None:
        """Add up the statistics over the processes. In place."""

    def least(self, count: int) -> int:
        """The least of the processes' numbers, if all must run the model equally often; else one's own."""
        return count

    def settle_(self) -> None:
        """Put the parameters back where the optimizer holds them, after passes of the model outside of training."""

    def decide(self, choose: Callable[[], T]) -> T:
        """What one process chooses, on all of them; its error is raised on all of them.

        Raises:
            ValueError: what `choose` raised.
        """
        return choose()

    def resize_parameter_(self, parameter: Tensor, data: Tensor) -> None:
        """Give a parameter new data of another shape. In place: it stays the same object."""
        set_data_(parameter, data)

    def after_cut_(self) -> None:
        """Tell whatever holds the parameters' old shapes, once the cut is made."""
        forget_compiled_code()
