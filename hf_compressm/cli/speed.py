"""What a smaller state gains in speed and memory: training, prefill, decoding, the largest batch.

Speed depends on shapes and not on values, so a model is made from its config with random weights, and a cut of it keeps
the first states: nothing is downloaded but the config.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel

from ..cutting.first_states import cut_to_first_states_
from ..hub.pretrained import check_name
from ..hub.state_spaces import is_state_spaces_checkpoint, load_state_spaces_config
from ..layers import find_layers

# Share of the free memory that the largest batch may take.
MEMORY_SHARE = 0.92
# Tokens of each sequence that a GPU decodes without being waited for in between.
TOKENS_IN_A_ROW = 8
KERNELS = ("mamba_ssm", "causal_conv1d")
# Numbers in the states of a layer, of all sequences, beyond which mamba_ssm's kernels access what is not theirs.
COUNTED = 2**31 - 1


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Args:
        length: tokens of the sequences in training and prefill.
        train_batch, prefill_batch: sequences.
        decode_batches: sequences that get a token each step, for each row of decoding.
        dtype: of the weights in prefill and decoding, and of autocast in training, whose weights are float32.
        repeats: timed steps, of which the median counts; in decoding on a GPU, runs of 8 tokens.
    """

    length: int = 1024
    train_batch: int = 8
    prefill_batch: int = 8
    decode_batches: tuple[int, ...] = (1, 64, 512)
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 10


def missing_kernels(device: torch.device) -> list[str]:
    """The packages without which transformers runs its slow scan in plain torch; on a CPU there are none."""
    if device.type != "cuda":
        return list(KERNELS)
    return [name for name in KERNELS if importlib.util.find_spec(name) is None]


def build(config: Any, device: torch.device, size: int | None = None, realization: str = "auto") -> PreTrainedModel:
    """A causal language model with random float32 weights, its state cut to `size` if one is given.

    Raises:
        ValueError: if it has no SSM layer, or its layers can't have this size.
    """
    with device:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)  # a cut changes its own
    if size is not None:
        cut_to_first_states_(model, size, realization)
    built: PreTrainedModel = model.to(device)
    return built


def load_config(name: str) -> Any:
    """The config of a checkpoint in either layout, or of a folder with a config.json and nothing else."""
    check_name(name)
    return load_state_spaces_config(name) if is_state_spaces_checkpoint(name) else AutoConfig.from_pretrained(name)


def benchmark(
    config: Any, size: int | None, realization: str, device: torch.device, work: Workload
) -> Iterator[tuple[str, float]]:
    """Time a model at one state size (None: its own); yields each row's name and value as soon as it is known.

    Rows: the (largest) state size; tokens/s of a training step (forward, backward, AdamW), of a prefill, and of decoding at
    each batch; bytes of recurrent state per sequence. On a GPU also tokens/s of decoding as a CUDA graph, for models
    whose cache allows one, and the largest batch that decodes in its memory, with its tokens/s. Where the memory does not
    hold a row's batch, its value is NaN.
    """
    _release(device)  # what the size before this one held
    model = build(config, device, size, realization)
    yield "state size", float(max(layer.state_size for layer in find_layers(model)))
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]

    def tokens(batch: int, length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (batch, length), device=device)

    yield (
        f"training, {work.train_batch} x {work.length}",
        _or_nan(lambda: _training(model, tokens(work.train_batch, work.length), work), device),
    )
    model = model.eval().requires_grad_(False).to(work.dtype)
    prompt = tokens(work.prefill_batch, work.length)
    yield (
        f"prefill, {work.prefill_batch} x {work.length}",
        _or_nan(
            lambda: prompt.numel() / _seconds(lambda: model(prompt, use_cache=True), device, work.repeats), device
        ),
    )
    (cache,) = _cache(model(tokens(1, 1), use_cache=True)).values()
    yield "state bytes per sequence", _state_bytes(model, cache)
    graphs = (False, True) if device.type == "cuda" and cache.is_compileable else (False,)
    for graph, batch in itertools.product(graphs, work.decode_batches):
        row = f"decoding, batch {batch}, CUDA graph" if graph else f"decoding, batch {batch}"
        yield row, _or_nan(lambda b=batch, g=graph: _decoding(model, tokens(b, 1), work, g), device)  # type: ignore[misc]
    if device.type == "cuda":
        largest, speed = _largest_batch(model, tokens, device)
        yield "largest batch that decodes", largest
        yield "decoding, largest batch", speed


def _seconds(step: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median time of a step, after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        begin = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has begun; on a CPU everything is done when it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _or_nan(measure: Callable[[], float], device: torch.device) -> float:
    """What is measured; NaN, and the memory as it was, if it does not hold what that takes."""
    try:
        return measure()
    except torch.cuda.OutOfMemoryError:
        pass  # while it is handled, its traceback holds all that the measurement did
    _release(device)
    return math.nan


def _training(model: PreTrainedModel, ids: torch.Tensor, work: Workload) -> float:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        with torch.autocast(ids.device.type, work.dtype, enabled=work.dtype != torch.float32):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        seconds = _seconds(step, ids.device, work.repeats)
    finally:  # a step that the memory does not hold leaves gradients behind, too
        model.zero_grad(set_to_none=True)
    return ids.numel() / seconds


def _cache(output: Any) -> dict[str, Cache]:
    """The cache in a model's output, by the name that the model takes it under."""
    return {name: value for name, value in output.items() if isinstance(value, Cache)}


def _state_bytes(model: nn.Module, cache: Cache) -> float:
    """Of the SSM layers' recurrent states, as the cache of one sequence holds them."""
    states: list[Any] = [cache.get_recurrent_state(layer.index) for layer in find_layers(model)]
    return float(sum(state.numel() * state.element_size() for state in states))


def _decoding(model: nn.Module, ids: torch.Tensor, work: Workload, graph: bool = False) -> float:
    cache = _cache(model(ids[:1], use_cache=True))
    for states in cache.values():  # the first token of all of them at once would take more memory than decoding does
        states.reorder_cache(cast(torch.LongTensor, torch.zeros(len(ids), dtype=torch.long, device=ids.device)))

    def step() -> None:
        model(ids, use_cache=True, **cache)

    decode = _captured(step) if graph else step
    tokens = TOKENS_IN_A_ROW if ids.is_cuda else 1

    def decode_some() -> None:
        for _ in range(tokens):
            decode()

    return len(ids) * tokens / _seconds(decode_some, ids.device, work.repeats)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph: the time of its kernels, without that of Python to launch them."""
    step()  # kernels that tune themselves do so before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _largest_batch(
    model: nn.Module, tokens: Callable[[int, int], torch.Tensor], device: torch.device
) -> tuple[float, float]:
    """The batch that fills the memory, from what a small one takes, and its tokens/s."""
    quick = Workload(repeats=2)

    def peak(batch: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _decoding(model, tokens(batch, 1), quick)
        return torch.cuda.max_memory_allocated()

    small = 64
    per_sequence = max(1, (peak(2 * small) - peak(small)) // small)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    (cache,) = _cache(model(tokens(1, 1), use_cache=True)).values()
    states = max(cast(torch.Tensor, cache.get_recurrent_state(layer.index)).numel() for layer in find_layers(model))
    batch = min(int(MEMORY_SHARE * free / per_sequence), COUNTED // states)
    while batch > 2 * small:
        speed = _or_nan(lambda b=batch: _decoding(model, tokens(b, 1), quick), device)  # type: ignore[misc]
        if not math.isnan(speed):
            return float(batch), speed
        batch = int(0.9 * batch)
    return math.nan, math.nan
