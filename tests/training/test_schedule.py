"""When the cuts come, and to what sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compressm import CompreSSMConfig
from hf_compressm.layers import find_layers
from hf_compressm.training.schedule import attempt_config, attempt_steps, check_target, training_config
from tests.conftest import tiny_mamba, tiny_mamba2


@given(st.integers(10, 5000), st.floats(0, 0.5), st.floats(0.01, 0.49), st.integers(1, 9))
def test_attempts_are_equidistant_and_end_at_the_end(max_steps, start, length, n):
    end = start + length
    config = CompreSSMConfig(start=start, end=end, num_reductions=n)
    first, last = round(start * max_steps), round(end * max_steps)
    if last - first < n or last == max_steps:
        with pytest.raises(ValueError, match=r"num_reductions|window|lower end"):
            attempt_steps(config, max_steps)
        return
    steps = attempt_steps(config, max_steps)
    assert len(set(steps)) == n
    assert first < steps[0]
    assert steps[-1] == last < max_steps
    gaps = [b - a for a, b in zip([first, *steps], steps, strict=False)]
    assert max(gaps) - min(gaps) <= 1 or n == 1


@pytest.mark.parametrize("max_steps", [0, -1])
def test_unknown_length_is_refused(max_steps):
    with pytest.raises(ValueError, match="max_steps"):
        attempt_steps(CompreSSMConfig(), max_steps)


@pytest.mark.parametrize("end", [100, 200])
def test_a_window_beyond_the_last_step_is_refused(end):
    with pytest.raises(ValueError, match="lower end below 100"):
        attempt_steps(CompreSSMConfig(end=end), 100)


@pytest.mark.parametrize(
    "bad",
    [
        {"start": -0.1},
        {"end": 0},
        {"start": 0.5, "end": 0.2},
        {"start": 30, "end": 20},
        {"num_reductions": 0},
        {"min_reduction": 1.0},
        {"calibration_batches": 0},
        {"rollback": -1.0},
        {"rollback": float("nan")},
    ],
)
def test_impossible_schedules_are_refused_at_construction(bad):
    with pytest.raises(ValueError):
        CompreSSMConfig(**bad)


def test_training_fields_round_trip():
    config = CompreSSMConfig(state_size={0: 3}, start=5, end=20, num_reductions=2, rollback=0.5)
    assert CompreSSMConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"state_size": 4}, [[14, 14], [11, 11], [9, 9], [6, 6], [4, 4]]),
        ({"state_size": {1: 1}}, [[16, 13], [16, 10], [16, 7], [16, 4], [16, 1]]),
    ],
)
def test_a_size_is_reached_in_equal_steps(target, expected):
    model = tiny_mamba(16)
    config = training_config(CompreSSMConfig(num_reductions=5, **target))
    layers = find_layers(model)
    check_target(config, layers)
    initial = {layer.index: layer.state_size for layer in layers}
    for attempt, wanted in enumerate(expected):
        step = attempt_config(config, attempt, initial, layers)
        for layer in layers:
            layer.resize(step.state_size.get(layer.index, layer.state_size))
        assert [layer.state_size for layer in layers] == wanted


def test_steps_of_mamba2_stop_only_at_sizes_that_the_library_would_choose():
    layers = find_layers(tiny_mamba2(64))
    config = training_config(CompreSSMConfig(num_reductions=4, state_size=24))
    seen = []
    for attempt in range(4):
        step = attempt_config(config, attempt, {0: 64, 1: 64}, layers)
        for layer in layers:
            layer.resize(layer.state_size if step is None else step.state_size[layer.index])
        seen.append(layers[0].state_size)
    assert seen == [64, 64, 64, 24]


def test_the_ratio_falls_in_equal_steps():
    layers = find_layers(tiny_mamba(16))
    config = training_config(CompreSSMConfig(num_reductions=4, ratio=0.5))
    totals = []
    for attempt in range(4):
        step = attempt_config(config, attempt, {0: 16, 1: 16}, layers)
        total = round(step.ratio * sum(layer.state_size for layer in layers))
        for layer, size in zip(layers, [total - total // 2, total // 2], strict=True):
            layer.resize(size)
        totals.append(total)
    assert totals == [28, 24, 20, 16]


@pytest.mark.parametrize("target", [{"state_size": 8}, {"state_size": {7: 2}}, {"ratio": 0.1, "min_state_size": 4}])
def test_targets_that_can_not_be_reached_are_refused(target):
    with pytest.raises(ValueError):
        check_target(training_config(CompreSSMConfig(**target)), find_layers(tiny_mamba(8)))


def test_a_layer_that_is_as_small_already_is_left_out():
    layers = find_layers(tiny_mamba(5))
    config = training_config(CompreSSMConfig(state_size=3, num_reductions=4))
    assert attempt_config(config, 0, {0: 8, 1: 8}, layers) is None
    assert attempt_config(config, 2, {0: 8, 1: 8}, layers).state_size == {0: 4, 1: 4}
