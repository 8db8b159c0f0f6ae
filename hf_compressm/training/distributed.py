"""Cuts on several processes: one set of statistics, one decision, one reducer that knows the new shapes."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..hankel.gramians import elimination_order

DEFAULT_BUCKET = 25 * 2**20


def several_processes() -> bool:
    """Whether there is more than one process in the default group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share_candidates_(statistics: list[Any], first: list[Any]) -> None:
    """Give all processes the same candidates for a read-out, where there are too many states to fit all of them.

    Args:
        statistics: of each layer, empty.
        first: of each layer, on the first batch.
    """
    for entry, seen in zip(statistics, first, strict=True):
        for moments, known in zip(entry.groups, seen.groups, strict=True):
            if not moments.readout or len(moments.candidates):
                continue
            contribution = known.contribution.clone()
            if several_processes():
                dist.all_reduce(contribution)
            moments.candidates = elimination_order(contribution)[: len(known.candidates)].sort().values
            moments.normal_pairs = moments._empty_pairs()


def sum_statistics_(statistics: list[Any]) -> None:
    """Add up the statistics of each layer over the processes. In place; all of them are sums over tokens."""
    if not several_processes():
        return
    for entry in [part for layer in statistics for part in getattr(layer, "heads", [layer])]:
        for owner in [entry, *entry.groups]:
            for name, value in vars(owner).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    dist.all_reduce(value)
                    setattr(owner, name, value)


def decide(choose: Callable[[], Any]) -> Any:
    """What process 0 chooses, on all processes; its error is raised on all of them.

    Raises:
        ValueError: what `choose` raised.
    """
    if not several_processes():
        return choose()
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [(choose(), None)]
        except ValueError as error:
            answer = [(None, str(error))]
    dist.broadcast_object_list(answer, src=0)
    choice, refusal = answer[0]
    if refusal is not None:
        raise ValueError(refusal)
    return choice


def find_ddp(wrapped: Any) -> DistributedDataParallel | None:
    """The DistributedDataParallel around a model, which itself may be wrapped by torch.compile."""
    while wrapped is not None and not isinstance(wrapped, DistributedDataParallel):
        wrapped = getattr(wrapped, "_orig_mod", None)
    return wrapped


def rebuild_reducer_(ddp: DistributedDataParallel) -> None:
    """Make a DDP wrapper reduce gradients of the parameters' new shapes. In place: the training loop holds the object.

    The constructor runs again, with the arguments of the first time. It checks the shapes over all processes.
    """
    stored = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        "process_group": ddp.process_group,
        "bucket_cap_mb": None if ddp.bucket_bytes_cap == DEFAULT_BUCKET else ddp.bucket_bytes_cap / 2**20,
        "mixed_precision": ddp.mixed_precision,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
        "skip_all_reduce_unused_params": getattr(ddp, "skip_all_reduce_unused_params", False),
        "batched_grad_copy": getattr(ddp, "batched_grad_copy", False),
    }
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    sync = "forward_sync_buffers" if hasattr(ddp, "forward_sync_buffers") else "broadcast_buffers"
    stored[sync] = getattr(ddp, sync)
    module, training, comm_hooks = ddp.module, ddp.training, list(ddp._comm_hooks)
    hooks = {name: value for name, value in vars(ddp).items() if name.endswith("_hooks") and name != "_comm_hooks"}
    hooks |= {name: value for name, value in vars(ddp).items() if name.endswith(("_with_kwargs", "_always_called"))}
    ddp.reducer = ddp.logger = None  # type: ignore[assignment]
    gc.collect()
    ddp.__init__(module, **{name: value for name, value in stored.items() if name in known})  # type: ignore[misc]
    vars(ddp).update(hooks)
    ddp.train(training)
    for hook, state in comm_hooks:
        for name in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD's tensors of the old shapes
            getattr(state, name, {}).clear()
        ddp.register_comm_hook(state, hook)
