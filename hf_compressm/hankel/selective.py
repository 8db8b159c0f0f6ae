"""The selective state space systems that mixers are, on one batch of tokens.

| here | paper | meaning |
|---|---|---|
| `A`, `delta`, `B`, `C`, `u` | A, Delta, B, C, u | the selective state space model, per token |
| `gate` | - | what multiplies a channel of the scan's output on its way to the residual stream; its square is w |
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MambaSystem:
    """The selective system of one Mamba-1 mixer on one batch, in float32.

    Shapes: `u`, `delta`, `gate` [batch, length, channels]; `A` [channels, N]; `B`, `C` [batch, length, N]; `valid`
    [batch, length], 1 for tokens and 0 for padding.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    gate: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Mamba2System:
    """The selective system of one Mamba-2 mixer on one batch, in float32.

    Shapes: `x`, `gate` [batch, length, heads, head_dim]; `delta` [batch, length, heads]; `A` [heads]; `B`, `C`
    [batch, length, groups, N]; `valid` [batch, length].
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    gate: Tensor
    valid: Tensor
