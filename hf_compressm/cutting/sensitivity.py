"""What each size of each layer costs the model: how far its predictions move when the state of that layer is cut.

Two layers that lose the same share of their output do not cost the model the same. What a cut of layer l to r states
costs is taken as k_l(r) * error_l(r), with an error that the statistics know for every r, and a factor that is measured at
a few sizes and interpolated between them: cut that layer alone, and see how far the predictions move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..hankel.statistics import Statistics
from ..layers import Layer, Realization
from .divergence import Divergence
from .progress import followed
from .trials import cut_for_a_while

# Shares of the states at which the factor is measured, a forward pass for each in each layer. On well-trained models two
# points find better sizes than one, and four hardly better ones than two.
POINTS = (0.25, 0.75)
# What a size counts for at which the predictions are not finite: more than any other, and still a number to add and compare.
BROKEN = 1e6

Path = Mapping[int, Realization]
"""A layer's realization at every size."""


def errors(
    layers: Sequence[Layer], statistics: Sequence[Statistics], paths: Sequence[Path], weights: str
) -> list[Tensor]:
    """What keeping r states of a layer loses, by its own statistics, [N] each at r - 1.

    Of statistics weighed by the loss ("fisher") it is half the expected square of the loss's change, in nats per token;
    else the share of the output's energy.
    """
    curves = []
    for layer, entry, path in zip(layers, statistics, paths, strict=True):
        scales = [1.0] * len(path[1].groups)
        if weights == "fisher":  # heads that are systems of their own count together in their group
            scales = (entry.output_energies() / (2 * entry.tokens)).reshape(len(scales), -1).sum(1).tolist()
        curves.append(
            torch.tensor(
                [
                    sum(scale * group.error for scale, group in zip(scales, path[r].groups, strict=True))
                    for r in range(1, layer.state_size + 1)
                ],
                dtype=torch.float64,
            )
        )
    return curves


@torch.no_grad()
def cost_curves(
    model: nn.Module,
    layers: Sequence[Layer],
    paths: Sequence[Path],
    choices: Sequence[Sequence[int]],
    lost: Sequence[Tensor],
    divergence: Divergence,
    fit: Callable[[Layer, Realization], Realization] = lambda layer, realization: realization,
) -> list[Tensor]:
    """What keeping r states of a layer costs, [N] each at r - 1, in units of the divergence.

    Args:
        model: it is the same afterwards, also after an error.
        layers: of the model.
        paths: the layers' realizations, which are tried on copies.
        choices: for each layer the sizes that it may have, ascending; the last is its present one.
        lost: from `errors`.
        divergence: of the model from what it is now.
        fit: what a realization is fitted to the layer by, where that gains in one layer what it does not in another.
    """
    curves = []
    rows = list(zip(layers, paths, choices, lost, strict=True))
    for layer, path, sizes, curve in followed("trying sizes, layer by layer", rows):
        at, factors = [], []
        for size in sorted({nearest(sizes, share) for share in POINTS}):
            if curve[size - 1] > 0:
                tried = fit(layer, path[size]) if path[size].fits_differ else path[size]
                with cut_for_a_while(model, [layer], {layer.index: tried}):
                    at.append(size)
                    factors.append(min(divergence(layer), BROKEN) / float(curve[size - 1]))
        scale = np.interp(np.arange(1, len(curve) + 1), at, factors) if at else np.ones(len(curve))
        curves.append(curve * torch.from_numpy(scale))
    return curves


def nearest(choice: Sequence[int], share: float) -> int:
    """The size below the present one, of those to choose from, that is nearest to a share of it.

    Where a layer may only stay whole, it is any size below: its cost is that of keeping all, nothing.
    """
    return min(choice[:-1] or [max(1, choice[-1] - 1)], key=lambda size: abs(size - share * choice[-1]))
