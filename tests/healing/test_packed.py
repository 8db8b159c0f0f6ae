"""Packed rows are learnt from as they are measured: attention keeps their samples apart, by their positions."""

from __future__ import annotations

import gc

import torch
from transformers import DataCollatorWithFlattening

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.cutting.passes import called_with
from hf_compressm.data.healing import HealingText, collate
from hf_compressm.healing import heal
from tests.layers.models import VOCABULARY, build


def packed(rows: int = 8) -> list[dict]:
    """Of several lengths, two samples in each."""
    generator = torch.Generator().manual_seed(2)
    samples = [torch.randint(2, VOCABULARY, (9 + number % 4,), generator=generator) for number in range(2 * rows)]
    join = DataCollatorWithFlattening(return_tensors="pt")
    return [join([{"input_ids": ids.tolist()} for ids in samples[2 * i : 2 * i + 2]]) for i in range(rows)]


@torch.no_grad()
def test_rows_are_read_together_as_each_alone():
    """Also beside one that is not packed."""
    model = build("jamba")
    text = HealingText([*packed(3), torch.randint(2, VOCABULARY, (1, 11))], model, None, 1)
    rows = text._rows
    assert ["position_ids" in row for row in rows] == [True, True, True, False]
    batch = collate(rows)
    together = model(**called_with(batch), use_cache=False).logits
    for row, logits, mask in zip(rows, together, batch["attention_mask"], strict=True):
        alone = model(**called_with(row), use_cache=False).logits[0]
        torch.testing.assert_close(logits[mask.bool()], alone, rtol=1e-4, atol=1e-5)
    across = model(rows[0]["input_ids"], use_cache=False).logits[0]
    assert (across - together[0, : len(across)]).abs().max() > 1e-3
    assert [batch["attention_mask"].sum() for batch in text.measured] == [
        11,
        *(len(row["input_ids"][0]) for row in rows[:3]),
    ]


def test_every_pass_of_a_healing_has_the_positions(monkeypatch):
    monkeypatch.setattr(heal, "STEP_TOKENS", 60)
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)
    model, calls = build("jamba"), []

    def look(base, args, kwargs):
        calls.append((kwargs.get("position_ids") is not None, kwargs.get("attention_mask") is None))

    handle = model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    config = CompreSSMConfig(state_size=4, refit=0, heal=300)
    report = compress_(model, config, packed())
    handle.remove()
    assert report.healing.tokens >= 200
    assert len(calls) > 20
    assert set(calls) == {(True, True)}
