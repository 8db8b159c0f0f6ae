"""Give a model's mixers new weights of other sizes, and tell its config."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from .architectures import SSMLayer, unprojected_sizes
from .architectures.parameter_cut import ParameterCut
from .hub import project_, set_state_sizes, text_configs
from .training.reshape import set_data_


def new_data(layer: SSMLayer, cuts: dict[str, ParameterCut]) -> dict[str, Tensor]:
    """The data of a mixer's parameters after a cut, by name; the mixer is not changed."""
    new = {}
    for name, cut in cuts.items():
        old = layer.mixer.A_log if cut.index is None else layer.mixer.get_parameter(name)
        new[name] = cut.weights(old.detach())
    return new


def cut_mixer_(layer: SSMLayer, new: dict[str, Tensor], size: int) -> None:
    if "BC_projection" in new:
        project_(layer.mixer, **new)
        return
    for name, data in new.items():
        set_data_(layer.mixer.get_parameter(name), data)
    layer.resize(size)


def cut_model_(
    model: PreTrainedModel, layers: list[SSMLayer], sizes: list[int], cuts: dict[int, dict[str, Tensor]]
) -> None:
    """Change the model: nothing here is expected to fail, everything that could has been computed before."""
    for layer, size in zip(layers, sizes, strict=True):
        if layer.index in cuts:
            cut_mixer_(layer, cuts[layer.index], size)
    if cuts:
        set_state_sizes(model, {layer.index: layer.state_size for layer in layers}, unprojected_sizes(layers))
        _keep_trained_weights(model)


def _keep_trained_weights(model: PreTrainedModel) -> None:
    """Switch off the rescaling of `out_proj`: transformers repeats it whenever it loads the saved model."""
    for config in text_configs(model):
        if getattr(config, "rescale_prenorm_residual", False):
            config.rescale_prenorm_residual = False
