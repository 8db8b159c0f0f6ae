"""A model and its optimizers before a cut, so that the cut can be undone exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat.offloading import weights_map
from ..compat.parts import Part, forget_planned_
from ..compat.sharding import held as held_of
from ..compat.sharding import is_same
from ..hankel import budgets
from ..interrupts import uninterrupted
from ..layers import Layer, set_data_
from ..modeling.state_sizes import text_configs
from ..reporting.record import Recorded


class Snapshot:
    """What a cut replaces: it makes new tensors, so that references to the old ones are enough.

    On a GPU these would be most of a second model, so there the old weights wait on the CPU if they are many.

    Args:
        model, layers, optimizers: before the cut. No training step may come between it and `restore_`.
        replaced: parameters that the cut gives new data, as far as that is known.
        resize_: as the cut gives parameters new data.

    Attributes:
        afterwards: is called once the cut is undone, with the error that undid it, if any: what holds the parameters has to
            hear of that, too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[Layer],
        optimizers: Sequence[torch.optim.Optimizer],
        resize_: Callable[[Tensor, Tensor], None] = set_data_,
        replaced: Sequence[Tensor] = (),
    ) -> None:
        self.resize_ = resize_
        self.afterwards: Callable[[BaseException | None], None] = lambda error: None
        modules = [module for layer in layers for module in layer.mixer.modules()]
        parameters = {id(p): p for module in modules for p in module.parameters(recurse=False)}.values()
        self.classes = [(module, type(module)) for module in modules]
        self.attributes = [Contents(vars(owner)) for owner in [*modules, *text_configs(model)]]
        # Such as its parameters, buffers and hooks.
        self.collections = [
            Contents(value) for module in modules for value in vars(module).values() if isinstance(value, dict | set)
        ]
        elsewhere = {id(p) for p in replaced if p.device.type != "cpu" and not isinstance(held_of(p), Part)}
        if sum(p.nbytes for p in replaced) <= budgets.REPLACED:
            elsewhere.clear()
        self.parameters = [(p, p.data.cpu() if id(p) in elsewhere else held_of(p), p.grad) for p in parameters]
        offloaded = [found[0] for module in modules if (found := weights_map(module)) is not None]
        self.collections += [Contents(weights) for weights in {id(weights): weights for weights in offloaded}.values()]
        self.states = [
            (optimizer, parameter, Contents(optimizer.state[parameter]) if parameter in optimizer.state else None)
            for optimizer in optimizers
            for parameter in parameters
        ]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        lists = [group[key] for group in groups for key in ("params", "param_names") if key in group]
        self.held = [(some, list(some)) for some in lists]
        self.recorded = Recorded(model)

    def restore_(self, error: BaseException | None = None) -> None:
        """Undo the cut, bit for bit, as much of it as was made.

        Args:
            error: that undoes it.
        """
        with uninterrupted():
            for module, kind in self.classes:
                module.__class__ = kind
            for contents in [*self.attributes, *self.collections]:
                contents.restore_()
            for parameter, data, gradient in self.parameters:
                forget_planned_(parameter)
                if not is_same(held_of(parameter), data):
                    if not isinstance(data, Part):
                        if parameter.dtype != data.dtype:
                            parameter.data = parameter.data.to(data.dtype)  # `set_data_` passes through another
                        data = data.to(parameter.device)
                    self.resize_(parameter, data)
                parameter.grad = gradient
            for some, before in self.held:
                some[:] = before
            for optimizer, parameter, state in self.states:
                if state is not None:
                    optimizer.state[parameter] = state.restore_()
                else:
                    optimizer.state.pop(parameter, None)
            self.recorded.restore_()
            self.afterwards(error)


class Contents:
    """A dictionary or set with what is in it now; the values are not copied."""

    def __init__(self, collection: Any) -> None:
        self.collection = collection
        self.copy: Any = dict(collection.items()) if isinstance(collection, Mapping) else set(collection)

    def restore_(self) -> Any:
        """Put it back in the same object, which others may hold."""
        self.collection.clear()
        self.collection.update(self.copy)
        return self.collection


@contextmanager
def undone_on_error(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    optimizers: Sequence[torch.optim.Optimizer],
    resize_: Callable[[Tensor, Tensor], None] = set_data_,
    replaced: Sequence[Tensor] = (),
) -> Iterator[Snapshot]:
    """Undo the cut that is made in here if it, or what comes after it in here, ends in an error or interrupt.

    Args:
        model, layers, optimizers, resize_, replaced: as for `Snapshot`, which this gives.
    """
    snapshot = Snapshot(model, layers, optimizers, resize_, replaced)
    try:
        yield snapshot
    except BaseException as error:
        snapshot.restore_(error)
        raise
