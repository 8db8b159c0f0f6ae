"""An optimizer's state follows its parameter through a cut.

The moments of a gradient are cut as the gradient is (`ParameterCut.gradient`), copies of the weights as the weights
are. Factored second moments v_ij = r_i c_j / mean(r) keep their value on what stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ParameterCut

# State entries that are copies of the weights: ASGD's average, schedule-free's iterate, master weights.
WEIGHT_COPIES = {"ax", "z", "master_param", "ema"}
# Adafactor's factors, of transformers (without the dimension they are averaged over) and of torch (with it, as a 1).
ROW_FACTORS = {"exp_avg_sq_row", "row_var"}
COLUMN_FACTORS = {"exp_avg_sq_col", "col_var"}

State = dict[str, Any]


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside of accelerate's wrapper, or itself."""
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Refuse an optimizer that can't follow a cut of these parameters, so far as its present state tells.

    Args:
        optimizer: of torch or of a library with the same interface; not accelerate's wrapper.
        parameters: those that a cut changes, by name.

    Raises:
        ValueError: if its state is of an unknown kind.
    """
    library = type(optimizer).__module__.split(".")[0]
    if library in ("bitsandbytes", "torchao", "apollo_torch", "galore_torch"):
        raise ValueError(
            f"The state of {library}'s {type(optimizer).__name__} is packed and can't be cut along with its parameters: "
            "train with a plain optimizer, such as optim='adamw_torch_fused', 'adafactor' or 'sgd'."
        )
    for name, parameter in parameters.items():
        for key, entry in optimizer.state.get(parameter, {}).items():
            _check_entry(name, key, entry, parameter.shape)


def cut_states(
    optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter | None, cut: ParameterCut
) -> State:
    """The state of a parameter after its cut; nothing is changed.

    Raises:
        ValueError: if an entry is of an unknown kind, or the parameter is made anew.
    """
    if parameter is None:
        raise ValueError(
            f"{name} would be a new parameter, which the optimizer does not hold: in training, take "
            "realization='select', and project after it."
        )
    state = optimizer.state.get(parameter, {})
    for key, entry in state.items():
        _check_entry(name, key, entry, parameter.shape)
    return {key: _cut_entry(key, entry, state, parameter.shape, cut) for key, entry in state.items()}


def set_states_(optimizer: torch.optim.Optimizer, states: list[tuple[Any, State]]) -> None:
    """Put the cut states in place of the old ones."""
    for parameter, state in states:
        if state:
            optimizer.state[parameter] = state


def verify_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Prove that the optimizer trains every trainable parameter, with a state that fits it.

    Raises:
        RuntimeError: if one is missing, a state does not fit, or a gradient is of another shape.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) not in held:
            raise RuntimeError(f"The optimizer does not hold {name}, which would never be trained.")
        for key, entry in optimizer.state.get(parameter, {}).items():
            try:
                _check_entry(name, key, entry, parameter.shape)
            except ValueError as error:
                raise RuntimeError(f"The optimizer's state does not fit its parameter: {error}") from error
        if parameter.grad is not None and parameter.grad.shape != parameter.shape:
            raise RuntimeError(f"The gradient of {name} is {list(parameter.grad.shape)}, not {list(parameter.shape)}.")


def _check_entry(name: str, key: str, entry: Any, shape: torch.Size) -> None:
    if not isinstance(entry, Tensor) or entry.numel() == 1:
        return
    plain = type(entry) in (Tensor, nn.Parameter) and entry.is_floating_point()
    if not plain or tuple(entry.shape) not in _shapes(key, shape):
        raise ValueError(
            f"The optimizer's state {key!r} of {name} {list(shape)} is {type(entry).__name__} {list(entry.shape)} "
            f"{entry.dtype}, which can't be cut along with it: train with a plain optimizer, such as "
            "optim='adamw_torch_fused', 'adafactor' or 'sgd'."
        )


def _shapes(key: str, shape: torch.Size) -> list[tuple[int, ...]]:
    """The shapes that an entry of this name may have."""
    rows, columns = (*shape[:-1],), (*shape[:-2], *shape[-1:])
    return {
        "exp_avg_sq_row": [rows],
        "exp_avg_sq_col": [columns],
        "row_var": [(*rows, 1)],
        "col_var": [(*shape[:-2], 1, *shape[-1:])],
    }.get(key, [tuple(shape)])


def _cut_entry(key: str, entry: Any, state: State, shape: torch.Size, cut: ParameterCut) -> Any:
    if not isinstance(entry, Tensor) or (entry.numel() == 1 and shape.numel() > 1):
        return entry
    if key in WEIGHT_COPIES:
        return cut.weights(entry)
    if key not in ROW_FACTORS | COLUMN_FACTORS:
        return cut.gradient(entry)
    # Factors: bring both to the form of torch, where an averaged dimension has size 1.
    averaged = len(shape) - (1 if key in ROW_FACTORS else 2)
    if cut.dim != averaged:
        full = entry.reshape([1 if d == averaged else n for d, n in enumerate(shape)])
        new = cut.gradient(full)
        return new if entry.dim() == len(shape) else new.squeeze(averaged)
    if key in ROW_FACTORS:
        return entry
    # The columns' factor when rows go: the mean of the rows' factor changes, and v shall not.
    rows = state["exp_avg_sq_row" if key == "exp_avg_sq_col" else "row_var"]
    rows = rows.reshape(*shape[:-1], 1)
    ratio = cut.gradient(rows).mean(-2, keepdim=True) / rows.mean(-2, keepdim=True).clamp_min(1e-30)
    return entry * ratio.reshape([*entry.shape[:-1], 1])
