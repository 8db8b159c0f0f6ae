"""What all backends share in which each process holds a part of every parameter: they read weights, and run the model, together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..compat.parts import States, plan_data_, take_planned_
from ..compat.sharding import asking_the_others, gathered
from ..compat.wrapping import inside
from .ddp import DDP
from .loop import Loop

T = TypeVar("T")


class Sharded(DDP):
    """Those of one mixer at a time are gathered, by all processes: a forward pass of one alone would wait for the others."""

    takes_new_parameters: ClassVar[bool] = False
    loads_in_place: ClassVar[bool] = True

    @property
    def model(self) -> nn.Module:
        """The plain one."""
        plain: nn.Module = inside(self.trainer.model_wrapped)
        return plain

    def refuse_loop(self) -> None:
        """A loop of one's own.

        Raises:
            ValueError: if it is one.
        """
        if isinstance(self.trainer, Loop):
            raise ValueError(
                f"compress_ can't cut what {type(self).__name__} holds: give CompreSSMCallback to a Trainer, or cut the model before "
                "it is sharded, or once it is saved. Nothing was changed."
            )

    def least(self, count: int) -> int:
        """The least of the processes' numbers: a pass of the model wants all of them."""
        least = torch.tensor(count, device=next(self.model.parameters()).device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def decide(self, choose: Callable[[], T]) -> T:
        """What process 0 chooses. Where it reads the weights of a layer, the others gather them with it.

        Raises:
            ValueError, TypeError: what `choose` raised; any other error of process 0 is a RuntimeError on the others.
        """
        if dist.get_rank() > 0:
            while (name := self._send()) is not None:
                with gathered(self.model.get_submodule(name)):
                    pass
            return super().decide(choose)
        names = {id(module): name for name, module in self.model.named_modules()}
        chosen: list[T] = []
        refusal: Exception | None = None
        try:
            with asking_the_others(lambda module: self._send(names[id(module)])):
                chosen = [choose()]
        except Exception as error:  # raised where the others hear of it
            refusal = error
        finally:
            self._send(None)  # they wait no longer

        def choice() -> T:
            if refusal is not None:
                raise refusal
            return chosen[0]

        return super().decide(choice)

    def _send(self, name: str | None = None) -> str | None:
        """The name of a module whose weights are read, from process 0 to the others; None once there is none."""
        sent = [name]
        dist.broadcast_object_list(sent, src=0)
        return sent[0]


class Rebuilt(Sharded):
    """Parameters and the optimizer's states lie in flat tensors, which are made anew after a cut with what is planned for them."""

    def __init__(self, trainer: Any = None) -> None:
        super().__init__(trainer)
        self.states = States()

    @property
    def begun(self) -> bool:
        """Whether the model is sharded already, which it is only when training begins."""
        return inside(self.wrapped) is not self.wrapped

    def states_of(self, optimizer: Any) -> Any:
        """What the optimizer knows of each parameter, in pieces."""
        if self.begun:
            self.read_states_(optimizer)
        return self.states

    def read_states_(self, optimizer: Any) -> None:
        """Let `states` show what the optimizer knows now."""
        raise NotImplementedError

    def resize_parameter_(self, parameter: Tensor, data: Tensor) -> None:
        """Plan new data of another shape for a parameter, until `after_cut_`."""
        plan_data_(parameter, data)

    def rebuild_(self) -> None:
        """Make what holds the flat tensors anew."""
        raise NotImplementedError

    def after_cut_(self) -> None:
        """Make the flat tensors anew, if there are any."""
        if not self.begun:
            for parameter in self.wrapped.parameters():
                take_planned_(parameter)
            return
        self.rebuild_()
        super().after_cut_()
