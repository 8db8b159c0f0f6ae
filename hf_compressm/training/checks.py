"""What must be right before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..backends import Backend, absent, processes
from ..layers import Layer, find_layers, is_plain
from ..modeling.state_sizes import check_state_sizes


def find_trainable_layers(model: Any) -> list[Layer]:
    """The SSM layers, of which none is frozen or carries an adapter.

    Raises:
        ValueError: if there is none, or one of them is, or the model is not one of transformers, or has no place for the sizes
            in its config.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            "CompreSSMCallback can't cut a PEFT model: an adapter's checkpoints do not carry the sizes of its base. Call "
            "compress_pretrained on the base model first, then train the adapter on the slim model."
        )
    layers = find_layers(model)
    if not isinstance(model, PreTrainedModel) and not is_plain(model):
        raise ValueError(
            f"CompreSSMCallback can't cut a {type(model).__name__}: its checkpoints have no config that carries the sizes of "
            "the model inside. Make it a PreTrainedModel (subclass that of the model inside and add to it), or call "
            "compress_ on the model inside before the training."
        )
    check_state_sizes(model, {layer.index: 1 for layer in layers})
    for layer in layers:
        parameters = cut_parameters([layer])
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise ValueError(
                f"{layer.name} is frozen ({', '.join(parameters)}), so training can't make up for a cut: unfreeze it, or "
                "call compress_pretrained before the training."
            )
    return layers


def cut_parameters(layers: Sequence[Layer]) -> dict[str, nn.Parameter]:
    """The parameters that a cut of the layers changes, by name in the model."""
    return {
        f"{layer.name}.{name}": layer.mixer.get_parameter(name)
        for layer in layers
        for name in layer.changed_by_a_cut()
    }


def check_realization(name: str, layers: Sequence[Layer], backend: Backend) -> None:
    """Refuse a cut whose new parameters, or parameters made anew, the optimizer could not take up.

    Raises:
        ValueError: with what to do instead.
    """
    if not backend.takes_new_parameters and not all(layer.realizations[name].stock for layer in layers):
        raise ValueError(
            f"realization={name!r} gives the model new parameters, which {type(backend).__name__} can't take: train with "
            "realization='select', or with DDP (torchrun) or in one process, or call compress_ after the training."
        )
    if not backend.counts_steps and any(layer.realizations[name].makes_anew for layer in layers):
        raise ValueError(
            f"realization={name!r} makes parameters anew, and {type(backend).__name__} counts the steps of all parameters "
            "together: Adam would move the new ones several times too far. Train with realization='select', or with FSDP2 or DDP."
        )


def check_evaluation(trainer: Any) -> None:
    """Refuse a `rollback` that has nothing to look at.

    Raises:
        ValueError: if there is no evaluation set, or more than one, or nothing computes the metric.
    """
    evaluation = trainer.eval_dataset
    if evaluation is None or isinstance(evaluation, dict):
        raise ValueError("rollback needs one evaluation set: pass eval_dataset to the Trainer, or drop rollback.")
    name = (trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    if trainer.compute_metrics is None and name != "loss":
        raise ValueError(
            f"rollback looks at metric_for_best_model={name!r}, which nothing computes: pass compute_metrics to the Trainer, or "
            "name the loss."
        )


def check_alone(callback: Any, trainer: Any) -> None:
    """Refuse a second callback of this kind.

    Raises:
        ValueError: if there is one.
    """
    if sum(isinstance(other, type(callback)) for other in trainer.callback_handler.callbacks) > 1:
        raise ValueError(
            f"There are several {type(callback).__name__}s, and each would cut what another has cut: keep one "
            "(trainer.remove_callback)."
        )


def check_everywhere(callback: Any, announced: str, patience: float) -> None:
    """Refuse to train where some processes would never come to a cut.

    Args:
        callback: of this process.
        announced: under which name each process has announced its own when it made its trainer.
        patience: seconds by which another may do so later than this one.

    Raises:
        ValueError: if one has none.
    """
    without = absent(announced, patience)
    if without:
        name = type(callback).__name__
        raise ValueError(
            f"Process {' and '.join(map(str, without))} of {processes()} has no {name}, and would wait for ever at the first "
            f"cut: give it to the Trainer of all processes, whatever their number (Trainer(callbacks=[{name}(...)]))."
        )
