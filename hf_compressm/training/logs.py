"""What a run with cuts tells in its log."""

from __future__ import annotations

import time
from typing import Any

from transformers.utils import logging

from ..cutting import Plan
from ..reporting.history import Attempt

logger = logging.get_logger(__name__)


class StepTimer:
    """Mean duration of a training step since the last question."""

    def __init__(self) -> None:
        self.begin: float | None = None
        self.durations: list[float] = []

    def start(self) -> None:
        """A step begins."""
        self.begin = time.perf_counter()

    def stop(self) -> None:
        """It ends."""
        if self.begin is not None:
            self.durations.append(time.perf_counter() - self.begin)
            self.begin = None

    def take(self) -> float | None:
        """Seconds; None if no step ended since."""
        durations, self.durations = self.durations, []
        return round(sum(durations) / len(durations), 6) if durations else None


def attempt_logs(attempt: Attempt, seconds: float, step_seconds: float | None) -> dict[str, float]:
    """What `trainer.log` gets of an attempt."""
    sizes, energies = list(attempt.sizes.values()), list(attempt.energy_kept.values())
    logs = {
        "compressm/state_size_mean": sum(sizes) / len(sizes),
        "compressm/energy_kept": sum(energies) / len(energies),
        "compressm/cut_seconds": round(seconds, 4),
    }
    logs |= {f"compressm/state_size/layer_{index}": size for index, size in attempt.sizes.items()}
    if attempt.rank_correlation is not None:
        logs["compressm/rank_correlation"] = attempt.rank_correlation
    if step_seconds is not None:
        logs["compressm/step_seconds"] = step_seconds
    return logs


def say_what_was_cut(plan: Plan, attempt: Attempt, seconds: float) -> None:
    """In the console, if anything was."""
    if not plan.realizations or attempt.undone:
        return
    old, new = [layer.old_size for layer in plan.report.layers], list(attempt.sizes.values())
    energies = list(attempt.energy_kept.values())
    logger.info(
        f"hf_compressm: step {attempt.step}: state size {sum(old) / len(old):.1f} -> {sum(new) / len(new):.1f} (mean of "
        f"{len(new)} layers, {min(new)} to {max(new)}), Hankel energy kept {sum(energies) / len(energies):.1%}, "
        f"{seconds:.1f} s."
    )


def trainer_log(trainer: Any, control: Any, logs: dict[str, float]) -> None:
    """Through the trainer, so that TensorBoard, W&B and `log_history` have it."""
    # Logging clears the flag by which the trainer knows that the step's own loss is to be logged.
    should_log = control.should_log
    trainer.log(logs)
    control.should_log = should_log
