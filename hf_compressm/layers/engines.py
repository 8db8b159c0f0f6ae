"""What runs a slim checkpoint elsewhere, and at which state sizes: one registration an engine.

README's table is made from these. An engine reads stock checkpoints, so one size for all layers and no projections, unless it
says otherwise. Its sizes are those that its kernels take; what becomes of another is said beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import ENGINES, CompreSSMConfig
from ..modeling.modeling_compressm import ARCHITECTURES
from .contracts import Layer


@dataclass(frozen=True)
class Sizes:
    """State sizes that kernels take: of a list, or multiples of a number up to another."""

    only: tuple[int, ...] = ()
    multiple_of: int = 1
    most: int | None = None

    def __contains__(self, size: int) -> bool:
        if self.only:
            return size in self.only
        return size % self.multiple_of == 0 and (self.most is None or size <= self.most)

    def __str__(self) -> str:
        if self.only:
            return ", ".join(map(str, self.only))
        text = f"multiples of {self.multiple_of}" if self.multiple_of > 1 else "any"
        return text if self.most is None else f"{text} up to {self.most}"


@dataclass(frozen=True)
class Engine:
    """A program that runs slim checkpoints.

    Args:
        name: in `CompreSSMConfig.engine`.
        version: that it was checked in.
        checked: "run", or "read" where its source was.
        sizes: that its kernels take, by family of layers; a family that is not here it can't run.
        model_types: that it knows.
        otherwise: what it does with any other size.
        uniform: whether it wants one size for all layers, and none of them projected.
    """

    name: str
    version: str
    checked: str
    sizes: Mapping[str, Sizes]
    model_types: frozenset[str]
    otherwise: str = "refuses"
    uniform: bool = True


def register_engine(engine: Engine) -> Engine:
    """Let it be named in `CompreSSMConfig.engine`."""
    ENGINES[engine.name] = engine
    return engine


ANY = Sizes()
_HYBRIDS = frozenset({"bamba", "falcon_h1", "granitemoehybrid", "nemotron_h"})
_LLAMA_CPP = _HYBRIDS | {"mamba", "falcon_mamba", "jamba", "mamba2"}

for _engine in (
    Engine("transformers", "5.24", "run", {"Mamba": ANY, "Mamba-2": ANY}, frozenset(ARCHITECTURES), uniform=False),
    Engine("llama.cpp", "llama-cpp-python 0.3.36, on a CPU", "run", {"Mamba": ANY, "Mamba-2": ANY}, _LLAMA_CPP),
    Engine(
        "llama.cpp-cuda",
        "b11434",
        "read",
        {"Mamba": Sizes((16,)), "Mamba-2": Sizes((96, 128, 256))},
        _LLAMA_CPP,
        "scans on the CPU, slower than the model before the cut",
    ),
    Engine(
        "mlx",
        "mlx-lm 0.32.2, on a CPU; its Metal kernel read",
        "run",
        {"Mamba": ANY, "Mamba-2": Sizes(multiple_of=32)},
        frozenset({"mamba", "falcon_mamba", "jamba", "mamba2", "falcon_h1", "granitemoehybrid", "nemotron_h"}),
        "decodes wrongly on Metal, with no error",
    ),
    Engine(
        "vllm",
        "main at 007ad216",
        "read",
        {"Mamba": Sizes(most=256), "Mamba-2": ANY},
        _LLAMA_CPP | {"zamba2"},
    ),
    Engine("sglang", "main at 5d2c83e6", "read", {"Mamba-2": ANY}, _HYBRIDS - {"bamba"}),
    Engine(
        "tensorrt-llm",
        "main at d513eeaf",
        "read",
        {"Mamba-2": Sizes((64, 96, 128, 256))},
        frozenset({"nemotron_h"}),
    ),
):
    register_engine(_engine)


def engine_sizes(config: CompreSSMConfig, layer: Layer, sizes: Sequence[int]) -> list[int]:
    """Those of a layer's sizes that the config's engine runs, ascending; the last is the layer's present one.

    Args:
        config: with an engine or none.
        layer: that is cut.
        sizes: that it may have, ascending.
    """
    if config.engine is None:
        return list(sizes)
    takes = ENGINES[config.engine].sizes[layer.family]
    return [size for size in sizes if size in takes and size < layer.state_size] + [layer.state_size]


def check_engine(config: CompreSSMConfig, layers: Sequence[Layer]) -> None:
    """Refuse layers that the config's engine can't run.

    Raises:
        ValueError: if it does not know their family or their model, or a named size.
    """
    if config.engine is None:
        return
    engine: Engine = ENGINES[config.engine]
    for layer in layers:
        model_type = _model_type(layer)
        if layer.family not in engine.sizes or model_type not in engine.model_types:
            others = [name for name, other in ENGINES.items() if model_type in other.model_types]
            todo = f"Take another engine ({', '.join(others)}), or drop engine" if others else "Drop engine"
            raise ValueError(
                f"{engine.name} ({engine.version}) can't run {model_type or type(layer.mixer).__name__} models. {todo}."
            )
        size = config.state_size.get(layer.index) if isinstance(config.state_size, Mapping) else config.state_size
        if size is not None and size not in engine.sizes[layer.family]:
            raise ValueError(
                f"{engine.name} ({engine.version}) takes {engine.sizes[layer.family]} as the state size of a {layer.family} "
                f"layer, and any other it {engine.otherwise}: give one of these instead of {size}, or drop engine."
            )


def engine_remarks(layers: Sequence[Layer], size: int) -> list[str]:
    """Where a size that all layers get is slow or wrong, and their present ones are not; a line for each engine."""
    found = []
    for engine in ENGINES.values():
        rows = [(engine.sizes[layer.family], layer) for layer in layers if layer.family in engine.sizes]
        known = len(rows) == len(layers) and all(_model_type(layer) in engine.model_types for layer in layers)
        if known and any(size not in takes and layer.state_size in takes for takes, layer in rows):
            takes = next(takes for takes, layer in rows if size not in takes)
            found.append(f"{engine.name} takes {takes} as state sizes, and any other it {engine.otherwise}")
    return found


def _model_type(layer: Any) -> str | None:
    """Of transformers' model that a layer's mixer is from; None if it is from none."""
    names = [kind.__name__ for kind in type(layer.mixer).__mro__]
    return next((name for name, architecture in ARCHITECTURES.items() if architecture.mixer in names), None)
