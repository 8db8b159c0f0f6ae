"""Find the SSM layers of a transformers model, whatever its architecture.

A mixer is known by what it has, not by its name. Two families and these differences cover the ten model types:

| what the mixer has | found in | adapter |
|---|---|---|
| `A_log` [channels, N], `x_proj` | mamba | `MambaLayer` |
| the same, with RMS norms on B and C | falcon_mamba, jamba | `NormalisedMambaLayer` |
| `A_log` [heads, head_dim, N], `x_proj_weight` [heads, ...] | zamba | `HeadwiseMambaLayer` |
| `A_log` [heads], B and C in `in_proj` and `conv1d` | mamba2, zamba2, bamba, granitemoehybrid, nemotron_h | `Mamba2Layer` |
| the same, with a `mup_vector` on what `in_proj` gives | falcon_h1 | `Mamba2Layer` |
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .headwise import HeadwiseMambaLayer
from .mamba import MambaLayer
from .mamba2 import Mamba2Layer
from .normalised import NormalisedMambaLayer

SSMLayer = MambaLayer | Mamba2Layer
# From the most to the least specific.
ADAPTERS: tuple[type[MambaLayer] | type[Mamba2Layer], ...] = (
    HeadwiseMambaLayer,
    NormalisedMambaLayer,
    MambaLayer,
    Mamba2Layer,
)


def find_layers(model: nn.Module) -> list[SSMLayer]:
    """The model's SSM layers, in order.

    Raises:
        ValueError: if there is none, or one with weights that can't be cut (meta device, quantised, with an adapter).
    """
    layers = []
    unknown = {}
    for name, module in model.named_modules():
        if not _looks_like_a_mixer(module):
            continue
        adapter = next((adapter for adapter in ADAPTERS if not missing(adapter, module)), None)
        if adapter is None:
            unknown[type(module).__name__] = module
        else:
            layers.append(adapter(name, module))
    if not layers:
        hints = "".join(f" {name} looks like one, but {_why_not(module)}." for name, module in unknown.items())
        raise ValueError(f"{type(model).__name__} has no Mamba or Mamba-2 layer, so there is no state to cut.{hints}")
    _check_weights(model, layers)
    return layers


def missing(adapter: type[MambaLayer] | type[Mamba2Layer], mixer: nn.Module) -> list[str]:
    """What an adapter needs and a mixer lacks, and what the mixer has that the adapter would not read."""
    absent = [f"lacks {name}" for name in sorted(adapter.NEEDS) if not hasattr(mixer, name)]
    own = {name.partition(".")[0] for name, _ in mixer.named_parameters()}
    own |= {name for name, _ in mixer.named_children()} | {name for name, _ in mixer.named_buffers(recurse=False)}
    return absent + [f"has {name}" for name in sorted(own - adapter.NEEDS - adapter.MAY_HAVE)] or adapter.misfit(mixer)


def _looks_like_a_mixer(module: nn.Module) -> bool:
    """Decays of its own, as all known ones, or computed from the input, as in Mamba-3."""
    return hasattr(module, "A_log") or all(hasattr(module, name) for name in ("in_proj", "dt_bias", "D", "out_proj"))


def _why_not(mixer: nn.Module) -> str:
    adapter, family = (MambaLayer, "Mamba") if hasattr(mixer, "x_proj") else (Mamba2Layer, "Mamba-2")
    return f"as a {family} mixer it {', '.join(missing(adapter, mixer))}"


def _check_weights(model: Any, layers: list[SSMLayer]) -> None:
    quantised = "cut the model first, in bf16 or float32, and quantise the slim one."
    if getattr(getattr(model, "config", None), "quantization_config", None):
        raise ValueError(
            f"{type(model).__name__} has a quantization_config, so its weights are quantised: {quantised}"
        )
    for layer in layers:
        for name, module in layer.mixer.named_children():
            if hasattr(module, "base_layer"):
                raise ValueError(
                    f"{layer.name}.{name} carries an adapter, whose weights would not follow the cut: merge it "
                    "(merge_and_unload), or cut the base model first and train the adapter on the slim one."
                )
        for name, parameter in layer.mixer.named_parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"{layer.name}.{name} is on the meta device: load the model with its weights in memory "
                    "(no meta device, no disk offload) before cutting it."
                )
            one_byte = parameter.element_size() < 2  # float8 counts as floating point
            if not parameter.is_floating_point() or one_byte or hasattr(parameter, "quant_state"):
                raise ValueError(f"{layer.name}.{name} is quantised ({parameter.dtype}): {quantised}")


def unprojected_sizes(layers: list[SSMLayer]) -> dict[int, int]:
    """The sizes that projected layers project from, by layer index."""
    sizes = {layer.index: getattr(layer, "unprojected_state_size", None) for layer in layers}
    return {index: size for index, size in sizes.items() if size is not None}
