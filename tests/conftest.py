"""Tiny models with states that matter: random weights, but slow and fast modes, and B and C of full size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits
from transformers import Cache, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

VOCABULARY = 61


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The models are so tiny that more threads only wait for each other.

    Not by torch.set_num_threads: afterwards the threaded LAPACK of torch 2.13 inverts matrices wrongly.
    """
    with threadpool_limits(1):
        yield


def tiny_mamba(state_size: int = 8, layers: int = 2, seed: int = 0, vocabulary: int = VOCABULARY) -> MambaForCausalLM:
    torch.manual_seed(seed)
    config = MambaConfig(
        vocab_size=vocabulary, hidden_size=24, num_hidden_layers=layers, state_size=state_size, time_step_rank=4
    )
    model = MambaForCausalLM(config).eval()
    _enliven(model)
    return model


def tiny_mamba2(
    state_size: int = 16, layers: int = 2, groups: int = 1, seed: int = 0, vocabulary: int = VOCABULARY
) -> Mamba2ForCausalLM:
    torch.manual_seed(seed)
    config = Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=layers,
        state_size=state_size,
        num_heads=8,
        head_dim=8,
        n_groups=groups,
        chunk_size=8,
        tie_word_embeddings=True,
    )
    model = Mamba2ForCausalLM(config).eval()
    _enliven(model)
    return model


def cache_of(output: Any) -> dict[str, Cache]:
    """The cache by its name, which is another one from transformers 5.24 on."""
    return {name: value for name, value in output.items() if isinstance(value, Cache)}


@torch.no_grad()
def _enliven(model: torch.nn.Module) -> None:
    """Fresh weights hardly use the state: make its part of the output as large as the skip connection's."""
    for name, parameter in model.named_parameters():
        if name.endswith(("x_proj.weight", "in_proj.weight", "out_proj.weight")):
            parameter.normal_(std=2 * parameter.shape[1] ** -0.5)


@pytest.fixture
def mamba() -> MambaForCausalLM:
    return tiny_mamba()


@pytest.fixture
def mamba2() -> Mamba2ForCausalLM:
    return tiny_mamba2()


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(1))
