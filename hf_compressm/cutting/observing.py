"""Take statistics of mixers from what passes through them, in the model's own forward (and backward) passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.offloading import weights_at_hand
from ..compat.pretrained import has_head
from ..config import CompreSSMConfig
from ..data.packing import unpacked
from ..hankel.statistics import Statistics
from ..interrupts import restoring, uninterrupted
from ..layers import Layer
from .inputs import Inputs
from .passes import blocks_of, checkpointed, kept_on_cpu, sequences_to_head

# Sequences of a forward and backward pass, at most.
SEQUENCES = 4
# Numbers in the predicted probabilities that are looked at together.
CLASSES = 2**24


@contextmanager
def observing(
    layers: Sequence[Layer],
    statistics: Sequence[Statistics],
    inputs: Inputs | None = None,
    max_tokens: int | None = None,
) -> Iterator[None]:
    """Add what the mixers read in the forward passes in here to their statistics, and to `inputs` if given.

    Of a batch of more than `max_tokens` tokens, only the first sequences are taken, and one at least.
    """
    by_index = {layer.index: entry for layer, entry in zip(layers, statistics, strict=True) if layer.reads_data}
    layers = [layer for layer in layers if layer.reads_data]

    def take(layer: Layer, hidden_states: Tensor, mask: Tensor | None, seq_idx: Tensor | None) -> None:
        rows = None if max_tokens is None else max(1, max_tokens // hidden_states.shape[1])
        read = (hidden_states[:rows], None if mask is None else mask[:rows], None)
        _add(layer, by_index[layer.index], read, None if seq_idx is None else seq_idx[:rows], inputs)

    with _reading(layers, take):
        yield


def can_weigh_by_loss(model: nn.Module, layers: Sequence[Layer], config: CompreSSMConfig) -> bool:
    """Whether the config asks for weights from the loss, and the model has predictions and layers that allow it.

    Raises:
        ValueError: if they are asked for by name and can't be had.
    """
    if not config.weighs_by_loss:
        return False
    missing = [layer.name for layer in layers if layer.gradient_at is None]
    headless = not has_head(model)
    if config.weights == "fisher" and (missing or headless):
        reason = "the model has no head" if headless else f"{missing[0]} does not say where its gradient is"
        raise ValueError(f"weights='fisher' needs the gradient of a loss, and {reason}: take weights='gate'.")
    slow = config.weights == "auto" and any(layer.gradient_is_slow for layer in layers)
    return not (missing or headless or slow)


@torch.enable_grad()
def observe_by_loss(
    model: Any,
    layers: Sequence[Layer],
    statistics: Sequence[Statistics],
    batch: Mapping[str, Any],
    inputs: Inputs | None = None,
    *,
    args: Sequence[Any] = (),
    seed: int = 0,
    max_tokens: int | None = None,
    least: Callable[[int], int] = int,
) -> None:
    """Add what the mixers read of a batch to their statistics, weighed by the loss's gradient by what they give.

    The loss is the model's own if the batch has labels, else that of labels drawn from its predictions: the expectation
    of the gradient's square is the Fisher information then, and half of it times the square of a small error in what the
    mixers give the divergence that it makes.

    Args:
        model: in evaluation mode. No gradient of a parameter is computed.
        layers, statistics, inputs, max_tokens: as for `observing`.
        batch, args: what to call the model with.
        seed: of the labels.
        least: of the passes that the processes would make of their batches, where all must make equally many.
    """
    by_index = {layer.index: entry for layer, entry in zip(layers, statistics, strict=True)}
    sequences, length = batch["input_ids"].shape
    if max_tokens is not None:
        sequences = min(sequences, max(1, max_tokens // length))
    step = sequences_to_head(model, layers, length, SEQUENCES)

    def add(layer: Layer, read: tuple[Tensor, Tensor | None, Tensor | None], seq_idx: Tensor | None) -> None:
        _add(layer, by_index[layer.index], read, seq_idx, inputs)

    for start in range(0, least(-(-sequences // step)) * step, step):
        rows = slice(start, min(start + step, sequences))
        part = {name: value[rows] if _is_by_row(value, batch["input_ids"]) else value for name, value in batch.items()}
        _read_with_gradients(model, layers, part, args, seed + start, add)


def _read_with_gradients(
    model: Any, layers: Sequence[Layer], batch: Mapping[str, Any], args: Sequence[Any], seed: int, add: Any
) -> None:
    """Call `add` with each layer, what its mixer reads, with the gradient, and the samples' numbers: from the last layer on."""
    blocks, run_again = blocks_of(model, layers)
    reads: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
    backward = False

    def take(layer: Layer, hidden_states: Tensor, mask: Tensor | None, seq_idx: Tensor | None) -> None:
        if backward or layer.index not in run_again:
            reads[layer.index] = (hidden_states.detach(), mask, seq_idx)

    def receive(layer: Layer, gradient: Tensor) -> None:
        hidden_states, mask, seq_idx = reads.pop(layer.index)
        add(layer, (hidden_states, mask, gradient.detach()), seq_idx)

    with (
        _reading(layers, take),
        _receiving_gradients(layers, receive),
        _grad_from_embeddings(model) as embedded,
        checkpointed(blocks),
        kept_on_cpu(model, len(blocks), batch["input_ids"].numel()),
    ):
        end, by_end = _loss(model(*args, **dict(batch) | {"use_cache": False}), batch, seed)
        backward = True
        torch.autograd.grad(end, embedded, by_end)


@torch.no_grad()
def _add(
    layer: Layer,
    entry: Statistics,
    read: tuple[Tensor, Tensor | None, Tensor | None],
    seq_idx: Tensor | None,
    inputs: Inputs | None,
) -> None:
    if seq_idx is not None and layer.keeps_samples_apart:
        read = unpacked(*read, seq_idx)
    with weights_at_hand(layer.mixer):
        system = layer.read(*read)
    # A call and no block, at whose end Ctrl-C could come before autocast is left: it would go on with cached weights.
    torch.autocast(read[0].device.type, enabled=False)(entry.update)(system)
    if inputs is not None:
        inputs.keep(layer.index, read)


@contextmanager
def _reading(layers: Sequence[Layer], take: Any) -> Iterator[None]:
    """Call `take` with each layer, and the hidden states, mask and samples' numbers that its mixer gets."""

    def hook_of(layer: Layer) -> Any:
        def hook(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            take(layer, hidden_states, kwargs.get("attention_mask"), kwargs.get("seq_idx"))

        return hook

    with hooks(layer.mixer.register_forward_pre_hook(hook_of(layer), with_kwargs=True) for layer in layers):
        yield


@contextmanager
def _receiving_gradients(layers: Sequence[Layer], add: Any) -> Iterator[None]:
    """Call `add` with each layer and the gradient by what comes out of its scan, as soon as the backward pass has it."""

    def hook_of(layer: Layer) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if args[0].requires_grad:
                args[0].register_hook(lambda gradient: add(layer, gradient))

        return hook

    modules = [(layer, layer.mixer.get_submodule(str(layer.gradient_at))) for layer in layers]
    with hooks(module.register_forward_pre_hook(hook_of(layer)) for layer, module in modules):
        yield


@contextmanager
def _grad_from_embeddings(model: Any) -> Iterator[list[Tensor]]:
    """Let autograd follow the activations, also where no parameter wants a gradient; gives what it begins with."""
    embedded: list[Tensor] = []

    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.detach().requires_grad_())
        return embedded[-1]

    embeddings = model.get_input_embeddings()
    with hooks(one.register_forward_hook(hook) for one in [embeddings]):
        yield embedded


@contextmanager
def hooks(registered: Iterable[Any]) -> Iterator[None]:
    """Remove hooks afterwards.

    Args:
        registered: registers a hook as each of its handles is asked for.
    """
    handles: list[Any] = []
    with restoring(lambda: [handle.remove() for handle in handles]):
        with uninterrupted():  # a hook without a handle could not be removed
            handles.extend(registered)
        yield


@torch.no_grad()
def _loss(output: Any, batch: Mapping[str, Any], seed: int) -> tuple[Tensor, Tensor | None]:
    """The model's loss; or its predictions, and the loss's gradient by them with labels drawn from them.

    With the sum of cross entropies as the loss, that gradient is the predicted probabilities, less 1 at the label.
    """
    if batch.get("labels") is not None:
        return output.loss, None
    logits = output.logits
    gradient, mask = torch.empty_like(logits), batch.get("attention_mask")
    generator = torch.Generator(logits.device).manual_seed(seed)
    rows = max(1, CLASSES // logits.shape[-1])
    for row, result in zip(logits.flatten(0, -2).split(rows), gradient.flatten(0, -2).split(rows), strict=True):
        p = row.float().softmax(-1)
        # Where a uniform number falls among them tells the label; multinomial takes ten times as long.
        below = p.cumsum(1)
        drawn = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=p.dtype) * below[:, -1:]
        labels = torch.searchsorted(below, drawn, right=True).clamp_(max=p.shape[1] - 1)
        result.copy_(p.scatter_add_(1, labels, -torch.ones_like(drawn)))
    if mask is not None and mask.shape == logits.shape[:-1]:
        gradient *= mask.to(gradient)[..., None]
    return logits, gradient


def _is_by_row(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(ids)
