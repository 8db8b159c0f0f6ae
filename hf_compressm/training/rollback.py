"""A cut that makes the evaluation set's metric too much worse is undone."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from ..backends import Backend
from ..interrupts import restoring, same_random_numbers

logger = logging.get_logger(__name__)


class Metric:
    """The metric of a trainer's evaluation set that `rollback` looks at: `metric_for_best_model`, or the loss.

    Args:
        trainer: with an evaluation set.
        backend: that it trains with.
        allowed: how much worse a cut may make it.
    """

    def __init__(self, trainer: Any, backend: Backend, allowed: float) -> None:
        self.trainer, self.backend, self.allowed = trainer, backend, allowed
        name = trainer.args.metric_for_best_model or "loss"
        self.name = name if name.startswith("eval_") else f"eval_{name}"
        greater = trainer.args.greater_is_better
        self.greater_is_better = not self.name.endswith("loss") if greater is None else greater

    def value(self) -> float:
        """Evaluate. The random numbers of the run are as they were, and no event is sent.

        Raises:
            ValueError: if the evaluation does not give the metric.
        """
        metrics = self.backend.together("the evaluation for rollback", self._evaluate)
        if self.name not in metrics:
            raise ValueError(
                f"rollback looks at {self.name}, and the evaluation gives {sorted(metrics)}: set metric_for_best_model to "
                "one of them."
            )
        return self.backend.decide(lambda: float(metrics[self.name]))

    def _evaluate(self) -> Any:
        with restoring(self.backend.settle_), same_random_numbers():
            return self.trainer.evaluation_loop(
                self.trainer.get_eval_dataloader(),
                description="CompreSSM",
                prediction_loss_only=True if self.trainer.compute_metrics is None else None,
            ).metrics

    def forbids(self, before: float, after: float) -> bool:
        """Whether a cut made it too much worse, or not a number."""
        worse = before - after if self.greater_is_better else after - before
        if worse <= self.allowed:
            return False
        logger.info(
            f"hf_compressm: the cut is undone: {self.name} went from {before:.4g} to {after:.4g}, more than "
            f"rollback={self.allowed} allows. No more cuts."
        )
        return True
