"""Choose how small each layer becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..config import CompreSSMConfig
from ..hankel.ranks import allocate_ranks, energy_rank_of_layer
from ..layers import Layer, engine_sizes


def check_targets(config: CompreSSMConfig, layers: Sequence[Layer], name: str) -> None:
    """Refuse sizes that the layers can't have.

    Args:
        config, layers: what to cut, and how.
        name: of the realization, from `layers.realization_of`.

    Raises:
        ValueError: if a size is not below that of its layer or not good for it, or is given for another layer; if a ratio is
            too small for the least sizes; or if layers that must be alike would not be.
    """
    if config.state_size is None:
        _check_alike(config, layers)
        _check_engine_leaves_a_choice(config, layers, name)
        _check_ratio(config, layers, name)
        return
    by_index = {layer.index: layer for layer in layers}
    wanted = (
        config.state_size if isinstance(config.state_size, Mapping) else dict.fromkeys(by_index, config.state_size)
    )
    for index, size in wanted.items():
        if index not in by_index:
            raise ValueError(f"state_size names layer {index}; the SSM layers are {sorted(by_index)}.")
        layer = by_index[index]
        if size >= layer.state_size:
            smallest = min(layer.state_size for layer in layers)
            todo = (
                "ask for fewer, or leave the layer out of {layer: size}"
                if isinstance(config.state_size, Mapping)
                else f"ask for fewer than {smallest}"
            )
            raise ValueError(f"Layer {index} has {layer.state_size} states, so it can't be cut to {size}: {todo}.")
        layer.realizations[name].check_size(layer, size)
    _check_alike(config, layers)


def _check_alike(config: CompreSSMConfig, layers: Sequence[Layer]) -> None:
    """Refuse sizes of their own for layers whose config has one for all."""
    if config.state_size is None:
        alike = config.uniform or len(layers) == 1 or config.tolerance == 0 or config.ratio == 1
    elif isinstance(config.state_size, Mapping):
        alike = len({config.state_size.get(layer.index, layer.state_size) for layer in layers}) == 1
    else:
        alike = True
    if not alike and not all(layer.sizes_may_differ for layer in layers):
        raise ValueError(
            "The config of this model has one state size for all layers, so that it could not be saved with others: ask for "
            "uniform=True, or for one state_size. Nothing was changed."
        )


def _check_ratio(config: CompreSSMConfig, layers: Sequence[Layer], name: str) -> None:
    if config.ratio is None or config.uniform:
        return
    total = round(config.ratio * sum(layer.state_size for layer in layers))
    least = sum(sizes_to_choose_from(config, layer, name)[0] for layer in layers)
    if total < least:
        raise ValueError(
            f"ratio={config.ratio:g} leaves {total} states for {len(layers)} layers, which need at least {least}: raise "
            "ratio, or lower min_state_size or multiple_of."
        )


def _check_engine_leaves_a_choice(config: CompreSSMConfig, layers: Sequence[Layer], name: str) -> None:
    if config.engine is None or config.tolerance == 0 or config.ratio == 1:
        return
    for layer in layers:
        if len(sizes_to_choose_from(config, layer, name)) == 1:
            rounding = "" if config.multiple_of is None else f" that is a multiple of {config.multiple_of}"
            raise ValueError(
                f"Layer {layer.index} has {layer.state_size} states, and engine={config.engine!r} takes none fewer{rounding}: "
                f"take another engine{', or drop multiple_of' if rounding else ''}."
            )


def sizes_to_choose_from(config: CompreSSMConfig, layer: Layer, name: str) -> list[int]:
    """Ascending; the last is the layer's present size."""
    return engine_sizes(config, layer, layer.realizations[name].sizes(layer, config))


def choose_sizes(
    config: CompreSSMConfig,
    layers: Sequence[Layer],
    choices: Sequence[Sequence[int]],
    spectra: Sequence[Tensor],
    costs: Callable[[], list[Tensor]],
) -> list[int]:
    """The size of each layer.

    Args:
        config, layers: what to cut, and how.
        choices: for each layer the sizes that it may have, ascending; the last is its present one.
        spectra: the layers' Hankel singular values, [groups, N] each.
        costs: what keeping r states costs, for each layer [N] at r - 1.

    Raises:
        ValueError: if the layers' smallest sizes add up to more than a `ratio` leaves.
    """
    if isinstance(config.state_size, Mapping):
        return [config.state_size.get(layer.index, layer.state_size) for layer in layers]
    if config.state_size is not None:
        return [config.state_size] * len(layers)
    if config.tolerance == 0 or config.ratio == 1:
        return [layer.state_size for layer in layers]
    if config.ratio is not None and not config.uniform:
        total = round(config.ratio * sum(layer.state_size for layer in layers))
        return allocate_ranks(costs(), total, choices)
    if config.ratio is not None:
        sizes = [max(1, round(config.ratio * layer.state_size)) for layer in layers]
    else:
        assert config.tolerance is not None
        sizes = [
            energy_rank_of_layer(spectrum, config.tolerance, layer.head_state_sizes is not None)
            for layer, spectrum in zip(layers, spectra, strict=True)
        ]
    if config.uniform:
        in_all = sorted(set.intersection(*map(set, choices)))
        size = next((r for r in in_all if r >= max(sizes)), None)
        if size is None:
            raise ValueError(
                f"A layer needs {max(sizes)} states, and the sizes that all layers can have are {in_all}: uniform=True is "
                "not for this model with this target. Name a state_size, give up more, or drop uniform=True."
            )
        return [size] * len(sizes)
    return [next(r for r in choice if r >= size) for size, choice in zip(sizes, choices, strict=True)]
