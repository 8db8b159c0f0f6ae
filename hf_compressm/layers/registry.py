"""The families of layers and their realizations, and which of them a model's mixers are.

A mixer is known by what it has, not by its name. Two families and these differences cover ten model types:

| what the mixer has | found in | family |
|---|---|---|
| `A_log` [channels, N], `x_proj` | mamba | `MambaLayer` |
| the same, with RMS norms on B and C | falcon_mamba, jamba | `NormalisedMambaLayer` |
| `A_log` [heads, head_dim, N], `x_proj_weight` [heads, ...] | zamba | `HeadwiseMambaLayer` |
| `A_log` [heads], B and C in `in_proj` and `conv1d` | mamba2, zamba2, bamba, granitemoehybrid, nemotron_h | `Mamba2Layer` |
| the same, with a `mup_vector` on what `in_proj` gives | falcon_h1 | `Mamba2Layer` |
| methods `lti_system` and `lti_parameters` | models of one's own: LRU, S4D, S5 | `LTILayer` |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ..compat.offloading import is_in_memory
from ..compat.sharding import is_sharded
from ..compat.wrapping import uncompiled
from ..config import REALIZATIONS, CompreSSMConfig
from ..modeling.state_sizes import sizes_may_differ
from .by_head import ProjectHeads
from .contracts import Layer, Realization
from .engines import check_engine
from .headwise import HeadwiseMambaLayer
from .lti import Balance, LTILayer
from .mamba import MambaLayer
from .mamba2 import Mamba2Layer
from .normalised import NormalisedMambaLayer

_FAMILIES: list[Any] = [HeadwiseMambaLayer, NormalisedMambaLayer, MambaLayer, Mamba2Layer, LTILayer]


def register(family: Any) -> Any:
    """Add a family, a class that satisfies `Layer` and is called with a mixer's name and the mixer. It comes first.

    Returns:
        the class, so that this serves as a decorator.
    """
    _FAMILIES.insert(0, family)
    return family


def register_realization(family: Any, realization: type[Realization]) -> None:
    """Let a family's layers be cut by a realization, by `CompreSSMConfig(realization=realization.name)`."""
    family.realizations = family.realizations | {realization.name: realization}
    if realization.name not in REALIZATIONS:
        REALIZATIONS.append(realization.name)


register_realization(Mamba2Layer, ProjectHeads)
register_realization(LTILayer, Balance)


def plain_model(model: Any) -> Any:
    """The model inside of `torch.compile`, or itself.

    Raises:
        TypeError: if it is wrapped in anything else, or neither a model of transformers nor one whose layers need no config.
        ValueError: in `torch.inference_mode`, whose tensors no training could use again.
    """
    model = uncompiled(model)
    if isinstance(model, PreTrainedModel) or is_plain(model):
        if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
            raise ValueError(
                "Parameters that are made in torch.inference_mode() can't be trained or healed: load and cut the model outside of it, "
                "or under torch.no_grad(). Nothing was changed."
            )
        return model
    if isinstance(model, nn.Module) and hasattr(model, "merge_and_unload"):
        todo = (
            "merge its adapters first (merge_and_unload), or cut the base model and train the adapter on the slim one"
        )
    elif isinstance(model, nn.Module):
        inside = next((name for name, part in model.named_modules() if isinstance(part, PreTrainedModel)), None)
        todo = f"pass the model inside of it, get_submodule({inside!r})" if inside else "pass the whole model"
    else:
        todo = "pass a loaded model"
    kind = model.__name__ if isinstance(model, type) else type(model).__name__
    raise TypeError(f"{kind} is no PreTrainedModel, as the models of transformers are: {todo}.")


def is_plain(model: Any) -> bool:
    """Whether a model has no config of transformers and no need of one: all of its SSM layers tell their sizes by shapes."""
    modules = [] if not isinstance(model, nn.Module) else list(model.modules())
    if any(isinstance(module, PreTrainedModel) for module in modules):
        return False
    families = [family for module in modules for family in _FAMILIES if not family.misfit(module)]
    return bool(families) and all(family.in_plain_models for family in families)


def find_layers(model: nn.Module, *, shapes_alone: bool = False) -> list[Layer]:
    """The model's SSM layers, in order.

    Args:
        model: that has them.
        shapes_alone: its weights are not looked at, and may be on the meta device.

    Raises:
        ValueError: if there is none, or one with weights that can't be cut (meta device, quantised, computed from others,
            with an adapter, another layer's, too), or two of one index.
    """
    layers: list[Layer] = []
    hints = {}
    for name, module in model.named_modules():
        misfits = {family: family.misfit(module) for family in _FAMILIES}
        family = next((family for family, remarks in misfits.items() if not remarks), None)
        if family is not None:
            layer = family(name, module)
            layer.sizes_may_differ = not isinstance(model, PreTrainedModel) or sizes_may_differ(model.config)
            layer.index = len(layers) if layer.index is None else layer.index
            layers.append(layer)
        elif _looks_like_a_mixer(module):
            _refuse_computed(name, module)
            nearest = MambaLayer if hasattr(module, "x_proj") else Mamba2Layer
            hints[type(module).__name__] = f"as a {nearest.family} mixer it {', '.join(misfits[nearest])}"
    if not layers:
        text = "".join(f" {name} looks like one, but {why}." for name, why in hints.items())
        raise ValueError(
            f"{type(model).__name__} has no Mamba, Mamba-2 or LTI layer, so there is no state to cut.{text}"
        )
    if not shapes_alone:
        _check_weights(model, layers)
    _check_indices(layers)
    return layers


def realization_of(config: CompreSSMConfig, layers: Sequence[Layer], *, in_training: bool = False) -> str:
    """What the config's `realization` means for these layers, when they are cut after or in training.

    Raises:
        ValueError: if it is one that they can't have.
    """
    check_engine(config, layers)
    projected = [layer.index for layer in layers if layer.unprojected_state_size is not None]
    if config.uniform and projected:
        raise ValueError(
            f"uniform=True asks for a stock checkpoint, and layer {projected[0]} scans a projected state, which no stock "
            "class loads: cut the model that it was projected from with uniform=True, or drop uniform=True."
        )
    name = _realization_of(config, layers, in_training)
    if _asks_for_a_cut(config):
        for layer in layers:
            layer.realizations[name].check_layer(layer)
    return name


def _realization_of(config: CompreSSMConfig, layers: Sequence[Layer], in_training: bool) -> str:
    by_head = [layer.index for layer in layers if layer.head_state_sizes is not None]
    if by_head:
        if config.realization not in ("auto", "project_heads") or config.selection != "auto":
            raise ValueError(
                f"Each head of layer {by_head[0]} scans a projection of its own, so the model can only be cut by head: with "
                "realization='project_heads'. Nothing was changed."
            )
        return "project_heads"
    of_each = [{name for name, made in layer.realizations.items() if made.fits(layer)} for layer in layers]
    have = set.intersection(*of_each)
    if config.realization in have:
        return config.realization
    if not _asks_for_a_cut(config) and "select" not in have:
        return "select"  # which is not made
    if not have:
        raise ValueError(_nothing_fits(layers, of_each))
    name = _best(config, layers, have, in_training)
    if config.realization == "auto" and name in have:
        return name
    best = _best(replace(config, selection="auto"), layers, have, in_training)
    best = best if best in have else min(have)
    can = f"which can {' or '.join(sorted(have))}"
    if config.realization == "auto":
        raise ValueError(
            f"selection={config.selection!r} is for realization='select', which is not for these layers, {can}. Take "
            f"realization={best!r} without a selection. Nothing was changed."
        )
    reason = (
        "needs the Mamba-2 layers of a model of transformers: in Mamba-1 each state of a channel decays at its own rate, "
        "and a projection would not commute with that; a Mamba-2 mixer of one's own has no projected form here"
        if config.realization in ("project", "project_heads")
        else f"is not for these layers, {can}"
    )
    raise ValueError(f"realization={config.realization!r} {reason}. Take realization={best!r}.")


def _best(config: CompreSSMConfig, layers: Sequence[Layer], have: set[str], in_training: bool) -> str:
    """What "auto" means, of what the layers have: "select" if nothing suits better."""
    kinds = {name: {layer.realizations[name] for layer in layers} for name in sorted(have)}
    suited = (n for n, made in kinds.items() if all(one.suits(config, in_training=in_training) for one in made))
    return next(suited, "select")


def _nothing_fits(layers: Sequence[Layer], of_each: Sequence[set[str]]) -> str:
    layer = next((layer for layer, names in zip(layers, of_each, strict=True) if not names), None)
    if layer is None:
        each = (f"layer {layer.index} {' or '.join(sorted(n))}" for layer, n in zip(layers, of_each, strict=True))
        return f"The layers have no realization in common: {', '.join(each)}. Nothing was changed."
    wanted = (f"{name!r} wants {made.wants}" for name, made in sorted(layer.realizations.items()) if made.wants)
    return f"{layer.name} can't be cut by any realization: {', '.join(wanted)}. Nothing was changed."


def _asks_for_a_cut(config: CompreSSMConfig) -> bool:
    return config.tolerance != 0 and config.ratio != 1


def realize(
    layers: Sequence[Layer], statistics: Sequence[Any], config: CompreSSMConfig, name: str
) -> list[Mapping[int, Realization]]:
    """For each layer its realization of that name at every size."""
    paths: list[Mapping[int, Realization]] = [{} for _ in layers]
    for realization in dict.fromkeys(layer.realizations[name] for layer in layers):
        mine = [position for position, layer in enumerate(layers) if layer.realizations[name] is realization]
        made = realization.paths([layers[i] for i in mine], [statistics[i] for i in mine], config)
        for position, path in zip(mine, made, strict=True):
            paths[position] = path
    return paths


def _looks_like_a_mixer(module: nn.Module) -> bool:
    """Decays of its own, as all known ones, or computed from the input, as in Mamba-3."""
    return hasattr(module, "A_log") or all(hasattr(module, name) for name in ("in_proj", "dt_bias", "D", "out_proj"))


def _check_weights(model: Any, layers: Sequence[Layer]) -> None:
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
        for name, module in layer.mixer.named_modules(prefix=layer.name):
            _refuse_computed(name, module)
        for name, parameter in layer.mixer.named_parameters():
            owner, _, own_name = name.rpartition(".")
            if not is_in_memory(layer.mixer.get_submodule(owner), own_name):
                raise ValueError(
                    f"{layer.name}.{name} is on the meta device, and its weights are not in memory: load the model "
                    "without a meta device or disk offload before cutting it; device_map may leave it on the CPU."
                )
            one_byte = parameter.element_size() < 2  # float8 counts as floating point
            number = parameter.is_floating_point() or parameter.is_complex()
            if not number or one_byte or hasattr(parameter, "quant_state"):
                raise ValueError(f"{layer.name}.{name} is quantised ({parameter.dtype}): {quantised}")
            if type(parameter.data) is not Tensor and not is_sharded(parameter):  # such as torchao's
                raise ValueError(
                    f"{layer.name}.{name} is a {type(parameter.data).__name__}, which can't be given new data: if it is "
                    f"quantised, {quantised}"
                )
    _refuse_shared(model, layers)


def _refuse_shared(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Refuse a mixer of which a config would tell two sizes, and parameters that are changed in one mixer and another's, too."""
    if isinstance(model, PreTrainedModel):
        mixers: dict[int, str] = {}
        found = {id(layer.mixer) for layer in layers}
        for name, module in model.named_modules(remove_duplicate=False):
            if id(module) in found and mixers.setdefault(id(module), name) != name:
                raise ValueError(
                    f"{mixers[id(module)]} and {name} are one mixer, of which the config would tell two sizes, and which can't be "
                    "saved: give each layer its own (copy.deepcopy). Nothing was changed."
                )
    owners: dict[int, tuple[Layer, str]] = {}
    for layer in layers:
        for name, parameter in layer.mixer.named_parameters():
            owner, own_name = owners.setdefault(id(parameter), (layer, name))
            if owner is not layer and any(
                shared in {*one.system_parameters(), *one.changed_by_a_cut()}
                for one, shared in ((owner, own_name), (layer, name))
            ):
                raise ValueError(
                    f"{owner.name}.{own_name} and {layer.name}.{name} are one parameter, which a cut would change for both: "
                    "give each mixer its own. Nothing was changed."
                )


def _refuse_computed(name: str, module: nn.Module) -> None:
    """Refuse weights that are computed from others at each step, and so are no parameters."""
    computed = set(module.parametrizations) if parametrize.is_parametrized(module) else set()  # type: ignore[arg-type]
    for suffix in ("_orig", "_v"):  # pruning and spectral_norm, and weight_norm, by their hooks
        own = [key.removesuffix(suffix) for key, _ in module.named_parameters(recurse=False) if key.endswith(suffix)]
        computed |= {key for key in own if isinstance(getattr(module, key, None), Tensor)}
    if computed:
        raise ValueError(
            f"{name}.{min(computed)} is computed from other parameters (a parametrization, a norm or a pruning mask), so it "
            "can't be given new data: make it a parameter first, by torch.nn.utils.parametrize.remove_parametrizations, "
            "remove_spectral_norm, remove_weight_norm or prune.remove. Nothing was changed."
        )


def _check_indices(layers: Sequence[Layer]) -> None:
    seen: dict[int, str] = {}
    for layer in layers:
        first = seen.setdefault(layer.index, layer.name)
        if first != layer.name:
            raise ValueError(
                f"{first} and {layer.name} both have layer_idx {layer.index}, so that the config can't tell their sizes "
                "apart, nor a cache their states: set mixer.layer_idx to the position of each layer (of copied ones, too), "
                "and config.num_hidden_layers to their number. Nothing was changed."
            )
