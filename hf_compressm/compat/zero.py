"""DeepSpeed's engine and its ZeRO optimizers: what they hold of a model, and how they are made anew for other shapes."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .parts import Part, States, take_planned_, taken
from .used import CHECKED

MASTER = "master_param"
"""The name of the weights in float32 among the states: as optimizers call copies of the weights."""
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
ENGINE_ARGUMENTS = [
    *("self", "args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler", "mpu"),
    *("dist_init_required", "collate_fn", "config", "config_class", "mesh_device", "dont_change_device"),
]


@dataclass(frozen=True)
class _Piece:
    """Where in a ZeRO optimizer's flat partition of float32 weights a parameter's piece is.

    Args:
        flat: the partition, which the states have the shape of.
        offset, numel: of the piece in it.
        start: of the piece in the flat parameter.
        shape, group: of the parameter.
    """

    flat: Tensor
    offset: int
    numel: int
    start: int
    shape: torch.Size
    group: Any

    def of(self, tensor: Tensor) -> Part:
        """The piece of a state, or of the weights."""
        return Part(tensor.detach()[self.offset : self.offset + self.numel], self.start, self.shape, self.group)


def check_deepspeed(engine: Any) -> None:
    """Refuse versions that this was not checked on.

    Raises:
        ValueError: for any other.
    """
    deepspeed: Any = import_module("deepspeed")

    arguments = list(inspect.signature(deepspeed.DeepSpeedEngine.__init__).parameters)
    known = arguments == ENGINE_ARGUMENTS and type(engine) is deepspeed.DeepSpeedEngine
    if not deepspeed.__version__.startswith(CHECKED["deepspeed"]) or not known:
        raise ValueError(
            f"How DeepSpeed {deepspeed.__version__} ({type(engine).__name__}) keeps a model is not known here; what is known was "
            f"checked on DeepSpeed {' and '.join(CHECKED['deepspeed'])}: take one of these, or FSDP2. Nothing was changed."
        )


def is_zero3(parameter: Tensor) -> bool:
    """Whether a parameter is one of ZeRO-3, with its data spread over the processes."""
    return hasattr(parameter, "ds_id")


def is_held(model: Any) -> bool:
    """Whether a model is DeepSpeed's engine, or has parameters that one holds."""
    deepspeed: Any = sys.modules.get("deepspeed")
    if deepspeed is None or not isinstance(model, nn.Module):
        return False
    held = (is_zero3(p) or getattr(p, "_hp_mapping", None) is not None for p in model.parameters())
    engine = getattr(deepspeed, "DeepSpeedEngine", ())  # it may be half imported
    return isinstance(model, engine) or any(held)


@contextmanager
def gathered_zero3(parameters: Sequence[Tensor]) -> Iterator[None]:
    """With the data of parameters that are not at hand yet; all processes must come here."""
    spread: list[Any] = [p for p in parameters if is_zero3(p)]
    if not spread:
        yield
        return
    deepspeed: Any = sys.modules["deepspeed"]
    status = deepspeed.zero.partition_parameters.ZeroParamStatus
    wanted = [p for p in spread if p.ds_status is not status.AVAILABLE]
    with deepspeed.zero.GatheredParameters(wanted, modifier_rank=None, enabled=bool(wanted)):
        yield


def part_of_zero3(parameter: Any) -> Part:
    """This process's part of a ZeRO-3 parameter."""
    local = parameter.ds_tensor.detach().flatten()
    start = min(parameter.ds_zero_partition_rank * len(local), parameter.ds_numel)
    return Part(
        local[: parameter.ds_numel - start], start, parameter.ds_shape, parameter.ds_process_group, taken(parameter)
    )


def _pieces(zero: Any) -> list[dict[nn.Parameter, _Piece]]:
    """Where the parameters of each group of an optimizer are."""
    groups: list[dict[nn.Parameter, _Piece]] = [{} for _ in zero.optimizer.param_groups]
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3, in subgroups
        for index, parameters in enumerate(zero.fp16_groups):
            flat, group = zero.fp32_partitioned_groups_flat[index], groups[zero.sub_group_to_group_id[index]]
            for p in parameters:
                _, offset, numel = zero.grad_position[zero.get_param_id(p)]
                start = min(p.ds_zero_partition_rank * numel, p.ds_numel)
                numel = min(numel, p.ds_numel - start)
                group[p] = _Piece(flat, offset, numel, start, p.ds_shape, p.ds_process_group)
        return groups
    for index, parameters in enumerate(zero.bit16_groups):
        flat = zero.single_partition_of_fp32_groups[index]
        for p in parameters:
            here = p._hp_mapping
            address = (0, 0, 0)
            if here is not None:
                address = (
                    here.hp_fragment_address.start,
                    here.lp_fragment_address.numel,
                    here.lp_fragment_address.start,
                )
            groups[index][p] = _Piece(flat, *address, p.shape, p._dp_group)
    return groups


def _keys(base: Any, flat: Tensor) -> list[str]:
    """The names of the states that have an entry for each weight."""
    return [key for key, value in base.state.get(flat, {}).items() if _by_weight(value, flat)]


def _by_weight(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape and value.dim() > 0


def settle_(engine: Any) -> None:
    """Free what passes outside of training left gathered under ZeRO-3, and forget which modules ran. In place."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is not None:
        for parameter in engine.module.parameters():
            parameter.ds_active_sub_modules.clear()
        offload.release_backward_leftovers()
        offload.partition_all_parameters()


def read_states_(engine: Any, states: States) -> None:
    """Let states show what the engine's optimizer knows now. In place."""
    base, pieces = engine.optimizer.optimizer, _pieces(engine.optimizer)
    states.param_groups = [{"params": list(group)} for group in pieces]
    states.state.clear()
    for group in pieces:
        for p, piece in group.items():
            entries = {key: base.state[piece.flat][key] for key in _keys(base, piece.flat)}
            states.state[p] = {MASTER: piece.of(piece.flat)} | {key: piece.of(value) for key, value in entries.items()}


def rebuild_engine_(engine: Any, states: States) -> None:
    """Make an engine and its optimizer anew, with the data that is planned for parameters. In place: loops hold the object.

    The constructor runs again on the same model, base optimizer, schedule and config, and the states are dealt out anew.

    Args:
        engine: between two steps.
        states: of `read_states_`, those of resized parameters in their new shapes; they are read anew.
    """
    zero, base = engine.optimizer, engine.basic_optimizer
    before = _pieces(zero)
    numbers = [
        {key: value for key, value in base.state.get(flat, {}).items() if not _by_weight(value, flat)}
        for flat in (next(iter(group.values())).flat for group in before)
    ]
    known, scaler = dict(states.state), zero.loss_scaler
    scheduler, counters = engine.lr_scheduler, {name: getattr(engine, name) for name in COUNTERS}
    module, training = engine.module, engine.training
    hooks = {
        name: value
        for name, value in vars(engine).items()
        if name.endswith(("_hooks", "_with_kwargs", "_always_called"))
    }
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()
    engine.destroy()
    for parameter in module.parameters():
        take_planned_(parameter)
    for group, pieces in zip(base.param_groups, before, strict=True):
        group["params"] = list(pieces)
    base.state.clear()
    arguments = {"mpu": engine.mpu, "collate_fn": engine.collate_fn, "mesh_device": engine.mesh_device}
    arguments |= {
        "config": engine.config,
        "config_class": engine._config,
        "dont_change_device": engine.dont_change_device,
    }
    del zero, engine.optimizer
    gc.collect()
    engine.__init__(None, module, optimizer=base, lr_scheduler=scheduler, **arguments)
    engine._configure_python_gc()
    vars(engine).update(hooks | counters)
    engine.train(training)
    engine.optimizer.loss_scaler = scaler
    for pieces, values in zip(_pieces(engine.optimizer), numbers, strict=True):
        for p, piece in pieces.items():
            entries = known.get(p, {})
            state = base.state[piece.flat] if len(entries) > 1 else {}
            for key, value in values.items():
                state.setdefault(key, value.clone() if isinstance(value, Tensor) else value)
            for key, part in entries.items():
                target = piece.flat if key == MASTER else state.setdefault(key, torch.zeros_like(piece.flat))
                piece.of(target.data).fill_(part.whole())
    read_states_(engine, states)
