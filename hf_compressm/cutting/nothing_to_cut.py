"""Why a plan leaves a model as it is, for the user who asked for a cut."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import TARGETS, CompreSSMConfig
from ..layers import Layer
from .sizes import sizes_to_choose_from


def why_nothing(config: CompreSSMConfig, layers: Sequence[Layer], name: str) -> str | None:
    """The reason and the knob that changes it; None where the config asks for no cut (tolerance=0 or ratio=1).

    Args:
        config, layers: of the plan.
        name: of the realization.
    """
    target, value = next((target, value) for target in TARGETS if (value := getattr(config, target)) is not None)
    if (target, value) in (("tolerance", 0), ("ratio", 1)):
        return None
    sizes = sorted({layer.state_size for layer in layers})
    have = f"have {' or '.join(map(str, sizes))} states"
    if config.min_state_size >= sizes[-1]:
        return f"min_state_size={config.min_state_size}, and the layers {have}: lower min_state_size."
    choices = [sizes_to_choose_from(config, layer, name) for layer in layers]
    any_size = "multiple_of=1 allows any size" if config.engine is None else "without engine there are more sizes"
    if all(len(choice) == 1 for choice in choices):
        return f"the layers {have}, and no smaller size is one to choose: {any_size}, or name a state_size."
    reason = f"{target}={value:g} leaves every layer its states"
    if config.uniform and len(layers) > 1:
        reason += ", where uniform=True gives all the size of the layer that needs most"
    knobs = [f"{'lower' if target == 'ratio' else 'raise'} {target}"]
    if any(len(choice) < layer.state_size for choice, layer in zip(choices, layers, strict=True)):
        knobs.append(f"round less ({any_size})")
    return f"{reason}: {', '.join(knobs)}, or name a state_size."
