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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.reference import mamba_sensitivities, mamba_states, mamba_states_by_input
from . import budgets, factorisations, moments
from .realization import Selection, safe_ridge
from .selective import MambaSystem

RIDGE = 1e-6
"""Added to the unit diagonal of the scaled normal matrices of T and R."""
DAMPING = 1e-2
"""Likewise for the Gauss-Newton steps of A and D."""
WORKING_SET = {"cpu": 2**20}
"""Numbers in the largest temporary tensor by the type of the device, 2^24 on any other: on a CPU, what its cache holds."""
INPUT_CHANNELS = 128
"""Channels that T, which all share, is fitted on, spread over all of them: its normal matrix is most of a fit's work. Of the
768 of a well-trained layer, 64 gave the same perplexity as all, to 0.15%."""

Pairs = Iterable[tuple[MambaSystem, Tensor]]
"""Systems and what is to be fitted to them, [batch, length, channels], batch after batch, in any number of passes."""


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
        """The state size, r."""
        return len(self.kept)


class Lazy(Iterable[tuple[MambaSystem, Tensor]]):
    """What a function yields, anew each time that it is gone through."""

    def __init__(self, make: Callable[[], Iterator[tuple[MambaSystem, Tensor]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[tuple[MambaSystem, Tensor]]:
        return self._make()


def with_outputs(systems: Iterable[MambaSystem]) -> Pairs:
    """Systems and their gated outputs: kept if they are few (`budgets.SYSTEMS`), and else computed anew in each pass."""
    pairs = Lazy(lambda: ((system, gated_output(system)) for system in systems))
    held, few = 0, []
    for pair in pairs:
        held += 4 * pair[1].nbytes
        if held > budgets.SYSTEMS:
            return pairs
        few.append(pair)
    return few


def refit(systems: Iterable[MambaSystem], selection: Selection, rounds: int) -> Refit:
    """Fit the kept states to the full layer's output.

    Args:
        systems: the full layer's, one per calibration batch; they are gone through several times.
        selection: which states stay; its read-out is where the fit starts.
        rounds: of least squares, with a Gauss-Newton step between any two. The best round is kept.

    Returns:
        the fit, in float64. Its error is at most that of the selection, up to rounding and the ridge.
    """
    full, kept = with_outputs(systems), selection.kept
    first, _ = next(iter(full))
    N = first.A.shape[1]
    identity = torch.eye(N, dtype=torch.float64, device=kept.device)
    A, inputs = first.A.double()[:, kept], identity[kept]
    readout = identity[kept] if selection.readout is None else selection.readout.double().clone()
    skip = A.new_zeros(len(A))
    energy = energy_of(full)
    parts = parts_to_fit(readout, rounds)
    best = None
    for turn in range(rounds):
        if turn:
            step, skip = fit_dynamics(full, A, inputs, readout)
            A = A * step.clamp(-1, 1).exp()
        for part in parts[turn]:
            rest = without_others(without_skip(full, skip), part, A, inputs, readout)
            inputs[part] = fit_inputs(rest, A[:, part], readout[part])
            readout[part], gain, left = _fit_readout(rest, A[:, part], inputs[part])
        error = (left - gain) / energy if energy else 0.0
        if best is None or error < best.error:
            best = Refit(kept, A, inputs.clone(), readout.clone(), skip, max(error, 0.0))
    assert best is not None
    return best


def energy_of(pairs: Pairs) -> float:
    """Of what is to be fitted."""
    return sum(float(target.double().square().sum()) for _, target in pairs)


def without_skip(pairs: Pairs, skip: Tensor) -> Pairs:
    """What a change of D leaves of the targets."""
    return Lazy(lambda: ((system, y - system.gate * system.u * skip.float()) for system, y in pairs))


def parts_to_fit(readout: Tensor, rounds: int) -> list[list[Tensor]]:
    """The kept states whose rows of T and R are fitted together, one part after the other, in each round.

    All at once, or as many as the normal matrices can take: in each round first those whose read-out takes most of other
    rows of C than one (the candidates of the read-out), and then some of the others, in turns.
    """
    mixed = readout.square().sum(1) - readout.square().amax(1)
    first, *others = mixed.argsort(descending=True, stable=True).split(max(1, moments.MAX_READOUT // readout.shape[1]))
    first = first.sort().values
    return [[first, others[turn % len(others)]] if others else [first] for turn in range(rounds)]


def without_others(pairs: Pairs, part: Tensor, A: Tensor, inputs: Tensor, readout: Tensor) -> Pairs:
    """What the states beside a part leave of the targets."""
    if len(part) == len(readout):
        return pairs
    others = torch.ones(len(readout), dtype=torch.bool, device=part.device)
    others[part] = False
    A, T, R = A[:, others].float(), inputs[others].float().mT, readout[others].float().mT

    def rest(system: MambaSystem, target: Tensor) -> Tensor:
        return target - gated_output(replace(system, A=A, B=system.B @ T, C=system.C @ R))

    return Lazy(lambda: ((system, rest(system, target)) for system, target in pairs))


def scaled_states(system: MambaSystem, A: Tensor, B: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The states, times the channels' gates."""
    for time, h in mamba_states(system.u, system.delta, A, B, chunk=_chunk(system, A.numel())):
        yield time, h.mul_(system.gate[:, time, :, None])


def _chunk(system: MambaSystem, states: int) -> int:
    """Tokens that are scanned at once, of a system with so many states in all channels together."""
    return min(max(WORKING_SET.get(system.u.device.type, 2**24) // (len(system.u) * states), 1), 16)


def gated_output(system: MambaSystem) -> Tensor:
    """What a system gives, scaled by its gate, [batch, length, channels]."""
    y = torch.empty_like(system.u)
    for time, h in scaled_states(system, system.A, system.B):
        y[:, time] = torch.einsum("btdn,btn->btd", h, system.C[:, time])
    return y


def fit_inputs(pairs: Pairs, A: Tensor, readout: Tensor) -> Tensor:
    """T for a given R: each kept state is split into what the N rows of B drive."""
    (r, N), channels = readout.shape, len(A)
    some = (
        torch.linspace(0, channels - 1, min(channels, INPUT_CHANNELS), dtype=torch.float32, device=A.device)
        .round()
        .long()
    )
    rates, R = A.float()[some], readout.float().mT
    normal, right = A.new_zeros(r * N, r * N), A.new_zeros(r * N)
    for system, target in pairs:
        C, gate = system.C @ R, system.gate[..., some]
        chunk = _chunk(system, len(some) * r * N)
        for time, h in mamba_states_by_input(
            system.u[..., some], system.delta[..., some], rates, system.B, chunk=chunk
        ):
            features = h.mul_((gate[:, time, :, None] * C[:, time, None])[..., None]).view(-1, r * N)
            normal += features.mT @ features
            right += features.mT @ target[:, time][..., some].flatten()
    return solve(normal, right, RIDGE).view(r, N)


def _fit_readout(pairs: Pairs, A: Tensor, inputs: Tensor) -> tuple[Tensor, float, float]:
    """R for a given T, the energy of the targets that it explains, and all their energy."""
    r, N = inputs.shape
    normal, right, energy = A.new_zeros(r, N, r, N), A.new_zeros(r, N), 0.0
    for system, target in pairs:
        for time, h in scaled_states(system, A.float(), system.B @ inputs.float().mT):
            C = system.C[:, time].flatten(0, 1)
            K = (h.mT @ h).flatten(0, 1)
            outer = (C[:, :, None] * C[:, None]).flatten(1)
            normal += (K.flatten(1).mT @ outer).view(r, r, N, N).transpose(1, 2)
            right += torch.einsum("bti,bto->io", (h.mT @ target[:, time, :, None])[..., 0], system.C[:, time])
        energy += float(target.double().square().sum())
    normal, right = normal.view(r * N, r * N), right.flatten()
    solution = solve(normal, right, RIDGE)
    return solution.view(r, N), float(2 * solution @ right - solution @ normal @ solution), energy


def fit_dynamics(pairs: Pairs, A: Tensor, inputs: Tensor, readout: Tensor) -> tuple[Tensor, Tensor]:
    """The Gauss-Newton step of log(-A), [channels, r], and D's change, [channels]: one small system per channel."""
    channels, r = A.shape
    normal, right = A.new_zeros(channels, r + 1, r + 1), A.new_zeros(channels, r + 1)
    for system, target in pairs:
        C = (system.C @ readout.float().mT)[:, :, None]
        B = system.B @ inputs.float().mT
        scan = mamba_sensitivities(system.u, system.delta, A.float(), B, chunk=_chunk(system, A.numel()))
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
