"""What a family of layers, and a way to make their state smaller, have to offer.

A `Layer` is one SSM mixer of a model: it reads the selective system that the mixer is on some input, and knows which
parameters depend on the state size. A `Realization` is that layer at one smaller size, as it would become: how large,
at what error, by which changes of which parameters.

A new family is a module with a class that satisfies `Layer` (`MixerLayer` has most of it) and one call of
`registry.register`. A new realization is a module with a subclass of `Realization` and one call of
`registry.register_realization`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..config import CompreSSMConfig
from ..hankel.ranks import allowed_sizes
from ..hankel.statistics import Statistics
from .parameters import ParameterCut, set_data_

MixerInput = tuple[Tensor, Tensor | None, Tensor | None]
"""What a mixer read in a batch, as `Layer.read` takes it: hidden states [batch, length, hidden], attention mask [batch,
length], and the loss's gradient [batch, length, channels]."""
MixerInputs = list[MixerInput]

ResizeParameter = Callable[[Tensor, Tensor], None]
"""Gives a parameter new data of another shape, in place."""

R = TypeVar("R", bound="Realization")


class Layer(Protocol):
    """One SSM layer of a model."""

    family: ClassVar[str]
    """Its name in tables and messages, such as "Mamba-2"."""
    realizations: ClassVar[dict[str, type[Realization]]]
    """How its state can be made smaller, by the name in `CompreSSMConfig.realization`; "select" is always there."""
    reads_data: ClassVar[bool]
    """Whether its system depends on what the mixer reads. If not, `statistics` knows all, and `read` is never called."""
    in_plain_models: ClassVar[bool]
    """Whether its model may be a plain module, without a config that sizes are written in: the weights' shapes tell them."""
    keeps_samples_apart: ClassVar[bool]
    """Whether the mixer, told which sample a token belongs to (`seq_idx`), begins each with an empty state."""
    name: str
    """Of the mixer in the model."""
    mixer: Any
    index: int
    """Of the layer in the model. A mixer that does not know it leaves it None, and gets its place among the layers."""
    sizes_may_differ: bool
    """Whether the model's config can tell another size for each layer; `find_layers` sets it."""
    unprojected_state_size: int | None
    """The size that B and C are projected from, where the layer is projected already."""
    head_state_sizes: tuple[int, ...] | None
    """The states of each head, where they differ in number; N is their mean then."""
    gradient_at: str | None
    """The submodule of the mixer that reads the scan's output first, where `read` wants the loss's gradient; None if the
    family's channels can't be weighed by the loss."""
    gradient_is_slow: bool
    """Whether the backward pass of the stock mixer takes too long here to be taken unasked."""

    @classmethod
    def misfit(cls, module: nn.Module) -> list[str]:
        """What keeps a module from being a mixer of this family, a remark each; empty if it is one."""

    @property
    def device(self) -> torch.device:
        """That the mixer computes on."""

    @property
    def state_size(self) -> int:
        """N."""

    @property
    def groups(self) -> int:
        """Sets of states that are chosen on their own, each with its B and C."""

    @property
    def channels(self) -> int:
        """Scanned channels: each has a state of N numbers per sequence."""

    @property
    def activation_bytes(self) -> int:
        """Of a token in a forward pass of the stock mixer in plain torch, about; kernels take less."""

    def statistics(self, *, mean_lti: bool) -> Statistics:
        """An empty accumulator for `read`'s systems."""

    def read(self, hidden_states: Tensor, attention_mask: Tensor | None, gradient: Tensor | None = None) -> Any:
        """The mixer's selective system on its input [batch, length, hidden], as the statistics take it.

        Its channels are weighed by how much of them reaches the residual stream, or, given the loss's gradient by what
        `gradient_at` reads [batch, length, channels], by how much the loss depends on them.
        """

    def magnitude(self) -> Tensor:
        """Product of the norms of each state's weights in B and in C, [groups, N]."""

    def shapes(self, size: int) -> dict[str, torch.Size]:
        """The shapes at a state size of the mixer's parameters that depend on it, by name."""

    def size_of(self, shapes: Mapping[str, torch.Size]) -> int | None:
        """The state size of a checkpoint's tensors, from those of `shapes` that are there; None if none tells it."""

    def changed_by_a_cut(self) -> list[str]:
        """The parameters that a selection changes, by name."""

    def system_parameters(self) -> list[str]:
        """The parameters that A, B, C, D and the steps come from, by name: what a cut mixer is healed by."""

    def resize(self, size: int) -> None:
        """Tell the mixer its new state size, once its parameters have it."""

    def select(self, kept: Tensor, readout: Tensor | None = None) -> dict[str, ParameterCut]:
        """How the mixer's parameters change when each group keeps the states `kept` [groups, r].

        With `readout` R [groups, r, N], C becomes R C.
        """

    def refit(self, inputs: MixerInputs, selections: tuple[Any, ...], rounds: int) -> list[Any] | None:
        """Fit the selection of each group to the mixer's output on its inputs; None where the family has no refit."""

    def refitted(self, fits: tuple[Any, ...]) -> dict[str, ParameterCut]:
        """How the mixer's parameters change in what `refit` gives."""


@dataclass(frozen=True)
class Realization(ABC):
    """One layer at a smaller state size, as it would become. It holds tensors and no layer, so it can be sent.

    Args:
        groups: for each group of the layer what becomes of its states, of one `size` each, with the `error` that the
            layer's output has on the calibration data (share of its energy that is lost).
    """

    groups: tuple[Any, ...]

    name: ClassVar[str]
    """In `CompreSSMConfig.realization`, reports and cards."""
    kind: ClassVar[str] = ""
    """What was done to a layer, more closely than the name: "select", "read-out", "refit", "project",
    "project_heads"."""
    has_fit: ClassVar[bool] = False
    """Whether `refit` wants what the mixers read."""
    reads_contributions: ClassVar[bool] = True
    """Whether `paths` wants the contribution Grams of the states."""
    fits_differ: ClassVar[bool] = False
    """Whether it takes much of the error away in one layer and little in another, so that sizes have to know."""
    stock: ClassVar[bool] = True
    """Whether what it makes is a stock layer, which transformers loads without this package."""
    makes_anew: ClassVar[bool] = False
    """Whether a parameter that the layer had is another one afterwards, of which an optimizer knows nothing."""
    wants: ClassVar[str] = ""
    """What `fits` looks for in a layer, for messages."""

    @property
    def size(self) -> int:
        """The state size r."""
        return int(self.groups[0].size)

    @property
    def error(self) -> float:
        """Share of the layer's output energy that is lost, of the group that loses most."""
        return float(max(group.error for group in self.groups))

    @property
    def cost(self) -> float:
        """The groups' shares together: what sizes are chosen by."""
        return float(sum(group.error for group in self.groups))

    @property
    def kept(self) -> list[list[int]]:
        """The states that stay, a list for each group; empty where they are mixed."""
        return []

    @property
    def error_bound(self) -> float | None:
        """The most that the error's gain can be at any frequency, where theory tells."""
        return None

    @property
    def head_sizes(self) -> list[int] | None:
        """The states of each head, where they may differ in number; `size` is their mean then."""
        return None

    @classmethod
    def fits(cls, layer: Any) -> bool:
        """Whether a layer of a family that has this realization can have it, too."""
        return True

    @classmethod
    def suits(cls, config: CompreSSMConfig, *, in_training: bool) -> bool:
        """Whether it is what `realization="auto"` means for layers that can have it, rather than "select"."""
        return False

    @classmethod
    def sizes(cls, layer: Any, config: CompreSSMConfig) -> list[int]:
        """The sizes that may be chosen for a layer, ascending; the last is its present one."""
        step = config.multiple_of if isinstance(config.multiple_of, int) else 1
        return allowed_sizes(layer.state_size, config.min_state_size, step)

    @classmethod
    def check_layer(cls, layer: Any) -> None:
        """Refuse a layer that it fits, of which something is wrong that would only be seen at the cut.

        Raises:
            ValueError: with what it is.
        """

    @classmethod
    def check_size(cls, layer: Any, size: int) -> None:
        """Refuse a size that a user names and a layer can't have.

        Raises:
            ValueError: with the sizes nearest to it.
        """

    @classmethod
    @abstractmethod
    def paths(
        cls, layers: Sequence[Any], statistics: Sequence[Any], config: CompreSSMConfig
    ) -> Sequence[Mapping[int, Realization]]:
        """For each layer the realization of every size; the layers are given together so that a GPU takes them so."""

    @classmethod
    @abstractmethod
    def of_first_states(cls, layer: Any, size: int) -> Realization:
        """The layer's first states, whatever they carry: for what depends on shapes alone."""

    @abstractmethod
    def parameter_cuts(self, layer: Any) -> dict[str, ParameterCut]:
        """How the mixer's parameters change, by name; nothing is changed yet."""

    def added_parameters(self, layer: Any) -> int:
        """How many more parameters the layer will have; negative where it will have fewer."""
        return _count(layer.shapes(self.size)) - _count(layer.shapes(layer.state_size))

    def refit(self, layer: Any, inputs: MixerInputs, rounds: int) -> Realization:
        """Fit what can be fitted to the full mixer's output on its inputs; itself where nothing can."""
        return self

    def apply_(self, layer: Any, new: Mapping[str, Tensor], resize_: ResizeParameter = set_data_) -> None:
        """Give the mixer its new parameters (from `new_data`) and size. In place; nothing here is expected to fail."""
        for name, data in new.items():
            resize_(layer.mixer.get_parameter(name), data)
        layer.resize(self.size)

    def to(self: R, device: torch.device | str) -> R:
        """The same with its tensors on a device."""
        there: R = _with_each(lambda tensor: tensor.to(device), self)
        return there

    def to_send(self: R) -> R:
        """The same on the CPU, none of its tensors a view of a larger one: what is pickled is the whole storage."""

        def alone(tensor: Tensor) -> Tensor:
            tensor = tensor.cpu()
            return tensor.clone() if tensor.nbytes < tensor.untyped_storage().nbytes() else tensor

        there: R = _with_each(alone, self)
        return there


def new_data(layer: Any, cuts: Mapping[str, ParameterCut]) -> dict[str, Tensor]:
    """The data of a mixer's parameters after a cut, by name; the mixer is not changed."""
    parameters = dict(layer.mixer.named_parameters())
    return {name: cut.weights(parameters[name].detach() if name in parameters else None) for name, cut in cuts.items()}


def _count(shapes: Mapping[str, torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes.values())


def _with_each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same with other tensors, wherever it has some."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_with_each(change, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: _with_each(change, item) for name, item in fields.items()})
    return value
