"""Make a planned cut in the model, its config and the optimizer: all of it is computed before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..backends import Backend
from ..layers import Layer, Realization, new_data
from ..modeling.state_sizes import set_state_sizes, text_configs
from .optimizer import NewState, check_optimizers, cut_states, set_states_


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
    ready: list[tuple[Layer, Realization, dict[str, Tensor]]] = []
    states: list[NewState] = []
    for layer in layers:
        if layer.index not in realizations:
            continue
        parameters = dict(layer.mixer.named_parameters())
        realization = realizations[layer.index].to(next(iter(parameters.values())).device)
        cuts = realization.parameter_cuts(layer)
        new = new_data(layer, cuts)
        if not all(torch.isfinite(data).all() for data in new.values()):
            raise ValueError(
                f"The cut of layer {layer.index} to {realization.size} states is not finite: look at the model's weights "
                "and the calibration data. Nothing was changed."
            )
        for name, cut in cuts.items():
            parameter = parameters[name] if cut.index is not None else None
            states += cut_states(optimizers, f"{layer.name}.{name}", parameter, cut)
        ready.append((layer, realization, new))
    for layer, realization, new in ready:
        realization.apply_(layer, new, backend.resize_parameter_)
    if ready:
        write_sizes_(model, layers)
        _keep_trained_weights(model)
    set_states_(states)
    if optimizers:  # of what a realization of one's own may have changed
        check_optimizers(optimizers, model)


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
