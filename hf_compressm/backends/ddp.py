"""DistributedDataParallel: one set of statistics, one decision, and a reducer that knows the new shapes."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..compat.wrapping import comm_hooks, uncompiled
from ..hankel.statistics import Statistics
from .agreement import ProcessLostError, agree, processes, together
from .backend import Backend

DEFAULT_BUCKET = 25 * 2**20

T = TypeVar("T")


class DDP(Backend):
    """Several processes, each with a whole model: all of them cut alike and stay bit-identical."""

    takes_new_parameters: ClassVar[bool] = True

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """If there is more than one process in the default group, or one with a wrapped model."""
        return processes() > 1 or find_ddp(getattr(trainer, "model_wrapped", None)) is not None

    @property
    def processes(self) -> int:
        """How many there are."""
        return processes()

    def together(self, what: str, part: Callable[[], T], silence: float | None = None) -> T:
        """See `agreement.together`.

        Raises:
            ValueError, TypeError: what `part` raised, on this process or another.
            RuntimeError: for any other error of another process, or if one does not come or has ended.
        """
        return together(what, part, silence)

    def agree(self, what: str, facts: Mapping[str, Any], silence: float | None = None) -> None:
        """See `agreement.agree`.

        Raises:
            ValueError: on all of them, with the first name in which one differs from process 0.
            RuntimeError: as `together`.
        """
        agree(what, facts, silence)

    def share_candidates_(self, statistics: Sequence[Statistics], first: Callable[[], Sequence[Statistics]]) -> None:
        """Choose them by what all processes saw in their first batches."""
        wanting = [
            (layer, group)
            for layer, entry in enumerate(statistics)
            for group, moments in enumerate(entry.groups)
            if moments.readout and not len(moments.candidates)
        ]
        seen = together("measuring the first batch", first) if wanting else []
        for layer, group in wanting:
            contribution = seen[layer].groups[group].contribution.clone()
            _add_up_(contribution)
            statistics[layer].groups[group].choose_candidates(contribution)

    def sum_(self, statistics: Sequence[Statistics]) -> None:
        """Add up the statistics over the processes. In place."""
        for entry in statistics:
            for tensor in entry.sums():
                _add_up_(tensor)

    def decide(self, choose: Callable[[], T]) -> T:
        """What process 0 chooses.

        Raises:
            ValueError, TypeError: what `choose` raised; any other error of another process is a RuntimeError.
        """
        first = dist.get_rank() == 0
        answer: list[Any] = [together("a decision of process 0", lambda: choose() if first else None)]
        dist.broadcast_object_list(answer, src=0)
        chosen: T = answer[0]
        return chosen

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in the order of these."""
        everything: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everything, list(items))
        return [item for some in everything for item in some]

    def bring(self, items: Sequence[T]) -> list[list[T]]:
        """The items of each process, on process 0; none on the others."""
        everything: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(list(items), everything, dst=0)
        return everything or []

    def after_cut_(self) -> None:
        """Rebuild the reducer."""
        ddp = find_ddp(self.wrapped)
        if ddp is not None:
            rebuild_reducer_(ddp)
        super().after_cut_()

    def after_undo_(self, error: BaseException | None = None) -> None:
        """The same, together with all other processes, if the error is one that they know of."""
        if error is None or (isinstance(error, Exception) and not isinstance(error, ProcessLostError)):
            super().after_undo_(error)


def _add_up_(tensor: Tensor) -> None:
    """Over the processes, in place; NCCL takes no tensors of the CPU, where large Gramians wait."""
    there = tensor.cuda() if tensor.device.type == "cpu" and dist.get_backend() == "nccl" else tensor
    dist.all_reduce(there)
    if there is not tensor:
        tensor.copy_(there)


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
    synchronising = ddp.require_backward_grad_sync  # not within no_sync()
    hooks = {name: value for name, value in vars(ddp).items() if name.endswith("_hooks") and name != "_comm_hooks"}
    hooks |= {name: value for name, value in vars(ddp).items() if name.endswith(("_with_kwargs", "_always_called"))}
    ddp.reducer = ddp.logger = None  # type: ignore[assignment]
    gc.collect()
    ddp.__init__(module, **{name: value for name, value in stored.items() if name in known})  # type: ignore[misc]
    vars(ddp).update(hooks)
    ddp.train(training)
    ddp.require_backward_grad_sync = synchronising
    for hook, state in registered:
        for name in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD's tensors of the old shapes
            getattr(state, name, {}).clear()
        ddp.register_comm_hook(state, hook)
