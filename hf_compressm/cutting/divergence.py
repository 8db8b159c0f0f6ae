"""How far a model's predictions are from what they were before a cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compat.offloading import device_of, weights_at_hand
from ..compat.pretrained import has_head
from ..data.evaluation import evaluating
from ..hankel import budgets
from ..layers import Layer, Realization, find_layers
from .observing import hooks
from .passes import called_with, in_passes, replaced_forwards
from .progress import followed
from .resuming import Outputs
from .trials import cut_copy

# Numbers in the predictions that are compared together.
TOGETHER = 2**24


class Divergence:
    """The divergence of a model's predictions from those it makes when this is made.

    For a model with a head it is the mean Kullback-Leibler divergence, in nats per token; for one without, the energy of
    what changes in its last hidden states, as a share of theirs.

    Args:
        model: as it is before any cut.
        batches: what to predict on, each with `input_ids` and `attention_mask`.
        mixers_only: nothing but mixers will change: predictions that are many are then not kept, but made again from the
            last hidden states.
        layer_by_layer: of them, too, only one at a time: each pass begins where the model differs.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        mixers_only: bool = False,
        layer_by_layer: bool = False,
    ) -> None:
        self.model = model
        self._layers = find_layers(model)
        self._outputs = Outputs(model, self._layers if layer_by_layer else [])
        self.parts = [on(device_of(model), part) for batch in batches for part in in_passes(batch, self._layers)]
        self.tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        self.has_head = False
        self._hidden: list[Any] = []
        self._full: dict[tuple[int, int], Tensor] = {}
        held = 0
        for number, part in enumerate(self.parts):
            hidden = self._hidden_states(part, self._outputs.kept(number))
            for rows, predictions in self._predictions(part, hidden):
                held += predictions.nbytes
                if held <= budgets.PREDICTIONS:
                    self._full[number, rows.start] = predictions
                elif not mixers_only:
                    self._full[number, rows.start] = predictions.cpu()
            self._hidden.append(hidden if mixers_only else None)

    @torch.no_grad()
    def _hidden_states(self, part: Mapping[str, Tensor], around: AbstractContextManager[None]) -> Any:
        """What the model gives below its head."""
        with evaluating(self.model), around:
            return self.model.base_model(**called_with(part), use_cache=False)

    @torch.no_grad()
    def _predictions(self, part: Mapping[str, Tensor], hidden: Any) -> Iterator[tuple[slice, Tensor]]:
        """What the head makes of that, of some sequences after the other; the last hidden states of a model without one."""
        sequences, length = part["input_ids"].shape
        if not has_head(self.model):
            yield slice(0, sequences), hidden[0]
            return
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        # Predictions of the model as it is now, and as it was.
        together = max(1, budgets.ACTIVATIONS // (2 * hidden[0].element_size() * vocabulary * length))
        for rows in (slice(start, start + together) for start in range(0, sequences, together)):
            yield rows, self._from_head(_rows(part, rows), hidden, rows)

    @torch.no_grad()
    def _from_head(self, part: Mapping[str, Tensor], hidden: Any, rows: slice) -> Tensor:
        """The predictions for a batch that is some rows of one that gave `hidden`."""
        given = replace(hidden, **{next(iter(hidden)): hidden[0][rows]})  # mostly `last_hidden_state`
        as_given = replaced_forwards([self.model.base_model], lambda forward: lambda *args, **kwargs: given)
        with evaluating(self.model), as_given:
            output = self.model(**called_with(part), use_cache=False)
        self.has_head = hasattr(output, "logits")
        predictions: Tensor = output.logits if self.has_head else output[0]
        return predictions

    def _split(self, predictions: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of predictions [..., classes] after the other, as log-probabilities; hidden states as they are."""
        rows = predictions.flatten(0, -2)
        step = max(1, TOGETHER // rows.shape[1])
        for start in range(0, len(rows), step):
            some = rows[start : start + step].float()
            yield slice(start, start + step), some.log_softmax(-1) if self.has_head else some

    @torch.no_grad()
    def __call__(self, first: Layer | None = None) -> float:
        """Of the model as it is now, infinite where what it predicts is not finite.

        With `first`, the first layer that is not as it was, it is run from there on.
        """
        moved = of = 0.0
        for number, part in enumerate(self.parts):
            around = nullcontext() if first is None else self._outputs.resumed(number, first)
            for rows, predictions in self._predictions(part, self._hidden_states(part, around)):
                some, full = _rows(part, rows), self._full.get((number, rows.start))
                if full is None:
                    full = self._from_head(some, self._hidden[number], rows)
                mask = some["attention_mask"].flatten().to(predictions.device).double()
                if len(mask) != predictions[..., 0].numel():  # such as the last hidden states of a model that pools
                    mask = mask.new_ones(predictions[..., 0].numel())
                for (at, now), (_, then) in zip(
                    self._split(predictions), self._split(full.to(predictions.device)), strict=True
                ):
                    each = (then.exp() * (then - now)).sum(-1) if self.has_head else (then - now).square().sum(-1)
                    moved += float((each * mask[at]).sum())
                    of += float(mask[at].sum() if self.has_head else (then.square().sum(-1) * mask[at]).sum())
        share = moved / of if of else 0.0
        return max(0.0, share) if math.isfinite(share) else math.inf


def _rows(batch: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in batch.items()}


def on(device: torch.device, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


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
    mask: list[Tensor] = []

    def hook_of(layer: Layer) -> Any:
        def hook(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            full = output[0] if isinstance(output, tuple) else output
            with weights_at_hand(mixer):
                slim = cut_copy(layer, cuts[layer.index]).mixer.forward(*args, **kwargs)  # without the hooks
            slim = slim[0] if isinstance(slim, tuple) else slim
            counts = mask[-1].to(full.device)[..., None]
            lost[layer.index] += float(((slim - full) * counts).double().square().sum())
            whole[layer.index] += float((full * counts).double().square().sum())

        return hook

    chosen = [layer for layer in layers if layer.index in cuts]
    registered = (layer.mixer.register_forward_hook(hook_of(layer), with_kwargs=True) for layer in chosen)
    with hooks(registered), evaluating(model):
        for batch in followed("judging the cut on held-out text", batches):
            for part in (on(device_of(model), part) for part in in_passes(batch, layers)):
                mask.append(part["attention_mask"])
                model.base_model(**called_with(part), use_cache=False)
    return {index: lost[index] / whole[index] if whole[index] else 0.0 for index in cuts}
