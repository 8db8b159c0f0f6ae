"""compress_ and compress_pretrained: measure, choose the sizes, realize them, and only then change the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .architectures import SSMLayer, find_layers, unprojected_sizes
from .architectures.mamba import MambaLayer
from .architectures.normalised import NormalisedMambaLayer
from .architectures.parameter_cut import ParameterCut
from .calibration import calibration_batches
from .config import CompreSSMConfig
from .evaluation import describe, evaluation_ids, perplexity
from .hankel.gramians import MAX_READOUT, Mamba2Statistics, MambaStatistics, elimination_order, hankel_spectra
from .hankel.headwise import HeadwiseStatistics
from .hankel.ranks import allocate_ranks, allowed_sizes, energy_rank, powers_of_two
from .hankel.realization import Projection, Selection, project, select, select_each_with_readout
from .hub import (
    check_login,
    check_state_sizes,
    load_model,
    load_tokenizer,
    project_,
    publish,
    set_state_sizes,
    text_configs,
)
from .report import CompressionReport, LayerReport, Perplexity
from .sensitivity import divergences
from .training.optimizer import cut_states, set_states_, verify_optimizer
from .training.reshape import set_data_

logger = logging.get_logger(__name__)

Statistics = MambaStatistics | Mamba2Statistics | HeadwiseStatistics
# What a ratio measures the layers' sensitivities on, a forward pass for each layer: divergences need few tokens.
SENSITIVITY_SEQUENCES = 2

# What each mixer read, by layer index: hidden states and attention mask of each batch.
MixerInputs = dict[int, list[tuple[Tensor, Tensor | None]]]


def compress_pretrained(
    name_or_model: str | Path | PreTrainedModel,
    config: CompreSSMConfig | None = None,
    *,
    calibration_data: Any = None,
    tokenizer: Any = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    evaluate: bool | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Make a slim model of a checkpoint or a model.

    Args:
        name_or_model: a name on the Hub or a local folder, in the layout of transformers or of `state-spaces/*`; or a
            model, which is changed in place.
        config: what to cut; by default 5% of each layer's Hankel energy.
        calibration_data: LongTensor [n, L], list of texts, `datasets.Dataset` or DataLoader. By default a text that the
            package ships, if there is a tokenizer, else samples of the model itself.
        tokenizer: for texts; by default the checkpoint's.
        push_to_hub: a repository to push the slim model, its tokenizer and its model card to, in one commit. The login is
            checked before anything else is done.
        private: make that repository a private one, if it is new.
        evaluate: take the perplexity before and after the cut, on a text that the package ships, into the report and the
            model card. By default when pushing, if there is a tokenizer.
        **from_pretrained_kwargs: for `from_pretrained`, such as `dtype`, `device_map` or `revision`.

    Returns:
        the slim model, with a `compression_report`.

    Raises:
        ValueError, TypeError: see `compress_`.
        OSError: if there is no such checkpoint, or a part of it is missing or half written; or if the push failed.
    """
    token = from_pretrained_kwargs.get("token")
    if push_to_hub is not None:
        check_login(token)
    if isinstance(name_or_model, PreTrainedModel):
        if from_pretrained_kwargs:
            raise TypeError(f"A model is already loaded: drop {', '.join(from_pretrained_kwargs)}, or give its name.")
        model = name_or_model
    else:
        hub = {
            key: from_pretrained_kwargs[key]
            for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder")
            if key in from_pretrained_kwargs
        }
        model = load_model(name_or_model, **from_pretrained_kwargs)
        if tokenizer is None:
            try:
                tokenizer = load_tokenizer(name_or_model, **hub)
            except (OSError, ValueError) as error:
                logger.info(f"hf_compressm: no tokenizer for {name_or_model} ({error}).")
    if evaluate and tokenizer is None:
        raise ValueError("The perplexity is taken on text, and there is no tokenizer: pass tokenizer=.")
    if evaluate is None:
        evaluate = push_to_hub is not None and tokenizer is not None
    ids = evaluation_ids(tokenizer) if evaluate else None
    before = perplexity(model, ids) if ids is not None else 0.0
    report = compress_(model, config, calibration_data, tokenizer=tokenizer)
    if ids is not None:
        measured = Perplexity(before, perplexity(model, ids), describe(ids))
        model.compression_report = replace(report, perplexity=measured)  # type: ignore[assignment]
    if push_to_hub is not None:
        publish(model, push_to_hub, tokenizer=tokenizer, private=private, token=token)
    return model


def compress_(
    model: PreTrainedModel,
    config: CompreSSMConfig | None = None,
    calibration_data: Any = None,
    *,
    tokenizer: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> CompressionReport:
    """Make the state of a model's SSM layers smaller, in place.

    Everything is measured and planned before anything is changed: an error leaves the model as it was. Parameters keep
    their identity and only change their data, except that a projection adds two to each mixer.

    Args:
        model: with Mamba or Mamba-2 layers, on any device.
        config: what to cut; by default 5% of each layer's Hankel energy.
        calibration_data, tokenizer: as for `compress_pretrained`.
        optimizer: of a training loop: its state is cut along with the parameters it belongs to.

    Returns:
        the report, which is also `model.compression_report`.

    Raises:
        ValueError: if the model has no SSM layer or weights that can't be cut, if the target can't be reached, or if
            the calibration data does not fit the model.
        TypeError: if the calibration data is of an unknown kind.
    """
    config = config or CompreSSMConfig()
    layers = find_layers(model)
    kind = _realization(config, layers)
    _check_targets(config, layers, kind)
    inputs: MixerInputs = {}
    batches = calibration_batches(calibration_data, model, tokenizer)
    refits = config.refit and config.selection == "auto" and (config.tolerance or config.tolerance is None)
    statistics = measure(model, layers, batches, config.estimator, inputs if refits else None)

    def predict() -> Tensor:
        some = {name: tensor[:SENSITIVITY_SEQUENCES].to(model.device) for name, tensor in batches[0].items()}
        return model(**some, use_cache=False)[0]

    plan = plan_cut(model, layers, statistics, config, inputs, predict)
    return apply_cut_(model, layers, plan, optimizer)


@dataclass(frozen=True)
class CutPlan:
    """A cut that was decided on and not made yet: the report of it, and how each parameter changes, by layer index.

    `kept` are the states that stay, a list for each group, by layer index; empty for a projection.
    """

    report: CompressionReport
    cuts: dict[int, dict[str, ParameterCut]]
    kept: dict[int, list[list[int]]]

    def cpu(self) -> CutPlan:
        """The same on the CPU, to be sent to other processes."""
        cuts = {index: {name: cut.cpu() for name, cut in cuts.items()} for index, cuts in self.cuts.items()}
        return CutPlan(self.report, cuts, self.kept)


@torch.no_grad()
def plan_cut(
    model: PreTrainedModel,
    layers: list[SSMLayer],
    statistics: list[Statistics],
    config: CompreSSMConfig,
    inputs: MixerInputs | None = None,
    predict: Callable[[], Tensor] | None = None,
) -> CutPlan:
    """Choose the sizes and the states; nothing is changed.

    Args:
        model, layers, config: what to cut, and how.
        statistics: of each layer, from `measure`.
        inputs: what the mixers read; the Mamba-1 layers are refitted on it.
        predict: runs the model on a few sequences and returns its logits. A `ratio` is allocated by how far they move when
            a layer is cut (see `sensitivity`); without it, all layers count the same.

    Raises:
        ValueError: as `compress_`.
    """
    kind = _realization(config, layers)
    spectra = hankel_spectra(statistics)
    paths = _realize(layers, statistics, config, kind)
    sizes = _choose_sizes(
        config, layers, kind, spectra, paths, lambda at: _sensitivities(model, layers, paths, at, predict)
    )
    check_state_sizes(model, {layer.index: size for layer, size in zip(layers, sizes, strict=True)})
    cuts, kept = {}, {}
    for layer, path, size in zip(layers, paths, sizes, strict=True):
        if size < layer.state_size:
            groups = [group[size] for group in path]
            if isinstance(layer, MambaLayer) and inputs and size * layer.state_size <= MAX_READOUT:
                groups = layer.refit(inputs[layer.index], groups, config.refit)
                for group, fit in zip(path, groups, strict=True):
                    group[size] = fit
            cuts[layer.index] = layer.cut(groups)
            kept[layer.index] = [group.kept.tolist() for group in groups if hasattr(group, "kept")]
    return CutPlan(_report(model, layers, sizes, spectra, paths, kind), cuts, kept)


@torch.no_grad()
def apply_cut_(
    model: PreTrainedModel, layers: list[SSMLayer], plan: CutPlan, optimizer: torch.optim.Optimizer | None = None
) -> CompressionReport:
    """Make a planned cut, in the model and in the optimizer's state. In place.

    Raises:
        ValueError: if the new weights are not finite or the optimizer's state can't follow. Nothing is changed then.
    """
    new: dict[int, dict[str, Tensor]] = {}
    states = []
    for layer in layers:
        if layer.index not in plan.cuts:
            continue
        new[layer.index] = _new_data(layer, plan.cuts[layer.index])
        if not all(torch.isfinite(data).all() for data in new[layer.index].values()):
            raise ValueError(
                f"The cut of layer {layer.index} to {plan.report.sizes[layer.index]} states is not finite: look at "
                "the model's weights and the calibration data. Nothing was changed."
            )
        if optimizer is not None:
            for name, cut in plan.cuts[layer.index].items():
                parameter = layer.mixer.get_parameter(name) if cut.index is not None else None
                states.append((parameter, cut_states(optimizer, f"{layer.name}.{name}", parameter, cut)))
    _apply(model, layers, list(plan.report.sizes.values()), new)
    if optimizer is not None:
        set_states_(optimizer, states)
        verify_optimizer(optimizer, model)
    after = sum(p.numel() for p in model.parameters())
    report = CompressionReport(plan.report.layers, plan.report.realization, plan.report.parameters_before, after)
    model.compression_report = report  # type: ignore[assignment]
    logger.info(f"hf_compressm: cut {len(plan.cuts)} of {len(layers)} SSM layers.")
    return report


@torch.no_grad()
def cut_to_first_states_(model: PreTrainedModel, size: int, realization: str = "auto") -> None:
    """Cut every SSM layer to its first states, in place, whatever they carry: for what depends on shapes alone.

    Raises:
        ValueError: as `compress_`.
    """
    layers = find_layers(model)
    config = CompreSSMConfig(state_size=size, realization=realization)  # type: ignore[arg-type]
    kind = _realization(config, layers)
    _check_targets(config, layers, kind)
    new = {}
    for layer in layers:
        identity = torch.eye(layer.state_size, size, device=layer.mixer.A_log.device)
        kept = torch.arange(size, device=identity.device)
        group: Any = Projection(identity, identity, 0.0) if kind == "project" else Selection(kept, None, 0.0)
        new[layer.index] = _new_data(layer, layer.cut([group] * layer.groups))
    _apply(model, layers, [size] * len(layers), new)


def hankel_singular_values(
    model: PreTrainedModel, calibration_data: Any = None, *, tokenizer: Any = None, estimator: str = "ltv"
) -> CompressionReport:
    """Measure the Hankel singular values of every SSM layer; the model is not changed.

    Args:
        model, calibration_data, tokenizer: as for `compress_`.
        estimator: "ltv" (time-varying, by scan) or "mean_lti" (the paper's surrogate).

    Returns:
        a report in which every layer keeps its size.

    Raises:
        ValueError, TypeError: as `compress_`.
    """
    layers = find_layers(model)
    statistics = measure(model, layers, calibration_batches(calibration_data, model, tokenizer), estimator)
    spectra = hankel_spectra(statistics)
    sizes = [layer.state_size for layer in layers]
    return _report(model, layers, sizes, spectra, None, "measured")


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    layers: list[SSMLayer],
    batches: list[dict[str, Tensor]],
    estimator: str = "ltv",
    inputs: MixerInputs | None = None,
) -> list[Statistics]:
    """Run the model on the batches and accumulate the statistics of each layer from its mixer's inputs.

    If `inputs` is given, those are kept there, too.

    Raises:
        ValueError: if a mixer never ran.
    """
    statistics: list[Statistics] = [layer.statistics(mean_lti=estimator == "mean_lti") for layer in layers]

    with observing(layers, statistics, inputs), evaluating(model):
        for batch in batches:
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            model.base_model(**on_device, use_cache=False)
    for layer, entry in zip(layers, statistics, strict=True):
        if not entry.tokens:
            raise ValueError(f"{layer.name} saw no token of the calibration data, so it can't be measured.")
    return statistics


@contextmanager
def observing(
    layers: list[SSMLayer], statistics: list[Statistics], inputs: MixerInputs | None = None
) -> Iterator[None]:
    """Add what the mixers read in the forward passes in here to their statistics, and to `inputs` if given."""

    def observe(layer: SSMLayer, entry: Any) -> Any:
        def hook(mixer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            read = (hidden_states, kwargs.get("attention_mask"))
            system = layer.read(*read)
            with torch.autocast(hidden_states.device.type, enabled=False):
                entry.update(system)
            if inputs is not None:
                inputs.setdefault(layer.index, []).append(read)

        return layer.mixer.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [observe(layer, entry) for layer, entry in zip(layers, statistics, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _realization(config: CompreSSMConfig, layers: list[SSMLayer]) -> str:
    can_project = all(layer.can_project for layer in layers)
    if config.realization == "project" and not can_project:
        raise ValueError(
            "realization='project' needs the layers of a mamba2 model: in Mamba-1 each state of a channel decays at its "
            "own rate, and a projection would not commute with that; the Mamba-2 mixers of other architectures have no "
            "projected form here. Take realization='select'."
        )
    if config.realization == "auto":
        return "project" if can_project and not config.uniform and config.selection == "auto" else "select"
    return config.realization


def _check_targets(config: CompreSSMConfig, layers: list[SSMLayer], kind: str) -> None:
    if config.state_size is None:
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
            raise ValueError(
                f"Layer {index} has {layer.state_size} states, so it can't be cut to {size}: ask for fewer, or leave the "
                "layer out of {layer: size}."
            )
        if kind == "select" and not getattr(layer, "unprojected_state_size", None):
            layer.check_size(size)


def _realize(
    layers: list[SSMLayer], statistics: list[Any], config: CompreSSMConfig, kind: str
) -> list[list[dict[int, Any]]]:
    """For each layer and each of its groups, the realization of every size."""
    if kind == "project":
        return [
            [project(moments, P) for moments, P in zip(entry.groups, entry.P, strict=True)] for entry in statistics
        ]
    paths: list[list[dict[int, Any]]] = [
        [select(moments, _order(layer, entry, group, config)) for group, moments in enumerate(entry.groups)]
        for layer, entry in zip(layers, statistics, strict=True)
    ]
    if config.selection == "auto":
        found = [
            (path, moments)
            for layer_paths, entry in zip(paths, statistics, strict=True)
            for path, moments in zip(layer_paths, entry.groups, strict=True)
            if moments.readout
        ]
        fits = select_each_with_readout([moments for _, moments in found])
        for (path, _), fit in zip(found, fits, strict=True):
            path |= fit
    for layer, layer_paths, entry in zip(layers, paths, statistics, strict=True):
        if isinstance(layer, NormalisedMambaLayer):
            for path in layer_paths:
                path |= {size: layer.realize(entry, selection) for size, selection in path.items()}
    return paths


def _order(layer: SSMLayer, statistics: Any, group: int, config: CompreSSMConfig) -> Tensor:
    moments = statistics.groups[group]
    if config.selection in ("auto", "greedy"):
        return elimination_order(moments.contribution)
    if config.selection == "random":
        generator = torch.Generator().manual_seed(config.seed * 1000 + layer.index * 10 + group)
        return torch.randperm(layer.state_size, generator=generator).to(moments.output.device)
    if config.selection == "magnitude":
        score = layer.magnitude()[group]
    elif config.selection == "lti_modal":
        score = statistics.modal_gain()[group]
    else:
        score = _weighted_power(statistics, group) * moments.output.diagonal()
    return score.argsort(descending=True)


def _weighted_power(statistics: Any, group: int) -> Tensor:
    statistics = statistics.heads[group] if isinstance(statistics, HeadwiseStatistics) else statistics
    P = statistics.P.diagonal(dim1=-2, dim2=-1).double()
    return P[group] if isinstance(statistics, Mamba2Statistics) else statistics.weight @ P


def _choose_sizes(
    config: CompreSSMConfig,
    layers: list[SSMLayer],
    kind: str,
    spectra: list[Tensor],
    paths: list[list[dict[int, Any]]],
    sensitivities: Callable[[list[int]], list[float]],
) -> list[int]:
    if isinstance(config.state_size, Mapping):
        return [config.state_size.get(layer.index, layer.state_size) for layer in layers]
    if config.state_size is not None:
        return [config.state_size] * len(layers)
    if config.tolerance == 0 or config.ratio == 1:
        return [layer.state_size for layer in layers]
    choices = [sizes_to_choose_from(config, layer, kind) for layer in layers]
    if config.ratio is not None and not config.uniform:
        total = round(config.ratio * sum(layer.state_size for layer in layers))
        # Where a layer may only stay whole, any size below does: its cost is that of keeping all, nothing.
        at = [_nearest(choice, config.ratio) for choice in choices]
        costs = [
            factor * torch.tensor([_error(path, r) for r in range(1, layer.state_size + 1)])
            for layer, path, factor in zip(layers, paths, sensitivities(at), strict=True)
        ]
        return allocate_ranks(costs, total, sizes=choices)
    if config.ratio is not None:
        sizes = [max(1, round(config.ratio * layer.state_size)) for layer in layers]
    else:
        assert config.tolerance is not None
        sizes = [int(energy_rank(spectrum, config.tolerance).max()) for spectrum in spectra]
    if config.uniform:
        sizes = [max(sizes)] * len(sizes)
    return [next(r for r in choice if r >= size) for size, choice in zip(sizes, choices, strict=True)]


def _nearest(choice: list[int], ratio: float) -> int:
    """The size below the present one, of those to choose from, that is nearest to a share of it."""
    return min(choice[:-1] or [max(1, choice[-1] - 1)], key=lambda size: abs(size - ratio * choice[-1]))


def _error(path: list[dict[int, Any]], size: int) -> float:
    return sum(group[size].error for group in path)


def _sensitivities(
    model: PreTrainedModel,
    layers: list[SSMLayer],
    paths: list[list[dict[int, Any]]],
    sizes: list[int],
    predict: Callable[[], Tensor] | None,
) -> list[float]:
    """For each layer, how far the predictions move for each unit of output error, from a cut of it to a size."""
    if predict is None or len(layers) == 1:
        return [1.0] * len(layers)
    cuts = []
    for layer, path, size in zip(layers, paths, sizes, strict=True):
        parameter_cuts = layer.cut([group[size] for group in path])
        cuts.append(lambda other, cut=parameter_cuts, size=size: _apply_to_layer(other, _new_data(other, cut), size))
    with evaluating(model):
        moved = divergences(model, layers, cuts, predict)
    errors = [_error(path, size) for path, size in zip(paths, sizes, strict=True)]
    return [kl / error if error > 0 else 0.0 for kl, error in zip(moved, errors, strict=True)]


def sizes_to_choose_from(config: CompreSSMConfig, layer: SSMLayer, kind: str) -> list[int]:
    """Ascending; the last is the layer's present size."""
    if config.multiple_of is None and layer.pads_states:
        return powers_of_two(layer.state_size, max(16, config.min_state_size))
    step = multiple_of = config.multiple_of or 1
    if kind == "select" and layer.pads_states:
        while layer.groups * step % 8:  # what the CUDA convolution takes
            step += multiple_of
    return allowed_sizes(layer.state_size, config.min_state_size, step)


def _report(
    model: PreTrainedModel,
    layers: list[SSMLayer],
    sizes: list[int],
    spectra: list[Tensor],
    paths: list[list[dict[int, Any]]] | None,
    kind: str,
) -> CompressionReport:
    parameters = sum(p.numel() for p in model.parameters())
    rows = []
    for position, (layer, size, spectrum) in enumerate(zip(layers, sizes, spectra, strict=True)):
        path = paths[position] if paths is not None and size < layer.state_size else []
        rows.append(
            LayerReport(
                index=layer.index,
                old_size=layer.state_size,
                new_size=size,
                hankel_singular_values=spectrum.tolist(),
                energy_kept=float(spectrum[:, :size].sum() / spectrum.sum()) if spectrum.sum() > 0 else 1.0,
                output_error=max((group[size].error for group in path), default=0.0),
                channels=layer.channels,
            )
        )
    return CompressionReport(rows, kind, parameters, parameters)


def _apply(
    model: PreTrainedModel, layers: list[SSMLayer], sizes: list[int], cuts: dict[int, dict[str, Tensor]]
) -> None:
    """Change the model: nothing here is expected to fail, everything that could has been computed before."""
    for layer, size in zip(layers, sizes, strict=True):
        if layer.index in cuts:
            _apply_to_layer(layer, cuts[layer.index], size)
    if cuts:
        set_state_sizes(model, {layer.index: layer.state_size for layer in layers}, unprojected_sizes(layers))
        _keep_trained_weights(model)


def _new_data(layer: SSMLayer, cuts: dict[str, ParameterCut]) -> dict[str, Tensor]:
    """The data of a mixer's parameters after a cut, by name; the mixer is not changed."""
    new = {}
    for name, cut in cuts.items():
        old = layer.mixer.A_log if cut.index is None else layer.mixer.get_parameter(name)
        new[name] = cut.weights(old.detach())
    return new


def _apply_to_layer(layer: SSMLayer, new: dict[str, Tensor], size: int) -> None:
    if "B_projection" in new:
        project_(layer.mixer, **new)
        return
    for name, data in new.items():
        set_data_(layer.mixer.get_parameter(name), data)
    layer.resize(size)


def _keep_trained_weights(model: PreTrainedModel) -> None:
    """Switch off the rescaling of `out_proj`: transformers repeats it whenever it loads the saved model."""
    for config in text_configs(model):
        if getattr(config, "rescale_prenorm_residual", False):
            config.rescale_prenorm_residual = False
