"""How far a model's predictions are from what they were before a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..compat import device_of, weights_at_hand
from ..data.evaluation import evaluating
from ..hankel import budgets
from ..layers import Layer, Realization, find_layers
from .observing import hooks
from .passes import called_with, in_passes, sequences_to_head
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
        layer_by_layer: the layers will be cut one at a time: each pass begins where the model differs.
    """

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]], *, layer_by_layer: bool = False) -> None:
        self.model = model
        layers = find_layers(model)
        self._outputs = Outputs(model, layers if layer_by_layer else [])
        self.parts = [
            on(device_of(model), part)
            for batch in batches
            for part in in_passes(batch, layers, sequences_to_head(model, layers, *reversed(batch["input_ids"].shape)))
        ]
        self.has_head = False
        self.full: list[Tensor] = []
        for predictions in self._predictions(self._outputs.kept):
            held = sum(tensor.nbytes for tensor in self.full)
            rows = predictions.flatten(0, -2)
            device = rows.device if held + 4 * rows.numel() <= budgets.PREDICTIONS else torch.device("cpu")
            kept = torch.empty(rows.shape, dtype=torch.float32, device=device)
            for place, some in self._split(predictions):
                kept[place] = some.to(device)
            self.full.append(kept)
        self.tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)

    @torch.no_grad()
    def _predictions(self, around: Callable[[int], AbstractContextManager[None]]) -> Iterator[Tensor]:
        with evaluating(self.model):
            for number, part in enumerate(self.parts):
                with around(number):
                    output = self.model(**called_with(part), use_cache=False)
                self.has_head = hasattr(output, "logits")
                yield output.logits if self.has_head else output[0]

    def _split(self, predictions: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of predictions [..., classes] after the other, as log-probabilities; hidden states as they are."""
        rows = predictions.flatten(0, -2)
        step = max(1, TOGETHER // rows.shape[1])
        for start in range(0, len(rows), step):
            some = rows[start : start + step].float()
            yield slice(start, start + step), some.log_softmax(-1) if self.has_head else some

    @torch.no_grad()
    def __call__(self, first: Layer | None = None) -> float:
        """Of the model as it is now; with `first`, the first layer that is not as it was, it is run from there on."""
        moved = of = 0.0

        def around(number: int) -> AbstractContextManager[None]:
            return nullcontext() if first is None else self._outputs.resumed(number, first)

        for part, full, predictions in zip(self.parts, self.full, self._predictions(around), strict=True):
            mask = part["attention_mask"].flatten().to(predictions.device).double()
            if len(mask) != len(full):  # such as the last hidden states of a model that pools
                mask = mask.new_ones(len(full))
            for rows, now in self._split(predictions):
                then = full[rows].to(now.device)
                each = (then.exp() * (then - now)).sum(-1) if self.has_head else (then - now).square().sum(-1)
                moved += float((each * mask[rows]).sum())
                of += float(mask[rows].sum() if self.has_head else (then.square().sum(-1) * mask[rows]).sum())
        return max(0.0, moved / of) if of else 0.0


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
