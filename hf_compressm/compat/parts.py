"""What a process holds of a tensor that is spread over several in pieces of its flat form, as by FSDP1 and ZeRO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """A piece of a tensor.

    Args:
        local: what this process has of the flat tensor, [n]; n may be 0.
        start: where in the flat tensor that begins.
        shape: of the whole tensor.
        group: of the processes that have the pieces; None for all.
        taken: how often the parameter, if it is of one, had taken data that was planned for it.
    """

    local: Tensor = field(repr=False)
    start: int
    shape: torch.Size
    group: Any = field(default=None, repr=False)
    taken: int = 0

    @classmethod
    def of(cls, tensor: Tensor, group: Any = None) -> Part:
        """This process's share of a whole tensor, which all have alike."""
        size = -(-tensor.numel() // dist.get_world_size(group))
        start = min(dist.get_rank(group) * size, tensor.numel())
        return cls(tensor.detach().flatten()[start : start + size].clone(), start, tensor.shape, group)

    def whole(self) -> Tensor:
        """The tensor, put together by all processes, which must all come here."""
        full = self.local.new_zeros(self.shape.numel())
        full[self.start : self.start + len(self.local)] = self.local
        # As bytes: of each, all processes but one have a zero, and the sum is exact to the bit.
        dist.all_reduce(full.view(torch.uint8), group=self.group)
        return full.view(self.shape)

    def fill_(self, tensor: Tensor) -> None:
        """Make it the part of a whole tensor. In place."""
        self.local.copy_(tensor.detach().flatten()[self.start : self.start + len(self.local)])


class States:
    """What an optimizer that holds pieces knows of each parameter, as one that holds the parameters themselves.

    Attributes:
        param_groups: with the model's parameters.
        state: for each of them its part of each state, by name.
        numbers: what else is known of them, such as the steps.
    """

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[nn.Parameter, dict[str, Any]] = {}
        self.numbers: dict[nn.Parameter, dict[str, Any]] = {}


def plan_data_(parameter: Tensor, data: Tensor | Part) -> None:
    """Keep the data of another shape that a parameter will have once what holds its pieces is made anew."""
    parameter.planned = data if isinstance(data, Part) else Part.of(data.to(parameter.dtype))  # type: ignore[attr-defined]


def planned_data(parameter: Tensor) -> Part | None:
    """What `plan_data_` kept, if anything."""
    return getattr(parameter, "planned", None)


def taken(parameter: Tensor) -> int:
    """How often a parameter took data that was planned for it."""
    return getattr(parameter, "taken", 0)


def pop_planned_(parameter: Any) -> Tensor | None:
    """The data that was planned for a parameter, whole, if any: it is taken now."""
    planned = planned_data(parameter)
    if planned is None:
        return None
    forget_planned_(parameter)
    parameter.taken = taken(parameter) + 1
    return planned.whole()


def forget_planned_(parameter: Tensor) -> None:
    """Drop what `plan_data_` kept."""
    vars(parameter).pop("planned", None)


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, of which this process may hold a part alone."""
    planned, known = planned_data(parameter), getattr(parameter, "whole_shape", None)  # of `compat.fsdp1`
    if planned is not None:
        return planned.shape
    return getattr(parameter, "ds_shape", parameter.shape) if known is None else known  # of ZeRO-3


def take_planned_(parameter: Any) -> None:
    """Give a parameter the data that is planned for it, once nothing holds pieces of it, other than ZeRO-3 by its own means."""
    data, convert = pop_planned_(parameter), getattr(parameter, "convert_to_zero_parameters", None)
    if data is None:
        return
    parameter.grad = None
    if convert is not None:  # it becomes another one of ZeRO-3, by what made it one
        for name in [name for name in vars(parameter) if name.startswith("ds_")]:
            delattr(parameter, name)
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = parameter.data.to(other)  # drops autograd's accumulator of the old shape
    parameter.data = data
    if convert is not None:
        convert([parameter])
