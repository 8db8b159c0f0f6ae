"""Run a model on calibration data and measure its SSM layers on the way; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .architectures import SSMLayer
from .hankel.gramians import Mamba2Statistics, MambaStatistics
from .hankel.headwise import HeadwiseStatistics

Statistics = MambaStatistics | Mamba2Statistics | HeadwiseStatistics
# What each mixer read, by layer index: hidden states and attention mask of each batch.
MixerInputs = dict[int, list[tuple[Tensor, Tensor | None]]]


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
    layers: list[SSMLayer],
    statistics: list[Statistics],
    inputs: MixerInputs | None = None,
    max_tokens: int | None = None,
) -> Iterator[None]:
    """Add what the mixers read in the forward passes in here to their statistics, and to `inputs` if given.

    Of a batch of more than `max_tokens` tokens, only the first sequences are taken, and one at least.
    """

    def observe(layer: SSMLayer, entry: Any) -> Any:
        def hook(mixer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            mask = kwargs.get("attention_mask")
            rows = None if max_tokens is None else max(1, max_tokens // hidden_states.shape[1])
            read = (hidden_states[:rows], None if mask is None else mask[:rows])
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
    """The model in evaluation mode; afterwards each of its modules is in the mode it was in."""
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
