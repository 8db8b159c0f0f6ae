"""Mamba-2 mixers whose kept rows of B and C are fitted: what is read is what they compute, what is fitted is what they get."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.hankel.realization import Selection
from hf_compressm.hankel.refit_mamba2 import OwnLoss, RowsRefit
from hf_compressm.layers import find_layers, new_data
from hf_compressm.layers import rows as module
from hf_compressm.layers.rows import fit_rows, parted, reading, rows_of
from hf_compressm.layers.selection import Refit, Select
from tests.layers.models import MAMBA_1, TYPES, N, build, tokens

MAMBA_2 = [name for name in TYPES if name not in MAMBA_1]
CPU = torch.device("cpu")
KEPT = torch.tensor([1, 3, 4, 7, 8, 12, 13, 15])


def first_layer(model, length: int = 24):
    """With what its mixer reads, the second sequence padded."""
    layer, read = find_layers(model)[0], []
    hook = layer.mixer.register_forward_pre_hook(
        lambda mixer, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        model(tokens(2, length), attention_mask=mask, use_cache=False)
    hook.remove()
    return layer, read[0], mask


@pytest.mark.parametrize("model_type", MAMBA_2)
@torch.no_grad()
def test_all_rows_give_the_full_layer_and_unfitted_ones_are_the_selection(model_type):
    layer, hidden_states, mask = first_layer(build(model_type))
    batch = reading(layer, hidden_states, mask, None)
    every = torch.arange(N).expand(layer.groups, -1)
    loss = OwnLoss([batch])
    assert (loss(rows_of(layer, every)) < 1e-10 * loss.energy).all()
    kept = KEPT.expand(layer.groups, -1)
    rows = rows_of(layer, kept)
    fits = tuple(RowsRefit(states, rows.of_group(group), 0.0) for group, states in enumerate(kept))
    selected, refitted = (new_data(layer, cuts) for cuts in (layer.select(kept), layer.refitted(fits)))
    assert selected.keys() == refitted.keys()
    for name, data in selected.items():
        torch.testing.assert_close(refitted[name], data)


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_h1"])
def test_the_cut_layer_computes_what_was_fitted(model_type):
    """With factors between the projection and the convolution, and several groups."""
    layer, hidden_states, mask = first_layer(build(model_type))
    generator = torch.Generator().manual_seed(3)
    rows = rows_of(layer, KEPT.expand(layer.groups, -1))
    rows = rows.map(lambda tensor: tensor + 0.1 * torch.randn(tensor.shape, generator=generator))
    B, C = reading(layer, hidden_states, mask, None).maps(rows)
    x = layer.read(hidden_states, mask).x
    fit = Refit(tuple(RowsRefit(KEPT, rows.of_group(group), 0.1) for group in range(layer.groups)))
    fit.apply_(layer, new_data(layer, fit.parameter_cuts(layer)))
    system = layer.read(hidden_states, mask)
    torch.testing.assert_close(system.B, B)
    torch.testing.assert_close(system.C, C)
    assert torch.equal(system.x, x)


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_h1", "nemotron_h"])
def test_a_selection_is_refitted_by_default_and_is_never_worse_for_it(model_type):
    model, ids = build(model_type), tokens(24, 48)
    measurement = measure(model, ids, CompreSSMConfig(state_size=8, realization="select"))
    selected, fitted = (
        measurement.plan(CompreSSMConfig(state_size=8, realization="select", refit=rounds)).realizations
        for rounds in (0, 1)
    )
    assert {one.kind for one in selected.values()} == {"select"}
    assert "refit" in {one.kind for one in fitted.values()}
    for index, one in fitted.items():
        assert one.kept == selected[index].kept
        for new, old in zip(one.groups, selected[index].groups, strict=True):
            assert new.error < old.error if one.kind == "refit" and len(one.groups) == 1 else new.error <= old.error


def test_bf16_weights_are_fitted_in_float32_and_rounded_once():
    model, ids = build("mamba2"), tokens(24, 48)
    model = model.to(torch.bfloat16)
    full = copy.deepcopy(model)
    config = CompreSSMConfig(state_size=8, realization="select", refit=1)
    plan = measure(model, ids, config).plan(config)
    plan.apply_(model)
    for layer, old in zip(find_layers(model), find_layers(full), strict=True):
        rows = torch.cat([group.rows.weight for group in plan.realizations[layer.index].groups], dim=1).flatten(0, 1)
        assert rows.dtype == torch.float32
        start = 2 * layer.mixer.intermediate_size
        new = layer.mixer.in_proj.weight
        assert new.dtype == torch.bfloat16
        assert torch.equal(new[start : start + len(rows)], rows.to(torch.bfloat16))
        assert torch.equal(new[:start], old.mixer.in_proj.weight[:start])


def test_a_plan_with_fits_can_be_sent_to_another_process():
    model, ids = build("mamba2"), tokens(24, 48)
    other = copy.deepcopy(model)
    config = CompreSSMConfig(state_size=8, realization="select", refit=1)
    plan = measure(model, ids, config).plan(config)
    assert "refit" in {one.kind for one in plan.realizations.values()}
    pickle.loads(pickle.dumps(plan.cpu())).apply_(other)
    plan.apply_(model)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_a_projected_layer_is_cut_further_without_a_fit():
    model, ids = build("mamba2"), tokens(24, 48)
    compress_(model, CompreSSMConfig(state_size=12), ids)
    report = compress_(model, CompreSSMConfig(state_size=8, realization="select"), ids)
    assert {row.realization for row in report.layers} == {"select"}


def test_on_a_cpu_a_fit_takes_no_more_work_than_it_may(monkeypatch):
    layer, hidden_states, mask = first_layer(build("mamba2"))
    counts = []

    def refit_rows(train, held, start, evaluations):
        counts.append(evaluations)
        return start, [1.0] * layer.groups

    monkeypatch.setattr(module, "refit_rows", refit_rows)
    selections = (Selection(KEPT, None, 0.5),) * layer.groups
    assert fit_rows(layer, [(hidden_states, mask, None)], selections, 3) is None
    work = 24 * 2 * layer.groups * len(KEPT) * hidden_states.shape[2]  # the first of two sequences is fitted to
    monkeypatch.setattr(module, "CPU_WORK", 150 * work)
    fit_rows(layer, [(hidden_states, mask, None)], selections, 3)
    assert counts == [[300, 30], [150, 15]]


def test_sizes_are_chosen_by_cuts_that_are_fitted_in_one_round(monkeypatch):
    """And each of those that are chosen is fitted once, in all rounds."""
    model, fitted = build("mamba2"), []

    def refit(self, layer, inputs, rounds):
        fitted.append((layer.index, self.size, rounds))
        return self

    monkeypatch.setattr(Select, "refit", refit)
    config = CompreSSMConfig(max_divergence=0.05, realization="select", multiple_of=4, refit=2)
    report = measure(model, tokens(8, 24), config).plan(config).report
    tried = [(layer.index, size, 1) for layer in find_layers(model) for size in (4, 12)]
    assert fitted[:4] == tried
    chosen = {(index, size, 2) for index, size in report.sizes.items() if size < N}
    assert chosen <= set(fitted[4:])
    assert len(set(fitted)) == len(fitted)
    assert {rounds for *_, rounds in fitted[4:]} == {2}


def test_one_of_eight_sequences_is_not_fitted_to():
    reads = [(torch.randn(4, 6, 3), None, torch.randn(4, 6, 5)) for _ in range(4)] + [
        (torch.randn(2, 9, 3), None, None)
    ]
    fit, judge = parted(reads, 1000, CPU)
    assert [tuple(read[0].shape) for read in fit] == [(14, 6, 3), (2, 9, 3)]
    assert [tuple(read[0].shape) for read in judge] == [(2, 6, 3)]
    assert torch.equal(judge[0][0], torch.stack([reads[1][0][3], reads[3][0][3]]))
    assert torch.equal(judge[0][2], torch.stack([reads[1][2][3], reads[3][2][3]]))
    assert fit[1][2] is None
    few, last = parted(reads[:1], 1000, CPU)
    assert [len(read[0]) for read in (*few, *last)] == [3, 1]
    assert parted([(torch.randn(1, 6, 3), None, None)], 1000, CPU)[1] == []
    few, last = parted(reads, 20, CPU)  # three sequences
    assert [len(read[0]) for read in (*few, *last)] == [2, 1]


def test_what_was_kept_elsewhere_comes_to_the_layer():
    """Of many inputs the later ones are kept on the CPU."""
    there = torch.device("meta")
    reads = [
        (torch.randn(2, 6, 3, device=device), torch.ones(2, 6), torch.randn(2, 6, 5))
        for device in ("meta", "cpu", "cpu")
    ]
    for part in parted(reads, 1000, there):
        assert all(tensor.device == there for read in part for tensor in read)
