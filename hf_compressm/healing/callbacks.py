"""What goes along with healing: the best weights are kept, and a bar tells how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from ..cutting.progress import followed


class KeepBest(TrainerCallback):
    """Keep the weights of the lowest divergence, and stop when it only rises in the second half.

    Args:
        parameters: that are trained.
        patience: evaluations one after another that are no lower than the one before, after which it stops.

    Attributes:
        curve: of each evaluation, the tokens learnt from until then and the divergence.
        best: the lowest.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], patience: int) -> None:
        self.parameters, self.patience = list(parameters), patience
        self.curve: list[tuple[int, float]] = []
        self.best = float("inf")
        self._weights: list[Tensor] = []
        self._rises = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the last step's weights in any case."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Look whether it is the lowest so far."""
        divergence = metrics["eval_divergence"]
        rises = bool(self.curve) and not divergence < self.curve[-1][1]
        self._rises = self._rises + 1 if rises else 0
        if divergence < self.best or not self._weights:
            # On the CPU, where there is room; and all of them are there before one counts.
            self._weights = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
            self.best = divergence
        self.curve.append((metrics["eval_tokens"], divergence))
        # While the learning rate is high it may rise, and falls again with that.
        if self._rises >= self.patience and 2 * state.global_step >= state.max_steps:
            control.should_training_stop = True

    @torch.no_grad()
    def put_back_(self) -> None:
        """Give the parameters the weights of the lowest divergence, if there was any. In place."""
        for parameter, weights in zip(self.parameters if self._weights else [], self._weights, strict=True):
            parameter.copy_(weights)


class Bar(TrainerCallback):
    """Tell how far it is, as the long loops of a cut do.

    Args:
        steps: of the training.
    """

    def __init__(self, steps: int) -> None:
        self._steps = followed("healing", range(steps))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """None is done."""
        next(self._steps, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Another is."""
        next(self._steps, None)

    def close(self) -> None:
        """No more."""
        self._steps.close()
