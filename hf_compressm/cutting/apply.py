"""Make a planned cut in the model, its config and the optimizer: all of it is computed once before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..backends import Backend
from ..compat.offloading import follow_class_, keep_offloaded_, weights_at_hand
from ..layers import Layer, Realization, new_data
from ..modeling.state_sizes import set_state_sizes, text_configs
from .optimizer import NewState, check_optimizers, cut_states, hold_new_, set_states_


@torch.no_grad()
def cut_(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    realizations: Mapping[int, Realization],
    optimizers: Sequence[torch.optim.Optimizer],
    backend: Backend,
) -> None:
    """Turn layers into their realizations, by layer index. In place.

    Raises:
        ValueError: if the new weights are not finite or the optimizers' states can't follow. Nothing is changed then.
    """
    if optimizers:
        check_optimizers(optimizers, model)
    ready: list[tuple[Layer, Realization]] = []
    states: list[NewState] = []
    for layer in layers:
        if layer.index not in realizations:
            continue
        realization = realizations[layer.index].to(layer.device)
        parameters = dict(layer.mixer.named_parameters())  # which optimizers hold
        with weights_at_hand(layer.mixer):
            cuts = realization.parameter_cuts(layer)
            # Looked at, and made once more in its turn: all layers' together would be most of a second model.
            wrong = [name for name, data in new_data(layer, cuts).items() if not torch.isfinite(data).all()]
            if wrong:
                raise ValueError(
                    f"The cut of layer {layer.index} to {realization.size} states is not finite in {layer.name}.{wrong[0]}: "
                    f"look at the model's weights{' and the calibration data' if layer.reads_data else ''}. Nothing was changed."
                )
            for name, cut in cuts.items():
                states += cut_states(optimizers, f"{layer.name}.{name}", parameters.get(name), cut)
        ready.append((layer, realization))
    for layer, realization in ready:
        with weights_at_hand(layer.mixer):
            new = new_data(layer, realization.parameter_cuts(layer))
            realization.apply_(layer, new, backend.resize_parameter_)
            follow_class_(layer.mixer)
            for name in new:
                owner, _, own_name = name.rpartition(".")
                keep_offloaded_(layer.mixer.get_submodule(owner), own_name)
        hold_new_(optimizers, model, layer.mixer)
    if ready:
        write_sizes_(model, layers)
        _keep_trained_weights(model)
    set_states_(states)
    if optimizers:  # of what a realization of one's own may have changed
        check_optimizers(optimizers, model)


@torch.no_grad()
def replaced_parameters(layers: Sequence[Layer], realizations: Mapping[int, Realization]) -> list[Tensor]:
    """The parameters that a cut gives new data, other than offloaded ones."""
    found = []
    for layer in layers:
        if layer.index in realizations and not any(p.is_meta for p in layer.mixer.parameters()):
            parameters = dict(layer.mixer.named_parameters())
            with weights_at_hand(layer.mixer):
                cuts = realizations[layer.index].to(layer.device).parameter_cuts(layer)
            found += [parameters[name] for name in cuts if name in parameters]
    return found


def write_sizes_(model: PreTrainedModel, layers: Sequence[Layer]) -> None:
    """Write the layers' sizes in the model's config. In place."""
    unprojected = {layer.index: layer.unprojected_state_size for layer in layers}
    set_state_sizes(
        model,
        {layer.index: layer.state_size for layer in layers},
        {index: size for index, size in unprojected.items() if size is not None},
        {layer.index: layer.head_state_sizes for layer in layers if layer.head_state_sizes is not None},
    )


def _keep_trained_weights(model: PreTrainedModel) -> None:
    """Switch off the rescaling of `out_proj`: transformers repeats it whenever it loads the saved model."""
    for config in text_configs(model):
        if getattr(config, "rescale_prenorm_residual", False):
            config.rescale_prenorm_residual = False
