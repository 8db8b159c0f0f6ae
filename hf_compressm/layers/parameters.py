"""How one parameter, and whatever follows it, changes in a cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..compat.sharding import is_held_by_others, is_sharded


@dataclass(frozen=True)
class ParameterCut:
    """The cut of one parameter: which of its slices stay, and what their new values are.

    The cut layer computes y' = sum_s C'_s h_s over the kept states s, with the states and the upstream gradient of the
    full layer, so that dL/dC'_s = dL/dC_s: gradients, and an optimizer's moments of them, are sliced and never mixed,
    even where the new values are a combination of old ones (C' = R C).

    Args:
        dim: the dimension that is cut.
        index: slices that stay, [new]; or [groups, new] for a parameter [groups, ...] that keeps others in each group.
        readout: R [r, N], or [groups, r, N] along with such an index. The last r slices of the new values are R times N
            of the old ones.
        readout_start: the first of the N old slices that R combines.
        values: the new values themselves, where they were fitted. Without `index` the parameter is made anew and has
            no old slices: what an optimizer knows of it is forgotten.
    """

    dim: int = 0
    index: Tensor | None = None
    readout: Tensor | None = None
    readout_start: int = 0
    values: Tensor | None = None

    def gradient(self, old: Tensor) -> Tensor:
        """Cut a tensor that has the parameter's shape and lives in the coordinates of its gradient.

        Raises:
            ValueError: if the parameter is made anew, so that there is nothing that could follow.
        """
        if self.index is None:
            raise ValueError("A projection makes new parameters, which no optimizer state belongs to: use 'select'.")
        index = self.index.to(old.device)
        if index.dim() == 1:
            return old.index_select(self.dim, index)
        shape = [1] * old.dim()
        shape[0], shape[self.dim] = index.shape
        sizes = [index.shape[1] if dim == self.dim else size for dim, size in enumerate(old.shape)]
        return old.gather(self.dim, index.view(shape).expand(sizes))

    def weights(self, old: Tensor | None) -> Tensor:
        """Cut the parameter's values, or a copy of them such as a moving average; None if the parameter is new."""
        if self.values is not None:
            return self.values if old is None else self.values.to(old.device)
        assert old is not None
        new = self.gradient(old)
        if self.readout is not None:
            r, N = self.readout.shape[-2:]
            R = self.readout.to(old.device)
            mixed = R @ old.narrow(self.dim, self.readout_start, N).to(R.dtype)
            new.narrow(self.dim, new.shape[self.dim] - r, r).copy_(mixed)
        return new


def set_data_(parameter: Tensor, new: Tensor) -> None:
    """Give a parameter new data of another shape and keep the object, which optimizers and wrappers hold.

    Passing through another dtype drops autograd's accumulator of the old shape.

    Raises:
        ValueError: if it is sharded, or takes the place of one that is: its backend can, and no other.
    """
    if is_sharded(parameter) or is_held_by_others(parameter):
        raise ValueError(
            "This parameter is sharded, and can only be cut by what shards it: give CompreSSMCallback to a Trainer that trains "
            "with it. Nothing was changed."
        )
    new = new.detach().to(parameter.dtype).contiguous()
    wide, narrow = (torch.complex128, torch.complex64) if parameter.is_complex() else (torch.float64, torch.float32)
    other = wide if parameter.dtype != wide else narrow
    parameter.grad = None
    parameter.data = parameter.data.to(other)
    parameter.data = new
