"""Decide on a cut: how small each layer becomes and which states stay; nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .architectures import SSMLayer
from .architectures.mamba import MambaLayer
from .architectures.normalised import NormalisedMambaLayer
from .architectures.parameter_cut import ParameterCut
from .config import CompreSSMConfig
from .hankel.gramians import MAX_READOUT, Mamba2Statistics, elimination_order, hankel_spectra
from .hankel.headwise import HeadwiseStatistics
from .hankel.ranks import allocate_ranks, allowed_sizes, energy_rank, powers_of_two
from .hankel.realization import project, select, select_each_with_readout
from .hub import check_state_sizes
from .measuring import MixerInputs, Statistics, evaluating
from .report import CompressionReport, LayerReport
from .sensitivity import divergences
from .surgery import cut_mixer_, new_data


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
    kind = realization_of(config, layers)
    spectra = hankel_spectra(statistics)
    paths = realize(layers, statistics, config, kind)
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
    return CutPlan(make_report(model, layers, sizes, spectra, paths, kind), cuts, kept)


def realization_of(config: CompreSSMConfig, layers: list[SSMLayer]) -> str:
    """What the config's `realization` means for these layers: "select" or "project".

    Raises:
        ValueError: if a projection is asked for that they can't have.
    """
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


def check_targets(config: CompreSSMConfig, layers: list[SSMLayer], kind: str) -> None:
    """Refuse sizes that the layers can't have.

    Args:
        config, layers: what to cut, and how.
        kind: "select" or "project", from `realization_of`.

    Raises:
        ValueError: if a size is not below that of its layer or not good for it, or is given for another layer.
    """
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


def realize(
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
        cuts.append(lambda other, cut=parameter_cuts, size=size: cut_mixer_(other, new_data(other, cut), size))
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


def make_report(
    model: PreTrainedModel,
    layers: list[SSMLayer],
    sizes: list[int],
    spectra: list[Tensor],
    paths: list[list[dict[int, Any]]] | None,
    kind: str,
) -> CompressionReport:
    """The report of sizes that were chosen, from the layers' spectra and realizations (None: nothing is cut)."""
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
