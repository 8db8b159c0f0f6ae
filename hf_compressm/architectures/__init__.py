"""Find the SSM layers of a transformers model, whatever its architecture."""

from __future__ import annotations

from torch import nn

from .mamba import MambaLayer
from .mamba2 import Mamba2Layer

SSMLayer = MambaLayer | Mamba2Layer
MIXERS: dict[str, type[MambaLayer] | type[Mamba2Layer]] = {
    "MambaMixer": MambaLayer,
    "Mamba2Mixer": Mamba2Layer,
    "ProjectedMamba2Mixer": Mamba2Layer,
}


def find_layers(model: nn.Module) -> list[SSMLayer]:
    """The model's SSM layers, in order.

    Raises:
        ValueError: if there is none, or one with weights that can't be cut (meta device, quantised).
    """
    layers = [
        MIXERS[type(module).__name__](name, module)
        for name, module in model.named_modules()
        if type(module).__name__ in MIXERS
    ]
    if not layers:
        others = {type(m).__name__ for m in model.modules() if hasattr(m, "A_log")}
        hint = f" Its {', '.join(sorted(others))} looks like one, of a kind that is not known here." if others else ""
        raise ValueError(f"{type(model).__name__} has no Mamba or Mamba-2 layer, so there is no state to cut.{hint}")
    quantised = "cut the model first, in bf16 or float32, and quantise the slim one."
    if getattr(getattr(model, "config", None), "quantization_config", None):
        raise ValueError(
            f"{type(model).__name__} has a quantization_config, so its weights are quantised: {quantised}"
        )
    for layer in layers:
        for name, parameter in layer.mixer.named_parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"{layer.name}.{name} is on the meta device: load the model with its weights in memory "
                    "(no meta device, no disk offload) before cutting it."
                )
            one_byte = parameter.element_size() < 2  # float8 counts as floating point
            if not parameter.is_floating_point() or one_byte or hasattr(parameter, "quant_state"):
                raise ValueError(f"{layer.name}.{name} is quantised ({parameter.dtype}): {quantised}")
    return layers


def unprojected_sizes(layers: list[SSMLayer]) -> dict[int, int]:
    """The sizes that projected layers project from, by layer index."""
    sizes = {layer.index: getattr(layer, "unprojected_state_size", None) for layer in layers}
    return {index: size for index, size in sizes.items() if size is not None}
