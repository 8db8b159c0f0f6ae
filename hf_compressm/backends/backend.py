"""The interface: add up statistics, decide once, resize parameters, and tell whatever holds the old shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ..compat.wrapping import forget_compiled_code
from ..hankel.statistics import Statistics
from ..layers import set_data_

T = TypeVar("T")


class Backend(ABC):
    """One way to train a model, on one or several processes.

    Args:
        trainer: the `Trainer` that trains it, or the `Loop` of one's own, if there is one.
    """

    late: ClassVar[float] = 0.0
    """Seconds by which another process may be later when training begins; none where wrapping the model waits for all."""

    takes_new_parameters: ClassVar[bool] = False
    """Whether a cut may give mixers parameters that they did not have, as projections do."""

    loads_in_place: ClassVar[bool] = False
    """Whether each process loads its part of a checkpoint's weights into what it has, which must have the right shape already."""

    counts_steps: ClassVar[bool] = True
    """Whether the optimizer counts the steps of each parameter, so that it can begin again with one."""

    def __init__(self, trainer: Any = None) -> None:
        self.trainer = trainer

    @property
    def wrapped(self) -> Any:
        """The model as the training loop calls it."""
        return self.trainer.model_wrapped

    @classmethod
    @abstractmethod
    def takes(cls, trainer: Any) -> bool:
        """Whether a trainer trains in this way."""

    def refuse(self) -> None:
        """Say what can't be cut here, before the first step.

        Raises:
            ValueError: with what to do instead.
        """

    @property
    def processes(self) -> int:
        """How many there are."""
        return 1

    def together(self, what: str, part: Callable[[], T], silence: float | None = None) -> T:
        """Do a part of the work on all processes, and go on when all have done theirs: an error of one is raised on all.

        Args:
            what: is done, for messages.
            part: what this process has to do.
            silence: seconds after which a process that does not come is given up.
        """
        return part()

    def agree(self, what: str, facts: Mapping[str, Any], silence: float | None = None) -> None:
        """Refuse to go on where the processes differ.

        Args:
            what: is begun, for messages.
            facts: that have to be the same on all of them, by name; as JSON takes them.
            silence: as for `together`.
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
            ValueError, TypeError: what `choose` raised; any other error of another process is a RuntimeError.
        """
        return choose()

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in the order of these."""
        return list(items)

    def as_called(self, model: Any) -> Any:
        """A plain model as it has to be called for a pass outside of training."""
        return model

    def bring(self, items: Sequence[T]) -> list[list[T]]:
        """The items of each process, on the first; none on the others. Tensors in them are on the CPU."""
        return [list(items)]

    def states_of(self, optimizer: Any) -> Any:
        """An optimizer as one that holds the model's parameters themselves."""
        return optimizer

    def resize_parameter_(self, parameter: Tensor, data: Tensor) -> None:
        """Give a parameter new data of another shape. In place: it stays the same object."""
        set_data_(parameter, data)

    def after_cut_(self) -> None:
        """Tell whatever holds the parameters' old shapes, once the cut is made."""
        forget_compiled_code()

    def after_undo_(self, error: BaseException | None = None) -> None:
        """The same once a cut is undone, because of an error if there was one."""
        self.after_cut_()
