"""FSDP2 (torch's `fully_shard`): each process holds a part of every parameter, and all of them cut theirs alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..compat import asking_the_others, fsdp2_parameters, fsdp2_units, gathered, is_sharded, resize_fsdp2_, uncompiled
from .agreement import SILENCE
from .ddp import DDP
from .loop import Loop

T = TypeVar("T")


class FSDP2(DDP):
    """Parameters and the optimizer's states are sharded; those of one mixer at a time are gathered for a cut.

    Processes must gather, and run the model, together: a forward pass of one alone would wait for the others. Sharding itself
    makes none wait.
    """

    late = SILENCE

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """If the model is sharded so."""
        return isinstance(trainer.model_wrapped, nn.Module) and bool(fsdp2_units(trainer.model_wrapped))

    @property
    def model(self) -> nn.Module:
        """The sharded model, which is the plain one: FSDP2 wraps nothing around it."""
        sharded: nn.Module = uncompiled(self.trainer.model_wrapped)
        return sharded

    @cached_property
    def _kept(self) -> dict[int, Any]:
        return {id(kept.sharded_param): kept for group in fsdp2_parameters(self.model) for kept in group}

    def refuse(self) -> None:
        """What FSDP2 can't run, or this can't cut.

        Raises:
            ValueError: if a group of parameters has several dtypes, parameters are offloaded or sharded in several ways, or
                torch is of an unknown version.
        """
        if isinstance(self.trainer, Loop):
            raise ValueError(
                "compress_ can't cut a model that FSDP2 shards: give CompreSSMCallback to a Trainer, or cut the model before it is "
                "sharded. Nothing was changed."
            )
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in fsdp2_parameters(self.model):
            dtypes: dict[torch.dtype, str] = {}
            for kept in group:
                parameter = kept.sharded_param
                if parameter.requires_grad:
                    dtypes.setdefault(parameter.dtype, names.get(id(parameter), "a parameter"))
                if kept.offload_to_cpu:
                    raise ValueError(
                        "CompreSSMCallback can't cut parameters that FSDP2 offloads to the CPU: drop cpu_offload from "
                        "fsdp_config (offload_params in accelerate's), or call compress_pretrained before or after the training."
                    )
                if parameter.device_mesh.ndim > 1:
                    raise ValueError(
                        f"CompreSSMCallback can't cut parameters that are sharded over a mesh of {parameter.device_mesh.ndim} "
                        "dimensions (hybrid sharding, tensor or context parallelism): shard over one, or call "
                        "compress_pretrained before or after the training."
                    )
            if len(dtypes) > 1:
                which = " and ".join(
                    f"{name} in {str(dtype).removeprefix('torch.')}" for dtype, name in dtypes.items()
                )
                raise ValueError(
                    f"FSDP2 can't train parameters of several dtypes in one group, such as {which}: train with bf16=True, which "
                    "keeps all of them in float32 and computes in bfloat16, or load the model in one dtype."
                )
        strange = [n for n, p in self.model.named_parameters() if is_sharded(p) and id(p) not in self._kept]
        if strange:
            raise ValueError(
                f"{strange[0]} is sharded by something other than FSDP2, and can't be cut: call compress_pretrained before or "
                "after the training."
            )

    def least(self, count: int) -> int:
        """The least of the processes' numbers: a pass of the model wants all of them."""
        least = torch.tensor(count, device=next(self.model.parameters()).device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def settle_(self) -> None:
        """Free what forward passes left gathered."""
        for unit in fsdp2_units(self.model):
            unit.reshard()

    def decide(self, choose: Callable[[], T]) -> T:
        """What process 0 chooses. Where it reads the weights of a layer, the others gather them with it.

        Raises:
            ValueError, TypeError: what `choose` raised; any other error of process 0 is a RuntimeError on the others.
        """
        if dist.get_rank() > 0:
            while (name := self._send()) is not None:
                with gathered(self.model.get_submodule(name)):
                    pass
            return super().decide(choose)
        names = {id(module): name for name, module in self.model.named_modules()}
        chosen: list[T] = []
        refusal: Exception | None = None
        try:
            with asking_the_others(lambda module: self._send(names[id(module)])):
                chosen = [choose()]
        except Exception as error:  # raised where the others hear of it
            refusal = error
        finally:
            self._send(None)  # they wait no longer

        def choice() -> T:
            if refusal is not None:
                raise refusal
            return chosen[0]

        return super().decide(choice)

    def _send(self, name: str | None = None) -> str | None:
        """The name of a module whose weights are read, from process 0 to the others; None once there is none."""
        sent = [name]
        dist.broadcast_object_list(sent, src=0)
        return sent[0]

    def resize_parameter_(self, parameter: Tensor, data: Tensor) -> None:
        """Give a parameter, or that whose place it takes while it is gathered, new data of another shape. In place."""
        kept = self._kept.get(id(getattr(parameter, "stands_for", parameter)))
        if kept is None:
            super().resize_parameter_(parameter, data)
        else:
            resize_fsdp2_(kept, data)
