"""Run a model on calibration data and measure its SSM layers on the way; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import CompreSSMConfig
from ..data.calibration import calibration_batches
from ..data.evaluation import evaluating
from ..data.packing import unpacked
from ..hankel.statistics import Statistics
from ..interrupts import restoring, uninterrupted
from ..layers import Layer, MixerInputs, find_layers
from .measurement import Measurement

# What a ratio measures the layers' sensitivities on, a forward pass for each layer: divergences need few tokens.
SENSITIVITY_SEQUENCES = 2


@torch.no_grad()
def measure(
    model: PreTrainedModel, data: Any = None, config: CompreSSMConfig | None = None, *, tokenizer: Any = None
) -> Measurement:
    """Measure what the states of a model's layers do: once, for any number of plans. The model is not changed.

    Args:
        model: with Mamba or Mamba-2 layers, on any device.
        data: LongTensor [n, L], list of texts, `datasets.Dataset` or DataLoader. By default a text that the package
            ships, if there is a tokenizer, else samples of the model itself.
        config: of which `estimator` counts, and whether it asks for refits: for these, what the mixers read is kept.
        tokenizer: for texts.

    Raises:
        ValueError: if the model has no SSM layer or weights that can't be cut, or the data does not fit the model.
        TypeError: if the data is of an unknown kind.
    """
    config = config or CompreSSMConfig()
    layers = find_layers(model)
    batches = calibration_batches(data, model, tokenizer)
    statistics = empty_statistics(layers, config)
    inputs: dict[int, MixerInputs] | None = {} if config.refits else None
    with observing(layers, statistics, inputs), evaluating(model):
        for batch in batches:
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            model.base_model(**on_device, use_cache=False)
    check_measured(layers, statistics)
    sample = {name: tensor[:SENSITIVITY_SEQUENCES].to(model.device) for name, tensor in batches[0].items()}
    return Measurement(model, layers, statistics, config.estimator, inputs, sample)


def empty_statistics(layers: Sequence[Layer], config: CompreSSMConfig) -> list[Statistics]:
    """For each layer an accumulator that has seen nothing."""
    return [layer.statistics(mean_lti=config.estimator == "mean_lti") for layer in layers]


def check_measured(layers: Sequence[Layer], statistics: Sequence[Statistics]) -> None:
    """Refuse statistics of a mixer that never ran.

    Raises:
        ValueError: if there is one.
    """
    for layer, entry in zip(layers, statistics, strict=True):
        if not entry.tokens:
            raise ValueError(f"{layer.name} saw no token of the calibration data, so it can't be measured.")


@contextmanager
def observing(
    layers: Sequence[Layer],
    statistics: Sequence[Statistics],
    inputs: dict[int, MixerInputs] | None = None,
    max_tokens: int | None = None,
) -> Iterator[None]:
    """Add what the mixers read in the forward passes in here to their statistics, and to `inputs` if given.

    Of a batch of more than `max_tokens` tokens, only the first sequences are taken, and one at least.
    """

    def observe(layer: Layer, entry: Statistics) -> Any:
        def hook(mixer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            mask: Tensor | None = kwargs.get("attention_mask")
            rows = None if max_tokens is None else max(1, max_tokens // hidden_states.shape[1])
            read: tuple[Tensor, Tensor | None] = (hidden_states[:rows], None if mask is None else mask[:rows])
            if layer.keeps_samples_apart and kwargs.get("seq_idx") is not None:
                read = unpacked(*read, kwargs["seq_idx"][:rows])
            system = layer.read(*read)
            with torch.autocast(hidden_states.device.type, enabled=False):
                entry.update(system)
            if inputs is not None:
                inputs.setdefault(layer.index, []).append(read)

        return layer.mixer.register_forward_pre_hook(hook, with_kwargs=True)

    handles: list[Any] = []
    with restoring(lambda: [handle.remove() for handle in handles]):
        with uninterrupted():  # a hook without a handle could not be removed
            for layer, entry in zip(layers, statistics, strict=True):
                handles.append(observe(layer, entry))
        yield
