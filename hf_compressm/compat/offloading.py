"""Accelerate's hooks, by which the weights of a module wait elsewhere than where it computes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from accelerate.utils import PrefixedDataset, align_module_device
from torch import Tensor, nn

from .sharding import gathered


def hook_of(module: nn.Module) -> Any:
    """Accelerate's hook on a module, by which its weights are moved; None if there is none."""
    return getattr(module, "_hf_hook", None)


def device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on, which is not that of its weights if these are offloaded."""
    for each in module.modules():
        device = getattr(hook_of(each), "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(module.parameters()).device


@contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """With offloaded weights of a module, and of what is in it, on the device that it computes on, and sharded ones whole.

    Sharded ones are gathered by all processes together, which must all come here.
    """
    with ExitStack() as stack:
        for each in module.modules():
            stack.enter_context(align_module_device(each))
        stack.enter_context(gathered(module))
        yield


def weights_map(module: nn.Module) -> tuple[dict[str, Tensor], str] | None:
    """Where the weights of an offloaded module wait in memory, and what comes before their names there; else None."""
    found, prefix = getattr(hook_of(module), "weights_map", None), ""
    while isinstance(found, PrefixedDataset):
        found, prefix = found.dataset, found.prefix + prefix
    found = getattr(found, "state_dict", found)  # of an `OffloadedWeightsLoader`
    return (found, prefix) if isinstance(found, dict) else None


def is_in_memory(module: nn.Module, name: str) -> bool:
    """Whether a parameter of a module is there, or waits on the CPU as an offloaded one."""
    found = weights_map(module)
    return not module.get_parameter(name).is_meta or (found is not None and found[1] + name in found[0])


def keep_offloaded_(module: nn.Module, name: str) -> None:
    """Let a parameter that was given new data, and is at hand now, wait on the CPU where the module's others do. In place."""
    found = weights_map(module)
    if found is not None:
        weights, prefix = found
        weights[prefix + name] = module.get_parameter(name).detach().cpu()
        hook_of(module).original_devices.setdefault(name, torch.device("cpu"))


def without_hooks_(module: nn.Module) -> None:
    """Take accelerate's hooks off a module, and what is in it, without moving a weight. In place."""
    for each in module.modules():
        if hook_of(each) is not None:
            each._hf_hook = ModelHook()
            remove_hook_from_module(each)
            if inspect.ismethod(each.forward):  # what it was before it had a hook, and so would be in another class
                del each.forward


def follow_class_(module: nn.Module) -> None:
    """Let the hook of a module that was given another class call the `forward` of that. In place."""
    if inspect.ismethod(vars(module).get("_old_forward")):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)
