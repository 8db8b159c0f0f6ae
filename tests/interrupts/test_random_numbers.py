"""Whatever a block draws, and however it ends, the numbers after it are those that would have come."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_compressm.interrupts import same_random_numbers


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_numbers_go_on_after_a_block_and_after_an_error():
    with same_random_numbers():
        expected = draw()
    with pytest.raises(ZeroDivisionError), same_random_numbers():
        draw(), torch.manual_seed(3), 1 / 0
    assert draw() == expected


@pytest.mark.parametrize("used", [True, False])
def test_the_generators_of_all_gpus_are_kept_if_cuda_is_in_use(monkeypatch, used):
    states, put = [torch.zeros(1), torch.ones(1)], []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: used)
    monkeypatch.setattr("torch.cuda.get_rng_state_all", lambda: states)
    monkeypatch.setattr("torch.cuda.set_rng_state_all", put.append)
    with same_random_numbers():
        pass
    assert put == ([states] if used else [])
