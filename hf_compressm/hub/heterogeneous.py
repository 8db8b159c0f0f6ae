"""Write and read the state sizes of a model's layers in its config.

A model whose layers all have one unprojected size has a stock config: that size, and nothing else. Any other model has
`per_layer_config`, with the size of every layer, and `auto_map`, which names the file that can build it (see
`modeling_compressm`).
"""

from collections.abc import Mapping

from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_compressm import AUTO_MAPS, update_auto_map

# The size that a config with `per_layer_config` gives for all layers. No layer has it, so all of them are listed, and
# no reader can take the size of some layers for that of all.
_NO_SIZE = 0


def get_state_sizes(config: PreTrainedConfig, field: str = "state_size") -> list[int]:
    """The size of the recurrent state of each layer, read from `field` of its config."""
    return [getattr(layer, field) for layer in config.per_layer_config]


def get_unprojected_state_sizes(config: PreTrainedConfig) -> list[int | None]:
    """For each layer the size its B and C are projected from, or None where they are not projected."""
    return [getattr(layer, "unprojected_state_size", None) for layer in config.per_layer_config]


def set_state_sizes(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    sizes: Mapping[int, int],
    projected_from: Mapping[int, int] | None = None,
    *,
    field: str = "state_size",
) -> None:
    """Write the state sizes of a slimmed model in its config. In place; the weights are not touched.

    Args:
        model_or_config: the model or its config, slimmed before or not.
        sizes: the state size of each layer that changes, by layer index. The other layers stay as they are. For a
            hybrid model, name all of the layers that have a state: the rest do not count.
        projected_from: for each layer of `sizes` that is a `ProjectedMamba2Mixer`, the size that B and C are projected
            from. A layer of `sizes` that is not named here is unprojected.
        field: the config attribute that holds the state size.

    Raises:
        ValueError: if a layer or a size is out of range, if `projected_from` names other layers than `sizes` or an
            architecture other than Mamba-2, or if the layers differ in an architecture that has one size for all.
    """
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    projected_from = projected_from or {}
    _check(config, sizes, projected_from)

    if config.model_type in AUTO_MAPS:
        now = zip(get_state_sizes(config, field), get_unprojected_state_sizes(config), strict=True)
        layers = dict(enumerate(now)) | {i: (size, projected_from.get(i)) for i, size in sizes.items()}
    else:
        layers = {i: (size, None) for i, size in sizes.items()}
        if len(set(layers.values())) > 1:
            raise ValueError(
                f"The layers of a {config.model_type} model must all have the same state size, got "
                f"{dict(sizes)}: choose one size for all of them (`uniform=True`)."
            )

    config.per_layer_config = None
    if hasattr(config, "unprojected_state_size"):
        del config.unprojected_state_size
    if len(set(layers.values())) == 1 and layers[min(layers)][1] is None:
        setattr(config, field, layers[min(layers)][0])
    else:
        setattr(config, field, _NO_SIZE)
        if any(N is not None for _, N in layers.values()):
            config.unprojected_state_size = None  # transformers wants what some layers set on the whole config too
        config.per_layer_config = {
            i: {field: size} if N is None else {field: size, "unprojected_state_size": N}
            for i, (size, N) in layers.items()
        }
    update_auto_map(config)


def _check(config: PreTrainedConfig, sizes: Mapping[int, int], projected_from: Mapping[int, int]) -> None:
    if not sizes:
        raise ValueError("`sizes` is empty: give the state size of at least one layer, {layer index: size}.")
    for layer, size in sizes.items():
        if not 0 <= layer < config.num_hidden_layers:
            raise ValueError(f"The model has layers 0 to {config.num_hidden_layers - 1}, `sizes` names layer {layer}.")
        if size < 1:
            raise ValueError(f"A state size is at least 1, `sizes` gives {size} for layer {layer}.")
    if projected_from and config.model_type != "mamba2":
        raise ValueError(f"Only Mamba-2 layers can project their state, this is a {config.model_type} model.")
    for layer, N in projected_from.items():
        if layer not in sizes:
            raise ValueError(f"`projected_from` names layer {layer}, which has no entry in `sizes`.")
        if sizes[layer] > N:
            raise ValueError(f"Layer {layer} cannot project its state from {N} up to {sizes[layer]}.")
