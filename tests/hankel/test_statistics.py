"""Statistics are sums over tokens: how the tokens come in batches, and what padding is between them, is nothing to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_compressm.hankel import mamba
from hf_compressm.hankel.singular_values import hankel_singular_values
from hf_compressm.hankel.spectra import hankel_spectra
from hf_compressm.layers import find_layers
from tests.conftest import tiny_mamba, tiny_mamba2

LENGTHS = [12, 5, 9, 1]
"""Of the rows; one is as long as the longest, so that batches can be padded to it."""

families = pytest.mark.parametrize("family", [tiny_mamba, lambda: tiny_mamba2(groups=2)], ids=["Mamba", "Mamba-2"])
estimators = pytest.mark.parametrize("mean_lti", [False, True], ids=["ltv", "mean_lti"])


def rows(width: int) -> list[Tensor]:
    """What a mixer reads, louder in some rows than in others, as gates are in real batches."""
    generator = torch.Generator().manual_seed(0)
    return [(1 + 3 * i) * torch.randn(n, width, generator=generator) for i, n in enumerate(LENGTHS)]


def padded(sequences: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """A batch of rows and its mask; what is in the padding is not zero."""
    batch = torch.ones(len(sequences), max(LENGTHS), sequences[0].shape[1])
    mask = torch.zeros(batch.shape[:2], dtype=torch.long)
    for i, row in enumerate(sequences):
        where = slice(0, len(row)) if side == "right" else slice(batch.shape[1] - len(row), None)
        batch[i, where], mask[i, where] = row, 1
    return batch, mask


@torch.no_grad()
def measured(layer, batches: list[tuple[Tensor, Tensor | None]], mean_lti: bool):
    statistics = layer.statistics(mean_lti=mean_lti)
    for batch in batches:
        statistics.update(layer.read(*batch))
    return statistics


def assert_same(one, other) -> None:
    assert one.tokens == other.tokens
    for a, b in zip((*one.gramians(), one.modal_gain()), (*other.gramians(), other.modal_gain()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
    # What float32 sums leave of the small ones: a perturbation of P by e moves sigma by up to its root.
    (a,), (b,) = hankel_spectra([one]), hankel_spectra([other])
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.max()))


@families
@estimators
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_says_nothing(family, mean_lti, side):
    layer = find_layers(family())[0]
    sequences = rows(layer.mixer.in_proj.in_features)
    alone = measured(layer, [(row[None], None) for row in sequences], mean_lti)
    assert_same(measured(layer, [padded(sequences, side)], mean_lti), alone)


@families
@estimators
def test_rows_may_come_in_any_batches(family, mean_lti):
    layer = find_layers(family())[0]
    sequences = rows(layer.mixer.in_proj.in_features)
    whole = measured(layer, [padded(sequences, "right")], mean_lti)
    parts = [padded(sequences[:1], "right"), padded(sequences[1:], "right")]
    assert_same(measured(layer, parts, mean_lti), whole)
    assert_same(measured(layer, parts[::-1], mean_lti), whole)


@families
@estimators
def test_two_halves_added_up_are_the_whole(family, mean_lti):
    """What a backend on several processes relies on."""
    layer = find_layers(family())[0]
    sequences = rows(layer.mixer.in_proj.in_features)
    whole = measured(layer, [padded(sequences, "right")], mean_lti)
    half, other = (measured(layer, [padded(part, "right")], mean_lti) for part in (sequences[:2], sequences[2:]))
    for total, more in zip(half.sums(), other.sums(), strict=True):
        total += more
    assert_same(half, whole)


@pytest.mark.parametrize("mean_lti", [False, True])
def test_of_many_states_some_channels_have_gramians(monkeypatch, mean_lti):
    """They are those that they would have among all, and what selections are chosen by is that of all."""
    layer = find_layers(tiny_mamba())[0]
    batch = padded(rows(layer.mixer.in_proj.in_features), "left")
    every = measured(layer, [batch], mean_lti)
    monkeypatch.setattr(mamba, "FEW_STATES", layer.state_size - 1)
    monkeypatch.setattr(mamba, "GRAMIAN_CHANNELS", 5)
    few = measured(layer, [batch], mean_lti)
    assert few.some.tolist() == [0, 12, 24, 35, 47]
    for one, other in zip(few.gramians(), every.gramians(), strict=True):
        torch.testing.assert_close(one, other[few.some] if len(other) == layer.channels else other)
    torch.testing.assert_close(few.weight, every.weight[few.some])
    assert torch.equal(few.groups[0].normal_pairs, every.groups[0].normal_pairs)
    P, Q = every.gramians()
    sigma = hankel_singular_values(*(X[few.some] if len(X) == layer.channels else X for X in (P, Q)))
    weight = every.weight[few.some]
    torch.testing.assert_close(hankel_spectra([few])[0], (weight / weight.sum() @ sigma)[None], rtol=1e-4, atol=1e-6)
