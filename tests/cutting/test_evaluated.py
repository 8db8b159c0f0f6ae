"""A cut with the perplexity before and after: where it is taken, and what is looked at before that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MambaModel

import hf_compressm
from hf_compressm import CompreSSMConfig, compress_, compress_pretrained
from hf_compressm.compress import compress_and_evaluate_
from hf_compressm.data.evaluation import Evaluation
from tests.conftest import tiny_mamba

CONFIG = CompreSSMConfig(state_size=4, refit=0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(hf_compressm.__file__).parent / "reference" / "mamba-small")


def cut(model, ids, tokenizer, config=CONFIG, evaluate=None, by_default=True):
    """The report, and the models' sizes as they were evaluated."""
    seen: list[int] = []

    def evaluation(model, ids) -> Evaluation:
        assert ids.dim() == 2
        seen.append(model.config.state_size)
        return Evaluation(float(len(seen)), None)

    options = {"evaluate": evaluate, "by_default": by_default, "evaluation": evaluation}
    return compress_and_evaluate_(model, config, ids, tokenizer=tokenizer, **options), seen


@pytest.mark.parametrize(
    ("evaluate", "by_default", "taken"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_before_and_after(mamba, token_ids, tokenizer, evaluate, by_default, taken):
    report, seen = cut(mamba, token_ids, tokenizer, evaluate=evaluate, by_default=by_default)
    assert seen == ([8, 4] if taken else [])
    assert (report.perplexity is not None) == taken
    if taken:
        assert (report.perplexity.before, report.perplexity.after) == (1.0, 2.0)
    assert mamba.compression_report is report


def test_once_where_nothing_is_cut(mamba, token_ids, tokenizer):
    report, seen = cut(mamba, token_ids, tokenizer, CompreSSMConfig(tolerance=0))
    assert seen == [8]
    assert report.perplexity.before == report.perplexity.after == 1.0


def test_a_target_that_is_out_of_reach_is_refused_before(mamba, token_ids, tokenizer):
    seen: list[object] = []
    with pytest.raises(ValueError, match="can't be cut to 99"):
        compress_and_evaluate_(
            mamba,
            {"state_size": 99},
            token_ids,
            tokenizer=tokenizer,
            evaluate=True,
            by_default=False,
            evaluation=lambda *given: seen.append(given),
        )
    assert not seen


def test_a_model_without_a_head(token_ids, tokenizer):
    """It has no perplexity, and what its predictions move by is no number of nats."""
    model = MambaModel(tiny_mamba().config)
    with pytest.raises(ValueError, match="the model has no head"):
        compress_pretrained(model, CONFIG, calibration_data=token_ids, tokenizer=tokenizer, evaluate=True)
    report, seen = cut(model, token_ids, tokenizer)
    assert report.states_after == 8
    assert not seen
    of_budget = compress_(MambaModel(tiny_mamba().config), {"max_divergence": 0.5, "refit": 0}, token_ids)
    assert "of the last hidden states' energy on held-out" in " ".join(str(of_budget).split())
    assert "nats" not in str(of_budget)
    labels = [axes.get_ylabel() for axes in of_budget.plot().axes]
    assert "divergence of the predictions (of the last hidden states' energy)" in labels
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        compress_pretrained(tiny_mamba(), CONFIG, calibration_data=token_ids, evaluate=True)


def test_measuring_what_the_package_has_is_bounded_where_a_model_is_healed(monkeypatch, mamba2):
    """As it is where it is not, though `measure` is given the text then."""
    seconds = []

    def measured(model, data, config):
        seconds.append(config.calibration_seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_compressm.compress.measure", measured)
    monkeypatch.setattr("hf_compressm.data.healing.LENGTH", 16)
    ids = torch.zeros(4, 16, dtype=torch.long)
    for data, given in ((None, None), (None, 7), (ids + torch.arange(4)[:, None], None)):
        with pytest.raises(KeyboardInterrupt):
            compress_(mamba2, CompreSSMConfig(state_size=4, heal=300, calibration_seconds=given), data)
    assert seconds == [60.0, 7, None]
