"""Packed rows are measured as the batch that they were packed from."""

from __future__ import annotations

import sys
from contextlib import suppress

import pytest
import torch
from transformers import DataCollatorWithFlattening
from transformers.utils import logging

from hf_compressm import CompreSSMConfig, measure
from hf_compressm.backends import OneProcess
from hf_compressm.cutting.inputs import Inputs
from hf_compressm.cutting.measuring import empty_statistics
from hf_compressm.cutting.observing import observing
from hf_compressm.data.batches import batches_of
from hf_compressm.data.packing import samples_in
from hf_compressm.hankel.spectra import hankel_spectra
from hf_compressm.layers import find_layers
from hf_compressm.training.measuring import measure_batches
from tests.layers.models import VOCABULARY, build

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


SAMPLES = [
    torch.randint(2, VOCABULARY, (length,), generator=torch.Generator().manual_seed(number)).tolist()
    for number, length in enumerate([12, 9, 14, 10, 13, 8, 11, 12])
]


def flattened(**kwargs) -> list[dict]:
    """What a DataLoader gives that packs four samples in each row."""
    collate = DataCollatorWithFlattening(return_tensors="pt", **kwargs)
    return [collate([{"input_ids": ids} for ids in SAMPLES[at : at + 4]]) for at in (0, 4)]


def padded() -> list[dict]:
    return [batch for at in (0, 4) for batch in batches_of({"input_ids": SAMPLES[at : at + 4]})]


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "nemotron_h"])
def test_packed_data_is_its_samples_where_the_model_keeps_them_apart(model_type):
    """Statistics, fits, budget: it is the unpacked batch from the beginning on."""
    model = build(model_type)
    config = CompreSSMConfig(max_divergence=0.05, refit=1)
    packed, apart = (
        measure(model, data, config)
        for data in (flattened(return_seq_idx=True, return_flash_attn_kwargs=True), padded())
    )
    for one, other in zip(hankel_spectra(packed.statistics), hankel_spectra(apart.statistics), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    one, other = packed.plan(config), apart.plan(config)
    assert one.report == other.report
    assert one.report.states_after < one.report.states_before


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "jamba", "granitemoehybrid"])
def test_packed_data_runs_on_where_the_model_does(model_type, caplog):
    """And its attention still keeps samples apart by their positions."""
    model, config = build(model_type), CompreSSMConfig(tolerance=0)
    logging.get_logger("hf_compressm.data.packing").warning_once.__func__.cache_clear()
    data = flattened(return_seq_idx=model_type != "granitemoehybrid")
    found = measure(model, data, config).statistics
    layers = find_layers(model)
    as_run = empty_statistics(layers, config)
    with observing(layers, as_run), torch.no_grad():
        for batch in data:
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    for one, other in zip(hankel_spectra(found), hankel_spectra(as_run), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    (warning,) = [record for record in caplog.records if "packed samples" in record.message]
    assert ("return_seq_idx=True" in warning.message) == (model_type == "granitemoehybrid")
    without = measure(model, [{"input_ids": batch["input_ids"]} for batch in data], config).statistics
    moved = max(
        (one / other - 1).abs().max() for one, other in zip(*map(hankel_spectra, (found, without)), strict=True)
    )
    assert (moved > 1e-6) == (model_type == "jamba")


@pytest.mark.parametrize("weights", ["gate", "fisher"])
def test_packed_batches_of_a_training_run(weights, monkeypatch):
    """With kernels that heed `seq_idx`, which only GPUs have: here each is the stock function, sample by sample."""
    model = build("bamba")
    home = sys.modules[type(model).__module__]

    def by_sample(function, dim):
        def run(x, *args, seq_idx=None, **kwargs):
            if seq_idx is None:
                return function(x, *args, **kwargs)
            counts = torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist()
            alike = [
                arg.split(counts, dim) if isinstance(arg, torch.Tensor) and arg.dim() > 2 else None for arg in args
            ]
            parts = []
            for number, part in enumerate(x.split(counts, dim)):
                own = [arg if split is None else split[number] for arg, split in zip(args, alike, strict=True)]
                parts.append(function(part, *own, **kwargs))
            return torch.cat(parts, dim)

        return run

    conv, scan = home.causal_conv1d_fn, home.mamba2_chunk_scan
    monkeypatch.setattr(home, "causal_conv1d_fn", by_sample(conv, 2))
    monkeypatch.setattr(home, "mamba2_chunk_scan", by_sample(scan, 1))
    config = CompreSSMConfig(weights=weights, ratio=0.5)
    (row, _), (batch, _) = flattened(return_seq_idx=True), padded()
    row["use_cache"] = batch["use_cache"] = False
    counted = batch["attention_mask"].cumsum(1)  # the first token of a sample is predicted by none
    batch["labels"] = batch["input_ids"].masked_fill(counted < 2, -100)
    with torch.no_grad():
        packed, apart = model(**row).logits, model(**batch).logits
    torch.testing.assert_close(packed[0, -10:], apart[3, -10:], rtol=1e-4, atol=1e-5)  # the model itself does
    packed, apart = (
        measure_batches(model, [((), kwargs)], config, OneProcess()).statistics for kwargs in (row, batch)
    )
    for one, other in zip(hankel_spectra(packed), hankel_spectra(apart), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=float(1e-5 * other.max()))


def test_what_tells_samples():
    ids = torch.ones(1, 6, dtype=torch.long)
    starts = torch.tensor([[0, 1, 2, 0, 1, 2]])
    expected = [[0, 0, 0, 1, 1, 1]]
    assert samples_in({"input_ids": ids, "position_ids": starts}).tolist() == expected
    assert samples_in({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 3, 6])}).tolist() == expected
    assert samples_in({"input_ids": ids, "seq_idx": torch.tensor(expected), "position_ids": ids}).tolist() == expected
    assert samples_in({"input_ids": ids, "position_ids": torch.arange(6)[None]}) is None
    padded_left = {
        "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
    }
    assert samples_in({"input_ids": ids} | padded_left) is None
    assert samples_in({"input_ids": ids}) is None
    (batch,) = batches_of([{"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 3, 6])}])
    assert batch["position_ids"].tolist() == starts.tolist()
    with pytest.raises(ValueError, match=r"position_ids of the calibration data.*\[1, 6\]"):
        batches_of([{"input_ids": ids, "position_ids": torch.arange(3)[None]}])
