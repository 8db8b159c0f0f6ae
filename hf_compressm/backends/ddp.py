"""DistributedDataParallel: one set of statistics, one decision, and a reducer that knows the new shapes."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..compat import comm_hooks, uncompiled
from ..hankel.statistics import Statistics
from .backend import Backend

DEFAULT_BUCKET = 25 * 2**20

T = TypeVar("T")


class DDP(Backend):
    """Several processes, each with a whole model: all of them cut alike and stay bit-identical."""

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """If there is more than one process in the default group."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def share_candidates_(self, statistics: Sequence[Statistics], first: Callable[[], Sequence[Statistics]]) -> None:
        """Choose them by what all processes saw in their first batches."""
        wanting = [
            (layer, group)
            for layer, entry in enumerate(statistics)
            for group, moments in enumerate(entry.groups)
            if moments.readout and not len(moments.candidates)
        ]
        seen = first() if wanting else []
        for layer, group in wanting:
            contribution = seen[layer].groups[group].contribution.clone()
            dist.all_reduce(contribution)
            statistics[layer].groups[group].choose_candidates(contribution)

    def sum_(self, statistics: Sequence[Statistics]) -> None:
        """Add up the statistics over the processes. In place."""
        for entry in statistics:
            for tensor in entry.sums():
                here = tensor.to(entry.tokens.device)  # from the CPU, if they are too many for the device
                dist.all_reduce(here)
                tensor.copy_(here)

    def decide(self, choose: Callable[[], T]) -> T:
        """What process 0 chooses.

        Raises:
            ValueError: what `choose` raised.
        """
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

    def after_cut_(self) -> None:
        """Rebuild the reducer."""
        ddp = find_ddp(self.trainer.model_wrapped)
        if ddp is not None:
            rebuild_reducer_(ddp)
        super().after_cut_()


def find_ddp(wrapped: Any) -> DistributedDataParallel | None:
    """The DistributedDataParallel around a model, which itself may be wrapped by torch.compile."""
    inner = uncompiled(wrapped)
    return inner if isinstance(inner, DistributedDataParallel) else None


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
    module, training, registered = ddp.module, ddp.training, comm_hooks(ddp)
    hooks = {name: value for name, value in vars(ddp).items() if name.endswith("_hooks") and name != "_comm_hooks"}
    hooks |= {name: value for name, value in vars(ddp).items() if name.endswith(("_with_kwargs", "_always_called"))}
    ddp.reducer = ddp.logger = None  # type: ignore[assignment]
    gc.collect()
    ddp.__init__(module, **{name: value for name, value in stored.items() if name in known})  # type: ignore[misc]
    vars(ddp).update(hooks)
    ddp.train(training)
    for hook, state in registered:
        for name in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD's tensors of the old shapes
            getattr(state, name, {}).clear()
        ddp.register_comm_hook(state, hook)
