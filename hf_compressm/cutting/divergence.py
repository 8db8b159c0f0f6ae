"""How far a model's predictions are from what they were before a cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.evaluation import evaluating
from ..interrupts import restoring
from ..layers import Layer, Realization, new_data
from .observing import hooks


class Divergence:
    """The divergence of a model's predictions from those it makes when this is made.

    For a model with a head it is the mean Kullback-Leibler divergence, in nats per token; for one without, the energy of
    what changes in its last hidden states, as a share of theirs.

    Args:
        model: as it is before any cut.
        batches: what to predict on, each with `input_ids` and `attention_mask`.
    """

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model = model
        self.batches = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]
        self.has_head = False
        self.full = list(self._predictions())
        self.tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)

    @torch.no_grad()
    def _predictions(self) -> Iterator[Tensor]:
        with evaluating(self.model):
            for batch in self.batches:
                output = self.model(**batch, use_cache=False)
                self.has_head = hasattr(output, "logits")
                yield output.logits.float().log_softmax(-1) if self.has_head else output[0].float()

    @torch.no_grad()
    def __call__(self) -> float:
        """Of the model as it is now."""
        moved = of = 0.0
        for batch, full, now in zip(self.batches, self.full, self._predictions(), strict=True):
            mask = batch["attention_mask"] if full.dim() == 3 else full.new_ones(len(full))
            each = (full.exp() * (full - now)).sum(-1) if self.has_head else (full - now).square().sum(-1)
            moved += float((each * mask).sum())
            of += float(mask.sum() if self.has_head else (full.square().sum(-1) * mask).sum())
        return max(0.0, moved / of) if of else 0.0


@torch.no_grad()
def output_errors(
    model: Any, layers: Sequence[Layer], cuts: Mapping[int, Realization], batches: Sequence[Mapping[str, Tensor]]
) -> dict[int, float]:
    """What each cut layer's mixer gives otherwise than the full one on what that reads, as a share of its energy.

    Args:
        model, layers: before the cut.
        cuts: what layers are cut to, by index.
        batches: what to look at; for an honest answer, nothing was fitted to it.
    """
    lost, whole = dict.fromkeys(cuts, 0.0), dict.fromkeys(cuts, 0.0)
    seen: dict[int, tuple[Any, Any, Tensor]] = {}

    def hook_of(index: int) -> Any:
        def hook(mixer: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            seen[index] = args, kwargs, output[0] if isinstance(output, tuple) else output

        return hook

    chosen = [layer for layer in layers if layer.index in cuts]
    registered = (layer.mixer.register_forward_hook(hook_of(layer.index), with_kwargs=True) for layer in chosen)
    with evaluating(model):
        copies = {layer.index: _cut_copy(layer, cuts[layer.index]).mixer for layer in chosen}  # without the hooks
    with hooks(registered), evaluating(model):
        for batch in batches:
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            model.base_model(**on_device, use_cache=False)
            mask = on_device["attention_mask"][..., None]
            for layer in chosen:
                args, kwargs, full = seen.pop(layer.index)
                slim = copies[layer.index](*args, **kwargs)
                slim = slim[0] if isinstance(slim, tuple) else slim
                lost[layer.index] += float(((slim - full) * mask).double().square().sum())
                whole[layer.index] += float((full * mask).double().square().sum())
    return {index: lost[index] / whole[index] if whole[index] else 0.0 for index in cuts}


def _cut_copy(layer: Layer, cut: Realization) -> Layer:
    other = copy.copy(layer)
    other.mixer = copy.deepcopy(layer.mixer)
    cut.apply_(other, new_data(other, cut.parameter_cuts(other)))
    return other


@contextmanager
def cut_for_a_while(model: nn.Module, layers: Sequence[Layer], cuts: Mapping[int, Realization]) -> Iterator[None]:
    """The model with cut copies of mixers in the places of those mixers, by layer index; afterwards it is as it was."""
    chosen = (layer for layer in layers if layer.index in cuts)
    copies = {layer.name: _cut_copy(layer, cuts[layer.index]).mixer for layer in chosen}
    with mixers_for_a_while(model, copies):
        yield


@contextmanager
def mixers_for_a_while(model: nn.Module, mixers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other mixers, by their names; afterwards it is as it was."""
    taken: list[tuple[nn.Module, str, nn.Module]] = []

    def restore() -> None:
        for owner, name, mixer in taken:
            setattr(owner, name, mixer)

    with restoring(restore):
        for path, mixer in mixers.items():
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            taken.append((owner, name, getattr(owner, name)))
            setattr(owner, name, mixer)
        yield
