"""What a cut would take, from a config alone: one layer and the head are timed here, and the passes of a cut are counted."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..config import CompreSSMConfig
from ..cutting.budget import TRIALS
from ..cutting.measuring import SENSITIVITY_SEQUENCES, SENSITIVITY_TOKENS, seconds_for
from ..cutting.passes import sequences_together
from ..cutting.scans import quick_scans
from ..cutting.sensitivity import POINTS
from ..cutting.sizes import check_targets
from ..data.calibration import CPU_SEQUENCES, GPU_SEQUENCES
from ..data.texts import LENGTH
from ..layers import Layer, find_layers, realization_of
from ..layers.systems import TOGETHER
from .speed import synchronize

SLACK = 2 * 2**30
"""What a cut keeps beside the model and one sequence's activations in one layer: see `hankel.budgets`."""
FITTING = 5.0
"""Seconds that fits are timed for."""
TIMED = {"cpu": 512, "cuda": 2048}
"""Tokens that are timed: on a GPU fewer would take as long."""


@dataclass(frozen=True)
class Estimate:
    """What is known of a cut before any weight is read.

    Attributes:
        family: of the layers, by name.
        layers: with a state.
        states: of all layers, each with a number for every channel.
        state_bytes: per sequence, in float32.
        after: for each target its states and bytes per sequence.
        parameters: of the whole model.
        model_bytes: of its weights.
        peak_bytes: at most this much memory, the weights included.
        seconds: of each step, about.
    """

    family: str
    layers: int
    states: int
    state_bytes: int
    after: dict[str, tuple[int, int]]
    parameters: int
    model_bytes: int
    peak_bytes: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def estimate(
    config: Any,
    options: CompreSSMConfig,
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[], object] = lambda: None,
) -> Estimate:
    """What a cut by these options would take on this machine, with the text that the package ships.

    Args:
        config: of the model.
        options: what to cut; a `state_size` or `ratio` tells the sizes, for any other target halves and quarters are shown.
        device, dtype: where and in what the model would be.
        advance: called before each thing that is timed.

    Raises:
        ValueError: if the model has no SSM layer, or the options are not for it or its sizes.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    layers = find_layers(model, shapes_alone=True)
    name = realization_of(options, layers)
    check_targets(options, layers, name)
    states = sum(layer.state_size for layer in layers)
    own = sum(parameter.nbytes for parameter in model.parameters())
    return Estimate(
        family=" and ".join(dict.fromkeys(layer.family for layer in layers)),
        layers=len(layers),
        states=states,
        state_bytes=_state_bytes(layers, 1.0),
        after={
            label: (round(share * states), _state_bytes(layers, share)) for label, share in _targets(options, layers)
        },
        parameters=model.num_parameters(),
        model_bytes=own,
        peak_bytes=own + max(layer.activation_bytes for layer in layers) * LENGTH + SLACK,
        seconds=_seconds(model, layers, options, name, device, dtype, advance),
    )


def _targets(options: CompreSSMConfig, layers: list[Layer]) -> list[tuple[str, float]]:
    states = sum(layer.state_size for layer in layers)
    if isinstance(options.state_size, int):
        return [(f"state_size={options.state_size}", options.state_size * len(layers) / states)]
    if options.ratio is not None:
        return [(f"ratio={options.ratio:g}", options.ratio)]
    return [("if half of the states stay", 0.5), ("if a quarter stays", 0.25)]


def _state_bytes(layers: list[Layer], share: float) -> int:
    return sum(round(4 * layer.channels * layer.state_size * share) for layer in layers)


@torch.no_grad()
def _seconds(
    model: Any,
    layers: list[Layer],
    options: CompreSSMConfig,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[], object],
) -> dict[str, float]:
    """Of each step, about: passes are counted, and a layer, a head and a fit are timed on this machine with random weights."""
    layer = _with_weights(layers[0], device, dtype)
    width = model.get_input_embeddings().weight.shape[1]
    length = min(TIMED.get(device.type, 2048), LENGTH)
    together = min(TIMED.get(device.type, 2048) // length, sequences_together([layer], length))
    hidden = torch.randn(together, length, width, device=device, dtype=dtype)
    timed = together * length
    statistics = layer.statistics(mean_lti=False)
    if not layer.realizations[name].reads_contributions:
        statistics.without_contributions_()
    advance()
    with quick_scans([layer]):
        forward = _timed(lambda: layer.mixer(hidden), device) / timed
    advance()
    reading = _timed(lambda: statistics.update(layer.read(hidden, None)), device) / timed
    advance()
    # Of the rest of the model, all of it counts as matrix products: attention, MLPs, experts and the head.
    in_layers = sum(parameter.numel() for each in layers for parameter in each.mixer.parameters())
    rest = model.num_parameters() - in_layers
    square = torch.randn(width, 4 * width, device=device, dtype=dtype)
    product = _timed(lambda: hidden @ square, device) / (timed * square.numel())
    token = len(layers) * forward + rest * product

    on_cpu = device.type == "cpu"
    tokens = LENGTH * (CPU_SEQUENCES if on_cpu else GPU_SEQUENCES)
    by_loss = options.weighs_by_loss and not layer.gradient_is_slow
    passes = 4 if by_loss else 1  # forward, again, and back, which is twice as long
    measuring = tokens * (passes * token + len(layers) * reading)
    bound = options.calibration_seconds
    bound = seconds_for(model.num_parameters(), device) if bound is None else bound
    found = {"measure": min(measuring, bound)}  # which goes as far as it gets then
    if options.state_size is None:
        few = min(SENSITIVITY_TOKENS, SENSITIVITY_SEQUENCES * LENGTH)
        # Each begins at its layer: on average half of the blocks, and the head.
        head = model.get_input_embeddings().weight.numel() * product
        found["sizes, layer by layer"] = len(layers) * len(POINTS) * few * ((token - head) / 2 + head)
    if options.max_divergence is not None:
        found["trials on held-out text"] = TRIALS / 2 * tokens / 4 * token
    if options.refits and name == "select":
        advance()
        once = _fit_seconds(layer, name, options.fit_rounds, hidden.flatten(0, 1), tokens)
        # Sizes that a trial changes are fitted anew: about as many again.
        found |= {"refit": len(layers) * once * (2 if options.max_divergence is not None else 1)} if once else {}
    return found


def _fit_seconds(layer: Layer, name: str, rounds: int, hidden: torch.Tensor, tokens: int) -> float:
    """Of one fit of a layer to so many tokens; 0 where the family has none.

    Fits are timed on what the mixer would read, [tokens, hidden], in as many sequences as a fit takes together, and on half of it: a
    GPU takes most of the time to begin their steps, whatever the tokens, and a CPU takes as much longer as there are more of them.
    """
    rows = min(8, max(1, TOGETHER // (LENGTH * layer.channels)))
    hidden = hidden[: len(hidden) // rows * rows].unflatten(0, (rows, -1))
    first = layer.realizations[name].of_first_states(layer, max(1, layer.state_size // 2))
    start = replace(first, groups=tuple(replace(group, error=math.inf) for group in first.groups))

    def seconds(hidden: torch.Tensor) -> float:
        return _timed(lambda: start.refit(layer, [(hidden, None, None)], rounds), hidden.device, FITTING)

    half = hidden[:, : hidden.shape[1] // 2]
    if start.refit(layer, [(half, None, None)], rounds) is start:
        return 0.0
    whole = seconds(hidden)
    if first.fits_differ:  # these stop by themselves, the sooner the more tokens there are
        return whole
    return whole + max(0.0, whole - seconds(half)) * (2 * tokens / hidden[..., 0].numel() - 2)


def _with_weights(layer: Layer, device: torch.device, dtype: torch.dtype) -> Layer:
    """The layer with a mixer of its shapes on a device, with random weights."""
    other = copy.copy(layer)
    other.mixer = copy.deepcopy(layer.mixer).to_empty(device=device).to(dtype).eval()
    for name, parameter in other.mixer.named_parameters():
        parameter.data.normal_(std=0.02)
        if name == "A_log":
            parameter.data.add_(1)
        elif name.endswith(("dt_bias", "dt_proj.bias", "dt_proj_bias")):
            parameter.data.sub_(4)
    for buffer in other.mixer.buffers():
        buffer.fill_(1)
    return other


def _timed(step: Callable[[], Any], device: torch.device, seconds: float = math.inf) -> float:
    """Seconds, of the quickest of three after one that is not counted, or of as many as fit into some seconds.

    Other programs only ever make it slower, and the first has to start threads and fill caches.
    """
    times: list[float] = []
    while len(times) < 4 and sum(times) < seconds:
        synchronize(device)
        begin = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:] or times)
