"""Write and read the state sizes of a model's layers in its config.

A model whose layers all have one unprojected size has a stock config: that size, and nothing else. Any other model has
`per_layer_config`, with the size of every layer, and `auto_map`, which names the file that can build it (see
`modeling_compressm`).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_compressm import ARCHITECTURES, NEEDS, update_auto_map

# The size that a config with `per_layer_config` gives for all layers. No layer has it, so all that have a state are
# listed, and no reader can take the size of some layers for that of all. Not 0, which llama.cpp's converter reads as a
# size that is not given, and takes its own.
_NO_SIZE = -1
# transformers 4 knows no `per_layer_config` and builds all layers alike, and with `ignore_mismatched_sizes` what does not
# fit is drawn at random. It makes numbers of the keys of this field when it reads a config, and so fails with what stands
# there; transformers 5 does not look at it.
_TOO_OLD: dict[str, dict[str, list[int]]] = {
    "pruned_heads": {f"this model needs transformers>={NEEDS}, and hf_compressm or trust_remote_code=True": []}
}
# What is set for projected layers, and for those of them whose heads differ.
_OF_SOME_LAYERS = ("unprojected_state_size", "head_state_sizes")


# Types of layers that have a state, in `config.layer_types`.
_STATEFUL = ("linear_attention", "hybrid", "mamba")


def state_size_field(config: PreTrainedConfig) -> str:
    """The config attribute that holds the state size.

    Raises:
        ValueError: if the architecture is unknown and has none of the known names.
    """
    if config.model_type in ARCHITECTURES:
        return ARCHITECTURES[config.model_type].state_size
    names = sorted({architecture.state_size for architecture in ARCHITECTURES.values()})
    for name in names:
        if name in vars(config):
            return name
    raise ValueError(
        f"The config of a {config.model_type} model has no state size: none of {', '.join(names)}. Without one, a slimmed "
        "model could not be saved."
    )


def sizes_may_differ(config: PreTrainedConfig) -> bool:
    """Whether a model of this architecture can be saved and built with layers of different sizes."""
    return config.get_text_config().model_type in ARCHITECTURES


def text_configs(model_or_config: PreTrainedModel | PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configs that tell the state sizes: a model and the text model inside may each hold a copy.

    None for a plain module, whose sizes are those of its weights.

    Raises:
        ValueError: if the model is a module of one's own around one that has a config.
    """
    if isinstance(model_or_config, PreTrainedConfig):
        return [model_or_config.get_text_config()]
    models = [module for module in model_or_config.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        return []
    if not isinstance(getattr(model_or_config, "config", None), PreTrainedConfig):
        raise ValueError(
            f"{type(model_or_config).__name__} has no config of transformers to write state sizes in: give the "
            "PreTrainedModel inside of it. Nothing was changed."
        )
    text = model_or_config.config.get_text_config()
    configs = [text, *(module.config for module in models if module.config.model_type == text.model_type)]
    return list({id(config): config for config in configs}.values())


def get_state_sizes(config: PreTrainedConfig, field: str | None = None) -> list[int]:
    """The size of the recurrent state of each layer, read from `field` of its config; 0 where a layer has none."""
    config = config.get_text_config()
    field = field or state_size_field(config)
    stateful = _stateful_layers(config)
    return [getattr(layer, field) if i in stateful else 0 for i, layer in enumerate(config.per_layer_config)]


def _stateful_layers(config: PreTrainedConfig) -> list[int]:
    types = getattr(config, "layer_types", None) or ["hybrid"] * config.num_hidden_layers
    return [i for i, kind in enumerate(types) if kind in _STATEFUL]


def get_unprojected_state_sizes(config: PreTrainedConfig) -> list[int | None]:
    """For each layer the size its B and C are projected from, or None where they are not projected."""
    return [getattr(layer, "unprojected_state_size", None) for layer in config.get_text_config().per_layer_config]


def get_head_state_sizes(config: PreTrainedConfig) -> list[list[int] | None]:
    """For each layer the sizes of its heads, or None where they are one."""
    return [getattr(layer, "head_state_sizes", None) for layer in config.get_text_config().per_layer_config]


def set_state_sizes(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    sizes: Mapping[int, int],
    projected_from: Mapping[int, int] | None = None,
    head_sizes: Mapping[int, Sequence[int]] | None = None,
    *,
    field: str | None = None,
) -> None:
    """Write the state sizes of a slimmed model in its config. In place; the weights are not touched.

    Args:
        model_or_config: the model or its config, slimmed before or not; if it wraps a text model, that one's.
        sizes: the state size of each layer that changes, by layer index. The other layers stay as they are.
        projected_from: for each layer of `sizes` that is a `ProjectedMixer`, the size that B and C are projected
            from. A layer of `sizes` that is not named here is unprojected.
        head_sizes: for each layer of `projected_from` that is a `HeadwiseProjectedMixer`, the sizes of its heads, of
            which `sizes` has the mean.
        field: the config attribute that holds the state size; by default the architecture's.

    Raises:
        ValueError: if a layer or a size is out of range or a layer has no state, if `projected_from` names other layers
            than `sizes` or an architecture other than Mamba-2, if `head_sizes` names other layers than that or sizes of
            another mean, or if the layers differ in an architecture that has one size for all.
    """
    for config in text_configs(model_or_config):
        _set_state_sizes(config, sizes, projected_from or {}, head_sizes or {}, field or state_size_field(config))


def check_state_sizes(model: PreTrainedModel, sizes: Mapping[int, int]) -> None:
    """Refuse sizes that `set_state_sizes` would refuse, with nothing changed.

    Raises:
        ValueError: as `set_state_sizes`.
    """
    for config in text_configs(model):
        _set_state_sizes(copy.deepcopy(config), sizes, {}, {}, state_size_field(config))


def _set_state_sizes(
    config: PreTrainedConfig,
    sizes: Mapping[int, int],
    projected_from: Mapping[int, int],
    head_sizes: Mapping[int, Sequence[int]],
    field: str,
) -> None:
    _check(config, sizes, projected_from, head_sizes)

    def of_layer(size: int, N: int | None = None, of_heads: Sequence[int] | None = None) -> dict[str, Any]:
        heads = None if of_heads is None else list(of_heads)
        values = {field: size} | dict(zip(_OF_SOME_LAYERS, (N, heads), strict=True))
        return {name: value for name, value in values.items() if value is not None}

    layers: dict[int | str, dict[str, Any]]
    if config.model_type in ARCHITECTURES:
        now = list(
            zip(
                get_state_sizes(config, field),
                get_unprojected_state_sizes(config),
                get_head_state_sizes(config),
                strict=True,
            )
        )
        layers = {i: of_layer(*now[i]) for i in _stateful_layers(config)}
        layers |= {i: of_layer(size, projected_from.get(i), head_sizes.get(i)) for i, size in sizes.items()}
    else:
        layers = {i: of_layer(size) for i, size in sizes.items()}
    alike = all(layer == layers[min(sizes)] for layer in layers.values())
    if config.model_type not in ARCHITECTURES and not alike:
        raise ValueError(
            f"The layers of a {config.model_type} model must all have the same state size, got "
            f"{dict(sizes)}: choose one size for all of them (`uniform=True`)."
        )

    config.per_layer_config = None
    for name in (*_OF_SOME_LAYERS, *_TOO_OLD):
        if hasattr(config, name):
            delattr(config, name)
    used = {name for layer in layers.values() for name in layer}
    if alike and used == {field}:
        setattr(config, field, layers[min(sizes)][field])
    else:
        setattr(config, field, _NO_SIZE)
        for name in used - {field}:
            setattr(config, name, None)  # transformers wants what some layers set on the whole config too
        for name, message in _TOO_OLD.items():
            setattr(config, name, copy.deepcopy(message))
        config.per_layer_config = layers
    update_auto_map(config)


def _check(
    config: PreTrainedConfig,
    sizes: Mapping[int, int],
    projected_from: Mapping[int, int],
    head_sizes: Mapping[int, Sequence[int]],
) -> None:
    if not sizes:
        raise ValueError("`sizes` is empty: give the state size of at least one layer, {layer index: size}.")
    for layer, size in sizes.items():
        if not 0 <= layer < config.num_hidden_layers:
            raise ValueError(f"The model has layers 0 to {config.num_hidden_layers - 1}, `sizes` names layer {layer}.")
        if size < 1:
            raise ValueError(f"A state size is at least 1, `sizes` gives {size} for layer {layer}.")
        if layer not in _stateful_layers(config):
            raise ValueError(
                f"Layer {layer} of this model has no state; those that have are {_stateful_layers(config)}."
            )
    heads = ARCHITECTURES[config.model_type].heads if config.model_type in ARCHITECTURES else None
    if projected_from and heads is None:
        raise ValueError(f"Only Mamba-2 layers can project their state, this is a {config.model_type} model.")
    for layer, N in projected_from.items():
        if layer not in sizes:
            raise ValueError(f"`projected_from` names layer {layer}, which has no entry in `sizes`.")
        if sizes[layer] > N:
            raise ValueError(f"Layer {layer} cannot project its state from {N} up to {sizes[layer]}.")
    for layer, of_heads in head_sizes.items():
        if layer not in projected_from:
            raise ValueError(f"`head_sizes` names layer {layer}, which has no entry in `projected_from`.")
        number = getattr(config, str(heads))
        if sum(of_heads) != number * sizes[layer] or len(of_heads) != number:
            raise ValueError(
                f"The sizes of the {number} heads of layer {layer} do not have the mean {sizes[layer]}: {list(of_heads)}."
            )
