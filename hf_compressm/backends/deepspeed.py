"""DeepSpeed's ZeRO-1, 2 and 3: the engine is made anew after a cut, with the optimizer's states dealt out anew."""

from __future__ import annotations

from typing import Any, ClassVar

from ..compat.zero import check_deepspeed, is_held, read_states_, rebuild_engine_, settle_
from .agreement import SILENCE
from .loop import Loop
from .sharded import Rebuilt

INSTEAD = "Train with another, or with FSDP2, or call compress_pretrained before or after the training."


class DeepSpeed(Rebuilt):
    """Parameters (in ZeRO-3), float32 weights and the optimizer's states are pieces of flat tensors."""

    late = SILENCE
    counts_steps: ClassVar[bool] = False  # it knows of one flat tensor alone

    @classmethod
    def takes(cls, trainer: Any) -> bool:
        """If the trainer says so, or it holds a loop's model."""
        return bool(getattr(trainer, "is_deepspeed_enabled", False)) or (
            isinstance(trainer, Loop) and is_held(trainer.model)
        )

    def refuse(self) -> None:
        """What can't be made anew here.

        Raises:
            ValueError: for a version, stage, offload or optimizer that this does not know, with what to do instead.
        """
        self.refuse_loop()
        engine = self.wrapped
        check_deepspeed(engine)
        stage, zero = engine.zero_optimization_stage(), engine.config.get("zero_optimization", {})
        if stage not in (1, 2, 3):
            raise ValueError(
                f"CompreSSMCallback cuts under DeepSpeed's ZeRO stages 1 to 3, and this is stage {stage}. {INSTEAD}"
            )
        offloads = [
            key for key in ("offload_optimizer", "offload_param") if zero.get(key, {}).get("device", "none") != "none"
        ]
        others = [
            "zero_quantized_weights",
            "zero_quantized_gradients",
            "zero_quantized_nontrainable_weights",
            "zenflow",
        ]
        others += ["mics_shard_size"] * (zero.get("mics_shard_size", -1) > 0)
        others += ["zero_hpz_partition_size"] * (zero.get("zero_hpz_partition_size", 1) > 1)
        found = offloads + [key for key in others if zero.get(key)]
        if found:
            raise ValueError(
                f"CompreSSMCallback can't cut under DeepSpeed's {' and '.join(found)}: drop it from zero_optimization. {INSTEAD}"
            )
        kind = type(engine.basic_optimizer)
        if (
            not kind.__module__.startswith(("torch.optim", "deepspeed.ops", "transformers"))
            or kind.__name__ == "Adagrad"
        ):
            raise ValueError(
                f"CompreSSMCallback does not know how DeepSpeed keeps the states of {kind.__name__}: take AdamW. {INSTEAD}"
            )

    def settle_(self) -> None:
        """Free what passes outside of training left gathered."""
        if self.begun:
            settle_(self.wrapped)

    def read_states_(self, optimizer: Any) -> None:
        """What the ZeRO optimizer knows."""
        read_states_(self.wrapped, self.states)

    def rebuild_(self) -> None:
        """Make the engine anew, and let the trainer's optimizer be its."""
        if not self.states.state:
            self.states_of(None)
        rebuild_engine_(self.wrapped, self.states)
        self.trainer.optimizer.optimizer = self.wrapped.optimizer
