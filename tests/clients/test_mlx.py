"""Checkpoints in mlx-lm, on a CPU; its kernel for decoding is for Metal and is not run here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.clients.conftest import perplexity

mx = pytest.importorskip("mlx.core")
load_model = pytest.importorskip("mlx_lm.utils").load_model
pytestmark = pytest.mark.clients


def prepared(folder: Path) -> Path:
    """Mamba-2's `intermediate_size` is missing in configs that transformers writes, and mlx-lm wants it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"intermediate_size": 2 * config["hidden_size"]} | config))
    return folder


@pytest.mark.parametrize("form", ["original", "slim"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_it_says_what_transformers_says(folder, logits, ids, family, form):
    model, _ = load_model(prepared(folder(family, form)))
    tokens, cache = mx.array(ids.numpy()), model.make_cache()
    read = torch.from_numpy(np.array(model(tokens)[0]))
    decoded = [model(tokens[:, i : i + 1], cache=cache) for i in range(32)]
    expected = logits(folder(family, form))
    assert f"{perplexity(read, ids):.3g}" == f"{perplexity(expected, ids):.3g}"
    step = torch.from_numpy(np.array(mx.concatenate(decoded, axis=1)[0]))
    assert float((step - expected[:32]).norm() / expected[:32].norm()) < 1e-3
    print(f"\n{family} {form}: {perplexity(expected, ids):.4f}, mlx-lm {perplexity(read, ids):.4f}")


@pytest.mark.parametrize(("family", "form"), [("mamba", "mixed"), ("mamba2", "mixed"), ("mamba2", "projected")])
def test_it_refuses_what_it_can_not_run(folder, family, form):
    with pytest.raises(ValueError, match=r"Negative dimensions|parameters not in model|Expected shape"):
        load_model(prepared(folder(family, form)))
