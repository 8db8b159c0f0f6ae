"""Weights of other state sizes are loaded into a model that is there already.

Trainer resumes, and loads the best model at the end, with `load_state_dict` on the model it has.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..backends import find_backend
from ..compat.sharding import is_in_pieces
from ..compat.trainer import before_loading_
from ..compat.wrapping import inside
from ..cutting.apply import write_sizes_
from ..layers import Layer, ResizeParameter, find_layers, is_plain, make_room_, set_data_, size_in
from ..modeling.state_sizes import sizes_may_differ
from .converted import load_converted_
from .forms import take_forms_
from .resuming import damaged


class ReshapeOnLoad:
    """A hook that gives a mixer the state size of the tensors that are about to be loaded, as long as its trainer lives.

    Whichever of the mixer's tensors is there tells the size: in a sharded checkpoint they may come apart.

    Args:
        trainer: whose model and, if there is one, optimizer follow.
        layer: of that model.
        listener: its `on_sizes_loaded` is called with the model when a layer has another size than before.
    """

    _handles: ClassVar[WeakKeyDictionary[Any, list[RemovableHandle]]] = WeakKeyDictionary()
    """Of the hooks on each model."""

    def __init__(self, trainer: Any, model: Any, layer: Any, listener: Any) -> None:
        self.trainer, self.model, self.listener = (weakref.ref(owner) for owner in (trainer, model, listener))
        self.layer = layer

    @classmethod
    def install(cls, trainer: Any, listener: Any) -> None:
        """Put the hook on every mixer of a trainer's model, and of those that its `model_init` makes.

        A model has the hooks of one trainer: of the one that was made last, or that loads.
        """
        cls._install(trainer, trainer.model, listener)

        def install_again(folder: str) -> bool:
            cls._install(trainer, trainer.model, listener)
            return False

        before_loading_(trainer, install_again)
        if trainer.model_init is not None:
            make = trainer.call_model_init

            def call_model_init(*args: Any, **kwargs: Any) -> Any:
                model = make(*args, **kwargs)
                cls._install(trainer, model, listener)
                return model

            trainer.call_model_init = call_model_init

    @classmethod
    def _install(cls, trainer: Any, model: Any, listener: Any) -> None:
        model = inside(model)  # which, unlike what is around it, is the same one all along
        try:
            layers = find_layers(model)
        except ValueError:
            return  # on_train_begin says what is wrong
        _remove(cls._handles.pop(model, []))
        handles = [
            layer.mixer.register_load_state_dict_pre_hook(cls(trainer, model, layer, listener)) for layer in layers
        ]
        cls._handles[model] = handles
        weakref.finalize(trainer, _remove, handles).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        """Copied or pickled with its mixer it has no trainer, and does nothing."""
        return {"trainer": _gone}

    def __call__(self, mixer: Any, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Give the layer the size that it has in the weights, before they are loaded."""
        trainer = self.trainer()
        if trainer is None:
            return
        layer, model = self.layer, self.model()
        if any(is_in_pieces(parameter) for parameter in mixer.parameters()):
            return  # and so are the tensors: `ReshapeBeforeLoad` has been here
        size = size_in(layer, state_dict, prefix)
        if size is None or size == layer.state_size or model is None:
            return
        reshape_(model, layer, size, self.listener(), getattr(trainer, "optimizer", None))


def _gone() -> None:
    """As a weak reference to what is no more."""


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class ReshapeBeforeLoad:
    """Gives the layers of a model the sizes of a checkpoint before its weights are loaded, where `ReshapeOnLoad` can't.

    Where it is sharded, each process loads into its own parts, which must have the right shapes already. Elsewhere these are
    layers that are projected in the checkpoint or in the model, and checkpoints that a Trainer can't load at all: see `load_converted_`.

    Args:
        trainer, listener: as for `ReshapeOnLoad`.
    """

    def __init__(self, trainer: Any, listener: Any) -> None:
        self.trainer, self.listener = weakref.ref(trainer), weakref.ref(listener)
        self.name = type(listener).__name__  # in a checkpoint, whose callback may have taken its place by now

    @classmethod
    def install(cls, trainer: Any, listener: Any) -> None:
        """Have the trainer call it with the folder of each checkpoint that it loads weights from."""
        before_loading_(trainer, cls(trainer, listener))

    def __call__(self, folder: str) -> bool:
        """Give the model the sizes of the checkpoint in a folder; whether its weights, too."""
        trainer, listener = self.trainer(), self.listener()
        if trainer is None:
            return False
        backend, model = find_backend(trainer), inside(trainer.model)
        if not backend.loads_in_place:
            if take_forms_(model, folder, getattr(trainer, "optimizer", None)) and listener is not None:
                listener.on_sizes_loaded(model)
            return load_converted_(model, folder)
        backend.settle_()
        sizes = sizes_in_state(folder, self.name)
        resized = [
            layer for layer in find_layers(model) if sizes.get(layer.index, layer.state_size) != layer.state_size
        ]
        states = backend.states_of(trainer.optimizer) if resized else None
        for layer in resized:
            reshape_(model, layer, sizes[layer.index], listener, states, backend.resize_parameter_)
        if resized:
            backend.after_cut_()
        return False


def sizes_in_state(folder: str, callback: str) -> dict[int, int]:
    """The state sizes, by layer index, that a callback's entry in a checkpoint's `trainer_state.json` tells; none without.

    Raises:
        ValueError: if the entry is damaged.
    """
    from transformers.trainer import TRAINER_STATE_NAME  # here, since it imports datasets

    try:
        with open(os.path.join(folder, TRAINER_STATE_NAME), encoding="utf-8") as file:
            entry = json.load(file)["stateful_callbacks"][callback]
    except (OSError, LookupError, TypeError, ValueError):
        return {}  # a run without the callback, or what the Trainer can't read either
    try:
        known = entry["attributes"]
        sizes = known["history"][-1]["sizes"] if known["history"] else known["initial_sizes"]
        return {int(index): int(size) for index, size in sizes.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise damaged(f"{type(error).__name__}: {error}") from error


def reshape_(
    model: Any, layer: Layer, size: int, listener: Any, optimizer: Any, resize_: ResizeParameter = set_data_
) -> None:
    """Give a layer another state size, with zeros until its weights are loaded; the optimizer forgets what it knew. In place."""
    for parameter in make_room_(layer, size, resize_):
        if optimizer is not None:
            optimizer.state.pop(parameter, None)
    layers = find_layers(model)
    if is_plain(model) or sizes_may_differ(model.config) or len({layer.state_size for layer in layers}) == 1:
        write_sizes_(model, layers)  # else the other layers are still to come
        if listener is not None:
            listener.on_sizes_loaded(model)
