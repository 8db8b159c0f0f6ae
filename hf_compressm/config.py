"""CompreSSMConfig: what to cut, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

TARGETS = ("max_divergence", "tolerance", "state_size", "ratio")
MAX_DIVERGENCE, TOLERANCE = 0.01, 0.05
"""Default targets: after training, and in training."""
REALIZATIONS = ["auto", "select", "project"]
"""What `realization` may be; `layers.register_realization` adds to it."""
Estimator = Literal["ltv", "mean_lti"]
Weights = Literal["auto", "fisher", "gate"]
Selection = Literal["auto", "greedy", "ghost", "lti_modal", "magnitude", "random"]


@dataclass(frozen=True)
class CompreSSMConfig:
    """How small the state of each layer becomes, and how the smaller state is made.

    Args:
        max_divergence: the most that the slim model's predictions may diverge from the full one's, as mean Kullback-Leibler
            divergence in nats per token; 0.01 raises the perplexity by about 1%. The smallest state that keeps it on tokens
            that neither statistics nor fits have seen. Of a model without a head, the relative error of its last hidden
            states. The default target after training, at 0.01, when no other is given.
        tolerance: share of each layer's Hankel energy that may be given up (the paper's tau), in [0, 1); 0 means no
            cut. The default target in training, at 0.05.
        state_size: the size itself, for all layers or as {layer: size}. Honoured exactly.
        ratio: share of all states to keep, in (0, 1], allocated over the layers by what each cut costs.
        realization: "select" keeps r of the N states; "project" (Mamba-2) scans an r-dimensional projection of the
            state. "auto" selects for Mamba-1, and for Mamba-2 projects unless `uniform` asks for a stock checkpoint.
        selection: which states `select` keeps. "auto" is this library's own: least-squares read-out for Mamba-1, greedy
            elimination for Mamba-2. The others are baselines, without a read-out fit: "greedy", "ghost" (P times C^2,
            arXiv 2602.11408), "lti_modal" (AIRE-style), "magnitude" of the weights, "random".
        refit: rounds of least squares, with "auto" on Mamba-1 layers, that refit A, B, C and D of a cut layer to the full
            layer's output on the calibration data; 0 refits only the read-out C. Not used while training, which refits
            everything.
        weights: what a layer's channels and tokens count in statistics and fits. "fisher": as much as the loss depends on
            them, by its gradient for labels sampled from the model's own predictions, so that what a cut costs is known in
            nats, over all layers alike. "gate": as much of them as reaches the residual stream. "auto" is "fisher" for a
            max_divergence or a ratio, where the model has a head and its backward pass is quick, and else "gate".
        estimator: Gramians of the time-varying system by scan ("ltv") or of its time mean ("mean_lti", the paper's).
        uniform: one size for all layers, the largest that any of them needs.
        multiple_of: sizes that the library chooses are rounded up to a multiple of it. By default any size for Mamba-1, and
            for Mamba-2 multiples of 8. "tuned", the default in training, takes few sizes, for which kernels need not be
            tuned again and again: for Mamba-2 powers of two from 16 up.
        min_state_size: no layer becomes smaller than this.
        seed: of the "random" selection.
        start, end: in training, the window of the cuts: shares of the steps if below 1, else steps. The paper cuts in
            the warm-up. The last cut comes at `end`.
        num_reductions: attempts to cut, equidistant between `start` and `end`. A tolerance is given up at each of them;
            a state_size or ratio is reached in equal steps.
        min_reduction: with a tolerance, an attempt that would remove a smaller share of all states is skipped.
        calibration_batches: training batches that the statistics are taken on, the last ones before the attempt.
        rollback: undo a cut that makes the metric of the evaluation set worse by more than this, and stop cutting. None
            keeps all cuts.

    Raises:
        ValueError: if a value is out of range or two targets are given.
    """

    max_divergence: float | None = None
    tolerance: float | None = None
    state_size: int | Mapping[int, int] | None = None
    ratio: float | None = None
    realization: str = "auto"
    selection: Selection = "auto"
    refit: int = 3
    weights: Weights = "auto"
    estimator: Estimator = "ltv"
    uniform: bool = False
    multiple_of: int | Literal["tuned"] | None = None
    min_state_size: int = 1
    seed: int = 0
    start: float = 0
    end: float = 0.1
    num_reductions: int = 4
    min_reduction: float = 0.05
    calibration_batches: int = 4
    rollback: float | None = None

    def __post_init__(self) -> None:
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        if len(targets) > 1:
            raise ValueError(f"Give one target, not {' and '.join(targets)}: drop all but one of them.")
        if self.max_divergence is not None and not 0 < self.max_divergence < math.inf:
            raise ValueError(
                f"max_divergence must be positive, got {self.max_divergence}: it is a divergence in nats per token, such as "
                "0.01. tolerance=0 cuts nothing."
            )
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(
                f"tolerance must lie in [0, 1), got {self.tolerance}: it is a share of the Hankel energy."
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must lie in (0, 1], got {self.ratio}: it is the share of the states to keep.")
        if isinstance(self.state_size, Mapping):
            # JSON turns the layer numbers into strings.
            object.__setattr__(self, "state_size", {int(i): int(r) for i, r in self.state_size.items()})
        sizes = self.state_size.values() if isinstance(self.state_size, Mapping) else [self.state_size]
        if any(size is not None and size != int(size) for size in sizes):
            raise ValueError(f"state_size must be a whole number, got {self.state_size}.")
        if any(size is not None and size < 1 for size in sizes):
            raise ValueError(f"state_size must be at least 1, got {self.state_size}.")
        if isinstance(self.state_size, Mapping) and self.uniform:
            raise ValueError("uniform=True takes one state_size for all layers, not one for each: give an int.")
        if self.uniform and self.realization == "project":
            raise ValueError("uniform=True makes a stock checkpoint, which realization='project' can't be: drop one.")
        for name, values in (
            ("realization", tuple(REALIZATIONS)),
            ("selection", get_args(Selection)),
            ("weights", get_args(Weights)),
            ("estimator", get_args(Estimator)),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        if isinstance(self.multiple_of, str) and self.multiple_of != "tuned":
            raise ValueError(f'multiple_of must be a whole number or "tuned", got {self.multiple_of!r}.')
        for name in ("multiple_of", "min_state_size", "num_reductions", "calibration_batches"):
            value = getattr(self, name)
            if value is not None and value != "tuned" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

        if self.start < 0 or self.end <= 0:
            raise ValueError(f"start must be at least 0 and end positive, got {self.start} and {self.end}.")
        if (self.start < 1) == (self.end < 1) and self.start >= self.end:
            raise ValueError(f"start must come before end, got {self.start} and {self.end}.")
        if not 0 <= self.min_reduction < 1:
            raise ValueError(
                f"min_reduction must lie in [0, 1), got {self.min_reduction}: it is a share of the states."
            )
        if self.rollback is not None and not self.rollback >= 0:
            raise ValueError(f"rollback must be at least 0, got {self.rollback}: it is a change of the metric.")

    @property
    def has_target(self) -> bool:
        """Whether any target was given."""
        return any(getattr(self, name) is not None for name in TARGETS)

    def after_training(self) -> CompreSSMConfig:
        """With the default target of a cut after training, if none was given."""
        return self if self.has_target else replace(self, max_divergence=MAX_DIVERGENCE)

    @property
    def weighs_by_loss(self) -> bool:
        """Whether channels count as much as the loss depends on them, if it can be had."""
        by_loss = self.max_divergence is not None or self.ratio is not None
        return self.weights == "fisher" or (self.weights == "auto" and by_loss)

    @property
    def refits(self) -> bool:
        """Whether cut layers are refitted on what the mixers read."""
        return self.refit > 0 and self.selection == "auto" and self.tolerance != 0

    def to_dict(self) -> dict[str, Any]:
        """The values as a dictionary that JSON can hold; `CompreSSMConfig(**d)` gives the config back."""
        values = asdict(self)
        if isinstance(self.state_size, Mapping):
            values["state_size"] = {str(i): r for i, r in self.state_size.items()}
        return values
