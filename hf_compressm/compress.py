"""compress_ and compress_pretrained: measure, plan, and only then change the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .architectures import SSMLayer, find_layers
from .architectures.normalised import NormalisedMambaLayer
from .calibration import calibration_batches
from .config import CompreSSMConfig
from .evaluation import describe, evaluation_ids, perplexity
from .hankel.gramians import hankel_spectra
from .hankel.normalised import NormalisedCut
from .hankel.realization import Projection, Selection
from .hub import check_login, load_model, load_tokenizer, publish
from .measuring import MixerInputs, measure
from .planning import CutPlan, check_targets, make_report, plan_cut, realization_of
from .report import CompressionReport, Perplexity
from .surgery import cut_model_, new_data
from .training.optimizer import cut_states, set_states_, verify_optimizer

logger = logging.get_logger(__name__)

# What a ratio measures the layers' sensitivities on, a forward pass for each layer: divergences need few tokens.
SENSITIVITY_SEQUENCES = 2


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
    kind = realization_of(config, layers)
    check_targets(config, layers, kind)
    inputs: MixerInputs = {}
    batches = calibration_batches(calibration_data, model, tokenizer)
    refits = config.refit and config.selection == "auto" and (config.tolerance or config.tolerance is None)
    statistics = measure(model, layers, batches, config.estimator, inputs if refits else None)

    def predict() -> Tensor:
        some = {name: tensor[:SENSITIVITY_SEQUENCES].to(model.device) for name, tensor in batches[0].items()}
        return model(**some, use_cache=False)[0]

    plan = plan_cut(model, layers, statistics, config, inputs, predict)
    return apply_cut_(model, layers, plan, optimizer)


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
        new[layer.index] = new_data(layer, plan.cuts[layer.index])
        if not all(torch.isfinite(data).all() for data in new[layer.index].values()):
            raise ValueError(
                f"The cut of layer {layer.index} to {plan.report.sizes[layer.index]} states is not finite: look at "
                "the model's weights and the calibration data. Nothing was changed."
            )
        if optimizer is not None:
            for name, cut in plan.cuts[layer.index].items():
                parameter = layer.mixer.get_parameter(name) if cut.index is not None else None
                states.append((parameter, cut_states(optimizer, f"{layer.name}.{name}", parameter, cut)))
    cut_model_(model, layers, list(plan.report.sizes.values()), new)
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
    kind = realization_of(config, layers)
    check_targets(config, layers, kind)
    new = {}
    for layer in layers:
        identity = torch.eye(layer.state_size, size, device=layer.mixer.A_log.device)
        kept = torch.arange(size, device=identity.device)
        group: Any = Projection(identity, identity, 0.0) if kind == "project" else Selection(kept, None, 0.0)
        if isinstance(layer, NormalisedMambaLayer):
            first = torch.eye(size, layer.state_size, dtype=torch.float64, device=kept.device)
            group = NormalisedCut(kept, None, first, first, first.new_ones(size), None, 0.0)
        new[layer.index] = new_data(layer, layer.cut([group] * layer.groups))
    cut_model_(model, layers, [size] * len(layers), new)


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
    return make_report(model, layers, sizes, spectra, None, "measured")
