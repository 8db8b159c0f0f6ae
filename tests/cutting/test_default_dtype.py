"""What torch makes new tensors of, where nobody says, changes no cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.data.texts import windows
from hf_compressm.hankel import mamba, refit
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2

IDS = torch.randint(0, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(5))
CUTS = {
    "mamba": (tiny_mamba, {"max_divergence": 0.02}),
    "mamba, by loss": (tiny_mamba, {"state_size": 4, "weights": "fisher"}),
    "mamba2": (tiny_mamba2, {"max_divergence": 0.02}),
    "mamba2, selected": (tiny_mamba2, {"state_size": 8, "realization": "select", "refit": 1}),
    "mamba2, by head": (tiny_mamba2, {"ratio": 0.5, "realization": "project_heads"}),
    "healed": (tiny_mamba2, {"state_size": 8, "heal": 300}),
}


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def cut(name: str, default: torch.dtype) -> tuple:
    make, options = CUTS[name]
    model = make()
    with by_default(default):
        report = compress_(model, CompreSSMConfig(**options), IDS)
    healing = None if report.healing is None else replace(report.healing, seconds=0)
    return replace(report, healing=healing), model.state_dict()


@pytest.mark.parametrize("name", CUTS)
def test_the_default_dtype_changes_no_cut(name, monkeypatch):
    monkeypatch.setattr(mamba, "FEW_STATES", 4)  # so that some channels are taken for all
    monkeypatch.setattr(mamba, "GRAMIAN_CHANNELS", 9)
    monkeypatch.setattr(refit, "INPUT_CHANNELS", 17)
    expected, weights = cut(name, torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        report, found = cut(name, dtype)
        assert report == expected
        assert weights.keys() == found.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in weights.items())


class Tokenizer:
    def __call__(self, text: str, **kwargs) -> dict:
        return {"input_ids": list(range(len(text)))}


def test_the_default_dtype_moves_no_window():
    text = "a" * 5000
    expected = windows(text, Tokenizer(), 64, 2)
    with by_default(torch.bfloat16):
        found = windows(text, Tokenizer(), 64, 2)
    assert torch.equal(found, expected)
