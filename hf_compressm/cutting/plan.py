"""What a cut will be: the size and the realization of each layer, decided on and not made yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..backends import Backend, OneProcess
from ..compat.offloading import weights_at_hand
from ..compat.sharding import parameter_count
from ..config import CompreSSMConfig
from ..hankel.spectra import hankel_spectra
from ..hankel.statistics import Statistics
from ..interrupts import uninterrupted
from ..layers import Layer, MixerInputs, Realization, engine_remarks, find_layers, plain_model, realization_of, realize
from ..modeling.state_sizes import check_state_sizes
from ..reporting.record import history_of, record_cut_
from ..reporting.report import CompressionReport
from ..reporting.rows import LayerReport
from .apply import cut_, replaced_parameters
from .budget import Ladder, keep_budget
from .divergence import Divergence, output_errors
from .nothing_to_cut import why_nothing
from .optimizer import as_list
from .progress import followed
from .sensitivity import cost_curves, errors
from .sizes import check_targets, choose_sizes, sizes_to_choose_from
from .snapshot import undone_on_error
from .trials import cut_for_a_while

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """A cut that was decided on and not made yet. It holds no model, so it can be sent to other processes.

    `print(plan.report)` shows the sizes and what they cost; `apply_` makes the cut.

    Attributes:
        config: that it was made by.
        report: of the model after the cut.
        realizations: what each layer that is cut becomes, by layer index; empty if nothing is to be cut.
        families: of all layers, by layer index.
    """

    config: CompreSSMConfig
    report: CompressionReport
    realizations: Mapping[int, Realization]
    families: Mapping[int, str]

    @property
    def kept(self) -> dict[int, list[list[int]]]:
        """The states that stay in each layer that is cut, a list for each group; an empty list for a projection."""
        return {index: realization.kept for index, realization in self.realizations.items()}

    def cpu(self) -> Plan:
        """The same on the CPU, to be sent to other processes."""
        return replace(self, realizations={index: made.to_send() for index, made in self.realizations.items()})

    def apply_(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        *,
        backend: Backend | None = None,
    ) -> CompressionReport:
        """Make the cut, in the model, its config and the optimizer's state. In place.

        All of it is made, or, after an error or an interrupt, nothing. Ctrl-C waits until all of it is made.

        Args:
            model: that was measured, or another with layers of the same families and sizes.
            optimizer: of a training loop, or a list of all that train the model: their states are cut along with the
                parameters that they belong to.
            backend: of a training loop on several processes.

        Returns:
            the report, which is also `model.compression_report`.

        Raises:
            ValueError: if the model has other layers than the one that was measured, the new weights are not finite,
                a trainable parameter is in no optimizer, or a state can't follow; or if there are several processes and
                no `backend`. Nothing is changed then.
        """
        if backend is None:
            backend = OneProcess()
            backend.refuse()
        model, optimizers = plain_model(model), as_list(optimizer)
        layers = find_layers(model)
        planned = {row.index: f"{self.families[row.index]}, {row.old_size} states" for row in self.report.layers}
        found = {layer.index: f"{layer.family}, {layer.state_size} states" for layer in layers}
        if found != planned:
            raise ValueError(
                f"The plan is for layers {planned}, and the model's are {found}: measure this model, and plan again."
            )
        earlier = history_of(model)
        replaced = replaced_parameters(layers, self.realizations)
        with uninterrupted(), undone_on_error(model, layers, optimizers, backend.resize_parameter_, replaced):
            cut_(model, layers, self.realizations, optimizers, backend)
            record_cut_(model, self.report, self.config, earlier)
        logger.info(f"hf_compressm: cut {len(self.realizations)} of {len(layers)} SSM layers.")
        reason = None if self.realizations else why_nothing(self.config, layers, self.report.realization)
        if reason is not None:
            logger.warning(f"hf_compressm: nothing to cut: {reason} The model is as it was.")
        return self.report


@torch.no_grad()
def make_plan(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    statistics: Sequence[Statistics],
    config: CompreSSMConfig,
    *,
    weights: str,
    inputs: Mapping[int, MixerInputs] | None = None,
    sample: Mapping[str, Tensor] | None = None,
    held_out: Sequence[Mapping[str, Tensor]] = (),
) -> Plan:
    """Choose the sizes and the states; nothing is changed.

    Args:
        model, layers, config: what to cut, and how.
        statistics: of each layer, with their `weights`.
        inputs: what the mixers read, by layer index; layers are refitted on it. None for no refit.
        sample: a few sequences, on which it is looked how far the predictions move when a layer is cut alone (see
            `sensitivity`), if the weights don't tell; None for all layers to count the same.
        held_out: what a `max_divergence` is measured on.

    Raises:
        ValueError: as `compress_`.
    """
    name = realization_of(config, layers)
    check_targets(config, layers, name)
    spectra = hankel_spectra(statistics)
    paths = realize(layers, statistics, config, name)
    fitted: dict[tuple[int, int, int], Realization] = {}

    def fit(layer: Layer, selected: Realization, rounds: int = config.fit_rounds) -> Realization:
        key = layer.index, selected.size, rounds
        if key not in fitted:
            fitted[key] = selected
            if inputs is not None:
                with weights_at_hand(layer.mixer):
                    fitted[key] = selected.refit(layer, inputs[layer.index], rounds)
        return fitted[key]

    def try_fit(layer: Layer, selected: Realization) -> Realization:
        return fit(layer, selected, min(1, config.fit_rounds))

    def realizations_of(sizes: Sequence[int]) -> dict[int, Realization]:
        cut = [row for row in zip(layers, paths, sizes, strict=True) if row[2] < row[0].state_size]
        new = [
            (layer, path[size]) for layer, path, size in cut if (layer.index, size, config.fit_rounds) not in fitted
        ]
        for layer, selected in new if inputs is None else followed("refitting layers", new):
            fit(layer, selected)
        return {layer.index: fit(layer, path[size]) for layer, path, size in cut}

    choices = [sizes_to_choose_from(config, layer, name) for layer in layers]

    def costs() -> list[Tensor]:
        lost = errors(layers, statistics, paths, weights)
        if sample is None or len(layers) == 1:
            return lost
        distance = Divergence(model, [sample], mixers_only=True, layer_by_layer=True)
        return cost_curves(model, layers, paths, choices, lost, distance, try_fit)

    divergence, tradeoff = None, None
    if config.max_divergence is not None:
        ladder = Ladder(costs(), choices, config.uniform)
        distance = Divergence(model, held_out, mixers_only=True)

        def trial(made: Mapping[int, Realization]) -> float:
            with cut_for_a_while(model, layers, made):
                return distance()

        realizations, divergence, factor = keep_budget(
            ladder, config.max_divergence, realizations_of, trial, distance.tokens
        )
        tradeoff = ladder.tradeoff(factor)
        if not distance.has_head:
            divergence = replace(divergence, unit="of the last hidden states' energy")
    else:
        realizations = realizations_of(choose_sizes(config, layers, choices, spectra, costs))
    sizes = {index: made.size for index, made in realizations.items()}
    check_state_sizes(model, {layer.index: sizes.get(layer.index, layer.state_size) for layer in layers})
    report = make_report(model, layers, spectra, realizations, name)
    if held_out:
        found = output_errors(model, layers, realizations, held_out)
        rows = [replace(row, output_error=found.get(row.index, 0.0)) for row in report.layers]
        tokens = sum(int(batch["attention_mask"].sum()) for batch in held_out)
        report = replace(report, layers=rows, held_out_tokens=tokens)
    report = replace(report, divergence=divergence, tradeoff=tradeoff)
    return Plan(config, report, realizations, {layer.index: layer.family for layer in layers})


def make_report(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    spectra: Sequence[Tensor],
    realizations: Mapping[int, Realization],
    name: str,
) -> CompressionReport:
    """The report of what layers become, from their spectra and realizations (those that are not named stay)."""
    parameters = parameter_count(model)
    rows = []
    for layer, spectrum in zip(layers, spectra, strict=True):
        realization = realizations.get(layer.index)
        size = layer.state_size if realization is None else realization.size
        heads = layer.head_state_sizes if realization is None else realization.head_sizes
        kept = heads if layer.head_state_sizes is not None and heads is not None else [size] * len(spectrum)
        lost = sum(row[n:].sum() for row, n in zip(spectrum, kept, strict=True))
        rows.append(
            LayerReport(
                index=layer.index,
                old_size=layer.state_size,
                new_size=size,
                hankel_singular_values=spectrum.tolist(),
                energy_kept=float(1 - lost / spectrum.sum()) if spectrum.sum() > 0 else 1.0,
                output_error=0.0 if realization is None else realization.error,
                error_bound=None if realization is None else realization.error_bound,
                channels=layer.channels,
                realization="" if realization is None else realization.kind or realization.name,
                head_sizes=None if heads is None else list(heads),
            )
        )
    added = sum(realizations[layer.index].added_parameters(layer) for layer in layers if layer.index in realizations)
    of_all = {row.new_size for row in rows}
    stock = len(of_all) == 1 and realizations and all(made.stock for made in realizations.values())
    elsewhere = engine_remarks(layers, of_all.pop()) if stock else []
    return CompressionReport(rows, name, parameters, parameters + added, elsewhere=elsewhere)
