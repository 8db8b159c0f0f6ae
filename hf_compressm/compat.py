"""Everything private or unofficial of other libraries that this package touches, and nothing of its own.

`USED` names each, with the versions that it was checked on; a test looks whether all of them are still there. What takes
its place where it is missing is said at each function.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from accelerate.hooks import ModelHook, remove_hook_from_module
from accelerate.utils import PrefixedDataset, align_module_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

CHECKED = {"torch": ("2.11", "2.13"), "transformers": ("5.23", "5.24"), "accelerate": ("1.15",)}

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
    "torch._dynamo.utils.counters": "whether anything was compiled that has to be compiled again",
}


UPLOAD = "_upload_modified_files"
SPLIT = "split_torch_state_dict_into_shards"
PUSH_FROM_CHECKPOINT = "_push_from_checkpoint"


def commit_hash(config: Any) -> str | None:
    """The revision on the Hub that a config was loaded from, if known."""
    return getattr(config, "_commit_hash", None)


def checkpoint_parent(trainer: Any) -> str:
    """The folder in which a `Trainer` makes its checkpoint folders."""
    return trainer._get_output_dir(trial=None)


def comm_hooks(ddp: DistributedDataParallel) -> list[tuple[Callable, Any]]:
    """The communication hooks of a DDP wrapper, with their states."""
    return list(ddp._comm_hooks)


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
    """With offloaded weights of a module, and of what is in it, on the device that it computes on."""
    with ExitStack() as stack:
        for each in module.modules():
            stack.enter_context(align_module_device(each))
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


def stock_scans(modules: Iterable[nn.Module], name: str) -> list[tuple[Any, Callable]]:
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
