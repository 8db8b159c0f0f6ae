"""FSDP2 (torch's `fully_shard`): each process holds a part of every parameter, and all of them cut theirs alike."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.fsdp2 import fsdp2_parameters, fsdp2_units, resize_fsdp2_
from ..compat.sharding import is_sharded
from .agreement import SILENCE
from .sharded import Sharded


class FSDP2(Sharded):
    """Parameters and the optimizer's states are sharded, as `DTensor`s. Sharding itself makes no process wait."""

    late = SILENCE

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """If the model is sharded so."""
        return isinstance(trainer.model_wrapped, nn.Module) and bool(fsdp2_units(trainer.model_wrapped))

    @cached_property
    def _kept(self) -> dict[int, Any]:
        return {id(kept.sharded_param): kept for group in fsdp2_parameters(self.model) for kept in group}

    def refuse(self) -> None:
        """What FSDP2 can't run, or this can't cut.

        Raises:
            ValueError: if a group of parameters has several dtypes, parameters are offloaded or sharded in several ways, or
                torch is of an unknown version.
        """
        self.refuse_loop()
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

    def settle_(self) -> None:
        """Free what forward passes left gathered."""
        for unit in fsdp2_units(self.model):
            unit.reshard()

    def resize_parameter_(self, parameter: Tensor, data: Tensor) -> None:
        """Give a parameter, or that whose place it takes while it is gathered, new data of another shape. In place."""
        kept = self._kept.get(id(getattr(parameter, "stands_for", parameter)))
        if kept is None:
            super().resize_parameter_(parameter, data)
        else:
            resize_fsdp2_(kept, data)
