"""How many sequences pass through a model at once, and what a backward pass keeps of them: see `hankel.budgets`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..compat.parts import shape_of
from ..hankel import budgets
from ..interrupts import restoring, uninterrupted
from ..layers import Layer


def sequences_together(layers: Sequence[Layer], length: int) -> int:
    """How many sequences fit in a forward pass."""
    return max(1, budgets.ACTIVATIONS // (max(layer.activation_bytes for layer in layers) * length))


def in_passes(
    batch: Mapping[str, Tensor], layers: Sequence[Layer], most: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """A batch as parts, of at most so many sequences, that pass through the model one after the other."""
    step = sequences_together(layers, batch["input_ids"].shape[1])
    step = step if most is None else min(step, most)
    for start in range(0, len(batch["input_ids"]), step):
        yield {name: tensor[start : start + step] for name, tensor in batch.items()}


def called_with(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model is called with: by `position_ids` attention keeps packed samples apart only where there is no mask."""
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask" or "position_ids" not in batch}


def blocks_of(model: nn.Module, layers: Sequence[Layer]) -> tuple[list[nn.Module], set[int]]:
    """The blocks of a model, one after the other, those without a mixer too; and the layers, by index, inside of them.

    They are the members of the outermost `ModuleList` around a mixer.
    """
    blocks: dict[int, nn.Module] = {}
    inside = set()
    for layer in layers:
        owner: nn.Module = model
        for part in layer.name.split("."):
            if isinstance(owner, nn.ModuleList):
                blocks |= {id(block): block for block in owner}
                inside.add(layer.index)
                break
            owner = getattr(owner, part)
    return list(blocks.values()), inside


@contextmanager
def replaced_forwards(blocks: Sequence[nn.Module], make: Callable[[Any], Any]) -> Iterator[None]:
    """Blocks with what `make` makes of their `forward`; afterwards they are as they were."""
    before: list[tuple[nn.Module, Any]] = []

    def restore() -> None:
        for block, own in before:
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = own

    with restoring(restore):
        with uninterrupted():
            for block in blocks:
                before.append((block, block.__dict__.get("forward")))
                block.forward = make(block.forward)
        yield


def checkpointed(blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Keep only what the blocks read for a backward pass: each is run once more when the pass comes to it.

    transformers' own checkpoints would want training mode, in which mixers take other paths.
    """

    def through_checkpoint(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    return replaced_forwards(blocks, through_checkpoint)


def sequences_to_head(model: Any, layers: Sequence[Layer], length: int, most: int) -> int:
    """How many sequences, at most so many, fit in a pass with its predictions, and perhaps their gradient."""
    vocabulary = shape_of(model.get_input_embeddings().weight)[0]
    # Predictions, perhaps in two precisions, and their gradient.
    return max(1, min(most, budgets.ACTIVATIONS // (12 * vocabulary * length), sequences_together(layers, length)))


def kept_on_cpu(model: Any, blocks: int, tokens: int) -> Any:
    """A context in which what a backward pass keeps between blocks waits on the CPU, if it is too much for the device."""
    width = shape_of(model.get_input_embeddings().weight)[1]
    if 4 * blocks * width * tokens <= budgets.CHECKPOINTS:
        return nullcontext()

    def pack(x: Tensor) -> tuple[torch.device, Tensor]:
        # Weights are there anyway, and the small ones don't matter.
        waits = x.device.type != "cpu" and x.numel() >= tokens and not isinstance(x, nn.Parameter)
        return (x.device, x.cpu() if waits else x)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, x = packed
        return x.to(device)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
