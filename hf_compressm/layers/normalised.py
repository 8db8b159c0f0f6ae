"""Mamba-1 mixers that normalise B and C after `x_proj` (Falcon-Mamba, Jamba)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..hankel.normalised import NormalisedCut, NormalisedStatistics, refit_normalised
from ..hankel.realization import Selection
from .contracts import MixerInputs, Realization
from .mamba import MambaLayer
from .parameters import ParameterCut
from .selection import Select
from .systems import Systems

NORMS = ("b_layernorm", "c_layernorm")


class NormalisedSelect(Select):
    """Keep some states behind the norms, by one `hankel.normalised.NormalisedCut`, which maps B and C before them."""

    @classmethod
    def of_selections(cls, layer: Any, statistics: Any, selections: tuple[Selection, ...]) -> Realization:
        """What a selection becomes behind the norms."""
        made = NormalisedSelect if selections[0].readout is None else NormalisedReadOut
        return made((statistics.realize(selections[0], layer.gamma),))

    @classmethod
    def of_first_states(cls, layer: Any, size: int) -> Realization:
        """Keep the first states."""
        kept = torch.arange(size, device=layer.device)
        first = torch.eye(size, layer.state_size, dtype=torch.float64, device=kept.device)
        return cls((NormalisedCut(kept, None, first, first, first.new_ones(size), None, 0.0),))

    def parameter_cuts(self, layer: Any) -> dict[str, ParameterCut]:
        """The mapped rows of B and C, and what becomes of the scale."""
        cuts: dict[str, ParameterCut] = layer.cut(self.groups[0])
        return cuts

    def refit(self, layer: Any, inputs: MixerInputs, rounds: int) -> Realization:
        """Fit the layer to the full one's output."""
        return NormalisedRefit((refit_normalised(Systems(layer, inputs), self.groups[0], rounds, layer.gamma),))


class NormalisedReadOut(NormalisedSelect):
    """The same, where C is mapped to the read-out that makes up best for the other states."""

    kind = "read-out"


class NormalisedRefit(NormalisedSelect):
    """The same, with all that belongs to the kept states fitted anew."""

    kind = "refit"


class NormalisedMambaLayer(MambaLayer):
    """A Mamba-1 mixer with RMS norms over the states on B and C.

    The scale g that the norms of a smaller state take away goes into the weights of the norms (Jamba). Norms without
    weights (Falcon-Mamba) leave it to what follows: D / g before, and g on `out_proj` after the gate.

    Args:
        name: of the mixer in the model.
        mixer: a `FalconMambaMixer`, a `JambaMambaMixer`, or a module with their attributes.
    """

    NEEDS = MambaLayer.NEEDS | {"dt_layernorm", *NORMS}
    realizations: ClassVar[dict[str, type[Realization]]] = {"select": NormalisedSelect}

    @property
    def norms_have_weights(self) -> bool:
        """Else they hold ones, as buffers that only the fused kernel reads."""
        return isinstance(self.mixer.c_layernorm.weight, nn.Parameter)

    @property
    def gamma(self) -> Tensor | None:
        """The product of the norms' weights, [N]: scaling a state in B or in C is the same."""
        if not self.norms_have_weights:
            return None
        scale: Tensor = self.mixer.b_layernorm.weight.detach().float() * self.mixer.c_layernorm.weight.detach().float()
        return scale

    def statistics(self, *, mean_lti: bool) -> NormalisedStatistics:
        """An empty accumulator for `read`'s systems."""
        return NormalisedStatistics(self.channels, self.state_size, self.device, mean_lti=mean_lti)

    def _normalise(self, step: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixer = self.mixer
        eps = getattr(mixer.c_layernorm, "variance_epsilon" if self.norms_have_weights else "eps")
        B, C = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) for x in (B, C))
        gamma = self.gamma
        return mixer.dt_layernorm(step), B, C if gamma is None else gamma * C

    def cut(self, cut: NormalisedCut) -> dict[str, ParameterCut]:
        """How the mixer's parameters change; nothing is changed yet."""
        mixer, kept, N = self.mixer, cut.kept, self.state_size
        step, B, C = mixer.x_proj.weight.detach().double().split([mixer.time_step_rank, N, N])
        all_channels = torch.arange(self.channels, device=kept.device)
        D = mixer.D.detach().double() if cut.skip is None else mixer.D.detach().double() + cut.skip
        cuts = {
            "A_log": ParameterCut(dim=1, index=kept, values=None if cut.A is None else torch.log(-cut.A)),
            "x_proj.weight": ParameterCut(
                index=self._rows(kept), values=torch.cat([step, cut.inputs @ B, cut.readout @ C])
            ),
        }
        if self.norms_have_weights:
            cuts["b_layernorm.weight"] = ParameterCut(index=kept, values=torch.ones_like(cut.gain))
            cuts["c_layernorm.weight"] = ParameterCut(index=kept, values=cut.gain)
            if cut.skip is not None:
                cuts["D"] = ParameterCut(index=all_channels, values=D)
        else:
            gain = cut.gain[0]
            out_proj = mixer.out_proj.weight.detach().double() * gain
            cuts["D"] = ParameterCut(index=all_channels, values=D / gain)
            cuts["out_proj.weight"] = ParameterCut(dim=1, index=all_channels, values=out_proj)
        return cuts

    def changed_by_a_cut(self) -> list[str]:
        """The parameters that a selection changes, by name."""
        return super().changed_by_a_cut() + ([] if self.norms_have_weights else ["D", "out_proj.weight"])

    def shapes(self, size: int) -> dict[str, torch.Size]:
        """The shapes at a state size of the parameters that depend on it."""
        norms = {f"{norm}.weight": torch.Size([size]) for norm in NORMS if self.norms_have_weights}
        return super().shapes(size) | norms

    def resize(self, size: int) -> None:
        """Tell the mixer its new state size."""
        super().resize(size)
        if not self.norms_have_weights:
            for name in NORMS:
                norm = getattr(self.mixer, name)
                norm.weight = norm.weight.new_ones(size)
