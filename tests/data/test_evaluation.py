"""Perplexity and recall against a loop, and windows that represent a text."""

from __future__ import annotations

import math

import pytest
import torch

from hf_compressm.data.calibration import hold_out
from hf_compressm.data.evaluation import evaluate, repeated_bigrams
from hf_compressm.data.texts import windows
from tests.conftest import tiny_mamba


def test_recall_is_of_the_tokens_whose_bigram_occurred_before():
    ids = torch.tensor([[1, 2, 3, 1, 2, 2, 2, 2, 1], [5, 5, 5, 6, 5, 6, 7, 5, 5]])
    found = repeated_bigrams(ids)
    for row, marks in zip(ids.tolist(), found.tolist(), strict=True):
        seen: set = set()
        for position, mark in enumerate(marks):
            pair = (row[position], row[position + 1])
            assert mark == (pair in seen)
            seen.add(pair)


@torch.no_grad()
def test_evaluate_is_the_mean_over_tokens(token_ids):
    model, ids = tiny_mamba(), torch.randint(0, 6, (3, 40), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    loss = -logits.gather(-1, ids[:, 1:, None])[..., 0]
    found = evaluate(model, ids)
    assert abs(found.perplexity / math.exp(loss.mean()) - 1) < 1e-5
    assert abs(found.recall / math.exp(loss[repeated_bigrams(ids)].mean()) - 1) < 1e-5
    assert evaluate(model, torch.arange(12)[None]).recall is None


class Letters:
    def __call__(self, text: str, **kwargs) -> dict:
        return {"input_ids": [ord(letter) for letter in text]}


def test_windows_are_spread_over_the_whole_text():
    text = "".join(letter * 10 for letter in "abcdefgh")
    assert windows(text, Letters(), 3, 10).tolist() == [[ord(letter)] * 10 for letter in "aeh"]
    assert len(windows(text, Letters(), 100, 10)) == 8
    assert windows("abc", Letters(), 3, 10).tolist() == [[97, 98, 99]]


def test_a_quarter_is_held_out_and_nothing_lost():
    model = tiny_mamba()
    ids = torch.arange(10)[:, None].expand(-1, 9) + 0
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]
    kept, apart = hold_out(batches, model)
    firsts = [sorted(int(row[0]) for batch in part for row in batch["input_ids"]) for part in (kept, apart)]
    assert firsts == [[0, 2, 3, 4, 6, 7, 8], [1, 5, 9]]


def test_a_few_tokens_are_too_few_to_hold_out():
    mask = torch.ones(8, 9, dtype=torch.long)
    mask[3::4, :6] = 0
    batches = [{"input_ids": torch.zeros_like(mask), "attention_mask": mask}]
    with pytest.raises(
        ValueError, match="the 2 of 8 sequences that are held back for them have 6 together, less than 8"
    ):
        hold_out(batches, tiny_mamba())
    mask[3::4, :5] = 1
    hold_out(batches, tiny_mamba())
