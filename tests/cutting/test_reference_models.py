"""The trained models that the package ships: real weights, real text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import hf_compressm
from hf_compressm import CompreSSMConfig, compress_pretrained

FOLDER = Path(hf_compressm.__file__).parent / "reference"


@torch.no_grad()
def loss(model, ids) -> float:
    return float(model.eval()(ids, labels=ids, use_cache=False).loss)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "mamba-tiny")
    return torch.tensor(tokenizer((FOLDER / "evaluation.txt").read_text())["input_ids"][: 8 * 256]).view(8, 256)


def slim_loss(name, ids, **target) -> float:
    return loss(compress_pretrained(str(FOLDER / name), CompreSSMConfig(**target), dtype=torch.float32), ids)


@pytest.mark.parametrize(
    ("name", "size", "kind", "baselines"),
    [
        ("mamba-tiny", 4, "select", ["greedy", "ghost", "lti_modal", "magnitude", "random"]),
        ("mamba2-tiny", 8, "select", ["magnitude", "random"]),
    ],
)
def test_ours_beats_the_baselines_on_held_out_text(ids, name, size, kind, baselines):
    ours = slim_loss(name, ids, state_size=size, realization=kind)
    for selection in baselines:
        assert ours < slim_loss(name, ids, state_size=size, realization=kind, selection=selection), selection


def test_projection_costs_less_than_selection(ids):
    full = slim_loss("mamba2-tiny", ids, tolerance=0)
    assert slim_loss("mamba2-tiny", ids, state_size=32) < full + 0.08
    assert slim_loss("mamba2-tiny", ids, state_size=8) < slim_loss(
        "mamba2-tiny", ids, state_size=8, realization="select"
    )


def test_the_state_is_used(ids):
    full = slim_loss("mamba-tiny", ids, tolerance=0)
    assert slim_loss("mamba-tiny", ids, state_size=8, selection="random") > full + 0.3
