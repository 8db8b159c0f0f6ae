"""The rows of a Mamba-2 mixer that make B and C: read for a fit, and put back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..hankel.refit_mamba2 import SPAN, Reading, Rows, RowsRefit, refit_rows
from ..kernels.chunked import CHUNK
from .contracts import MixerInput, MixerInputs
from .parameters import ParameterCut
from .systems import joined

HELD_OUT = 8
"""Of so many sequences, one is not fitted to."""
TOGETHER = 2**14
"""Tokens of sequences that are read together, at most."""
STEPS = (100, 10)
"""Evaluations in a round: of the error with independent read-outs, and of the layer's own."""
CPU_WORK = 2**35
"""Multiply-adds of the rows' projections that a fit may take on a CPU: some seconds. The evaluations are fewer then."""
FITTED = 2**30
"""Numbers that a fit may keep of what it is fitted to, 4 GiB: of more tokens, it takes the first sequences."""


def fit_rows(layer: Any, inputs: MixerInputs, selections: tuple[Any, ...], rounds: int) -> list[RowsRefit] | None:
    """Fit what makes B and C of the kept states to the output of the layer's scan.

    Args:
        layer: a `Mamba2Layer` that is not projected.
        inputs: of its mixer.
        selections: of each group.
        rounds: of the fit.

    Returns:
        the fits; None if none is better on one of eight of the sequences, which are not fitted to.
    """
    train, held = (
        [reading(layer, *read) for read in part] for part in parted(inputs, FITTED // _numbers(layer), layer.device)
    )
    start = rows_of(layer, torch.stack([one.kept for one in selections]))
    work = sum(one.u[..., 0].numel() for one in train) * start.weight.numel()
    share = min(1.0, CPU_WORK / (rounds * STEPS[0] * work)) if start.weight.device.type == "cpu" else 1.0
    rows, left = refit_rows(train, held, start, [max(1, round(share * rounds * steps)) for steps in STEPS])
    if min(left) == 1:
        return None
    return [
        RowsRefit(one.kept, rows.of_group(group), share * one.error)
        for group, (one, share) in enumerate(zip(selections, left, strict=True))
    ]


def fitted_cuts(layer: Any, fits: tuple[RowsRefit, ...]) -> dict[str, ParameterCut]:
    """The kept rows of `in_proj` and channels of `conv1d`, with the fitted values of those that make B and C."""
    mixer, inner = layer.mixer, layer.mixer.intermediate_size
    kept, rows = torch.stack([fit.kept for fit in fits]), Rows.of_groups([fit.rows for fit in fits])
    rows = rows.scaled(1 / _factors(layer, kept))
    fitted = {
        "in_proj.weight": (2 * inner, rows.weight),
        "in_proj.bias": (2 * inner, rows.bias),
        "conv1d.weight": (inner, rows.taps[..., None, :]),
        "conv1d.bias": (inner, rows.conv_bias),
    }
    cuts: dict[str, ParameterCut] = layer.select(kept)
    for name, cut in cuts.items():
        start, values = fitted[name]
        assert values is not None
        new = cut.gradient(mixer.get_parameter(name).detach())
        new = new.to(torch.promote_types(new.dtype, torch.float32))
        new[start : start + values.shape[:3].numel()] = values.flatten(0, 2).to(new)
        cuts[name] = replace(cut, values=new)
    return cuts


def reading(layer: Any, hidden_states: Tensor, mask: Tensor | None, gradient: Tensor | None) -> Reading:
    """What the layer makes of a batch of its mixer's inputs."""
    system = layer.read(hidden_states, mask, gradient)
    scale = getattr(layer.mixer, "ssm_in_multiplier", 1.0)
    return Reading(hidden_states.float() * system.valid[..., None] * scale, system, layer.mixer.act)


def rows_of(layer: Any, kept: Tensor) -> Rows:
    """What makes B and C of the kept states [groups, r], in float32."""
    mixer, inner = layer.mixer, layer.mixer.intermediate_size

    def rows(parameter: Tensor | None, start: int) -> Any:
        return None if parameter is None else _of_states(layer, parameter.detach()[start:].float(), kept)

    weight, bias = (rows(parameter, 2 * inner) for parameter in (mixer.in_proj.weight, mixer.in_proj.bias))
    taps, conv_bias = (rows(parameter, inner) for parameter in (mixer.conv1d.weight, mixer.conv1d.bias))
    return Rows(weight, taps[..., 0, :], bias, conv_bias).scaled(_factors(layer, kept))


def _factors(layer: Any, kept: Tensor) -> Tensor:
    """What multiplies the kept states' rows after `in_proj`, [2, groups, r]."""
    mup = getattr(layer.mixer, "mup_vector", None)
    if mup is None:
        return torch.ones(2, *kept.shape, dtype=torch.float32, device=kept.device)
    return _of_states(layer, mup.flatten()[2 * layer.mixer.intermediate_size :].float(), kept)


def _of_states(layer: Any, rows: Tensor, kept: Tensor) -> Tensor:
    """Of rows [2 groups N, ...] and what follows, B's first, those of the kept states: [2, groups, r, ...]."""
    every = rows[: 2 * layer.groups * layer.state_size].unflatten(0, (2, layer.groups, layer.state_size))
    return torch.stack([every[:, group, states] for group, states in enumerate(kept)], dim=1)


def _numbers(layer: Any) -> int:
    """That a fit keeps of a token, about."""
    return int(6 * layer.channels + 2 * CHUNK * layer.mixer.num_heads + layer.groups * (SPAN + 3 * layer.state_size))


def parted(inputs: MixerInputs, tokens: int, device: torch.device) -> tuple[MixerInputs, MixerInputs]:
    """What to fit to, and one of eight sequences, or of fewer if there are no more, to judge the fit by.

    In each part, neighbours of one length are together, as long as they are few tokens.

    Args:
        inputs: of a mixer.
        tokens: that are taken at most, of the first sequences; one sequence at least.
        device: where they are to be.
    """
    rows: MixerInputs = []
    taken = 0
    for row in (_sequence(read, i) for read in inputs for i in range(len(read[0]))):
        taken += row[0].shape[1]
        if rows and taken > tokens:
            break
        rows.append(row)
    every = min(HELD_OUT, len(rows))
    held = [every > 1 and number % every == every - 1 for number in range(len(rows))]
    fit, judge = (
        list(joined((row for row, out in zip(rows, held, strict=True) if out == part), TOGETHER, device))
        for part in (False, True)
    )
    return fit, judge


def _sequence(read: MixerInput, i: int) -> MixerInput:
    hidden_states, mask, gradient = read
    one = slice(i, i + 1)
    return hidden_states[one], None if mask is None else mask[one], None if gradient is None else gradient[one]
