"""The report, and the card, of a run with several cuts."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from tests.conftest import tiny_mamba
from tests.training.conftest import make_trainer, sizes

CUTS = CompreSSMConfig(state_size={0: 4, 1: 6}, start=0, end=4, num_reductions=2)


def test_it_spans_all_cuts(tmp_path):
    model = tiny_mamba()
    before = sum(parameter.numel() for parameter in model.parameters())
    callback = CompreSSMCallback(CUTS)
    make_trainer(tmp_path, model, callbacks=[callback]).train()
    report = model.compression_report
    assert [(row.old_size, row.new_size) for row in report.layers] == [(8, 4), (8, 6)]
    assert report.parameters_before == before
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert [len(row.hankel_singular_values[0]) for row in report.layers] == [8, 8]
    first = callback.history[0].hankel_singular_values[0][0]
    second = callback.history[1].hankel_singular_values[0][0]
    kept = sum(first[:6]) / sum(first) * sum(second[:4]) / sum(second)
    assert report.layers[0].energy_kept == pytest.approx(kept)
    figure = callback.plot()
    assert len(figure.axes) == 3  # two panels and a colour bar


def test_a_layer_that_was_cut_names_how(tmp_path):
    model = tiny_mamba()
    config = CompreSSMConfig(state_size={1: 6}, start=0, end=2, num_reductions=1)
    make_trainer(tmp_path, model, config, max_steps=3).train()
    assert [row.realization for row in model.compression_report.layers] == ["", "select"]


def test_a_resumed_run_has_it_too(tmp_path):
    make_trainer(tmp_path, tiny_mamba(), CUTS, save_strategy="steps", save_steps=5).train()
    model = tiny_mamba()
    make_trainer(tmp_path, model, CUTS, save_strategy="no").train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-5")
    )
    assert sizes(model) == [4, 6]
    assert [row.old_size for row in model.compression_report.layers] == [8, 8]
    model.save_pretrained(tmp_path / "slim")
    assert "10 of 16 SSM states" in (tmp_path / "slim" / "README.md").read_text()


def test_an_undone_cut_leaves_none(tmp_path):
    model = tiny_mamba()
    config = CompreSSMConfig(state_size=1, start=0, end=2, num_reductions=1, rollback=0.0)
    trainer = make_trainer(tmp_path, model, config, eval_dataset=[{"input_ids": row, "labels": row} for row in _ids()])
    trainer.train()
    if sizes(model) == [8, 8]:  # else the cut made the model better
        assert model.compression_report is None
    else:
        pytest.fail("the cut was not undone: make the test's cut a worse one")


def _ids():
    from tests.training.conftest import dataset

    return [entry["input_ids"] for entry in dataset(size=8, seed=4)]


def test_no_attempt_no_figure():
    with pytest.raises(ValueError, match="no attempt"):
        CompreSSMCallback().plot()


def test_an_uncut_model_has_no_card(tmp_path):
    tiny_mamba().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
