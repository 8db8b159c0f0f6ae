"""Random numbers go on after a block as if it had drawn none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .restoring import restoring


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Keep the generators of Python, numpy and torch: the CPU's, and those of all GPUs if CUDA is in use.

    Of all, since a seed is given to all, and a model may be on several. A CUDA that nobody uses is left alone.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    with restoring(restore):
        yield
