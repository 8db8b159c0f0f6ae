"""Selections and refits of Mamba-1 layers that normalise B and C over the states (Falcon-Mamba, Jamba).

Such a layer can't be cut by slicing: the root mean square is taken over fewer states then, so that the scale of B and C
changes, at every token in its own way. What a smaller layer can have is B' = norm(T B) and C' = g norm(R C), since the
weights of `x_proj` come before the norms. Here B and C are without the norms' weights, whose product is gamma: the states
can be scaled at will, so that y = sum_s gamma_s C_s h_s.

| here | paper | meaning |
|---|---|---|
| `kept` | - | S, the states that stay, [r] |
| `A` | A | continuous-time dynamics of the kept states, one per channel, [channels, r] |
| `inputs` | - | T, the new input map B' = norm(T B), [r, N] |
| `readout` | - | R, the new output map C' = g norm(R C), [r, N] |
| `gamma` | - | the product of the weights of both norms, [N]; None where they have none |
| `gain` | - | g, the new gamma, [r]; all the same where the norms have no weights |
| `skip` | - | what is added to D, [channels] |

The least-squares read-out of a layer without norms serves as R as it is, with g for the mean scale that the norms take
away. Where g may differ between the states, it takes from R what gamma does to the length of its rows.
The refit goes on from there: T by least squares with the denominators held, A and D by Gauss-Newton steps, R by
Gauss-Newton steps that know R's own denominator, g by least squares. Steps are halved until the error falls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .mamba import MambaStatistics
from .realization import Selection
from .refit import (
    RIDGE,
    Lazy,
    Pairs,
    energy_of,
    fit_dynamics,
    fit_inputs,
    parts_to_fit,
    scaled_states,
    solve,
    with_outputs,
    without_others,
    without_skip,
)
from .selective import MambaSystem

HALVINGS = 3
READOUT_DAMPING = 1e-4
"""Added to the unit diagonal of the scaled normal matrix of a step in R."""


@dataclass(frozen=True)
class NormalisedCut:
    """A cut layer with norms on B and C (see the module's glossary), in float64."""

    kept: Tensor
    A: Tensor | None
    """None where the kept states keep their own."""
    inputs: Tensor
    readout: Tensor
    gain: Tensor
    skip: Tensor | None
    error: float
    """Share of the layer's output energy that is lost on the calibration data; without a refit, not counting the norms."""

    @property
    def size(self) -> int:
        """The state size, r."""
        return len(self.kept)


class NormalisedStatistics(MambaStatistics):
    """The statistics of a Mamba-1 layer, and the power of its B, which the norms will take away.

    `update` wants systems with gamma in C and unweighted B.

    Attributes:
        input_power: sum over tokens of B_n^2, [N].
    """

    def __init__(self, channels: int, size: int, device: torch.device, *, mean_lti: bool = False) -> None:
        super().__init__(channels, size, device, mean_lti=mean_lti)
        self.input_power = torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, system: MambaSystem) -> None:
        """Add a batch, and the power of its B."""
        super().update(system)
        self.input_power += (system.B.square() * system.valid[..., None]).sum((0, 1))

    def realize(self, selection: Selection, gamma: Tensor | None) -> NormalisedCut:
        """The cut layer of a selection, with its mean scale restored."""
        kept, output = selection.kept, self.groups[0].output
        identity = torch.eye(len(output), dtype=torch.float64, device=output.device)
        inputs = identity[kept]
        readout = inputs if selection.readout is None else selection.readout.double()
        gain = readout.new_ones(len(kept))
        if gamma is not None:
            gamma = _nonzero(gamma.double())
            output = output / gamma / gamma[:, None]
            weighted = readout * gamma
            gain = _positive(weighted.norm(dim=1)) / _positive(readout.norm(dim=1))
            readout = weighted / gain[:, None]
        # The norms see T B and R C at the scale of B and C, so that their epsilon means what it did.
        input_scale = _positive(self.input_power[kept].mean() / self.input_power.mean()).sqrt()
        output_power = (readout @ output @ readout.mT).diagonal().mean()
        output_scale = _positive(output_power / output.diagonal().mean()).sqrt()
        gain = gain * input_scale * output_scale
        return NormalisedCut(kept, None, inputs / input_scale, readout / output_scale, gain, None, selection.error)


def refit_normalised(
    systems: Iterable[MambaSystem], start: NormalisedCut, rounds: int, gamma: Tensor | None
) -> NormalisedCut:
    """Fit the kept states to the full layer's output.

    Args:
        systems: the full layer's, one per calibration batch, with gamma in C and unweighted B; they are
            gone through several times.
        start: where the fit starts.
        rounds: of steps in each of A, T and R.
        gamma: see the module's glossary.

    Returns:
        the fit, in float64. Its error is at most that of the start.
    """
    fit = _Fit(systems, gamma)
    A = next(iter(fit.full))[0].A.double()[:, start.kept]
    start = replace(start, A=A, skip=A.new_zeros(len(A)))
    best = min(fit.with_gain(start, start.gain), fit.with_gain(start), key=lambda cut: cut.error)
    for turn, parts in enumerate(parts_to_fit(start.readout, rounds)):
        steps: list[Callable[[NormalisedCut], Move]] = [fit.step_dynamics] if turn else []
        for part in parts:
            steps += [partial(fit.step_inputs, part=part), partial(fit.step_readout, part=part)]
        for step in steps:
            move = step(best)
            for halving in range(HALVINGS + 1):
                trial = fit.with_gain(move(0.5**halving))
                if trial.error < best.error:
                    best = trial
                    break
    return replace(best, error=max(best.error, 0.0))


Move = Callable[[float], NormalisedCut]
"""From the length of a step to where it leads."""


class _Fit:
    """The full layer's gated output, and steps of a cut layer towards it."""

    def __init__(self, systems: Iterable[MambaSystem], gamma: Tensor | None) -> None:
        self.gamma = gamma
        self.gain_per_state = gamma is not None
        self.full = with_outputs(systems)
        self.energy = energy_of(self.full)

    def with_gain(self, cut: NormalisedCut, gain: Tensor | None = None) -> NormalisedCut:
        """The cut with a g, by default the one that fits best, and its error."""
        assert cut.A is not None
        r = len(cut.kept)
        normal, right = cut.A.new_zeros(r, r), cut.A.new_zeros(r)
        energy = 0.0
        for raw, rest in self._rest(cut):
            system = self._normalised(raw, cut)
            energy += float(rest.double().square().sum())
            for time, h in scaled_states(system, cut.A.float(), system.B):
                features = h.mul_(system.C[:, time, None]).flatten(0, 2)
                normal += features.mT @ features
                right += features.mT @ rest[:, time].flatten()
        if gain is None and self.gain_per_state:
            gain = solve(normal, right, RIDGE)
        elif gain is None:
            gain = (right.sum() / _positive(normal.sum())).expand(r)
        explained = float(2 * gain @ right - gain @ normal @ gain)
        error = (energy - explained) / self.energy if self.energy else 0.0
        return replace(cut, gain=gain, error=error)

    def step_inputs(self, cut: NormalisedCut, part: Tensor) -> Move:
        assert cut.A is not None
        readout = cut.gain[:, None] * cut.readout
        rest = without_others(self._scaled(self._rest(cut), cut), part, cut.A, cut.inputs, readout)
        inputs = cut.inputs.clone()
        inputs[part] = fit_inputs(rest, cut.A[:, part], readout[part])
        return lambda length: replace(cut, inputs=cut.inputs + length * (inputs - cut.inputs))

    def step_dynamics(self, cut: NormalisedCut) -> Move:
        assert cut.A is not None
        assert cut.skip is not None
        A, skip = cut.A, cut.skip
        # Its second part is D as a whole: what remains to be fitted contains the present one.
        step, fitted = fit_dynamics(self._scaled(self._full(), cut), A, cut.inputs, cut.gain[:, None] * cut.readout)
        return lambda length: replace(
            cut, A=A * (length * step).clamp(-1, 1).exp(), skip=skip + length * (fitted - skip)
        )

    def step_readout(self, cut: NormalisedCut, part: Tensor) -> Move:
        """With v = norm(R C) and y' = sum_s g_s v_s h_s: dy'/dR_sj = (g_s h_s - v_s y' / r) C_j / rms(R C)."""
        assert cut.A is not None
        (r, N), p = cut.readout.shape, len(part)
        normal, right = cut.A.new_zeros(p, N, p, N), cut.A.new_zeros(p, N)
        for plain, rest in self._rest(cut):
            system, raw = self._normalised(plain, cut), _with_denominators(plain, cut)
            for time, h in scaled_states(system, cut.A.float(), system.B):
                h = h.mul_(cut.gain.float())
                v, C = system.C[:, time, None], raw.C[:, time].flatten(0, 1)
                y = (h * v).sum(-1, keepdim=True)
                error = rest[:, time, :, None] - y
                h = (h - v * y / r)[..., part]
                K = (h.mT @ h).flatten(0, 1)
                outer = (C[:, :, None] * C[:, None]).flatten(1)
                normal += (K.flatten(1).mT @ outer).view(p, p, N, N).transpose(1, 2)
                right += torch.einsum("bti,bto->io", (h.mT @ error)[..., 0], raw.C[:, time])
        step = torch.zeros_like(cut.readout)
        step[part] = solve(normal.view(p * N, p * N), right.flatten(), READOUT_DAMPING).view(p, N)
        return lambda length: replace(cut, readout=cut.readout + length * step)

    def _full(self) -> Pairs:
        """The systems without gamma in C, and what the full layer gives."""
        if self.gamma is None:
            return self.full
        gamma = _nonzero(self.gamma.float())
        return Lazy(lambda: ((replace(system, C=system.C / gamma), y) for system, y in self.full))

    def _rest(self, cut: NormalisedCut) -> Pairs:
        """The same with what the states have to explain."""
        assert cut.skip is not None
        return without_skip(self._full(), cut.skip)

    def _normalised(self, system: MambaSystem, cut: NormalisedCut) -> MambaSystem:
        """The system with B' = norm(T B) and norm(R C)."""
        T, R = cut.inputs.float().mT, cut.readout.float().mT
        return replace(system, B=_norm(system.B @ T), C=_norm(system.C @ R))

    def _scaled(self, pairs: Pairs, cut: NormalisedCut) -> Pairs:
        return Lazy(lambda: ((_with_denominators(system, cut), target) for system, target in pairs))


def _with_denominators(system: MambaSystem, cut: NormalisedCut) -> MambaSystem:
    """The system with B / rms(T B) and C / rms(R C), of which T and R make B' and C' / g."""
    T, R = cut.inputs.float().mT, cut.readout.float().mT
    return replace(system, B=system.B / _rms(system.B @ T), C=system.C / _rms(system.C @ R))


def _rms(x: Tensor) -> Tensor:
    return _positive(x.square().mean(-1, keepdim=True)).sqrt()


def _norm(x: Tensor) -> Tensor:
    return x / _rms(x)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1e-6, 1e-6, x)


def _positive(x: Tensor) -> Tensor:
    return x.clamp_min(1e-12)
