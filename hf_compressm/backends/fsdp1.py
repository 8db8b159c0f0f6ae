"""FSDP1 (torch's `FullyShardedDataParallel`): the units whose parameters were cut are made anew, one after the other."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..compat.fsdp1 import fsdp1_units, know_units_, read_flat_states_, rebuild_units_, settle_units_, uses_original
from .agreement import SILENCE
from .sharded import Rebuilt

INSTEAD = "Or train with FSDP2 (version: 2 in fsdp_config), or call compress_pretrained before or after the training."


class FSDP1(Rebuilt):
    """Parameters and their states are pieces of a flat tensor for each unit; the optimizer holds its pieces of parameters."""

    late = SILENCE

    def __init__(self, trainer: Any = None) -> None:
        super().__init__(trainer)
        know_units_(self.wrapped)

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """If the model is sharded so, or will be."""
        if isinstance(trainer.model_wrapped, nn.Module) and fsdp1_units(trainer.model_wrapped):
            return True
        plugin = getattr(getattr(getattr(trainer, "accelerator", None), "state", None), "fsdp_plugin", None)
        return bool(getattr(trainer, "is_fsdp_enabled", False)) and getattr(plugin, "fsdp_version", 1) == 1

    def refuse(self) -> None:
        """What can't be made anew.

        Raises:
            ValueError: if the optimizer holds flat parameters, parameters are offloaded or sharded over a mesh, or torch is of an
                unknown version, with what to do instead.
        """
        self.refuse_loop()
        for unit in fsdp1_units(self.wrapped):
            if not uses_original(unit):
                raise ValueError(f"CompreSSMCallback needs FSDP1 with use_orig_params: true in fsdp_config. {INSTEAD}")
            if unit.cpu_offload.offload_params:
                raise ValueError(
                    f"CompreSSMCallback can't cut parameters that FSDP1 offloads to the CPU: drop cpu_offload. {INSTEAD}"
                )
            strategy = unit.sharding_strategy.name.lower()
            if "hybrid" in strategy or (strategy == "no_shard" and self.processes > 1):
                raise ValueError(
                    f"CompreSSMCallback can't cut under FSDP1's {strategy}: take full_shard or shard_grad_op. {INSTEAD}"
                )

    def as_called(self, model: Any) -> Any:
        """The outermost unit, which gathers those inside."""
        return self.wrapped

    def settle_(self) -> None:
        """Free what forward passes left gathered."""
        settle_units_(self.wrapped)

    def read_states_(self, optimizer: Any) -> None:
        """What the optimizer knows of its pieces."""
        read_flat_states_(getattr(optimizer, "optimizer", optimizer), self.states)

    def rebuild_(self) -> None:
        """Make the units anew whose parameters were cut."""
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        if optimizer is not None and not self.states.state:
            self.states_of(optimizer)
        rebuild_units_(self.wrapped, optimizer, self.states)
