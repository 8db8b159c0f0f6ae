"""Weights of other state sizes are loaded into a model that is there already.

Trainer resumes, and loads the best model at the end, with `load_state_dict` on the model it has.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from ..cutting.apply import write_sizes_
from ..layers import find_layers, is_plain, make_room_, size_in
from ..modeling.state_sizes import sizes_may_differ


class ReshapeOnLoad:
    """A hook that gives a mixer the state size of the tensors that are about to be loaded.

    Whichever of the mixer's tensors is there tells the size: in a sharded checkpoint they may come apart.

    Args:
        trainer: whose model and, if there is one, optimizer follow.
        layer: of that model.
        listener: its `on_sizes_loaded` is called with the model when a layer has another size than before.
    """

    def __init__(self, trainer: Any, model: Any, layer: Any, listener: Any) -> None:
        self.trainer, self.model, self.listener = (weakref.ref(owner) for owner in (trainer, model, listener))
        self.layer = layer

    @classmethod
    def install(cls, trainer: Any, listener: Any) -> None:
        """Put the hook on every mixer of a trainer's model, and of those that its `model_init` makes."""
        cls._install(trainer, trainer.model, listener)
        if trainer.model_init is not None:
            make = trainer.call_model_init

            def call_model_init(*args: Any, **kwargs: Any) -> Any:
                model = make(*args, **kwargs)
                cls._install(trainer, model, listener)
                return model

            trainer.call_model_init = call_model_init

    @classmethod
    def _install(cls, trainer: Any, model: Any, listener: Any) -> None:
        try:
            layers = find_layers(model)
        except ValueError:
            return  # on_train_begin says what is wrong
        for layer in layers:
            layer.mixer.register_load_state_dict_pre_hook(cls(trainer, model, layer, listener))

    def __call__(self, mixer: Any, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        layer, model, trainer = self.layer, self.model(), self.trainer()
        size = size_in(layer, state_dict, prefix)
        if size is None or size == layer.state_size or model is None:
            return
        if all(module is not mixer for module in model.modules()):
            return  # a copy of the model, which the hook was copied with
        optimizer = getattr(trainer, "optimizer", None)
        for parameter in make_room_(layer, size):
            if optimizer is not None:
                optimizer.state.pop(parameter, None)
        layers = find_layers(model)
        if is_plain(model) or sizes_may_differ(model.config) or len({layer.state_size for layer in layers}) == 1:
            write_sizes_(model, layers)  # else the other layers are still to come
            listener = self.listener()
            if listener is not None:
                listener.on_sizes_loaded(model)
