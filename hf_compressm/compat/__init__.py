"""Everything private or unofficial of other libraries that this package touches, and nothing of its own.

`USED` names each, with the versions that it was checked on; a test looks whether all of them are still there. What takes
its place where it is missing is said at each function.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from accelerate.utils import PrefixedDataset, align_module_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .fsdp1 import gathered_fsdp1, part_of_fsdp1, unit_of
from .parts import Part, shape_of
from .zero import VERSIONS, gathered_zero3, is_zero3, part_of_zero3

CHECKED = {"torch": ("2.11", "2.13"), "transformers": ("5.23", "5.24"), "accelerate": ("1.15",), "deepspeed": VERSIONS}

USED = {
    "transformers.configuration_utils._commit_hash": "the revision that a config was loaded from",
    "transformers.modeling_utils.PreTrainedModel._upload_modified_files": "save_pretrained(push_to_hub=True) and "
    "push_to_hub write a card of their own after the model is saved, and only this comes after it",
    "transformers.modeling_utils.split_torch_state_dict_into_shards": "save_pretrained asks it which tensors go to which file",
    "transformers.trainer.Trainer._push_from_checkpoint": "copies weights and config to the folder that it uploads, and no "
    "other file; its event comes before the copies",
    "transformers.trainer.Trainer._get_output_dir": "where a checkpoint is being written, in a hyperparameter search, too",
    "torch.nn.parallel.distributed.DistributedDataParallel._comm_hooks": "to register them again with a new reducer",
    "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1PreTrainedModel._init_weights": "copies multipliers of one "
    "length to all layers (in modeling/modeling_compressm.py, which stands alone beside saved models)",
    "accelerate.state.PartialState._shared_state": "a Trainer resets Accelerate's global state, which Accelerators of others use",
    "accelerate.state.AcceleratorState._shared_state": "the same",
    "accelerate.state.GradientState._shared_state": "the same",
    "accelerate.hooks.AlignDevicesHook": "its attributes execution_device, weights_map and original_devices, as `module._hf_hook`: "
    "where the weights of an offloaded module are, and where they are computed with",
    "accelerate.hooks.add_hook_to_module": "keeps the `forward` of the module's class as `module._old_forward`",
    "torch.distributed.distributed_c10d._get_default_store": "where the processes of a group find each other: it answers also "
    "where a collective would wait for a process that never comes",
    "torch._dynamo.utils.counters": "whether anything was compiled that has to be compiled again",
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam": "all that FSDP2 keeps of a parameter, its shapes among it: made "
    "anew for another shape. Of its attributes, those in `FSDP2_ATTRIBUTES`",
    "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule._get_fsdp_state": "where they are: _fsdp_param_groups, which before "
    "2.12 was one, _fsdp_param_group, and the fsdp_params of each",
    "torch.distributed.fsdp._flat_param.FlatParamHandle": "all that FSDP1 keeps of a unit's parameters, made anew for other shapes "
    "(`compat.fsdp1`), by the next one",
    "torch.distributed.fsdp._init_utils._init_param_handle_from_params": "makes it as FSDP1's constructor does",
    "torch.distributed.fsdp._runtime_utils._reshard": "frees what a pass outside of training left gathered",
    "torch.distributed.fsdp.FullyShardedDataParallel._reset_lazy_init": "lets the next forward pass know the new units",
    "transformers.trainer.Trainer._load_from_checkpoint": "under FSDP2 a model must have a checkpoint's sizes before its weights are "
    "loaded, and no event comes between its sharding and that",
    "transformers.trainer.Trainer._load_best_model": "the same",
    "transformers.trainer.Trainer._prepare_for_training": "the same, under FSDP1 and DeepSpeed",
}

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


CHECKPOINTED = "_checkpoint_wrapped_module."
"""In the names of modules that are computed again in the backward pass under FSDP, and not in those of their tensors."""
UPLOAD = "_upload_modified_files"
SPLIT = "split_torch_state_dict_into_shards"
PUSH_FROM_CHECKPOINT = "_push_from_checkpoint"


def commit_hash(config: Any) -> str | None:
    """The revision on the Hub that a config was loaded from, if known."""
    return getattr(config, "_commit_hash", None)


def checkpoint_parent(trainer: Any) -> str:
    """The folder in which a `Trainer` makes its checkpoint folders."""
    return str(trainer._get_output_dir(trial=None))


def comm_hooks(ddp: DistributedDataParallel) -> list[tuple[Callable[..., Any], Any]]:
    """The communication hooks of a DDP wrapper, with their states."""
    return list(ddp._comm_hooks)


def process_store() -> Any:
    """The key-value store that all processes of the default group share."""
    return torch.distributed.distributed_c10d._get_default_store()


def accelerate_state() -> list[dict[str, Any]]:
    """The dictionaries that hold Accelerate's global state: what device and processes there are, precision, accumulation."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [owner._shared_state for owner in (PartialState, AcceleratorState, GradientState)]


def recompute_activations_(model: Any) -> None:
    """Have a model compute its activations again in the backward pass; it was called by another name before 5.24."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


def forget_compiled_code() -> None:
    """Have torch.compile trace anew; only if something was compiled, since the reset imports inductor, which is slow."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
        dynamo.reset()


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


def before_loading_(trainer: Any, prepare_: Callable[[str], None]) -> None:
    """Have a `Trainer` call `prepare_` with the folder of a checkpoint before it loads weights from it. In place."""
    load, load_best = trainer._load_from_checkpoint, trainer._load_best_model
    prepare = trainer._prepare_for_training

    def prepare_for_training(steps: int, batches: Any, folder: str | None) -> Any:
        fsdp1 = trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1
        if folder is not None and (fsdp1 or trainer.is_deepspeed_enabled):
            prepare_(folder)
        return prepare(steps, batches, folder)

    def load_from_checkpoint(folder: str, *args: Any, **kwargs: Any) -> None:
        prepare_(folder)
        load(folder, *args, **kwargs)

    def load_best_model() -> None:
        prepare_(trainer.state.best_model_checkpoint)
        load_best()

    trainer._load_from_checkpoint, trainer._load_best_model = load_from_checkpoint, load_best_model
    trainer._prepare_for_training = prepare_for_training


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


def stock_scans(modules: Iterable[nn.Module], name: str) -> list[tuple[Any, Callable[..., Any]]]:
    """The Python modules that have transformers' plain scan of that name for some of these mixers, and the scan.

    Since 5.24 it is a function of the module that is looked up when the mixer runs; none are found where it is not, or
    where mamba_ssm takes its place.
    """
    if find_spec("mamba_ssm") is not None:
        return []
    names = {base.__module__ for kind in {type(module) for module in modules} for base in kind.__mro__}
    homes = [sys.modules.get(home) for home in sorted(names)]
    return [(home, getattr(home, name)) for home in homes if hasattr(home, name)]


def uncompiled(module: Any) -> Any:
    """The module inside of `torch.compile`'s wrapper, or itself."""
    return getattr(module, "_orig_mod", module)


def inside(wrapped: Any) -> Any:
    """The model inside of `torch.compile`'s wrapper, DeepSpeed's engine or FSDP1's, or itself."""
    module = uncompiled(wrapped)
    kinds = [("deepspeed", "DeepSpeedEngine"), ("torch.distributed.fsdp", "FullyShardedDataParallel")]
    known = tuple(getattr(sys.modules[home], name) for home, name in kinds if home in sys.modules)
    return uncompiled(module.module) if isinstance(module, known) else module


def calling_trainer() -> tuple[Any, dict[str, Any]]:
    """The `Trainer` that sends the event whose handler asks, and the local variables of its method that does.

    Events get neither the trainer nor the checkpoint that a run was resumed from. None and nothing where no trainer
    is among the callers.
    """
    from transformers import Trainer

    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner, frame.f_locals
        frame = frame.f_back
    return None, {}
