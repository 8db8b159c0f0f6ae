"""FSDP2's parameters (torch's `fully_shard`): what it keeps of each, and how one gets data of another shape."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import is_sharded
from .used import CHECKED

FSDP2_ARGUMENTS = [
    *("self", "param", "module_info", "mesh_info", "post_forward_mesh_info", "device"),
    *("shard_placement_fn", "mp_policy", "offload_policy"),
]
FSDP2_ATTRIBUTES = [
    "_module_info",
    "_param_fqn",
    "_post_load_hook_handle",
    "_setattr_on_modules",
    "fsdp_placement",
    "init_dtype_attrs",
]


def fsdp2_units(model: nn.Module) -> list[Any]:
    """The modules of a model that FSDP2 gathers and frees, each as one; none where it is not sharded so."""
    module: Any = sys.modules.get("torch.distributed.fsdp")
    return [each for each in model.modules() if module is not None and isinstance(each, module.FSDPModule)]


def fsdp2_parameters(model: nn.Module) -> list[list[Any]]:
    """What FSDP2 keeps of a model's parameters (an `FSDPParam` of each, with it as `sharded_param`), by group.

    Raises:
        ValueError: if torch is of a version that this was not checked on, and keeps other things.
    """
    units = fsdp2_units(model)
    if not units:
        return []
    groups: list[Any] = []
    for unit in units:
        state = unit._get_fsdp_state()
        several = getattr(state, "_fsdp_param_groups", None)
        groups += [getattr(state, "_fsdp_param_group", None)] if several is None else several
    kept = [group.fsdp_params for group in groups if group is not None]
    for one in [one for group in kept for one in group][:1]:
        arguments = list(inspect.signature(type(one).__init__).parameters)
        if arguments != FSDP2_ARGUMENTS or not all(hasattr(one, name) for name in FSDP2_ATTRIBUTES):
            kept = []
    if not any(kept):
        raise ValueError(
            f"How FSDP2 of torch {torch.__version__} keeps its parameters is not known here; what is known was checked on torch "
            f"{' and '.join(CHECKED['torch'])}: take one of these, or DDP. Nothing was changed."
        )
    return kept


def resize_fsdp2_(kept: Any, data: Tensor) -> None:
    """Give a parameter that FSDP2 shards new data of another shape. In place: it stays the same object.

    Args:
        kept: its `FSDPParam`, which also stays the same object.
        data: whole, the same on all processes; or sharded as the parameter will be.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    parameter: nn.Parameter = kept.sharded_param
    empty = torch.empty(data.shape, dtype=parameter.dtype, device=kept.device) if is_sharded(data) else None
    full = data.detach().to(kept.device, parameter.dtype).contiguous() if empty is None else empty
    new = type(kept)(
        nn.Parameter(full, requires_grad=parameter.requires_grad),
        kept._module_info,
        kept.mesh_info,
        kept.post_forward_mesh_info,
        kept.device,
        lambda _: kept.fsdp_placement,
        kept.mp_policy,
        CPUOffloadPolicy(pin_memory=kept.pin_memory) if kept.offload_to_cpu else OffloadPolicy(),
    )
    new._post_load_hook_handle.remove()
    if is_sharded(data):
        new.sharded_param.detach().to_local().copy_(data.detach().to_local())  # type: ignore[attr-defined]
    new.init_dtype_attrs(kept.mp_policy)
    parameter.grad = None
    torch.utils.swap_tensors(parameter, new.sharded_param)
    own = {name: vars(kept)[name] for name in ("_param_fqn", "_post_load_hook_handle")}
    vars(kept).clear()  # of the old shape's whole parameter, too, which is made anew where it is missing
    vars(kept).update(vars(new) | own | {"sharded_param": parameter})
    kept._setattr_on_modules(parameter)
