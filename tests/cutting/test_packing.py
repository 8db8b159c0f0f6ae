"""Packed rows are measured as the batch that they were packed from."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from hf_compressm import CompreSSMConfig
from hf_compressm.cutting.inputs import Inputs
from hf_compressm.cutting.measuring import empty_statistics
from hf_compressm.cutting.observing import observing
from hf_compressm.hankel.spectra import hankel_spectra
from hf_compressm.layers import find_layers
from tests.layers.models import build

LENGTHS = [[5, 12, 7], [10, 14]]
APART = ["bamba", "granitemoehybrid", "falcon_h1", "zamba2", "nemotron_h"]


def measured(layer, hidden_states, inputs=None, **kwargs):
    statistics = empty_statistics([layer], CompreSSMConfig())
    # Without its kernels transformers refuses to run the mixer, once it was read.
    with observing([layer], statistics, inputs), torch.no_grad(), suppress(ValueError):
        layer.mixer(hidden_states, **kwargs)
    return statistics


@pytest.mark.parametrize("model_type", [*APART, "jamba"])
def test_statistics_of_packed_rows(model_type):
    layer = find_layers(build(model_type))[0]
    rows = torch.randn(2, 24, layer.mixer.in_proj.in_features, generator=torch.Generator().manual_seed(0))
    seq_idx = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in LENGTHS]).int()
    samples = [sample for row, lengths in zip(rows, LENGTHS, strict=True) for sample in row.split(lengths)]
    batch, mask = torch.zeros(5, 14, rows.shape[-1]), torch.zeros(5, 14)
    for number, sample in enumerate(samples):
        batch[number, -len(sample) :], mask[number, -len(sample) :] = sample, 1
    inputs = Inputs()
    packed = measured(layer, rows, inputs, seq_idx=seq_idx)
    if model_type not in APART:  # transformers lets the state run on
        assert torch.equal(hankel_spectra(packed)[0], hankel_spectra(measured(layer, rows))[0])
        return
    apart, across = measured(layer, batch, attention_mask=mask), measured(layer, rows)
    torch.testing.assert_close(hankel_spectra(packed)[0], hankel_spectra(apart)[0], rtol=1e-5, atol=1e-7)
    assert (hankel_spectra(across)[0] / hankel_spectra(apart)[0] - 1).abs().max() > 0.01
    assert packed[0].tokens == apart[0].tokens == 48
    assert torch.equal(inputs[layer.index][0][0], batch)
