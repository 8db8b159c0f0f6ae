"""Run a model on calibration data and measure its SSM layers on the way; nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import CompreSSMConfig, ConfigLike
from ..data.calibration import calibration_batches, hold_out
from ..data.evaluation import evaluating
from ..hankel.statistics import Statistics
from ..layers import Layer, MixerInputs, find_layers, plain_model
from .measurement import Measurement
from .observing import can_weigh_by_loss, observe_by_loss, observing

# What the layers' cost curves are measured on, some forward passes for each layer: divergences need few tokens.
SENSITIVITY_SEQUENCES = 4
# Of so many sequences, one is held out to see what a cut loses; a max_divergence, which decides by them, takes more.
HELD_OUT_FROM = 8


@torch.no_grad()
def measure(
    model: PreTrainedModel, data: Any = None, config: ConfigLike = None, *, tokenizer: Any = None
) -> Measurement:
    """Measure what the states of a model's layers do: once, for any number of plans. The model is not changed.

    Args:
        model: with Mamba or Mamba-2 layers, on any device.
        data: LongTensor [n, L], list of texts, `datasets.Dataset` or DataLoader. By default a text that the package
            ships, if there is a tokenizer, else samples of the model itself.
        config: of which `weights` and `estimator` count, and what it asks for: for refits, what the mixers read is kept; for
            a `max_divergence`, the default, and to heal, a quarter of the data is held out, and for any other cut an eighth, if
            there are eight sequences.
        tokenizer: for texts.

    Raises:
        ValueError: if the model has no SSM layer or weights that can't be cut, or the data does not fit the model.
        TypeError: if the data is of an unknown kind.
    """
    config, model = CompreSSMConfig.of(config).after_training(), plain_model(model)
    layers = find_layers(model)
    batches = calibration_batches(data, model, tokenizer)
    held_out: list[dict[str, Tensor]] = []
    if config.max_divergence is not None or config.heal:
        batches, held_out = hold_out(batches, model)
    elif config.tolerance != 0 and sum(len(batch["input_ids"]) for batch in batches) >= HELD_OUT_FROM:
        batches, held_out = hold_out(batches, model, every=HELD_OUT_FROM)
    statistics = empty_statistics(layers, config)
    inputs: dict[int, MixerInputs] | None = {} if config.refits else None
    by_loss = can_weigh_by_loss(model, layers, config)
    with evaluating(model):
        for number, batch in enumerate(batches):
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            if by_loss:
                observe_by_loss(model, layers, statistics, on_device, inputs, seed=config.seed + number)
            else:
                with observing(layers, statistics, inputs):
                    model.base_model(**on_device, use_cache=False)
    check_measured(layers, statistics)
    sample = {name: tensor[:SENSITIVITY_SEQUENCES].to(model.device) for name, tensor in batches[0].items()}
    weights = "fisher" if by_loss else "gate"
    return Measurement(model, layers, statistics, config.estimator, weights, inputs, sample, held_out)


def empty_statistics(layers: Sequence[Layer], config: CompreSSMConfig) -> list[Statistics]:
    """For each layer an accumulator that has seen nothing."""
    return [layer.statistics(mean_lti=config.estimator == "mean_lti") for layer in layers]


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
