"""The model as it was before a cut, to learn from: the same weights, and beside them only what cut or healing change."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.offloading import hook_of, without_hooks_
from ..cutting.passes import called_with
from ..cutting.trials import mixers_for_a_while
from ..data.evaluation import evaluating


class FullModel:
    """Give the predictions of a model as it is when this is made, also once it was cut and healed.

    Args:
        model: before the cut.
        changed: by the mixers' names, their parameters that cut and healing change. Of all else there is no second copy;
            where nothing is named, all of the model may change, and is copied.
    """

    def __init__(self, model: Any, changed: Mapping[str, Collection[str]]) -> None:
        self.model = model if changed else copy.deepcopy(model)
        self.mixers = {name: _copy(model.get_submodule(name), changed[name]) for name in changed}

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities of the next tokens [batch, length, vocabulary], float32."""
        with mixers_for_a_while(self.model, self.mixers), evaluating(self.model):
            predictions: Tensor = self.model(**called_with(batch), use_cache=False).logits.float().log_softmax(-1)
            return predictions


def _copy(mixer: nn.Module, changed: Collection[str]) -> nn.Module:
    """Of a mixer, in evaluation mode: it shares all parameters but those."""
    same: list[Any] = [parameter for name, parameter in mixer.named_parameters() if name not in changed]
    same += [hook for module in mixer.modules() if (hook := hook_of(module)) is not None]
    other = copy.deepcopy(mixer, {id(value): value for value in same}).eval()
    without_hooks_(other)
    return other
