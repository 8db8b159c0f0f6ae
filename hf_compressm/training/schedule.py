"""When a training run cuts, and to what sizes.

Glossary (code: paper): `start`, `end`: the warm-up that the cuts fall in; `num_reductions`: the number of reduction
steps; `tolerance`: τ, given up anew at each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..config import ENGINES, REFIT_IN_TRAINING, TOLERANCE, CompreSSMConfig
from ..cutting.nothing_to_cut import why_nothing
from ..cutting.sizes import check_targets, sizes_to_choose_from
from ..layers import Layer, check_engine, realization_of


def attempt_steps(config: CompreSSMConfig, max_steps: int) -> list[int]:
    """The training steps after which a cut is attempted: `num_reductions` equidistant ones, the last at `end`.

    Args:
        config: with `start`, `end` (shares of the steps if below 1, else steps) and `num_reductions`.
        max_steps: steps of the run.

    Raises:
        ValueError: if the number of steps is unknown, the window reaches beyond the last step, or it is too short.
    """
    if max_steps <= 0:
        raise ValueError(
            f"The run has {max_steps} steps, so the cuts can't be scheduled: set max_steps, or num_train_epochs with a "
            "dataset of known length."
        )
    start, end = (round(x * max_steps) if x < 1 else round(x) for x in (config.start, config.end))
    if end >= max_steps:
        raise ValueError(
            f"end={config.end} is step {end} and the run has {max_steps} steps, so that nothing would be trained after "
            f"the last cut: lower end below {max_steps}."
        )
    if end - start < config.num_reductions:
        raise ValueError(
            f"Steps {start} to {end} of {max_steps} can't hold {config.num_reductions} cuts: lower num_reductions to "
            f"{max(0, end - start)} or less, raise end, or train for more steps."
            if end > start
            else f"The window of the cuts, steps {start} to {end} of {max_steps}, is empty: raise end (a share of the "
            "steps if below 1, else steps), or train for more steps."
        )
    n = config.num_reductions
    return [start + round((end - start) * (i + 1) / n) for i in range(n)]


def training_config(config: CompreSSMConfig) -> CompreSSMConfig:
    """The config as it is meant in training, with its own defaults.

    Raises:
        ValueError: if healing or a quality budget is asked for, which are for a trained model.
    """
    if config.heal:
        raise ValueError("heal is for a cut after training; while it goes on, training heals: drop heal.")
    if config.max_divergence is not None:
        raise ValueError(
            "max_divergence is for a trained model: what a cut costs now says little, since training goes on. Give a "
            "tolerance, ratio or state_size, and rollback for a bound on the evaluation set's metric."
        )
    tolerance = config.tolerance if config.has_target else TOLERANCE
    return replace(
        config,
        refit=REFIT_IN_TRAINING if config.refit is None else config.refit,
        multiple_of=config.multiple_of or (None if _lists_sizes(config) else "tuned"),
        tolerance=tolerance,
    )


def _lists_sizes(config: CompreSSMConfig) -> bool:
    """Whether its engine takes few sizes, which kernels are soon tuned for."""
    return config.engine is not None and any(sizes.only for sizes in ENGINES[config.engine].sizes.values())


def check_target(config: CompreSSMConfig, layers: Sequence[Layer]) -> None:
    """Refuse a target that the attempts can't reach.

    Args:
        config: from `training_config`.
        layers: of the model, before the first cut.

    Raises:
        ValueError: if a size is not below that of its layer or not good for it, a ratio is too small, or there is no smaller size.
    """
    check_engine(config, layers)
    name = realization_of(config, layers, in_training=True)
    check_targets(config, layers, name)
    if config.tolerance and all(len(sizes_to_choose_from(config, layer, name)) == 1 for layer in layers):
        raise ValueError(f"CompreSSMCallback would cut nothing: {why_nothing(config, layers, name)}")


def check_still_below(config: CompreSSMConfig, layers: Sequence[Layer]) -> None:
    """Refuse a state_size that a checkpoint's layers are below.

    Args:
        config: from `training_config`.
        layers: of the model that was loaded from it.

    Raises:
        ValueError: if there is one.
    """
    for layer in layers:
        target = _target(config.state_size, layer.index)
        if target is not None and target > layer.state_size:
            raise ValueError(
                f"Layer {layer.index} has {layer.state_size} states in the checkpoint, so it can't be cut to state_size={target}: ask "
                "for as few, or resume from a checkpoint before that cut."
            )


def attempt_config(
    config: CompreSSMConfig, attempt: int, initial: dict[int, int], layers: Sequence[Layer]
) -> CompreSSMConfig | None:
    """The target of one attempt, or None where it has nothing to do.

    Args:
        config: from `training_config`.
        attempt: 0 to num_reductions - 1. Its target lies (attempt + 1) / num_reductions of the way.
        initial: state sizes before the first cut, by layer index.
        layers: of the model, as they are now.
    """
    way = (attempt + 1) / config.num_reductions
    name = realization_of(config, layers, in_training=True)
    if config.state_size is not None:
        sizes = {}
        for layer in layers:
            target = _target(config.state_size, layer.index)
            if target is None:
                continue
            size = round(initial[layer.index] + way * (target - initial[layer.index]))
            if size >= layer.state_size:  # as after a checkpoint of a run with another target
                continue
            if way < 1:
                size = min(n for n in sizes_to_choose_from(config, layer, name) if n >= size)
            if size < layer.state_size:
                sizes[layer.index] = size
        return replace(config, state_size=sizes, uniform=False, engine=None) if sizes else None
    if config.ratio is not None:
        total = round(sum(initial.values()) * (1 - way * (1 - config.ratio)))
        now = sum(layer.state_size for layer in layers)
        return replace(config, ratio=total / now) if total < now else None
    return config if config.tolerance else None


def _target(state_size: Any, index: int) -> int | None:
    return state_size.get(index) if isinstance(state_size, Mapping) else state_size
