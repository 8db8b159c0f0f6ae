"""What a callback knows of the run that it cuts: read from a checkpoint, and set back when weights of before are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..layers import Layer, Realization
from ..reporting.history import Attempt

States = dict[int, list[list[int]]]


def read_attributes(saved: Any, layers: Sequence[Layer]) -> dict[str, Any]:
    """The attributes that the callback's entry in a `trainer_state.json` gives it.

    Args:
        saved: that entry.
        layers: of the model that was loaded with it.

    Raises:
        ValueError: if it is damaged, or about other layers or sizes.
    """
    sizes = {layer.index: layer.state_size for layer in layers}
    try:
        attributes = saved["attributes"]
        # JSON turns the layer numbers into strings.
        initial = {int(i): size for i, size in attributes["initial_sizes"].items()}
        kept = {int(i): groups for i, groups in attributes["kept"].items()}
        history = [Attempt.from_dict(values) for values in attributes["history"]]
        wrong = _wrong(sizes, layers, initial, kept, history, attributes["attempts"], attributes["stopped"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise damaged(wrong)
    return {
        "initial_sizes": initial,
        "kept": kept,
        "history": history,
        "attempts": attributes["attempts"],
        "stopped": attributes["stopped"],
    }


def damaged(wrong: str) -> ValueError:
    """The error to raise for what is wrong with the callback's entry."""
    return ValueError(
        f"The state of CompreSSMCallback in the checkpoint's trainer_state.json is damaged or of another run ({wrong}): "
        "resume from another checkpoint, or load this one's model and train it anew."
    )


def _wrong(
    sizes: Mapping[int, int],
    layers: Sequence[Layer],
    initial: Mapping[int, Any],
    kept: Mapping[int, Any],
    history: Sequence[Attempt],
    attempts: Any,
    stopped: Any,
) -> str | None:
    """What can't be true of a model with layers of these sizes."""
    if attempts != len(history) or not isinstance(stopped, bool):
        return f"{attempts} attempts, stopped: {stopped}, and {len(history)} in the history"
    tables = [initial, kept]
    for attempt in history:
        tables += [attempt.sizes, attempt.hankel_singular_values, attempt.contributions, attempt.states]
        tables += [attempt.output_error, attempt.energy_kept]
    if any(table.keys() != sizes.keys() for table in tables):
        return f"not all of it is about layers {sorted(sizes)}"
    for layer in layers:
        name, size = f"layer {layer.index}", layer.state_size
        now = history[-1].sizes[layer.index] if history else initial[layer.index]
        if now != size:
            return f"{name} has {size} states and not {now}"
        groups, (number, each) = kept[layer.index], states_shape(layer)
        first = range(initial[layer.index])  # later ones were mixed of others
        if len(groups) != number or any(
            len(group) != each or not (set(group) <= set(first) or min(group) >= len(first) or layer.head_state_sizes)
            for group in groups
        ):
            return f"{name} does not keep {size} of {initial[layer.index]} states"
        for attempt in history:
            before = {len(group) for group in attempt.states[layer.index]}
            spectra = {len(group) for group in attempt.hankel_singular_values[layer.index]}
            contributions = {len(group) for group in attempt.contributions[layer.index]}
            if not before == spectra == contributions or len(before) != 1:
                return f"{name} had several sizes at step {attempt.step}"
            sum(map(sum, attempt.hankel_singular_values[layer.index]), attempt.output_error[layer.index])  # numbers
            attempt.energy_kept[layer.index] + attempt.parameters
    return None


def attempts_until(sizes: Mapping[int, int], initial: Mapping[int, int], history: Sequence[Attempt]) -> int | None:
    """How many of the attempts lead to these sizes; None if the run never had them."""
    for count in range(len(history), 0, -1):
        if history[count - 1].sizes == sizes:
            return count
    return 0 if initial == sizes else None


def states_shape(layer: Layer) -> tuple[int, int]:
    """The number of a layer's groups of states, and of the states in each: of heads, that of the largest."""
    sizes = layer.head_state_sizes
    return (layer.groups, layer.state_size) if sizes is None else (len(sizes), max(sizes))


def states_left(before: list[list[int]], made: Realization, layer: Layer) -> list[list[int]]:
    """The names of the states of a layer that a cut leaves, a list for each group: new ones where it mixed them.

    Args:
        before: of those before the cut.
        made: what the layer has become.
        layer: that has become so.
    """
    if made.kept:
        return [[old[s] for s in new] for old, new in zip(before, made.kept, strict=True)]
    number, each = states_shape(layer)
    first = 1 + max(map(max, before))
    return [list(range(first, first + each)) for _ in range(number)]


def states_after(count: int, kept: States, history: Sequence[Attempt]) -> States:
    """The states that were left after some of the attempts.

    Args:
        count: how many of them, the first ones.
        kept: those that were left after all of them.
        history: all attempts.
    """
    return {
        i: [list(g) for g in groups] for i, groups in (history[count].states if count < len(history) else kept).items()
    }
