"""L-BFGS in a few large operations a step.

torch's goes through the steps that it remembers one by one and waits for a GPU at each. Here the recursion runs over their
inner products, a small matrix on the CPU: a step is two products with the matrix of all steps and changes of the gradient.

Source: Chen, Wang and Zhou, Large-scale L-BFGS using MapReduce (NIPS 2014), for the recursion; Nocedal and Wright,
Numerical Optimization, algorithms 3.1 and 7.4.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

ARMIJO = 1e-4
"""Share of the slope's promise that a step has to keep."""
FIRST = 0.01
"""Length of the first step, as a share of that of the variables."""
SHORTEST = 2.0**-20
"""Share of a step below which none is taken."""


class LBFGS:
    """Minimise a function from a point on; `run` as often as you like.

    Args:
        function: of a vector [n], differentiable, a scalar.
        x: where to start, [n].
        history: steps that are remembered.

    Attributes:
        x: the best point so far.
        value: the function there.
        evaluations: so far.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, history: int) -> None:
        self._function, self._history = function, history
        self.x, self.evaluations = x.detach(), 0
        self.value, self._gradient = self._evaluate(self.x)
        # Steps s, changes of the gradient y, and the inner products of all of them: [2, history, n], [2 history, 2 history].
        self._past = x.new_zeros(2, history, len(x))
        self._products = np.zeros((2 * history, 2 * history))
        self._order: list[int] = []

    def run(self, evaluations: int) -> bool:
        """Go on for so many evaluations; whether there is any way down left."""
        until = self.evaluations + evaluations
        while self.evaluations < until:
            direction, slope = self._direction()
            if not slope < 0:
                return False
            length = 1.0
            while True:
                x = self.x + length * direction
                value, gradient = self._evaluate(x)
                if value <= self.value + ARMIJO * length * slope:
                    break
                # The minimum of the parabola through what is known; a value that is not finite tells nothing.
                bend = 2 * (value - self.value - length * slope)
                length *= min(max(-slope * length / bend, 0.1), 0.5) if np.isfinite(bend) else 0.1
                if length < SHORTEST:
                    if not self._order:
                        return False
                    self._order.clear()  # once more, straight down
                    break
            if length >= SHORTEST:
                self._remember(x - self.x, gradient - self._gradient)
                self.x, self.value, self._gradient = x, value, gradient
        return True

    def _evaluate(self, x: Tensor) -> tuple[float, Tensor]:
        self.evaluations += 1
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self._function(x)
            (gradient,) = torch.autograd.grad(value, x)
        return float(value.detach()), gradient

    def _remember(self, step: Tensor, change: Tensor) -> None:
        if len(self._order) == self._history:
            self._order.pop(0)
        slot = min(set(range(self._history)) - set(self._order))
        self._past[0, slot], self._past[1, slot] = step, change
        flat = self._past.flatten(0, 1)
        rows = (flat @ flat[[slot, self._history + slot]].mT).double().cpu().numpy()
        for column, at in zip(rows.T, (slot, self._history + slot), strict=True):
            self._products[at] = self._products[:, at] = column
        if self._products[slot, self._history + slot] > 0:  # else there is no curvature to remember
            self._order.append(slot)

    def _direction(self) -> tuple[Tensor, float]:
        """Where to go, and the slope of the function there."""
        g = self._gradient
        if not self._order:
            square = float(g @ g)
            if square == 0:
                return g, 0.0
            length = FIRST * max(float(self.x.norm()), 1e-3) / square**0.5
            return -length * g, -length * square
        flat, h = self._past.flatten(0, 1), self._history
        with_gradient = (flat @ g).double().cpu().numpy()
        D = self._products
        # The direction is made of the remembered vectors, by these weights, and of the gradient, by `of_gradient`.
        weights, of_gradient, taken = np.zeros(2 * h), -1.0, {}
        for i in reversed(self._order):
            taken[i] = (weights @ D[:, i] + of_gradient * with_gradient[i]) / D[i, h + i]
            weights[h + i] -= taken[i]
        last = self._order[-1]
        scale = D[last, h + last] / D[h + last, h + last]
        weights, of_gradient = weights * scale, of_gradient * scale
        for i in self._order:
            back = (weights @ D[:, h + i] + of_gradient * with_gradient[h + i]) / D[i, h + i]
            weights[i] += taken[i] - back
        direction = torch.from_numpy(weights).to(g) @ flat + of_gradient * g
        return direction, float(direction @ g)
