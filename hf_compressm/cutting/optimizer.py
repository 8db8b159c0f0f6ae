"""An optimizer's state follows its parameter through a cut.

The moments of a gradient are cut as the gradient is (`ParameterCut.gradient`), copies of the weights as the weights
are. Factored second moments v_ij = r_i c_j / mean(r) keep their value on what stays. A parameter that is made anew, in
other coordinates, begins with no state, like that of a new model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.parts import Part
from ..compat.sharding import is_sharded, sharded_like, whole
from ..layers import ParameterCut

# State entries that are copies of the weights: ASGD's average, schedule-free's iterate, master weights.
WEIGHT_COPIES = {"ax", "z", "master_param", "ema"}
# Adafactor's factors, of transformers (without the dimension they are averaged over) and of torch (with it, as a 1).
ROW_FACTORS = {"exp_avg_sq_row", "row_var"}
COLUMN_FACTORS = {"exp_avg_sq_col", "col_var"}

State = dict[str, Any]
NewState = tuple[torch.optim.Optimizer, nn.Parameter, State]
"""What a parameter's state becomes in one of the optimizers."""

# The message of every refusal ends in this.
PLAIN = "train with a plain optimizer, such as optim='adamw_torch_fused', 'adafactor' or 'sgd'. Nothing was changed."


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside of accelerate's wrapper, or itself."""
    from accelerate.optimizer import AcceleratedOptimizer

    plain: torch.optim.Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return plain


def as_list(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers of a training loop, from none, one or a list of them, unwrapped.

    Raises:
        TypeError: if there is something else.
    """
    several = optimizer if isinstance(optimizer, list | tuple) else [] if optimizer is None else [optimizer]
    for one in several:
        if not hasattr(one, "param_groups"):
            raise TypeError(f"optimizer= takes an optimizer or a list of them, got {type(one).__name__}.")
    return [unwrap(one) for one in several]


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> None:
    """Prove that optimizers train every trainable parameter of a model, with states that can follow a cut.

    Args:
        optimizers: from `as_list`; of torch or of a library with the same interface. They may have no state yet.
        model: that they train.

    Raises:
        ValueError: if no optimizer holds a parameter, or a state is of an unknown kind or shape.
    """
    for optimizer in optimizers:
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):  # its import is slow
            raise ValueError(f"A ZeroRedundancyOptimizer keeps most of its state in other processes: {PLAIN}")
        library = type(optimizer).__module__.split(".")[0]
        if library in ("bitsandbytes", "torchao", "apollo_torch", "galore_torch"):
            raise ValueError(
                f"The state of {library}'s {type(optimizer).__name__} is packed and can't be cut along with its "
                f"parameters: {PLAIN}"
            )
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if missing:
        others = f" and {len(missing) - 1} more, which would never be trained" if missing[1:] else ""
        raise ValueError(
            f"No optimizer holds {missing[0]}{others or ', which would never be trained'}: pass the optimizers of this "
            "model, all of them in a list, or freeze what shall not be trained (requires_grad=False). Nothing was changed."
        )
    for optimizer in optimizers:
        for name, parameter in trained.items():
            _check_state(name, optimizer.state.get(parameter, {}), parameter.shape)


def cut_states(
    optimizers: Sequence[torch.optim.Optimizer], name: str, parameter: nn.Parameter | None, cut: ParameterCut
) -> list[NewState]:
    """The states of a parameter after its cut; nothing is changed. Sharded ones are gathered by all processes together.

    Args:
        optimizers: that may hold it.
        name, parameter: in the model, before the cut; None for one that the cut will make, which has no state yet.
        cut: of it.

    Raises:
        ValueError: if an entry is of an unknown kind, or an optimizer can't be given a new parameter.
    """
    states: list[NewState] = []
    for optimizer in optimizers:
        if parameter is None:
            if isinstance(optimizer, torch.optim.Adagrad):
                raise ValueError(f"Adagrad makes its states when it is constructed, and {name} would be new: {PLAIN}")
            continue
        state = optimizer.state.get(parameter)
        if state:
            _check_state(name, state, parameter.shape)
            kept = state if cut.index is not None else {}
            full = {key: whole(entry) for key, entry in kept.items()}
            new = {key: _cut_entry(key, entry, full, parameter.shape, cut) for key, entry in full.items()}
            new = {key: sharded_like(entry, kept[key]) for key, entry in new.items()}
            states.append((optimizer, parameter, new))
    return states


def hold_new_(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, mixer: nn.Module) -> None:
    """Let optimizers train the parameters that a cut has added to a mixer, in the group of its matrices. In place.

    They come where the optimizer of the slim model would have them, so that the states in a checkpoint are told apart by
    their order, as ever.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(p): group for group in groups for p in group["params"]}
    new = [p for p in mixer.parameters() if p.requires_grad and id(p) not in held]
    of_matrices = [held[id(p)] for p in mixer.parameters() if p.dim() > 1 and id(p) in held]
    if not new or not of_matrices:
        return  # none is trained, or nothing is new
    place = {id(p): (i, name) for i, (name, p) in enumerate(model.named_parameters())}
    for parameter in new:
        group, (order, name) = of_matrices[0], place[id(parameter)]
        before = [i for i, p in enumerate(group["params"]) if id(p) in place and place[id(p)][0] < order]
        at = before[-1] + 1 if before else 0
        group["params"].insert(at, parameter)
        if "param_names" in group:
            group["param_names"].insert(at, name)


def let_go_(optimizers: Sequence[torch.optim.Optimizer], parameter: Tensor) -> None:
    """Let optimizers no longer train a parameter. In place."""
    for optimizer in optimizers:
        optimizer.state.pop(parameter, None)
        for group in optimizer.param_groups:
            for at in [i for i, p in enumerate(group["params"]) if p is parameter]:
                del group["params"][at]
                if "param_names" in group:
                    del group["param_names"][at]


def set_states_(states: Sequence[NewState]) -> None:
    """Put the cut states in place of the old ones."""
    for optimizer, parameter, state in states:
        optimizer.state[parameter] = state


def _check_state(name: str, state: State, shape: torch.Size) -> None:
    for key, entry in state.items():
        if isinstance(entry, Part):
            continue  # it is of the parameter's shape
        if isinstance(entry, Tensor):
            number = entry.is_floating_point() or entry.is_complex()
            plain = (type(entry) in (Tensor, nn.Parameter) or is_sharded(entry)) and number
            if entry.numel() == 1 or (plain and tuple(entry.shape) in _shapes(key, shape)):
                continue
            found = f"{type(entry).__name__} {list(entry.shape)} {entry.dtype}"
        elif _holds_tensors(entry):
            found = f"a {type(entry).__name__} that holds tensors"
        else:
            continue
        raise ValueError(
            f"The optimizer's state {key!r} of {name} {list(shape)} is {found}, which can't be cut along with it: {PLAIN}"
        )


def _holds_tensors(entry: Any) -> bool:
    if isinstance(entry, Tensor):
        return True
    if isinstance(entry, dict):
        return any(map(_holds_tensors, entry.values()))
    if isinstance(entry, list | tuple | set):
        return any(map(_holds_tensors, entry))
    return any(isinstance(value, Tensor) for value in getattr(entry, "__dict__", {}).values())


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
