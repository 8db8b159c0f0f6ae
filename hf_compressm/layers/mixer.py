"""What the layers of all families share, and how a mixer computes what its state sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.offloading import device_of
from ..compat.parts import shape_of
from .contracts import MixerInputs, Realization
from .selection import Select


class MixerLayer:
    """Most of a `Layer`, for families that know their mixers by the names of what these have.

    Args:
        name: of the mixer in the model.
        mixer: the module.
    """

    NEEDS: ClassVar[frozenset[str]] = frozenset()
    """Attributes that are read."""
    MAY_HAVE: ClassVar[frozenset[str]] = frozenset()
    """Further parameters, buffers and modules that the mixer may have."""
    SYSTEM: ClassVar[frozenset[str]] = frozenset()
    """Parameters and modules that A, B, C, D and the steps come from, beside those that a cut changes."""
    family: ClassVar[str]
    realizations: ClassVar[dict[str, type[Realization]]] = {"select": Select}
    reads_data: ClassVar[bool] = True
    in_plain_models: ClassVar[bool] = False
    keeps_samples_apart: ClassVar[bool] = False
    sizes_may_differ: bool = True
    unprojected_state_size: int | None = None
    head_state_sizes: tuple[int, ...] | None = None
    gradient_at: str | None = None
    gradient_is_slow: bool = False

    def __init__(self, name: str, mixer: Any) -> None:
        self.name = name
        self.mixer = mixer
        self.index: int = mixer.layer_idx

    @classmethod
    def misfit(cls, module: nn.Module) -> list[str]:
        """What the family needs and a module lacks, what it has beyond that, or else its wrong shapes."""
        absent = [f"lacks {name}" for name in sorted(cls.NEEDS) if not hasattr(module, name)]
        own = {name for name, _ in module.named_children()} | {name for name, _ in module.named_buffers(recurse=False)}
        own |= {name for name, _ in module.named_parameters(recurse=False)}
        more = [f"has {name}" for name in sorted(own - cls.NEEDS - cls.MAY_HAVE)]
        return absent + more or wrong_shapes(module, cls.expected_shapes(module))

    @classmethod
    def expected_shapes(cls, mixer: Any) -> dict[str, list[int | None]]:
        """The shapes of a mixer's tensors, by name (None: any), from its attributes."""
        return {}

    @property
    def device(self) -> torch.device:
        """That the mixer computes on."""
        return device_of(self.mixer)

    @property
    def groups(self) -> int:
        """Sets of states that are chosen on their own."""
        return 1

    @property
    def channels(self) -> int:
        """Scanned channels."""
        raise NotImplementedError

    @property
    def state_size(self) -> int:
        """N."""
        raise NotImplementedError

    @property
    def activation_bytes(self) -> int:
        """Of a token in a forward pass in plain torch: four float32 tensors of [length, channels, N]."""
        return 16 * self.channels * self.state_size

    def shapes(self, size: int) -> dict[str, torch.Size]:
        """The shapes at a state size of the mixer's parameters that depend on it, by name."""
        raise NotImplementedError

    def size_of(self, shapes: Mapping[str, torch.Size]) -> int | None:
        """The state size of a checkpoint's tensors, from those of `shapes` that are there; None if none tells it."""
        one, two = self.shapes(1), self.shapes(2)
        for name, shape in shapes.items():
            if name in one:
                dim = next(d for d, (n, m) in enumerate(zip(one[name], two[name], strict=True)) if n != m)
                return 1 + (shape[dim] - one[name][dim]) // (two[name][dim] - one[name][dim])
        return None

    def refit(self, inputs: MixerInputs, selections: tuple[Any, ...], rounds: int) -> list[Any] | None:
        """Fit the selection of each group to the mixer's output on its inputs; None where the family has no refit."""
        return None

    def changed_by_a_cut(self) -> list[str]:
        """The parameters that a selection changes, by name."""
        return list(self.shapes(1))

    def system_parameters(self) -> list[str]:
        """The parameters that A, B, C, D and the steps come from, by name: what a cut mixer is healed by."""
        cut = self.changed_by_a_cut()
        return [name for name, _ in self.mixer.named_parameters() if name in cut or name.split(".")[0] in self.SYSTEM]


def causal_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A mixer's depthwise causal convolution, [batch, length, channels] in and float32 out."""
    bias = None if conv.bias is None else conv.bias.float()
    out = F.conv1d(x.mT, conv.weight.float(), bias, padding=conv.kernel_size[0] - 1, groups=conv.groups)
    return out[..., : x.shape[1]].mT.float()


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer in float32, or in autocast's precision, as the model itself computes it; float32 comes out."""
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float()).float()


def valid_tokens(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """1 for tokens and 0 for padding, [batch, length], float32."""
    if attention_mask is None:
        return torch.ones(hidden_states.shape[:2], dtype=torch.float32, device=hidden_states.device)
    return attention_mask.float()


def wrong_shapes(mixer: Any, expected: Mapping[str, list[int | None]]) -> list[str]:
    """For each tensor of another shape than expected (None: any), or that is none, a remark."""
    remarks = []
    for name, shape in expected.items():
        tensor = mixer
        for part in name.split("."):
            tensor = getattr(tensor, part, None)
        if not isinstance(tensor, Tensor):
            remarks.append(f"has no tensor {name}: it is quantised or computed")
            continue
        found = shape_of(tensor)
        if len(found) != len(shape) or any(n not in (None, m) for n, m in zip(shape, found, strict=True)):
            remarks.append(f"has {name} {list(found)} for {['any' if n is None else n for n in shape]}")
    return remarks
