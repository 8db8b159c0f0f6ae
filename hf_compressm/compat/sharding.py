"""A parameter that is spread over several processes, whatever spreads it: what this one has of it, all of it, and stand-ins for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .fsdp1 import gathered_fsdp1, part_of_fsdp1, unit_of
from .parts import Part, shape_of
from .zero import gathered_zero3, is_zero3, part_of_zero3


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over several processes, as a `DTensor` or `Part`; its shape is that of the whole."""
    if isinstance(tensor, Part):
        return True
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Any:
    """A sharded tensor, gathered by all processes together; any other as it is."""
    if isinstance(tensor, Part):
        return tensor.whole()
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor


def is_in_pieces(parameter: Tensor) -> bool:
    """Whether a parameter is spread over several processes in pieces of its flat form, by FSDP1 or ZeRO-3."""
    return is_zero3(parameter) or unit_of(parameter) is not None


def is_held_by_others(parameter: Tensor) -> bool:
    """Whether a parameter is gathered only for a while, or is a piece of what FSDP1 or ZeRO-3 holds."""
    return hasattr(parameter, "stands_for") or is_in_pieces(parameter)


def held(parameter: Tensor) -> Any:
    """What this process has of a parameter, without gathering it."""
    if unit_of(parameter) is not None:
        return part_of_fsdp1(parameter)
    return part_of_zero3(parameter) if is_zero3(parameter) else parameter.data


def is_same(one: Any, other: Any) -> bool:
    """Whether what is held of a parameter is the same memory."""
    if isinstance(one, Part) or isinstance(other, Part):
        return type(one) is type(other) and one.taken == other.taken  # alike on all processes, as addresses are not
    if is_sharded(one):
        return one.shape == other.shape and is_same(one.to_local(), other.to_local())
    return bool(one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype)


def parameter_count(model: nn.Module) -> int:
    """Of the whole model, whatever this process holds of it."""
    return sum(shape_of(parameter).numel() for parameter in model.parameters())


def sharded_like(new: Any, old: Any) -> Any:
    """A whole tensor, which all processes have alike, sharded as another one is; as it is if that is whole."""
    if isinstance(old, Part):
        return Part.of(new, old.group)
    if not is_sharded(old):
        return new
    from torch.distributed.tensor import distribute_tensor

    # The source rank None: each takes its part of what it has, and nothing is sent.
    return distribute_tensor(new, old.device_mesh, old.placements, src_data_rank=None)


_ask_the_others: list[Callable[[nn.Module], object]] = []


@contextmanager
def asking_the_others(ask: Callable[[nn.Module], object]) -> Iterator[None]:
    """Where only this process reads weights, call `ask` with a module before its weights are gathered."""
    _ask_the_others.append(ask)
    try:
        yield
    finally:
        _ask_the_others.remove(ask)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """With whole parameters in the places of a module's sharded ones; each knows its own as `stands_for`.

    All processes must come here together, or those that did not be asked to.
    """
    parameters = list(module.parameters())
    if _ask_the_others and any(is_sharded(p) or is_in_pieces(p) for p in parameters):
        _ask_the_others[-1](module)
    with _in_place_of(module, is_sharded, whole), gathered_zero3(parameters), gathered_fsdp1(parameters):
        yield


@contextmanager
def shapes_only(module: nn.Module) -> Iterator[None]:
    """With zeros in the places of parameters that are spread over processes: nothing is gathered, and none waits for another."""

    def zeros(parameter: Tensor) -> Tensor:
        return torch.zeros(shape_of(parameter), dtype=parameter.dtype, device=parameter.device)

    with _in_place_of(module, lambda p: is_sharded(p) or is_in_pieces(p), zeros):
        yield


@contextmanager
def holding(module: nn.Module, data: Mapping[str, Tensor]) -> Iterator[None]:
    """With other data, of any shape, in the places of some of a module's parameters, by name."""
    new = {id(module.get_parameter(name)): value for name, value in data.items()}
    with _in_place_of(module, lambda p: id(p) in new, lambda p: new[id(p)].detach().to(p.device, p.dtype)):
        yield


@contextmanager
def _in_place_of(
    module: nn.Module, chosen: Callable[[Tensor], bool], make: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    found = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if chosen(parameter)
    ]
    try:
        for owner, name, parameter in found:
            stand_in = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
            stand_in.stands_for = parameter  # type: ignore[attr-defined]
            setattr(owner, name, stand_in)
        yield
    finally:
        for owner, name, parameter in found:
            setattr(owner, name, parameter)
