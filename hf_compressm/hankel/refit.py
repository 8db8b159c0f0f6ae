"""Refit what a selection keeps: decays, input map, output map and skip of a Mamba-1 layer, to the full layer's output.

| here | paper | meaning |
|---|---|---|
| `kept` | - | S, the states that stay, [r] |
| `A` | A | continuous-time dynamics of the kept states, one per channel, [channels, r] |
| `inputs` | - | T, the new input map B' = T B, [r, N] |
| `readout` | - | R, the new output map C' = R C, [r, N] |
| `skip` | - | what is added to D, [channels] |

The layer's output is linear in each of T, R and D while the others stand still, so T and R are alternating least
squares; A is per channel and takes Gauss-Newton steps with the states' sensitivities to it. All of it minimises
E sum_d w (y - sum_s (R C)_s h'_s - D' u)^2, on the inputs that the full model gives the layer.

The normal matrices of T and R have (r N)^2 entries. Where that is too many, a part of the states is fitted to what the
others leave, and then another part (`parts_to_fit`); A and D are always fitted as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.reference import mamba_sensitivities, mamba_states
from . import factorisations, moments
from .realization import Selection, safe_ridge
from .selective import MambaSystem

RIDGE = 1e-6
"""Added to the unit diagonal of the scaled normal matrices of T and R."""
DAMPING = 1e-2
"""Likewise for the Gauss-Newton steps of A and D."""
WORKING_SET = 2**26
"""Numbers in the largest temporary tensor."""


@dataclass(frozen=True)
class Refit:
    """A cut Mamba-1 layer whose parameters are no longer slices of the old ones (see the module's glossary)."""

    kept: Tensor
    A: Tensor
    inputs: Tensor
    readout: Tensor
    skip: Tensor
    error: float
    """Share of the layer's output energy that is lost on the calibration data."""

    @property
    def size(self) -> int:
        """r."""
        return len(self.kept)


def refit(systems: list[MambaSystem], selection: Selection, rounds: int) -> Refit:
    """Fit the kept states to the full layer's output.

    Args:
        systems: the full layer's, one per calibration batch.
        selection: which states stay; its read-out is where the fit starts.
        rounds: of least squares, with a Gauss-Newton step between any two. The best round is kept.

    Returns:
        the fit, in float64. Its error is at most that of the selection, up to rounding and the ridge.
    """
    N, kept = systems[0].A.shape[1], selection.kept
    identity = torch.eye(N, dtype=torch.float64, device=kept.device)
    A, inputs = systems[0].A.double()[:, kept], identity[kept]
    readout = identity[kept] if selection.readout is None else selection.readout.double().clone()
    skip = A.new_zeros(len(A))
    targets = [gated_output(system) for system in systems]
    energy = sum(float(y.double().square().sum()) for y in targets)
    parts = parts_to_fit(readout, rounds)
    best = None
    for turn in range(rounds):
        if turn:
            step, skip = fit_dynamics(systems, targets, A, inputs, readout)
            A = A * step.clamp(-1, 1).exp()
        full = [y - system.gate * system.u * skip.float() for system, y in zip(systems, targets, strict=True)]
        for part in parts[turn]:
            rest = without_others(systems, full, part, A, inputs, readout)
            inputs[part] = fit_inputs(systems, rest, A[:, part], readout[part])
            readout[part], gain = _fit_readout(systems, rest, A[:, part], inputs[part])
        error = (sum(float(y.double().square().sum()) for y in rest) - gain) / energy if energy else 0.0
        if best is None or error < best.error:
            best = Refit(kept, A, inputs.clone(), readout.clone(), skip, max(error, 0.0))
    assert best is not None
    return best


def parts_to_fit(readout: Tensor, rounds: int) -> list[list[Tensor]]:
    """The kept states whose rows of T and R are fitted together, one part after the other, in each round.

    All at once, or as many as the normal matrices can take: in each round first those whose read-out takes most of other
    rows of C than one (the candidates of the read-out), and then some of the others, in turns.
    """
    mixed = readout.square().sum(1) - readout.square().amax(1)
    first, *others = mixed.argsort(descending=True, stable=True).split(max(1, moments.MAX_READOUT // readout.shape[1]))
    first = first.sort().values
    return [[first, others[turn % len(others)]] if others else [first] for turn in range(rounds)]


def without_others(
    systems: list[MambaSystem], targets: list[Tensor], part: Tensor, A: Tensor, inputs: Tensor, readout: Tensor
) -> list[Tensor]:
    """What the states beside a part leave of the targets."""
    if len(part) == len(readout):
        return targets
    others = torch.ones(len(readout), dtype=torch.bool, device=part.device)
    others[part] = False
    A, T, R = A[:, others].float(), inputs[others].float().mT, readout[others].float().mT
    beside = (replace(system, A=A, B=system.B @ T, C=system.C @ R) for system in systems)
    return [target - gated_output(system) for target, system in zip(targets, beside, strict=True)]


def scaled_states(system: MambaSystem, A: Tensor, B: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The states, times the channels' gates."""
    for time, h in mamba_states(system.u, system.delta, A, B, chunk=_chunk(system, A)):
        yield time, h.mul_(system.gate[:, time, :, None])


def _chunk(system: MambaSystem, A: Tensor) -> int:
    """Tokens that are scanned at once."""
    return min(max(WORKING_SET // (len(system.u) * A.numel()), 1), 16)


def gated_output(system: MambaSystem) -> Tensor:
    y = torch.empty_like(system.u)
    for time, h in scaled_states(system, system.A, system.B):
        y[:, time] = torch.einsum("btdn,btn->btd", h, system.C[:, time])
    return y


def fit_inputs(systems: list[MambaSystem], targets: list[Tensor], A: Tensor, readout: Tensor) -> Tensor:
    """T for a given R: each kept state is split into what the N rows of B drive."""
    (r, N), rates = readout.shape, A.float().repeat_interleave(readout.shape[1], dim=1)
    normal, right = A.new_zeros(r * N, r * N), A.new_zeros(r * N)
    for system, target in zip(systems, targets, strict=True):
        C = (system.C @ readout.float().mT).repeat_interleave(N, dim=-1)
        for time, h in scaled_states(system, rates, system.B.repeat(1, 1, r)):
            features = h.mul_(C[:, time, None]).flatten(0, 2)
            normal += features.mT @ features
            right += features.mT @ target[:, time].flatten()
    return solve(normal, right, RIDGE).view(r, N)


def _fit_readout(systems: list[MambaSystem], targets: list[Tensor], A: Tensor, inputs: Tensor) -> tuple[Tensor, float]:
    """R for a given T, and the energy of the targets that it explains."""
    r, N = inputs.shape
    normal, right = A.new_zeros(r, N, r, N), A.new_zeros(r, N)
    for system, target in zip(systems, targets, strict=True):
        for time, h in scaled_states(system, A.float(), system.B @ inputs.float().mT):
            C = system.C[:, time].flatten(0, 1)
            K = (h.mT @ h).flatten(0, 1)
            outer = (C[:, :, None] * C[:, None]).flatten(1)
            normal += (K.flatten(1).mT @ outer).view(r, r, N, N).transpose(1, 2)
            right += torch.einsum("bti,bto->io", (h.mT @ target[:, time, :, None])[..., 0], system.C[:, time])
    normal, right = normal.view(r * N, r * N), right.flatten()
    solution = solve(normal, right, RIDGE)
    return solution.view(r, N), float(2 * solution @ right - solution @ normal @ solution)


def fit_dynamics(
    systems: list[MambaSystem], targets: list[Tensor], A: Tensor, inputs: Tensor, readout: Tensor
) -> tuple[Tensor, Tensor]:
    """The Gauss-Newton step of log(-A), [channels, r], and D's change, [channels]: one small system per channel."""
    channels, r = A.shape
    normal, right = A.new_zeros(channels, r + 1, r + 1), A.new_zeros(channels, r + 1)
    for system, target in zip(systems, targets, strict=True):
        C = (system.C @ readout.float().mT)[:, :, None]
        B = system.B @ inputs.float().mT
        scan = mamba_sensitivities(system.u, system.delta, A.float(), B, chunk=_chunk(system, A))
        for time, h, sensitivity in scan:
            gate = system.gate[:, time]
            error = target[:, time] - gate * (h * C[:, time]).sum(-1)
            features = torch.cat([sensitivity * C[:, time], system.u[:, time, :, None]], dim=-1) * gate[..., None]
            features = features.flatten(0, 1).transpose(0, 1)  # [channels, tokens, r + 1]
            normal += features.mT @ features
            right += (features.mT @ error.flatten(0, 1).mT[..., None])[..., 0]
    solution = solve(normal, right, DAMPING)
    return solution[:, :r], solution[:, r]


def solve(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve normal equations, scaled to a unit diagonal to which the ridge is added; see `safe_ridge`."""
    scale = normal.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(normal.dtype).tiny).rsqrt()
    identity = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    scaled = normal * scale[..., :, None] * scale[..., None, :]
    scaled += safe_ridge(scaled, ridge) * identity
    return factorisations.solve(scaled, (right * scale)[..., None])[..., 0] * scale
