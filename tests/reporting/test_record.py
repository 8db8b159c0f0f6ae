"""What was done to a model is known in any process that has it, or its folder."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_, get_report, hankel_singular_values
from hf_compressm.reporting.record import RECORD, history_of, read_record
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.training.conftest import dataset, make_trainer

UNIFORM, MIXED = {"state_size": 3}, {"state_size": {0: 3, 1: 5}}


@pytest.mark.parametrize("options", [UNIFORM, MIXED], ids=["uniform", "mixed"])
def test_a_saved_model_tells(tmp_path, mamba, token_ids, options):
    report = compress_(mamba, CompreSSMConfig(**options), token_ids)
    mamba.save_pretrained(tmp_path / "one")
    record = json.loads((tmp_path / "one" / RECORD).read_text())
    assert record["schema_version"] == 1
    (cut,) = record["cuts"]
    assert CompreSSMConfig(**cut["config"]) == CompreSSMConfig(**options)
    assert cut["versions"]["torch"] == torch.__version__
    assert get_report(mamba) is report
    assert get_report(tmp_path / "one") == get_report(str(tmp_path / "one")) == report
    # It goes along with what is loaded, and with the card.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert get_report(again) == report
    again.save_pretrained(tmp_path / "two")
    for name in (RECORD, "README.md", "spectra.png"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    copied = copy.deepcopy(again)
    assert get_report(copied) == report


def test_a_second_cut_appends(tmp_path, token_ids):
    model = tiny_mamba2()
    first = compress_(model, CompreSSMConfig(state_size=8), token_ids)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    second = compress_(model, CompreSSMConfig(state_size=4, realization="select"), token_ids)
    model.save_pretrained(tmp_path)
    assert [cut.report for cut in read_record(tmp_path)] == [first, second]
    assert get_report(tmp_path) == second
    assert "It was cut 2 times, with 32 -> 16 -> 8 SSM states" in (tmp_path / "README.md").read_text()
    assert "8 of 32 SSM states" in (tmp_path / "README.md").read_text()


def test_measuring_and_cutting_nothing_leave_no_record(tmp_path, mamba, token_ids):
    hankel_singular_values(mamba, token_ids)
    compress_(mamba, CompreSSMConfig(tolerance=0), token_ids)
    mamba.save_pretrained(tmp_path)
    assert not {RECORD, "README.md"} & {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="was not cut"):
        get_report(mamba)
    with pytest.raises(OSError, match=f"no {RECORD}"):
        get_report(tmp_path)


def test_a_second_call_that_cuts_nothing_leaves_the_record_of_the_first(tmp_path, mamba, token_ids):
    first = compress_(mamba, CompreSSMConfig(state_size=4), token_ids)
    mamba.save_pretrained(tmp_path / "one")
    compress_(mamba, CompreSSMConfig(tolerance=0), token_ids)
    mamba.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    compress_(again, CompreSSMConfig(tolerance=0), token_ids)
    again.save_pretrained(tmp_path / "three")
    for source in (mamba, again, tmp_path / "two", tmp_path / "three"):
        assert get_report(source) == first
    assert "8 of 16 SSM states" in (tmp_path / "three" / "README.md").read_text()


def test_a_training_run_is_one_cut(tmp_path, token_ids):
    model = tiny_mamba()
    compress_(model, CompreSSMConfig(state_size=6), token_ids)
    config = CompreSSMConfig(state_size=2, start=0, end=4, num_reductions=2)
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    make_trainer(tmp_path, model, callbacks=[CompreSSMCallback(config)], **saved).train()
    shrunk = [[row.new_size for row in cut.report.layers] for cut in history_of(model)]
    assert shrunk == [[6, 6], [2, 2]]
    for step, sizes in ((1, [6, 6]), (2, [4, 4]), (4, [2, 2]), (5, [2, 2])):
        cuts = read_record(tmp_path / f"checkpoint-{step}")
        assert [row.new_size for row in cuts[-1].report.layers] == sizes
        assert len(cuts) == (1 if step == 1 else 2)
    assert [row.old_size for row in cuts[-1].report.layers] == [6, 6]


def test_a_cut_that_was_undone_is_not_on_record(tmp_path):
    calls = iter(range(100))
    config = CompreSSMConfig(state_size=1, start=0, end=2, num_reductions=1, rollback=0.0)
    metric = {"compute_metrics": lambda _: {"badness": next(calls)}, "metric_for_best_model": "badness"}
    model = tiny_mamba()
    trainer = make_trainer(tmp_path, model, config, eval_dataset=dataset(4), greater_is_better=False, **metric)
    trainer.train()
    assert history_of(model) == ()


def test_a_record_of_other_sizes_is_not_the_models(tmp_path, mamba, token_ids):
    compress_(mamba, CompreSSMConfig(**UNIFORM), token_ids)
    mamba.save_pretrained(tmp_path)
    other = tiny_mamba()
    other.config.name_or_path = str(tmp_path)
    assert history_of(other) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"schema_version": 1}', "damaged"),
        ('{"schema_version": 1, "cuts": [{}]}', "damaged"),
        ('{"schema_version": 1, "cuts": [{"report": []}]}', "damaged"),
        ('{"schema_version": 1, "cuts": []}', "damaged .*no cut"),
        ('{"schema_version": 2, "cuts": []}', "newer hf_compressm"),
    ],
)
def test_records_that_can_not_be_read(tmp_path, mamba, token_ids, content, message):
    compress_(mamba, CompreSSMConfig(**UNIFORM), token_ids)
    mamba.save_pretrained(tmp_path)
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(OSError, match=message):
        get_report(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # which goes on working
    assert history_of(again) == ()


def test_a_record_of_a_model_that_another_was_saved_over(tmp_path, mamba, token_ids):
    compress_(mamba, CompreSSMConfig(**UNIFORM), token_ids)
    mamba.save_pretrained(tmp_path)
    record, card = (tmp_path / RECORD).read_text(), (tmp_path / "README.md").read_text()
    assert "SSM states" in card
    tiny_mamba().save_pretrained(tmp_path)
    assert not {RECORD, "spectra.png", "README.md"} & {path.name for path in tmp_path.iterdir()}
    (tmp_path / RECORD).write_text(record)  # as where it was saved by other means
    with pytest.raises(OSError, match=r"of other sizes than the config.json beside it"):
        get_report(tmp_path)
    assert history_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == ()


def test_a_model_without_a_state_size_that_a_slim_one_was_replaced_by(tmp_path, mamba, token_ids):
    compress_(mamba, CompreSSMConfig(**UNIFORM), token_ids)
    mamba.save_pretrained(tmp_path / "slim")
    record = (tmp_path / "slim" / RECORD).read_text()
    other = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    other.save_pretrained(tmp_path / "slim")
    assert not {RECORD, "spectra.png", "README.md"} & {path.name for path in (tmp_path / "slim").iterdir()}
    (tmp_path / "slim" / RECORD).write_text(record)  # as where it was saved by other means
    AutoModelForCausalLM.from_pretrained(tmp_path / "slim").save_pretrained(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()
    assert not (tmp_path / "elsewhere" / RECORD).exists()


def test_a_wrapped_model_tells(mamba, token_ids, monkeypatch):
    report = compress_(mamba, CompreSSMConfig(**UNIFORM), token_ids)
    assert get_report(torch.compile(mamba, backend="eager")) is report

    class Wrapper(torch.nn.Module):
        """Without processes."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    monkeypatch.setattr("hf_compressm.reporting.record.DistributedDataParallel", Wrapper)
    assert get_report(Wrapper(mamba)) is report


def test_what_is_no_model_at_all(tmp_path):
    for name in ("no such/folder at all", "./nosuchfolder"):
        with pytest.raises(OSError, match="neither a folder"):
            get_report(name)
    for source in (None, 3):
        with pytest.raises(TypeError, match=f"got {source}"):
            get_report(source)


def test_where_the_hub_is_out_of_reach(mamba, monkeypatch, caplog):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("hf_compressm.reporting.record.hf_hub_download", offline)
    with pytest.raises(OSError, match="no folder me/slim, and the Hub is out of reach"):
        get_report("me/slim")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    mamba.config.name_or_path = "me/slim"
    assert history_of(mamba) == history_of(mamba) == ()
    assert sum("not known whether me/slim was cut before" in record.message for record in caplog.records) == 1
