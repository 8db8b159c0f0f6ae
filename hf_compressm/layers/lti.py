"""Linear time-invariant mixers with a diagonal state: LRU, S4D, S5, and what else says which system it is.

transformers has no such model, so a mixer of one's own takes part by two methods, and needs no base class:

    class LRU(nn.Module):
        def lti_system(self):
            '''a [n], B [n, m], C [p, n] of x_k = a * x_{k-1} + B u_k, y_k = Re(C x_k) + D u_k'''
            a = torch.exp(torch.complex(-self.nu_log.exp(), self.theta_log.exp()))
            return a, self.gamma_log.exp()[:, None] * torch.complex(self.B_re, self.B_im), torch.complex(self.C_re, self.C_im)

        def lti_parameters(self, a, B, C):
            '''The parameters that make it this system, by name'''
            gamma = (1 - a.abs().square()).sqrt()
            nu_log = a.abs().log().neg().log()
            theta_log = (a.angle() % (2 * math.pi)).clamp_min(1e-9).log()  # the angle of a real state is 0
            B = B / gamma[:, None]
            return {"nu_log": nu_log, "theta_log": theta_log, "gamma_log": gamma.log(), "B_re": B.real, "B_im": B.imag,
                    "C_re": C.real, "C_im": C.imag}

- a, B and C are tensors, of the discrete system: a mixer with a step (S4D, S5) discretises in `lti_system` and undoes it in
  `lti_parameters`. A step that belongs to a state may stay what it is or be made anew with the rest.
- A mixer of many systems side by side, such as S4D's one for each channel, gives a [systems, n], B [systems, n, m],
  C [systems, p, n]. All are cut to one size.
- Where only one of each conjugate pair is stored (S4D, S5), C is twice what is stored: y = Re(C x).
- `lti_parameters` names every parameter whose shape depends on n; a, B and C come to it as complex128, on the mixer's device.
  Some eigenvalues of a truncated system are real, of either sign: what it makes of these has to be finite, too.
- Balanced truncation wants complex states. Real ones are selected, which wants one slice for each state in these parameters.
- Where FSDP2 shards the mixer, its parameters are zeros while only shapes are asked for.
- D, and whatever else the mixer has, stays as it is.
- The mixer's forward takes n from its parameters. If it has an attribute `state_size`, that is kept up to date; if it has a
  `layer_idx`, reports call it by that, and else by its place in the model.

Such a model may be a plain `torch.nn.Module`: the state sizes are in the shapes of its weights, so that `state_dict()` is
all that there is to save. A slim one is loaded into a fresh model by `hf_compressm.layers.resize_like_(model, state_dict)` and
then `model.load_state_dict(state_dict)`, which without the former refuses the shapes. A `PreTrainedModel` takes n from a
`state_size` in its config, one for all layers: ask for `uniform=True`, or name the size, and `from_pretrained` loads it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..compat.offloading import weights_at_hand
from ..compat.sharding import holding, is_in_pieces, is_sharded, shapes_only
from ..config import CompreSSMConfig
from ..hankel.lti import LTIStatistics, ModalSystem, Truncated, TruncatedPath
from .contracts import Realization, ResizeParameter
from .mixer import MixerLayer
from .parameters import ParameterCut, set_data_
from .selection import Select

# The share of its output energy by which a cut mixer may be off the system that it was made for; any in half precision.
CLOSE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}

# Eigenvalues that every mixer has to have parameters for, where it is balanced.
REAL = (0.5, -0.5)


class SelectModes(Select):
    """Keep some of the states as they are (modal truncation): the baseline."""

    has_fit = False
    wants = "one slice for each state in the parameters that depend on their number"

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """Where each parameter that depends on the number of states has a slice for each of them."""
        one, two = layer.shapes(1), layer.shapes(2)
        return all(sum(m - n for n, m in zip(one[name], two[name], strict=True)) == 1 for name in one)


class Balance(Realization):
    """Balanced truncation, made diagonal again. `groups` has the systems of a layer as one `Truncated`.

    All states are new ones, so that an optimizer begins anew with the parameters that make them: its moments belong to
    coordinates that are gone.
    """

    name = kind = "balance"
    makes_anew = True
    wants = "complex states"

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """Where the states are complex: the eigenvalues of what is left need not be real where all were."""
        return bool(layer.like_a().is_complex())

    @classmethod
    def suits(cls, config: CompreSSMConfig, *, in_training: bool) -> bool:
        """Whenever no selection is named."""
        return config.selection == "auto"

    @classmethod
    def check_layer(cls, layer: Any) -> None:
        """Refuse a mixer that has no finite parameters for real eigenvalues, which truncation makes of complex ones.

        Of a sharded mixer it is seen at the cut: what else `lti_parameters` reads is not at hand here.

        Raises:
            ValueError: with the parameter.
        """
        if any(is_sharded(parameter) or is_in_pieces(parameter) for parameter in layer.mixer.parameters()):
            return
        for eigenvalue in REAL:
            a, B, C = layer.system().first(1)
            made = layer.parameters_of(torch.full_like(a, eigenvalue), torch.ones_like(B), torch.ones_like(C))
            wrong = next((name for name, value in made.items() if not value.isfinite().all()), None)
            if wrong is not None:
                raise ValueError(
                    f"{layer.name}.lti_parameters gives a {wrong} that is not finite for a real eigenvalue ({eigenvalue}), and "
                    "balanced truncation makes such ones: keep it finite, by a clamp as that of the LRU in "
                    "hf_compressm.layers.lti. Nothing was changed."
                )

    @classmethod
    def paths(
        cls, layers: Sequence[Any], statistics: Sequence[Any], config: CompreSSMConfig
    ) -> list[Mapping[int, Realization]]:
        """For each layer the truncation to every size."""
        return [_Path(TruncatedPath(entry.system)) for entry in statistics]

    @classmethod
    def of_first_states(cls, layer: Any, size: int) -> Realization:
        """The first states as they are."""
        a, B, C = LTIStatistics(layer.system()).system.first(size)
        return cls((Truncated(a, B, C, error=0.0, bound=0.0),))

    @property
    def error_bound(self) -> float:
        """Twice the sum of the Hankel singular values that are cut."""
        return float(self.groups[0].bound)

    def parameter_cuts(self, layer: Any) -> dict[str, ParameterCut]:
        """The parameters of the new system."""
        return {name: ParameterCut(values=value) for name, value in layer.parameters_of(*self._system(layer)).items()}

    def apply_(self, layer: Any, new: Mapping[str, Tensor], resize_: ResizeParameter = set_data_) -> None:
        """Give the mixer its new parameters, once it is seen that they make it the new system. In place.

        Raises:
            ValueError: if they don't.
        """
        wanted, made = ModalSystem(*self._system(layer)), self._tried(layer, new)
        dtypes = {layer.mixer.get_parameter(name).dtype for name in new}
        tolerance = max(CLOSE.get(dtype, math.inf) for dtype in dtypes)
        alike = all(getattr(wanted, name).shape == getattr(made, name).shape for name in ("a", "B", "C"))
        if not alike or wanted.minus(made).energy() > tolerance * wanted.energy():
            raise ValueError(
                f"{layer.name} was given the parameters that its lti_parameters names for a system, and its lti_system gives "
                "another one then: the two methods have to undo each other. Nothing was changed."
            )
        super().apply_(layer, new, resize_)

    def _tried(self, layer: Any, new: Mapping[str, Tensor]) -> ModalSystem:
        """What the mixer is with other parameters."""
        size = layer.state_size
        try:
            with holding(layer.mixer, new):
                layer.resize(self.size)
                system: ModalSystem = layer.system()
                return system
        finally:
            layer.resize(size)

    def _system(self, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
        """a, B and C, with the leading dimension of many systems only where the mixer has it."""
        made = self.groups[0]
        parts = made.a.cpu(), made.B.cpu(), made.C.cpu()
        return parts if layer.like_a().ndim > 1 else tuple(part[0] for part in parts)


class _Path(Mapping[int, Realization]):
    """A layer's realization at every size, made when it is asked for."""

    def __init__(self, path: TruncatedPath) -> None:
        self._path = path

    def __getitem__(self, size: int) -> Realization:
        return Balance((self._path[size],))

    def __iter__(self) -> Iterator[int]:
        return iter(self._path)

    def __len__(self) -> int:
        return len(self._path)


class LTILayer(MixerLayer):
    """A mixer that says which linear time-invariant system it is; see the module.

    Args:
        name: of the mixer in the model.
        mixer: with `lti_system` and `lti_parameters`.
    """

    NEEDS = frozenset(["lti_system", "lti_parameters"])
    family = "LTI"
    realizations: ClassVar[dict[str, type[Realization]]] = {"select": SelectModes}
    reads_data = False
    in_plain_models = True

    def __init__(self, name: str, mixer: Any) -> None:
        self.name, self.mixer = name, mixer
        self.index = getattr(mixer, "layer_idx", None)  # type: ignore[assignment]

    @classmethod
    def misfit(cls, module: nn.Module) -> list[str]:
        """The methods that it lacks; a wrapper, such as FSDP1's, has none of what it wraps."""
        return [
            f"lacks {name}" for name in sorted(cls.NEEDS) if not callable(inspect.getattr_static(module, name, None))
        ]

    @torch.no_grad()
    def system(self) -> ModalSystem:
        """That the mixer is, on the CPU.

        Raises:
            ValueError: if the mixer's answer is none.
        """
        with weights_at_hand(self.mixer), self._asked():
            a, B, C = (matrix.cpu() for matrix in self.mixer.lti_system())
            return ModalSystem(a, B, C)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.name}.lti_system() gives no system: {error}. Nothing was changed.") from error

    @torch.no_grad()
    def parameters_of(self, a: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
        """The mixer's parameters that make it a system, by name.

        Raises:
            ValueError: if its `lti_parameters` names one that it does not have.
        """
        with weights_at_hand(self.mixer):
            system = (matrix.to(self.device, torch.complex128) for matrix in (a, B, C))
            values: dict[str, Tensor] = self.mixer.lti_parameters(*system)
        unknown = sorted(values.keys() - {name for name, _ in self.mixer.named_parameters()})
        if unknown:
            raise ValueError(f"{self.name}.lti_parameters names {unknown[0]}, which is no parameter of it.")
        return values

    @property
    def state_size(self) -> int:
        """The state size, n."""
        return self.like_a().shape[-1]

    @property
    def channels(self) -> int:
        """Numbers of a state in all systems: two for each where it is complex."""
        a = self.like_a()
        return (1 + a.is_complex()) * a.shape[:-1].numel()

    @torch.no_grad()
    def like_a(self) -> Tensor:
        """A tensor of a's shape and dtype; its values may be others."""
        with shapes_only(self.mixer), self._asked():
            a: Tensor = self.mixer.lti_system()[0]
            return a

    def statistics(self, *, mean_lti: bool) -> LTIStatistics:
        """What the weights say, which is all that there is to know.

        Raises:
            ValueError: if there is no system, or it is not stable.
        """
        system = self.system()
        try:
            return LTIStatistics(system)
        except ValueError as error:
            raise ValueError(f"{self.name} can't be measured: {error}.") from error

    def magnitude(self) -> Tensor:
        """Product of the norms of each state's B and C, [1, n]."""
        system = LTIStatistics(self.system()).system
        gain: Tensor = (system.B.norm(dim=-1) * system.C.norm(dim=-2)).sum(0, keepdim=True)
        return gain

    def shapes(self, size: int) -> dict[str, torch.Size]:
        """The shapes at a state size of the parameters that depend on it."""
        one, two, wanted = (self._named_shapes(n) for n in (1, 2, size))
        return {name: shape for name, shape in wanted.items() if one[name] != two[name]}

    def _named_shapes(self, size: int) -> dict[str, torch.Size]:
        """The same, with the parameters of one shape at every size that `lti_parameters` names beside these."""
        with torch.no_grad(), shapes_only(self.mixer), weights_at_hand(self.mixer):
            with self._asked():
                parts = zip(self.mixer.lti_system(), (-1, -2, -1), strict=True)
                a, B, C = (torch.cat([matrix.narrow(dim, 0, 1)] * size, dim) for matrix, dim in parts)
            return {name: value.shape for name, value in self.parameters_of(a, B, C).items()}

    def changed_by_a_cut(self) -> list[str]:
        """The parameters that a cut gives new values, by name."""
        return list(self._named_shapes(1))

    def resize(self, size: int) -> None:
        """Tell the mixer its new state size, where it wants to know."""
        if "state_size" in vars(self.mixer):
            self.mixer.state_size = size

    def select(self, kept: Tensor, readout: Tensor | None = None) -> dict[str, ParameterCut]:
        """The slices of the kept states."""
        one, two = self.shapes(1), self.shapes(2)
        dims = {name: next(d for d, n in enumerate(one[name]) if n != two[name][d]) for name in one}
        return {name: ParameterCut(dim=dim, index=kept[0]) for name, dim in dims.items()}
