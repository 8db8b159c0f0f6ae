"""FSDP1's units (torch's `FullyShardedDataParallel`): what each keeps of its parameters, and how it is made anew for other shapes."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .parts import Part, States, planned_data, pop_planned_, taken
from .used import CHECKED

HANDLE_ARGUMENTS = [
    *("self", "params", "fully_sharded_module", "device", "sharding_strategy", "offload_params", "mp_param_dtype"),
    *("mp_reduce_dtype", "keep_low_precision_grads", "process_group", "use_orig_params", "fsdp_extension"),
]


def fsdp1_units(model: nn.Module) -> list[Any]:
    """The modules of a model that FSDP1 gathers and frees, each as one; none where it is not sharded so."""
    module: Any = sys.modules.get("torch.distributed.fsdp")
    return [
        each for each in model.modules() if module is not None and isinstance(each, module.FullyShardedDataParallel)
    ]


def know_units_(model: nn.Module) -> None:
    """Note on each parameter the unit that it is in, and the shape that it has as a whole. In place.

    Raises:
        ValueError: if torch is of a version that this was not checked on, and keeps other things.
    """
    for unit in fsdp1_units(model):
        if unit._handle is None or not uses_original(unit):
            continue
        flat = unit._handle.flat_param
        if list(inspect.signature(type(unit._handle).__init__).parameters) != HANDLE_ARGUMENTS:
            raise ValueError(
                f"How FSDP1 of torch {torch.__version__} keeps its parameters is not known here; what is known was checked on torch "
                f"{' and '.join(CHECKED['torch'])}: take one of these, or FSDP2. Nothing was changed."
            )
        for p, shape in zip(flat._params, flat._shapes, strict=True):
            p.whole_shape, p.unit = shape, unit


def uses_original(unit: Any) -> bool:
    """Whether the optimizer holds the model's parameters, in pieces, and no flat ones."""
    return bool(unit._use_orig_params)


def unit_of(parameter: Tensor) -> Any:
    """The unit that a parameter is in; None if FSDP1 does not shard it."""
    return getattr(parameter, "unit", None)


@contextmanager
def gathered_fsdp1(parameters: Sequence[Tensor]) -> Iterator[None]:
    """With the data of parameters that are not at hand yet; all processes must come here."""
    units = {id(unit): unit for p in parameters if (unit := unit_of(p)) is not None}
    with ExitStack() as stack:
        for unit in units.values():
            if unit._handle._training_state.name == "IDLE":
                stack.enter_context(type(unit).summon_full_params(unit, recurse=False, writeback=False))
        yield


def part_of_fsdp1(parameter: Any) -> Part:
    """This process's part of a parameter that FSDP1 shards; all of it, where there is one process."""
    handle = parameter.unit._handle
    local, start = parameter.detach().flatten(), 0
    if handle.uses_sharded_strategy:
        index = next(i for i, other in enumerate(handle.flat_param._params) if other is parameter)
        info = handle.flat_param._shard_param_infos[index]
        offset, numel, start = info[1:4] if info.in_shard else (0, 0, 0)
        local = handle.flat_param.detach()[offset : offset + numel]
    return Part(local, start, parameter.whole_shape, handle.process_group, taken(parameter))


def read_flat_states_(optimizer: torch.optim.Optimizer, states: States) -> None:
    """Let states show what an optimizer knows of the pieces that it holds now; by all processes together. In place."""
    states.param_groups = optimizer.param_groups
    states.state.clear()
    states.numbers.clear()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    # Of a parameter that a process has no piece of, its optimizer knows nothing.
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [_entries(optimizer.state.get(p, {})) for p in held])
    for number, p in enumerate(held):
        keys, numbers = ({k: v for each in found for k, v in each[number][kind].items()} for kind in (0, 1))
        own = optimizer.state.get(p, {})
        if unit_of(p) is None:
            states.state[p] = dict(own)
            continue
        here = part_of_fsdp1(p)
        empty = here.local[:0]
        states.numbers[p] = numbers
        states.state[p] = {
            key: Part(own.get(key, empty.to(dtype)).flatten(), here.start, here.shape, here.group)
            for key, dtype in keys.items()
        }


def _entries(state: dict[str, Any]) -> tuple[dict[str, torch.dtype], dict[str, Any]]:
    """The names of the entries for each weight, with their dtypes; and the others."""
    by_weight = {key: value.dtype for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
    return by_weight, {key: value for key, value in state.items() if key not in by_weight}


def rebuild_units_(root: Any, optimizer: Any, states: States) -> None:
    """Make the units anew that hold parameters for which data is planned, one after the other. In place.

    Args:
        root: the outermost unit, between two steps.
        optimizer: that holds the parameters, in pieces; None if it is still to be made.
        states: of `read_flat_states_`, those of resized parameters in their new shapes; they are read anew.
    """
    from torch.distributed.fsdp._init_utils import _init_param_handle_from_params

    units = fsdp1_units(root)
    for unit in units:
        parameters = [] if unit._handle is None else list(unit._handle.flat_param._params)
        if not any(planned_data(p) is not None for p in parameters):
            continue
        with gathered_fsdp1(parameters):
            data = [p.detach().clone() if planned_data(p) is None else None for p in parameters]
        old = unit._handle
        unit.params.remove(old.flat_param)
        unit._fully_sharded_module_to_handle.pop(old._fully_sharded_module)
        unit._handle = None
        for p, same in zip(parameters, data, strict=True):
            planned = pop_planned_(p)
            p.data = same if planned is None else planned
            p.grad = None
            p._fsdp_flattened = False
        _init_param_handle_from_params(unit, parameters, unit._fsdp_wrapped_module)
        know_units_(unit)
        if optimizer is not None:
            for p in parameters:
                _deal_(optimizer, states, p)
    order = root._exec_order_data
    limits = [getattr(order, f"_{way}_prefetch_limit") for way in ("backward", "forward")]
    root._exec_order_data = type(order)(dist.get_debug_level(), *limits)
    for unit in units:
        unit._reset_lazy_init()  # which the next forward pass does for all units
    if optimizer is not None:
        read_flat_states_(optimizer, states)


def _deal_(optimizer: Any, states: States, p: Any) -> None:
    """Give an optimizer what it knows of this process's new piece of a parameter."""
    known = {key: part.whole() for key, part in states.state.get(p, {}).items()}
    here = part_of_fsdp1(p)
    optimizer.state.pop(p, None)
    if known and len(here.local):
        rows = slice(here.start, here.start + len(here.local))
        mine = {key: tensor.flatten()[rows].clone().view(p.shape) for key, tensor in known.items()}
        # Its own copies of numbers: some are tensors that each step counts up.
        optimizer.state[p] = copy.deepcopy(states.numbers[p]) | mine


def settle_units_(root: nn.Module) -> None:
    """Free what forward passes left gathered, and let modules have their pieces of parameters again. In place."""
    from torch.distributed.fsdp._runtime_utils import _reshard

    for unit in fsdp1_units(root):
        if unit._handle is not None and hasattr(unit._handle.flat_param, "_local_shard"):  # it has run
            _reshard(unit, unit._handle, unit._handle.uses_sharded_strategy)
