"""Run a model on calibration data and measure its SSM layers on the way; nothing is changed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..backends import Backend, OneProcess
from ..compat.offloading import device_of
from ..config import CompreSSMConfig, ConfigLike, Weights
from ..data.batches import BATCH, Batch
from ..data.calibration import calibration_batches, hold_out
from ..data.evaluation import evaluating
from ..hankel import budgets
from ..hankel.statistics import Statistics
from ..layers import Layer, find_layers, is_plain, plain_model, realization_of
from .inputs import Inputs
from .measurement import Measurement
from .observing import can_weigh_by_loss, observe_by_loss, observing
from .passes import called_with, in_passes
from .progress import followed
from .scans import quick_scans

logger = logging.get_logger(__name__)

# What the layers' cost curves are measured on, some forward passes for each layer: divergences need few tokens. At most so
# many sequences, and as many as make so many tokens; four times as many gave well-trained models no better sizes.
SENSITIVITY_SEQUENCES = 4
SENSITIVITY_TOKENS = 512
# What measuring on the package's own text or on samples may take for each so many parameters, if the config names no time.
SECONDS, MODEL = {"cpu": 60.0, "cuda": 10.0}, 130e6
# Tokens of a step, at most: on a CPU few, so that the time is kept and the bar moves.
TOKENS = {"cpu": 1024}
# Of so many sequences, one is held out to see what a cut loses; a max_divergence, which decides by them, takes more.
HELD_OUT_FROM = 8


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    data: Any = None,
    config: ConfigLike = None,
    *,
    tokenizer: Any = None,
    backend: Backend | None = None,
) -> Measurement:
    """Measure what the states of a model's layers do: once, for any number of plans. The model is not changed.

    Args:
        model: with Mamba or Mamba-2 layers, on any device.
        data: LongTensor [n, L], list of texts, `datasets.Dataset` or DataLoader. By default a text that the package
            ships, if there is a tokenizer, else samples of the model itself. Time-invariant layers need none: their weights
            tell all.
        config: of which `weights` and `estimator` count, and what it asks for: for refits, what the mixers read is kept where the
            realization has one; for a `max_divergence`, the default, and to heal, a quarter of the data is held out, and for
            any other cut an eighth, if there are eight sequences; where it means a projection, what selections are chosen by is
            left out, which takes a third of the time. Without one, what the default cut needs and what selections are chosen by: for
            a `tolerance`, or a selection of Mamba-2 with its fit, measure with that config.
        tokenizer: for texts.
        backend: of a training loop on several processes: each measures on its own data, the statistics are summed and what
            is held out and what layers are refitted on is put together.

    Raises:
        ValueError: if the model has no SSM layer or weights that can't be cut, the data does not fit the model, or a plain
            module is to keep a `max_divergence` or to be healed.
        TypeError: if the data is of an unknown kind.

    Example:
        measurement = measure(model, token_ids)
        print(measurement.plan(CompreSSMConfig(max_divergence=0.003)).report)  # nothing is changed
        measurement.plan(CompreSSMConfig(max_divergence=0.01)).apply_(model)
    """
    for_any = config is None
    config, model = CompreSSMConfig.of(config).after_training(), plain_model(model)
    backend = backend or OneProcess()
    layers = find_layers(model)
    name = realization_of(config, layers)
    by_loss = can_weigh_by_loss(model, layers, config)
    weights: Weights = "fisher" if by_loss else "gate"
    reading = [layer for layer in layers if layer.reads_data]
    if config.max_divergence is not None or config.heal:
        _refuse_plain(model)
    elif not reading:
        if data is not None:
            logger.warning(
                "hf_compressm: the layers are time-invariant, so that their weights tell all: no data was used."
            )
        return Measurement(model, layers, empty_statistics(layers, config), config.estimator, weights)
    batches, held_out = backend.together(
        "reading the calibration data",
        lambda: _data(calibration_batches(data, model, tokenizer), model, config, backend.processes),
    )
    held_out = backend.gather(held_out)
    fits = config.refits and any(layer.realizations[name].has_fit for layer in layers)
    inputs = Inputs(backend.processes) if fits else None
    device = device_of(model)
    seconds = config.calibration_seconds
    if seconds is None:
        seconds = seconds_for(model.num_parameters(), device) if data is None else math.inf
    most = TOKENS.get(device.type, 2**20)
    parts = [
        part for batch in batches for part in in_passes(batch, layers, max(1, most // batch["input_ids"].shape[1]))
    ]

    def run(statistics: list[Statistics], parts: Sequence[Batch], inputs: Inputs | None) -> list[Statistics]:
        begin = time.monotonic()
        with evaluating(model), quick_scans(layers):
            for number, part in enumerate(followed("measuring", parts if reading else [])):
                if number and time.monotonic() - begin > seconds:
                    _note_tokens(statistics, batches, seconds)
                    break
                part = {name: tensor.to(device) for name, tensor in part.items()}
                if by_loss:
                    observe_by_loss(
                        model, layers, statistics, called_with(part), inputs, seed=config.seed + number * BATCH
                    )
                else:
                    with observing(layers, statistics, inputs):
                        model.base_model(**called_with(part), use_cache=False)
        return statistics

    contributions = for_any or any(layer.realizations[name].reads_contributions for layer in layers)
    statistics = measured_together(layers, config, backend, run, parts, inputs, contributions)
    few = min(SENSITIVITY_SEQUENCES, max(1, SENSITIVITY_TOKENS // batches[0]["input_ids"].shape[1]))
    sample = {name: tensor[:few] for name, tensor in batches[0].items()}
    return Measurement(model, layers, statistics, config.estimator, weights, inputs, sample, held_out)


def measured_together(
    layers: Sequence[Layer],
    config: CompreSSMConfig,
    backend: Backend,
    run: Callable[[list[Statistics], Sequence[Any], Inputs | None], list[Statistics]],
    batches: Sequence[Any],
    inputs: Inputs | None,
    contributions: bool = True,
) -> list[Statistics]:
    """The statistics of all processes' data.

    Args:
        layers, config, backend: what is measured, and how.
        run: adds batches of this process to statistics, keeps what mixers read in the inputs, and returns the statistics.
        batches, inputs: for it; the inputs are brought to process 0, which fits.
        contributions: whether the realization reads them.

    Raises:
        ValueError: as `check_measured`.
    """

    def empty() -> list[Statistics]:
        return empty_statistics(layers, config, budgets.STATISTICS, contributions)

    def first_look() -> list[Statistics]:
        statistics = empty()
        for entry in statistics:
            entry.contributions_alone_()
        return run(statistics, batches[:1], None)

    statistics = empty()
    backend.share_candidates_(statistics, first_look)
    backend.together("measuring", lambda: run(statistics, batches, inputs))
    backend.sum_(statistics)
    if inputs is not None and backend.processes > 1:
        inputs.bring_(backend)
    check_measured(layers, statistics)
    return statistics


def _refuse_plain(model: Any) -> None:
    if is_plain(model):
        raise ValueError(
            f"max_divergence and heal run a model of transformers on tokens, and {type(model).__name__} is a plain module: give "
            "a tolerance, ratio or state_size, which need no data for its layers. Nothing was changed."
        )


def _data(
    batches: list[Batch], model: PreTrainedModel, config: CompreSSMConfig, share: int
) -> tuple[list[Batch], list[Batch]]:
    """What to measure on, and what is held out."""
    if config.max_divergence is not None or config.heal:
        return hold_out(batches, model, share=share)
    if config.tolerance != 0 and sum(len(batch["input_ids"]) for batch in batches) >= HELD_OUT_FROM:
        return hold_out(batches, model, every=HELD_OUT_FROM, share=share, least=1)
    return batches, []


def seconds_for(parameters: int, device: torch.device) -> float:
    """What measuring a model of so many parameters on the package's own text may take."""
    return SECONDS.get(device.type, SECONDS["cuda"]) * max(1.0, parameters / MODEL)


def empty_statistics(
    layers: Sequence[Layer], config: CompreSSMConfig, budget: int | None = None, contributions: bool = True
) -> list[Statistics]:
    """For each layer an accumulator that has seen nothing.

    Args:
        layers, config: what is measured, and how.
        budget: bytes of them that may be on a device; further Gramians are added up on the CPU.
        contributions: of the states; without them, most of the work may be spared.
    """
    statistics, held = [], dict.fromkeys([layer.device for layer in layers], 0)
    for layer in layers:
        entry = layer.statistics(mean_lti=config.estimator == "mean_lti")
        if not contributions:
            entry.without_contributions_()
        held[layer.device] += sum(total.numel() * total.element_size() for total in entry.sums())
        if budget is not None and held[layer.device] > budget:
            entry.offload_()
        statistics.append(entry)
    return statistics


def _note_tokens(statistics: Sequence[Statistics], batches: Sequence[Mapping[str, Tensor]], seconds: float) -> None:
    of = sum(int(batch["attention_mask"].sum()) for batch in batches)
    logger.warning(
        f"hf_compressm: measured on {int(statistics[0].tokens)} of {of} tokens, which took the {seconds:g} s that there are for "
        "it: more time (calibration_seconds) makes a better cut."
    )


def check_measured(layers: Sequence[Layer], statistics: Sequence[Statistics]) -> None:
    """Refuse statistics of a mixer that never ran, or that are not finite.

    Raises:
        ValueError: if there is one.
    """
    for layer, entry in zip(layers, statistics, strict=True):
        if not entry.tokens:
            raise ValueError(f"{layer.name} saw no token of the calibration data, so it can't be measured.")
        if not all(torch.isfinite(total).all() for total in entry.sums()):
            raise ValueError(
                f"From {layer.name} on, what the model computes on the calibration data is not finite: look for NaN or "
                "infinity in its weights and those before it, or load the model in float32."
            )
